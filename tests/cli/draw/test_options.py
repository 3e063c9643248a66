"""What the words of sample's and complete's options mean."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast.cli.checks import UsageError
from igpt_fast.cli.draw import options
from igpt_fast.config import ImageGPTConfig
from igpt_fast.image import center_crop, open_image, resize


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A configuration of eight classes, of which config.json has the names."""
    names = dict(enumerate(["tea", "coffee", "milk", "5", "a b", "x", "y", "Tea"]))
    ImageGPTConfig(vocab_size=40, n_positions=16, n_classes=8, id2label=names).save_pretrained(tmp_path)
    return str(tmp_path)


def test_labels(model: str) -> None:
    assert options.labels(None, 3, model) is None
    assert options.labels("7", 3, model) == [7, 7, 7]
    assert options.labels("0,2,5", 7, model) == [0, 2, 5, 0, 2, 5, 0]
    assert options.labels("coffee, 3,a b,5", 4, model) == [1, 3, 4, 5]  # a number is a number, whatever is called so
    for wrong in ("", "a", "1,", "-1", "1.5", "1,2,3,4", "1 2", "٣", "9" * 12, "8"):
        with pytest.raises(UsageError, match="--label"):
            options.labels(wrong, 3, model)
    with pytest.raises(UsageError, match=r"'cofee'; want 0\.\.7, or a name: .*coffee.*; did you mean coffee\?"):
        options.labels("cofee", 1, model)
    with pytest.raises(UsageError, match=r"--label 8 is not in 0\.\.7$"):
        options.labels("8", 1, model)


def test_labels_of_models_without_names_or_classes(tmp_path: Path) -> None:
    ImageGPTConfig(vocab_size=40, n_positions=16).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="the model has no classes"):
        options.labels("0", 1, str(tmp_path))
    ImageGPTConfig(vocab_size=40, n_positions=16, n_classes=2).save_pretrained(tmp_path)  # LABEL_0, LABEL_1 by default
    assert options.labels("1", 1, str(tmp_path)) == [1]
    ImageGPTConfig(vocab_size=40, n_positions=16, n_classes=3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"--label is 'LABEL_0'; want 0\.\.2$"):
        options.labels("LABEL_0", 1, str(tmp_path))


def test_kept() -> None:
    for text, expected in {"0.5": 0.5, "0": 0.0, ".25": 0.25, "12rows": 12, "1row": 1, "3 rows": 3, "0rows": 0}.items():
        keep = options.kept(text, None, 16, 16)
        assert (keep, type(keep)) == (expected, type(expected))
    assert options.kept(None, None, 16, 16) == 0.5
    for wrong in ("1", "12", "-0.5", "nan", "inf", "16rows", "-1rows", "1.5rows", "rows", "", "half", "0.99"):
        with pytest.raises(UsageError, match="--keep"):
            options.kept(wrong, None, 16, 16)
    with pytest.raises(UsageError, match="not both"):
        options.kept("0.5", Path("mask.png"), 16, 16)


def test_masks(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((6, 4)) < 0.5
    path = tmp_path / "mask.png"
    for mode in ("L", "RGB", "1", "P"):
        Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(path)
        assert np.array_equal(options.kept(None, path, 6, 4), mask)
    Image.fromarray(mask.astype(np.uint8) * 255).resize((40, 60), Image.Resampling.NEAREST).save(path)
    assert np.array_equal(options.kept(None, path, 6, 4), mask)
    grey = np.where(mask, 128, 127).astype(np.uint8)
    Image.fromarray(grey).save(path)
    assert np.array_equal(options.kept(None, path, 6, 4), mask)
    Image.new("L", (4, 6), 255).save(path)
    with pytest.raises(ValueError, match=r"mask\.png: is white"):
        options.kept(None, path, 6, 4)
    picture = np.full((30, 90, 3), 255, dtype=np.uint8)  # the outer parts are cut off, of image and mask alike
    picture[12:18, 48:57] = 0
    Image.fromarray(picture).save(path)
    seen = resize(center_crop(open_image(path)), 10, 10, resample=Image.Resampling.NEAREST)
    assert np.array_equal(options.kept(None, path, 10, 10), np.asarray(seen)[..., 0] == 255)
    assert not options.kept(None, path, 10, 10).all()
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"mask\.png"):
        options.kept(None, path, 6, 4)
    with pytest.raises(FileNotFoundError):
        options.kept(None, tmp_path / "none.png", 6, 4)
