"""``igpt convert``: a folder that the other commands and transformers take, exit codes, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
import transformers

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTImageProcessor, Pipeline, backend
from igpt_fast.cli import main as cli


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of ``igpt convert``."""
    code = cli.main(["convert", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], code: int, *args: object) -> str:
    got, out, err = run(capsys, *args)
    assert (got, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith("igpt convert: ")
    return err


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with a checkpoint of 3x4 pixels in 9 colours, and their palette."""
    folder = tmp_path / "given"
    folder.mkdir()
    bundles.write_bundle(folder / "model.ckpt-1000000", bundles.network())
    np.save(folder / "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (9, 3)))
    return folder


def test_a_whole_model(capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path) -> None:
    out, clusters = tmp_path / "out", given / "kmeans_centers.npy"
    code, text, err = run(capsys, given, out, "--clusters", clusters, "--size", "3x4", "--json")
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert report == {
        "out": str(out),
        "source": str(given / "model.ckpt-1000000.index"),
        "parameters": sum(p.numel() for p in ImageGPTForCausalImageModeling.from_pretrained(out).parameters()),
        "dtype": "float32",
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "n_positions": 12,
        "vocab_size": 10,
        "bidirectional": False,
        "clusters": str(clusters),
    }
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    processor = ImageGPTImageProcessor.from_pretrained(out)
    assert (processor.height, processor.width) == (3, 4)
    np.testing.assert_array_equal(processor.clusters, np.load(clusters).astype(np.float32))
    assert Pipeline.from_pretrained(out).sample(2, seed=0).tokens.shape == (2, 12)
    assert cli.main(["sample", "-n", "2", "--model", str(out), "--out", str(tmp_path / "grid.png")]) == 0
    theirs = transformers.ImageGPTImageProcessor.from_pretrained(out)
    assert theirs.size == {"height": 3, "width": 4}


def test_dtype_and_force(capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    code, text, _ = run(capsys, given / "model.ckpt-1000000", out, "--dtype", "bfloat16")
    assert code == 0
    assert text == f"{out}: 0.01 M parameters, 2 layers, width 16, 2 heads; 9 colours; bfloat16\n"
    assert ImageGPTForCausalImageModeling.from_pretrained(out).dtype == torch.bfloat16
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "config.json: exists already; pass --force" in fails(capsys, 1, given, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run(capsys, given, out, "--force")[0] == 0
    assert ImageGPTForCausalImageModeling.from_pretrained(out).dtype == torch.float32


def test_force_leaves_nothing_of_another_model(capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path) -> None:
    out, clusters = tmp_path / "out", given / "kmeans_centers.npy"
    assert run(capsys, given, out, "--clusters", clusters, "--size", "3x4")[0] == 0
    (out / "generation_config.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    assert run(capsys, given, out, "--force")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_damage_leaves_no_folder(capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path) -> None:
    """Of a variable that is used, and so read while the folder is written."""
    network = bundles.network()
    bundles.write_bundle(given / "model.ckpt-1000000", network | {"model/wpe": network["model/wpe"] * torch.nan})
    (tmp_path / "there").mkdir()
    assert "model/wpe" in fails(capsys, 1, given, tmp_path / "there" / "x" / "out")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_bert_says_so(capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path) -> None:
    bundles.write_bundle(given / "model.ckpt-1000000", bundles.network(bert=True))
    code, text, _ = run(capsys, given, tmp_path / "out", "--clusters", given / "kmeans_centers.npy", "--size", "4x3")
    assert code == 0
    assert (
        "; BERT, bidirectional, which cannot draw, and which transformers would run as if it were causal; float32"
        in text
    )
    code = cli.main(["sample", "--model", str(tmp_path / "out"), "--out", str(tmp_path / "grid.png")])
    assert (code, "attention is bidirectional" in capsys.readouterr().err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "--dtype is 'int8'; want one of float32, bfloat16, float16"),
        (("--size", "3x4"), "--size: only with --clusters"),
        (("--clusters", "{}", "--size", "3x"), "--size is '3x'; want HxW"),
        (("--clusters", "{}", "--size", "3x5"), "has 12 positions: --size has 15 pixels"),
        (("--clusters", "{}"), "has 12 positions: give --size HxW"),
    ],
)
def test_usage(
    capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    words = [word.format(given / "kmeans_centers.npy") for word in arguments]
    assert message in fails(capsys, 2, given, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_failures(
    capsys: pytest.CaptureFixture[str], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "CHECKPOINT" in fails(capsys, 2)
    assert "no such file" in fails(capsys, 1, tmp_path / "none", out)
    assert "kmeans_centers.npy: not a PyTorch checkpoint" in fails(capsys, 1, given / "kmeans_centers.npy", out)
    np.save(given / "other.npy", np.zeros((8, 3)))
    message = fails(capsys, 1, given, out, "--clusters", given / "other.npy", "--size", "3x4")
    assert "other.npy: has 8 colours, the checkpoint 9" in message
    assert "is not a directory" in fails(capsys, 1, given, given / "kmeans_centers.npy")
    assert "no such" in fails(capsys, 1, given, out, "--clusters", given / "none.npy")
    shard = given / "model.ckpt-1000000.data-00000-of-00002"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "damaged: its checksum is another" in fails(capsys, 1, given, out)
    assert not out.exists() or not list(out.iterdir())
    monkeypatch.setattr(backend, "_C", None)
    assert "crc32c" in fails(capsys, 3, given, out)


def test_a_disk_that_is_full(given: Path, tmp_path: Path) -> None:
    """One line, exit code 1, and what was there stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code = (
        "import resource, signal, sys; from igpt_fast.cli.main import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(given), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
