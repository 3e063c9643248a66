"""The emoji data set's script, on a package made up here: four emoji, two sheets that are read and one that is not."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast.image.clusters import dequantize
from igpt_fast.learning.data import load_tokens
from igpt_fast.recipes import emoji

RECORDS = [
    {"unified": "1F600", "category": "Smileys & Emotion", "sheet_x": 0, "sheet_y": 0},
    {"unified": "1F408", "category": "Animals & Nature", "sheet_x": 1, "sheet_y": 0},
    {"unified": "1F3FB", "category": "Component", "sheet_x": 0, "sheet_y": 1},
    {"unified": "1F697", "category": "Travel & Places", "sheet_x": 1, "sheet_y": 1},
]
COLOURS = {"google": ["red", "lime", "black", "blue"], "twitter": ["yellow", "cyan", "black", "magenta"]}


def sheet(colours: list[str]) -> bytes:
    """2x2 cells of a flat colour, transparent outside and in the upper half."""
    image = Image.new("RGBA", (68, 68), (0, 0, 0, 0))
    for record, colour in zip(RECORDS, colours, strict=True):
        x, y = record["sheet_x"] * 34 + 1, record["sheet_y"] * 34 + 1  # type: ignore[operator]
        image.paste(Image.new("RGBA", (32, 16), colour), (x, y + 16))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "package.tgz"
    content = {
        "package/emoji.json": json.dumps(RECORDS).encode(),
        "package/img/google/sheets/32.png": sheet(COLOURS["google"]),
        "package/img/twitter/sheets/32.png": sheet(COLOURS["twitter"]),
        "package/img/apple/sheets/32.png": b"must never be opened",
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(emoji, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_build(package: Path) -> None:
    data, names = emoji.build(package, side=4, n_clusters=5)
    assert names == [f"{name}/{code}" for name in ("noto", "twemoji") for code in ("1F600", "1F408", "1F697")]
    assert not data.heldout.any()  # a tenth of three is none
    assert data.tokens.shape == (6, 16)
    assert data.class_names == ["smileys", "animals", "travel"]
    assert data.labels.tolist() == [0, 1, 2] * 2
    assert data.clusters[0].tolist() == [1.0, 1.0, 1.0]
    assert bool((data.tokens[:, :4] == 0).all())  # transparent is white
    exact, _ = emoji.build(package, side=4, n_clusters=12)
    bottom = dequantize(exact.tokens[:, 12:], exact.clusters).float().mean(dim=1)
    wanted = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]]
    # The blended edges of two emoji may share a cluster with a pure colour.
    assert torch.allclose(bottom, torch.tensor(wanted, dtype=torch.float32), atol=40.0)


def test_only_the_two_free_sheets_are_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    extract = tarfile.TarFile.extractfile

    def watched(self: tarfile.TarFile, member: str) -> object:
        read.append(member)
        return extract(self, member)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpacked to the disk")

    monkeypatch.setattr(tarfile.TarFile, "extractfile", watched)
    monkeypatch.setattr(tarfile.TarFile, "extract", never)
    monkeypatch.setattr(tarfile.TarFile, "extractall", never)
    emoji.unpack(package)
    assert sorted(read) == [
        "package/emoji.json",
        "package/img/google/sheets/32.png",
        "package/img/twitter/sheets/32.png",
    ]


def test_another_file_is_refused(package: Path) -> None:
    package.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"package\.tgz: SHA-256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        emoji.unpack(package)


def test_command(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    real = emoji.build
    monkeypatch.setattr(emoji, "build", lambda path: real(path, side=4, n_clusters=5))
    emoji.main([str(package), "--out", str(tmp_path / "out.npz")])
    assert "6 images, 0 held out" in capsys.readouterr().err
    assert load_tokens(tmp_path / "out.npz").n_clusters == 5
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["names"].tolist()[0] == "noto/1F600"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1F468-200D-1F52C", "1F469-200D-1F52C", True),  # man and woman scientist
        ("1F9D1-200D-1F52C", "1F52C", True),  # and the microscope
        ("1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F", True),
        ("0031-FE0F-20E3", "002A-FE0F-20E3", True),  # keycaps
        ("1F1E9-1F1EA", "1F1E9-1F1F0", True),  # flags DE and DK
        ("1F1E9-1F1EA", "1F1EB-1F1F7", False),
        ("1F550", "1F557", True),  # clock faces
        ("1F600", "1F607", True),
        ("1F600", "1F608", False),
        ("1F468-200D-2764-FE0F-200D-1F468", "1F469-200D-1F469-200D-1F467", True),  # couples, families
        ("2764-FE0F", "1F468-200D-2764-FE0F-200D-1F468", False),
    ],
)
def test_family(one: str, other: str, same: bool) -> None:
    assert (emoji.family(one) == emoji.family(other)) is same


def test_hold_out() -> None:
    families = ["a"] * 50 + ["b"] * 7 + ["c"] * 3 + ["d"] * 40
    chosen = emoji.hold_out(families, 0.10)
    assert chosen == {"b", "c"}
    assert emoji.hold_out(families[::-1], 0.10) == chosen
    assert emoji.hold_out(families, 0.0) == set()
    many = [f"f{i}" for i in range(1000)]
    assert len(emoji.hold_out(many, 0.10)) == 100
    assert len(emoji.hold_out(many, 0.10) & emoji.hold_out(many[:500], 0.10)) >= 30


def test_families_stay_together_in_the_bundled_data() -> None:
    path = Path(emoji.__file__).parents[1] / "assets" / "emoji16.npz"
    heldout = load_tokens(path).heldout.tolist()
    with np.load(path) as arrays:
        names = arrays["names"].tolist()
    families = [emoji.family(name.split("/")[1]) for name in names]
    held = {name for name, out in zip(families, heldout, strict=True) if out}
    trained = {name for name, out in zip(families, heldout, strict=True) if not out}
    assert held
    assert not held & trained
    data = load_tokens(path, classes=True)
    assert data.class_names == list(emoji.CLASSES.values())
    grinning, flag = (names.index(f"twemoji/{code}") for code in ("1F600", "1F1E9-1F1F0"))
    assert (int(data.labels[grinning]), int(data.labels[flag])) == (0, 8)
    assert 0.09 < np.mean(heldout) <= 0.10
