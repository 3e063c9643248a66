"""Features in a file: equal to those in memory, gone on with after an interruption, never of a mixture."""

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTImageProcessor
from igpt_fast.learning import feature_files
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.extraction import extract
from igpt_fast.learning.feature_files import FeatureRun, begin, finish, make, parts_folder
from igpt_fast.learning.feature_sources import Pictures, TokenImages, check_palette
from igpt_fast.learning.tokenizers import CodeTokenizer

COLOURS = 8
CLUSTERS = np.random.default_rng(1).uniform(-1, 1, (COLOURS, 3)).astype(np.float32)
PROCESSOR = ImageGPTImageProcessor(CLUSTERS, size={"height": 4, "width": 4})
MODEL = small(vocab_size=COLOURS + 1, n_positions=16, n_embd=16, n_layer=3)


def data(n: int = 10, seed: int = 0) -> TokenData:
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, COLOURS, (n, 16)).astype(np.uint8))
    return TokenData(tokens, CLUSTERS, torch.arange(n) % 5 == 0, labels=torch.arange(n) % 2, class_names=["a", "b"])


def run(**changed: Any) -> FeatureRun:
    given = {"model": MODEL, "model_hash": "m", "source": TokenImages(data()), "layers": [1, 3], "batch_size": 2}
    return FeatureRun(**{**given, **changed})


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "_PART_ROWS", 4)


def whole(job: FeatureRun, out: Path) -> int:
    begin(job, out)
    make(job, out, range(len(job.parts)), lambda done: None)
    return finish(job, out)


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_file_has_what_is_in_memory(tmp_path: Path, pool: str | None) -> None:
    assert whole(run(pool=pool), tmp_path / "a.npz") == 10
    wanted = extract(MODEL, data().tokens, [1, 3], pool=pool, batch_size=2).reshape(10, 2, -1)
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found.files) == ["about", "class_names", "heldout", "labels", "layer_1", "layer_3"]
        for i, layer in enumerate((1, 3)):
            assert found[f"layer_{layer}"].dtype == np.float32
            np.testing.assert_array_equal(found[f"layer_{layer}"], wanted[:, i])
        np.testing.assert_array_equal(found["labels"], np.arange(10) % 2)
        np.testing.assert_array_equal(found["heldout"], np.arange(10) % 5 == 0)
        assert found["class_names"].tolist() == ["a", "b"]
        about = json.loads(str(found["about"]))
        assert (about["model"], about["settings"]["layers"]) == ("m", [1, 3])
    whole(run(pool=pool), tmp_path / "a.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["label", "heldout", "layer_1", "layer_3"]
    assert table["label"].to_pylist() == ["a", "b"] * 5
    np.testing.assert_array_equal(np.array(table["layer_3"].to_pylist(), np.float32), wanted[:, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.parquet"]


def test_the_start_token_of_a_bidirectional_model() -> None:
    """It is fed none, whatever was asked for."""
    network = small(vocab_size=COLOURS + 1, n_positions=16, n_embd=16, bidirectional=True)
    assert run(model=network, layers=[1]).manifest()["settings"]["sos"] is False
    assert run().manifest()["settings"]["sos"] is True


def test_pictures_that_are_read_otherwise_are_other_data(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    out = tmp_path / "a.npz"
    begin(run(source=Pictures(tmp_path, PROCESSOR)), out)
    make(run(source=Pictures(tmp_path, PROCESSOR)), out, [0], lambda done: None)
    assert begin(run(source=Pictures(tmp_path, PROCESSOR)), out) == 4
    turned = {"height": 2, "width": 8}
    for processor in (ImageGPTImageProcessor(CLUSTERS[::-1].copy()), ImageGPTImageProcessor(CLUSTERS, size=turned)):
        with pytest.raises(ValueError, match="it holds parts of other data"):
            begin(run(source=Pictures(tmp_path, processor)), out)
    with pytest.raises(ValueError, match="it holds parts of other data"):
        begin(run(source=Pictures(tmp_path, PROCESSOR, skip_unreadable=True)), out)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in (b"\xff.png", "ä.png".encode()):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path / "p") + b"/" + name)
    source = Pictures(tmp_path / "p", PROCESSOR)
    assert whole(run(source=source), tmp_path / "a.parquet") == 2
    names = pyarrow.parquet.read_table(tmp_path / "a.parquet")["name"].to_pylist()
    assert sorted(names) == ["\\xff.png", "ä.png"]
    assert whole(run(source=source), tmp_path / "a.npz") == 2
    with np.load(tmp_path / "a.npz") as found:
        assert found["names"].tolist() == list(source.names)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, straight = tmp_path / "a.npz", tmp_path / "b.npz"
    whole(run(), straight)
    assert begin(run(), out) == 0
    make(run(), out, [1], lambda done: None)

    class Interrupted(TokenImages):
        def tokens(self, part: range) -> Any:
            if part.start == 8:
                raise KeyboardInterrupt
            return super().tokens(part)

    with pytest.raises(KeyboardInterrupt):
        make(run(source=Interrupted(data())), out, range(3), lambda done: None)
    assert begin(run(), out) == 8
    seen = []

    class Seen(TokenImages):
        def tokens(self, part: range) -> Any:
            seen.append(part.start)
            return super().tokens(part)

    told: list[int] = []
    make(run(source=Seen(data())), out, range(3), told.append)
    assert seen == [8]
    assert told == [4, 8, 10, 10]
    finish(run(), out)
    assert out.read_bytes() == straight.read_bytes()
    # A part that is damaged is made again, and leftovers of a kill go with the rest.
    begin(run(), out)
    make(run(), out, range(3), lambda done: None)
    folder = parts_folder(out)
    (folder / "part-00001.npy").write_bytes((folder / "part-00001.npy").read_bytes()[:-9])
    (folder / ".part-00000.npy.0123.partial.npy").write_bytes(b"half")
    assert begin(run(), out) == 6
    with pytest.raises(ValueError, match=r"part-00001\.npy: is missing"):
        finish(run(), out, overwrite=True)
    make(run(), out, range(3), lambda done: None)
    finish(run(), out, overwrite=True)
    assert out.read_bytes() == straight.read_bytes()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_hash": "n"}, "another model;"),
        ({"source": TokenImages(data(seed=1))}, "other data;"),
        ({"layers": [2]}, r"other settings: layers was \[1, 3\];"),
        ({"sos": False}, "other settings: sos was True"),
        ({"bands": 2}, "other settings: bands was 1"),
        ({"pool": None}, "other settings: pool was 'mean'"),
        (
            {"model_hash": "n", "source": TokenImages(data(11))},
            "another model; other data; other settings: images was 10",
        ),
    ],
)
def test_parts_of_something_else_are_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    out = tmp_path / "a.npz"
    begin(run(), out)
    make(run(), out, [0], lambda done: None)
    with pytest.raises(ValueError, match=rf"a\.npz\.parts: it holds parts of {reason}"):
        begin(run(**changed), out)
    assert (parts_folder(out) / "part-00000.npy").exists()
    assert begin(run(**changed), out, overwrite=True) == 0
    assert not (parts_folder(out) / "part-00000.npy").exists()
    assert begin(run(), out) == 0  # where nothing is done, there is nothing to lose


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    parts_folder(out).mkdir()
    (parts_folder(out) / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is there, and holds no parts of features; move it away"):
            begin(run(), out, overwrite)
    (parts_folder(out) / "mine.txt").unlink()
    parts_folder(out).rmdir()
    begin(run(), out)
    (parts_folder(out) / "mine.txt").write_text("mine")
    make(run(), out, range(3), lambda done: None)
    finish(run(), out)
    assert os.listdir(parts_folder(out)) == ["mine.txt"]


def test_a_manifest_that_is_no_manifest(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    for text, reason in (("[1]", "not usable JSON"), ("{", "not usable JSON"), ('{"settings": 3}', "another model")):
        parts_folder(out).mkdir(exist_ok=True)
        (parts_folder(out) / "manifest.json").write_text(text)
        (parts_folder(out) / "part-00000.npy").touch()
        with pytest.raises(ValueError, match=reason):
            begin(run(), out)


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.npz"
    begin(run(), out)
    make(run(), out, [0], lambda done: None)

    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files.np, "save", full)
    with pytest.raises(OSError, match=r"part-00001\.npy"):
        make(run(), out, range(3), lambda done: None)
    assert sorted(os.listdir(parts_folder(out))) == ["manifest.json", "part-00000.npy"]


def pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 9, 3), np.uint8)).save(folder / name)


def test_folders_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "d", "b/0.png", "a/0.png", "a/1.png")
    source = Pictures(tmp_path / "d", PROCESSOR, classes=True)
    assert (source.names, source.labels.tolist(), source.class_names) == (  # type: ignore[union-attr]
        ["a/0.png", "a/1.png", "b/0.png"], [0, 0, 1], ["a", "b"])  # fmt: skip
    job = run(source=source)
    whole(job, tmp_path / "a.npz")
    with Image.open(tmp_path / "d/a/1.png") as picture:
        square = picture.crop((1, 0, 7, 6)).resize((4, 4), Image.Resampling.BILINEAR)
        wanted = extract(MODEL, PROCESSOR(square, return_tensors="pt")["input_ids"], [1, 3])
    with np.load(tmp_path / "a.npz") as found:
        assert found["names"].tolist() == ["a/0.png", "a/1.png", "b/0.png"]
        np.testing.assert_allclose(found["layer_3"][1], wanted[0, 1], rtol=1e-5, atol=1e-6)
    before = source.fingerprint()
    assert Pictures(tmp_path / "d", PROCESSOR, classes=True).fingerprint() == before
    assert Pictures(tmp_path / "d", PROCESSOR).fingerprint() != before
    os.utime(tmp_path / "d/a/1.png", (1, 1))
    assert source.fingerprint() != before


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    pictures(tmp_path / "d", "0.png", "1.png", "2.png", "3.png", "4.png")
    for name in ("1.png", "4.png"):
        (tmp_path / "d" / name).write_bytes(b"no picture")
    out = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        whole(run(source=Pictures(tmp_path / "d", PROCESSOR)), out)
    with pytest.warns(UserWarning, match=r"skipped .*\.png: not a readable image"):
        assert whole(run(source=Pictures(tmp_path / "d", PROCESSOR, skip_unreadable=True)), out) == 3
    with np.load(out) as found:
        assert found["names"].tolist() == ["0.png", "2.png", "3.png"]
        assert np.isfinite(found["layer_1"]).all()
        assert found["layer_1"].shape == (3, 16)
    for path in (tmp_path / "d").iterdir():
        path.write_bytes(b"no picture")
    other = run(source=Pictures(tmp_path / "d", PROCESSOR, skip_unreadable=True))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 5 images"):
        whole(other, tmp_path / "b.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images in it"):
        Pictures(tmp_path / "empty", PROCESSOR)


def test_a_file_of_another_palette() -> None:
    check_palette("a.npz", data(), PROCESSOR, MODEL)
    moved = ImageGPTImageProcessor(CLUSTERS[::-1].copy(), size={"height": 4, "width": 4})
    with pytest.raises(ValueError, match=r"a\.npz: its palette has other colours than the model's"):
        check_palette("a.npz", data(), moved, MODEL)
    with pytest.raises(ValueError, match=r"a\.npz: has a palette of 8 colours, the model 5"):
        check_palette("a.npz", data(), ImageGPTImageProcessor(CLUSTERS[:5]), MODEL)
    small_ = TokenData(data().tokens[:, :9], CLUSTERS, data().heldout)
    with pytest.raises(ValueError, match=r"a\.npz: has 9 tokens an image, the model 16"):
        check_palette("a.npz", small_, PROCESSOR, MODEL)


def test_tokens_that_are_no_colours(tmp_path: Path) -> None:
    codes = TokenData(data().tokens, None, data().heldout, tokenizer=CodeTokenizer(COLOURS, 4, 4))
    check_palette("a.npz", codes, None, MODEL)
    assert whole(run(source=TokenImages(codes)), tmp_path / "a.npz") == 10
    more = TokenData(data().tokens, None, data().heldout, tokenizer=CodeTokenizer(COLOURS + 1, 4, 4))
    with pytest.raises(ValueError, match=r"a\.npz: has 9 codes, the model 8"):
        check_palette("a.npz", more, None, MODEL)


def test_large_files_are_written_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is in memory as a whole, and the archive's member may pass 4 GiB."""
    seen: list[int] = []
    real = zipfile.ZipFile.open

    def opened(self: Any, name: Any, mode: str = "r", *rest: Any, force_zip64: bool = False) -> Any:
        assert mode == "r" or force_zip64
        member = real(self, name, mode, *rest, force_zip64=force_zip64)
        if mode == "w" and "layer" in name:
            write = member.write
            member.write = lambda content: seen.append(len(content)) or write(content)
        return member

    monkeypatch.setattr(zipfile.ZipFile, "open", opened)
    whole(run(), tmp_path / "a.npz")
    assert max(seen) <= 4 * 16 * 4


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install .*igpt_fast\[train\]"):
        whole(run(), tmp_path / "a.parquet")
