"""The scripts of CIFAR-10 and ImageNet, on pictures made up here in the shapes of theirs, a network of two layers."""

import functools
import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessor
from igpt_fast.image import quantize
from igpt_fast.learning import classifiers
from igpt_fast.learning.watch import DivergedError
from igpt_fast.recipes import cifar10, imagenet, protocol

CLUSTERS = np.array([(r, g, b) for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)], np.float32)
RED, GREEN = (250, 3, 5), (4, 251, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ImageGPTConfig(vocab_size=9, n_positions=1024, n_embd=8, n_layer=2, n_head=1)
    ImageGPTForCausalImageModeling(config).save_pretrained(folder)
    ImageGPTImageProcessor(clusters=CLUSTERS, size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "GRID", (0.1,))


def records(labels: list[int]) -> bytes:
    """CIFAR-10's: a label, then the planes of red, green and blue, row by row."""
    parts = []
    for label in labels:
        planes = np.zeros((3, 32, 32), np.uint8)
        planes[label % 3] = 200
        planes[:, 0, 1] = (1, 2, 3)
        parts.append(bytes([label]) + planes.tobytes())
    return b"".join(parts)


def archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def whole(labels: list[int]) -> dict[str, bytes]:
    return {name: records(labels) for name in (*cifar10.TRAIN, *cifar10.TEST)} | {"readme.html": b"<html>"}


def test_cifar10_archive(tmp_path: Path) -> None:
    train, test = cifar10.read_archive(archive(tmp_path / "cifar.tar.gz", whole([3, 1])))
    assert train.labels.tolist() == [3, 1] * 5
    assert test.labels.tolist() == [3, 1]
    assert train.pixels.shape == (10, 32, 32, 3)
    assert train.pixels[0, 0, 1].tolist() == [1, 2, 3]
    assert train.pixels[0, 1, 0].tolist() == [200, 0, 0]
    assert train.pixels[1, 1, 0].tolist() == [0, 200, 0]


def test_cifar10(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = archive(tmp_path / "cifar.tar.gz", whole([0, 1, 2]))
    out = tmp_path / "out"
    cifar10.main([str(source), "--model", str(checkpoint), "--concat", "2", "--device", "cpu", "--out", str(out)])
    found = json.loads((out / "results.json").read_text())
    assert {row["kind"] for row in found["rows"]} == {"raw", "model", "random"}
    best = [row for row in found["rows"] if row["kind"] == "model"]
    assert [row["layer"] for row in best] == [1, 2, [1, 2]]
    assert {(row["n_train"], row["n_test"], row["accuracy"]) for row in best} == {(15, 3, 1.0)}
    assert "96.3" in capsys.readouterr().out
    assert (out / "layers.png").exists()


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({**whole([0, 1]), "data_batch_3.bin": records([0])[:-1]}, r"data_batch_3\.bin has 3072 bytes; want records"),
        ({**whole([0, 1]), "test_batch.bin": b""}, r"test_batch\.bin has 0 bytes"),
        ({**whole([0, 1]), "data_batch_1.bin": b"\x0a" + bytes(3072)}, "label 10 is not in 0..9"),
        ({"test_batch.bin": records([0])}, r"has no data_batch_1\.bin"),
    ],
)
def test_cifar10_damaged(tmp_path: Path, contents: dict[str, bytes], reason: str) -> None:
    path = archive(tmp_path / "cifar.tar.gz", contents)
    with pytest.raises(ValueError, match=f"{path}: not CIFAR-10's binary version: {reason}"):
        cifar10.read_archive(path)


def test_cifar10_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "cifar.tar.gz", whole([0]))
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.tar\.gz: not CIFAR-10's binary version: .*end-of-stream"):
        cifar10.read_archive(cut)
    monkeypatch.setattr(cifar10, "MAX_CONTENT", 1 << 20)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(ValueError, match="unpacks to more than 1048576 bytes"):
        cifar10.read_archive(bomb)


def test_cifar10_takes_no_holes_for_content(tmp_path: Path) -> None:
    """Of a few bytes, a sparse member claims to be as large as it likes."""
    path = tmp_path / "sparse.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        for name, content in whole([0]).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == "data_batch_2.bin":
                info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1000 * cifar10.RECORD)}
            file.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"sparse\.tar\.gz: not CIFAR-10's .*: data_batch_2\.bin is no plain file"):
        cifar10.read_archive(path)


def folders(root: Path, parts: tuple[str, str], size: tuple[int, int], count: int = 6) -> Path:
    """One picture of the second part has a corner of its own: the parts are not the same."""
    for part in parts:
        for name, colour in (("a", RED), ("b", GREEN)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", size, colour)
                if part == parts[1] and i == 0:
                    picture.paste(GREEN if name == "a" else RED, (0, 0, size[0] // 2, size[1] // 2))
                picture.save(root / part / name / f"{i}.png")
    return root


def test_cifar10_of_a_directory(checkpoint: Path, tmp_path: Path) -> None:
    source = folders(tmp_path / "pictures", ("train", "test"), (32, 32))
    found = cifar10.main([str(source), "--model", str(checkpoint), "--layers", "2", "--out", str(tmp_path / "out")])
    assert [(row["kind"], row["layer"], row["n_train"]) for row in found["rows"]] == [
        ("raw", None, 12),
        ("model", 2, 12),
        ("random", 2, 12),
    ]
    (source / "test" / "b").rename(source / "test" / "c")
    with pytest.raises(ValueError, match="train and test do not share the classes b, c"):
        cifar10.main([str(source), "--model", str(checkpoint), "--out", str(tmp_path / "out")])


def test_imagenet(checkpoint: Path, tmp_path: Path) -> None:
    source = folders(tmp_path / "ILSVRC", ("train", "val"), (300, 260))
    arguments = [str(source), "--model", str(checkpoint), "--layers", "2", "--per-class", "5"]
    found = imagenet.main([*arguments, "--out", str(tmp_path / "out")])
    assert [(row["n_train"], row["n_test"]) for row in found["rows"]] == [(10, 12)] * 3
    assert found["expected"] == list(imagenet.EXPECTED[32])


def test_imagenet_wants_a_model_of_its_size(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1024 positions; images of 48x48 have 2304"):
        imagenet.main([str(tmp_path), "--model", str(checkpoint), "--side", "48", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--layers", "3"], "layers is 3"),
        (["--concat", "1"], "--concat is 1; want 2 layers or more"),
        (["--layers", "1", "--concat", "2"], "--concat is 2"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_wrong_numbers_are_found_before_pictures_are_read(
    checkpoint: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        cifar10.main([str(tmp_path / "none"), "--model", str(checkpoint), *options, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_what_the_report_needs_is_asked_for_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"igpt_fast\[train\]"):
        cifar10.main([str(tmp_path / "none"), "--model", str(checkpoint), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("error", [FloatingPointError("a"), DivergedError("a"), MemoryError("a"), OSError("a")])
def test_a_failure_is_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        protocol.command(main)
    assert (stop.value.code, capsys.readouterr().err) == (1, "error: a\n")


def test_imagenet_crops(tmp_path: Path) -> None:
    """A picture of its own coordinates tells what has been cut out of it: 224 of a short side of 256 to 384, anywhere;
    for evaluation the whole short side, in the middle."""
    height, width = 480, 640
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    val = imagenet.read_val(tmp_path / "ramp.png", 0, 32).astype(float)
    assert val.shape == (32, 32, 3)
    assert abs(val[0, :, 0].mean() - 255 / 64) < 3
    assert abs(val[-1, :, 0].mean() - (255 - 255 / 64)) < 3
    assert abs(val[..., 1].mean() - 127.5) < 1
    assert abs((val[:, -1, 1].mean() - val[:, 0, 1].mean()) - 255 * 0.75 * 31 / 32) < 3
    extents, tops = [], []
    for number in range(60):
        train = imagenet.read_train(tmp_path / "ramp.png", number, 32, seed=0).astype(float)
        extents.append((train[-1, :, 0].mean() - train[0, :, 0].mean()) / 255 * 32 / 31)
        tops.append(train[0, :, 0].mean() / 255)
    assert 224 / 384 - 0.02 <= min(extents) < 0.65
    assert 0.8 < max(extents) <= 224 / 256 + 0.02
    assert min(tops) < 0.06
    assert max(tops) > 0.25
    again = imagenet.read_train(tmp_path / "ramp.png", 59, 32, seed=0)
    assert np.array_equal(again, train)
    assert not np.array_equal(again, imagenet.read_train(tmp_path / "ramp.png", 59, 32, seed=1))


def test_tokens_of_the_palette() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    tokens = protocol.tokens_of(pixels, CLUSTERS)
    assert tokens.shape == (5, 16)
    assert torch.equal(tokens.long(), torch.from_numpy(quantize(pixels, CLUSTERS)).view(5, -1))


def test_a_picture_that_is_damaged_or_in_no_class(tmp_path: Path) -> None:
    root = folders(tmp_path / "pictures", ("train", "test"), (32, 32), 1)
    read = functools.partial(imagenet.read_val, side=8)
    (root / "train/a/1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"train/a/1\.png"):
        protocol.read_classes(root / "train", 8, read)
    (root / "test/loose.png").write_bytes((root / "test/a/0.png").read_bytes())
    with pytest.raises(ValueError, match=r"loose\.png: lies in no class"):
        protocol.read_classes(root / "test", 8, read)
    (root / "none").mkdir()
    with pytest.raises(ValueError, match="none: no images in it"):
        protocol.read_classes(root / "none", 8, read)
