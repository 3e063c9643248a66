"""Tokens back to pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt_fast.cli import main as cli
from igpt_fast.files import BUNDLED
from igpt_fast.image import dequantize, load_clusters

PALETTE = np.array([[-1, -1, -1], [1, 1, 1], [1, -1, -1]], np.float32)
TOKENS = np.arange(2 * 3 * 4).reshape(2, 3, 4) % 3


def run(*words: object) -> int:
    return cli.main(["decode", *map(str, words)])


def test_what_sample_writes(tmp_path: Path) -> None:
    words = ["-n", "3", "--seed", "1", "--out", str(tmp_path / "a.png"), "--tokens", str(tmp_path / "t.npz")]
    assert cli.main(["sample", *words]) == 0
    assert run(tmp_path / "t.npz", "--out", tmp_path / "b.png", "--singles", tmp_path / "s") == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [f"{i:05}.png" for i in range(3)]


@pytest.mark.parametrize("flat", [False, True])
def test_files_of_other_shapes(tmp_path: Path, flat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.arange(9).reshape(1, 9) % 3 if flat else TOKENS
    np.savez(tmp_path / "t.npz", tokens=tokens.astype(np.uint16), clusters=PALETTE)
    assert run(tmp_path / "t.npz", "--no-grid", "--singles", tmp_path / "s", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["size"]) == (len(tokens), [3, 3] if flat else [3, 4])
    with Image.open(tmp_path / "s" / "00000.png") as picture:
        assert np.array_equal(np.asarray(picture), dequantize(tokens[0], PALETTE).reshape(np.asarray(picture).shape))


def test_what_quantize_writes_has_the_colours_of_a_model(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", TOKENS.astype(np.uint16))
    assert run(tmp_path / "t.npy", "--out", tmp_path / "a.png", "--upscale", 1, "--columns", 1) == 0
    colours = dequantize(TOKENS, load_clusters(BUNDLED / "preprocessor_config.json"))
    with Image.open(tmp_path / "a.png") as grid:
        pixels = np.asarray(grid)
    assert np.array_equal(pixels[:3], colours[0])
    assert np.array_equal(pixels[4:], colours[1])
    np.save(tmp_path / "clusters.npy", PALETTE)
    assert run(tmp_path / "t.npy", "--out", tmp_path / "a.png", "--clusters", tmp_path / "clusters.npy", "--force") == 0
    with Image.open(tmp_path / "a.png") as grid:
        assert np.asarray(grid)[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": TOKENS + 1}, r"token 3 is not in 0\.\.2, its colours"),
        ({"tokens": TOKENS - 1}, r"token -1 is not in 0\.\.2"),
        ({"tokens": TOKENS / 2}, "want (N, H, W) integers"),
        ({"tokens": TOKENS[0, 0]}, "want (N, H, W) integers"),
        ({"tokens": TOKENS[:0]}, "want (N, H, W) integers"),
        ({"tokens": TOKENS.reshape(2, 12)}, "want (N, H, W) integers"),
        ({"clusters": PALETTE * 9}, "clusters"),
        ({"clusters": PALETTE[0, 0]}, "clusters"),
        ({"clusters": np.array("red")}, "clusters"),
        ({"tokens": None}, "has no array 'tokens'"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"tokens": TOKENS, "clusters": PALETTE} | change
    np.savez(tmp_path / "t.npz", **{name: value for name, value in arrays.items() if value is not None})
    assert run(tmp_path / "t.npz", "--out", tmp_path / "a.png") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/t.npz" in said
    assert reason.replace("\\", "") in said
    assert not (tmp_path / "a.png").exists()


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.npz").write_text("no zip")
    assert run(tmp_path / "t.npz") == 1
    assert "t.npz: not a usable file of tokens" in capsys.readouterr().err
    assert run(tmp_path / "none.npz") == 1
    assert "none.npz: no such file" in capsys.readouterr().err
    assert run(tmp_path / "t.npz", "--clusters", "a", "--model", "b") == 2
