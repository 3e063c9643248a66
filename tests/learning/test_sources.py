"""Sources that are hostile, damaged, or do not say one thing: each is refused by name, or read as it says."""

import io
import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from igpt_fast.learning.sources import archives, arrays
from igpt_fast.learning.sources.opening import open_source


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, labels: list[int] | list[str], names: list[str] | None, column: str = "label") -> None:
    kind = {column: {"names": names, "_type": "ClassLabel"}} if names is not None else {}
    text = json.dumps({"info": {"features": kind}})
    rows = pa.table({"image": [png(i) for i in range(len(labels))], column: labels})
    pa.parquet.write_table(rows.replace_schema_metadata({"huggingface": text}), path)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def classes_of(path: Path) -> list[str]:
    """The name of each picture's class."""
    found = open_source(path).classes()
    return [found.names[label] for label in found.labels]


# ---- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "column"), [(["dog", "cat"], "label"), (None, "label"), (["cat", "dog"], "cls")])
def test_tables_that_mean_other_classes(tmp_path: Path, names: list[str] | None, column: str) -> None:
    write_table(tmp_path / "p0.parquet", [0, 1], ["cat", "dog"])
    write_table(tmp_path / "p1.parquet", [0, 1], names, column)
    with pytest.raises(ValueError, match=r"p1\.parquet: has other classes than p0\.parquet"):
        open_source(tmp_path).classes()


def test_strings_are_their_own_names(tmp_path: Path) -> None:
    write_table(tmp_path / "p0.parquet", ["zebra", "ant"], ["zebra", "ant"])
    write_table(tmp_path / "p1.parquet", ["ant", "bee"], None)
    assert classes_of(tmp_path) == ["zebra", "ant", "ant", "bee"]
    (tmp_path / "p1.parquet").unlink()
    assert classes_of(tmp_path) == ["zebra", "ant"]


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [0, 1], None)
    with pa.ipc.new_stream(
        str(tmp_path / "A.ARROW"), (rows := pa.parquet.read_table(tmp_path / "a.parquet")).schema
    ) as w:
        w.write_table(rows)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=[1, 0])
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    for name, wanted in (("A.ARROW", ["0", "1"]), ("A.NPZ", ["1", "0"])):
        assert len(open_source(tmp_path / name)) == 2
        assert classes_of(tmp_path / name) == wanted


# ---- arrays -------------------------------------------------------------------------------------------------


def test_a_npz_with_the_name_of_a_npy(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b\.npy: not a usable \.npy file"):
        open_source(tmp_path / "b.npy")


def test_a_part_of_a_npz_goes_to_a_process_as_its_rows(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=array)
    part = pickle.dumps(open_source(tmp_path / "a.npz").part(np.array([3, 7])))
    arrays._array.cache_clear()
    (tmp_path / "a.npz").unlink()  # the other process does not read it again
    names, found = zip(*pickle.loads(part).pictures(), strict=True)
    assert names == ("3", "7")
    assert np.array_equal(np.stack(found), array[[3, 7]])
    assert len(part) < 1000


# ---- archives -----------------------------------------------------------------------------------------------


def test_a_tar_whose_member_leads_back(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(0)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[124:136] = b"\xff" * 10 + (-512).to_bytes(2, "big", signed=True)  # base-256
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    (tmp_path / "a.tar").write_bytes(content)
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(ValueError, match="its headers lead back"):
        list(itertools.islice(archives._scan_tar(file), 9))
    with pytest.raises(ValueError, match=r"a\.tar: not a usable zip or tar file: its headers lead back"):
        open_source(tmp_path / "a.tar")


@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
def test_a_cls_counts_more_than_a_json(tmp_path: Path, order: tuple[str, str]) -> None:
    notes = {"cls": b"cat", "json": b'{"url": "x"}'}
    write_tar(tmp_path / "a.tar", {"0.png": png(0)} | {f"0.{kind}": notes[kind] for kind in order})
    assert classes_of(tmp_path / "a.tar") == ["cat"]


def test_a_json_of_no_picture_is_no_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"all/about.json": b"{}", "all/a/0.png": png(0), "all/b/1.png": png(1)})
    assert classes_of(tmp_path / "a.tar") == ["a", "b"]


# ---- folders ------------------------------------------------------------------------------------------------


def test_a_picture_replaced_by_one_of_the_same_size(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    before = open_source(tmp_path).fingerprint()
    content = bytearray(png(0))
    content[50] ^= 1
    (tmp_path / "b.png").write_bytes(content)
    changed = open_source(tmp_path).fingerprint()
    (tmp_path / "b.png").write_bytes(png(0))
    os.utime(tmp_path / "b.png", (0, 0))  # a copy is the same
    assert changed != before == open_source(tmp_path).fingerprint()


def test_a_picture_that_cannot_be_opened_has_a_fingerprint(tmp_path: Path) -> None:
    """It is left out later, and listed."""
    (tmp_path / "a.png").write_bytes(png(0))
    source = open_source(tmp_path)
    before = source.fingerprint()
    (tmp_path / "a.png").unlink()
    assert source.fingerprint() != before
