"""What the command prints is plain text, whatever files and names hold."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from igpt_fast.cli import main as cli
from igpt_fast.cli.terminal import plain
from igpt_fast.files import BUNDLED

# Clears the screen, sets the title, turns the direction, hides, is no UTF-8.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07\u202egnp\u200b\x9b31m\udcff"


def lines(capsys: pytest.CaptureFixture[str], code: int, *args: object) -> tuple[str, str]:
    """What a command prints: nothing but printable characters, in lines of which none is endless."""
    assert cli.main([str(arg) for arg in args]) == code
    captured = capsys.readouterr()
    for line in captured.out.split("\n") + captured.err.split("\n"):
        assert line.isprintable(), ascii(line)
        assert len(line) <= 1500
    return captured.out, captured.err


def test_plain() -> None:
    assert plain("Größe 例 🙂 a b") == "Größe 例 🙂 a b"
    assert plain(" a\n\tb\r\nc ") == "a b c"
    assert plain(HOSTILE) == r"a\x1b[2J\x1b]0;owned\x07\u202egnp\u200b\x9b31m\udcff"
    for text in ("x" * 400_000, "\x1b" * 400_000, "x " * 3000, "x" * 1501):
        short = plain(f"name: {text}; want less")
        assert (short[:6], short[-11:]) == ("name: ", "; want less")
        assert len(short) <= 1500
        assert " [...] " in short
    assert plain("x" * 1500) == "x" * 1500


def test_names_of_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    name = HOSTILE.replace("/", "") + ".png"
    (folder / name).write_text("no picture")
    Image.effect_noise((8, 8), 90).convert("RGB").save(folder / "fine.png")
    shown = plain(name)
    out, err = lines(
        capsys, 0, "clusters", folder, "-k", 2, "--side", 4, "--skip-unreadable", "--out", tmp_path / "c.npy"
    )
    assert err.startswith(f"left out: {folder}/{shown}")
    assert shown in lines(capsys, 1, "clusters", folder / name, "--out", tmp_path / "d.npy")[1]
    assert shown in lines(capsys, 1, "complete", folder / name, "--out", tmp_path / "d.png")[1]
    assert plain(HOSTILE) in lines(capsys, 2, "sample", "--out", tmp_path / f"{HOSTILE}.txt")[1]
    assert r"\x1b[2J" in lines(capsys, 2, "sample", "-n", HOSTILE)[1]
    out, _ = lines(capsys, 0, "quantize", folder / "fine.png", "--out", tmp_path / f"{HOSTILE}.npy")
    assert out.startswith(f"{tmp_path}/{plain(HOSTILE)}.npy: 1 x 16 x 16 tokens")
    out, _ = lines(
        capsys, 0, "quantize", folder / "fine.png", "--out", tmp_path / f"{HOSTILE}.npy", "--force", "--json"
    )
    assert json.loads(out)["out"] == str(tmp_path / f"{HOSTILE}.npy")


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "quick" + HOSTILE[:-1] * 20_000},
        {"num_labels": HOSTILE[:-1]},
        {"n_embd": [HOSTILE[:-1]] * 2000},
        {"model_type": HOSTILE[:-1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_hostile_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    command = ("sample", "-n", 1, "--model", tmp_path / "model", "--device", "cpu", "--out", tmp_path / "a.png")
    code = cli.main([str(word) for word in command])  # may be a value that does not matter
    captured = capsys.readouterr()
    assert all(line.isprintable() and len(line) <= 1500 for line in (captured.out + captured.err).split("\n"))
    assert code == 1 or (tmp_path / "a.png").exists()


def test_hostile_names_of_tensors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    tensors[HOSTILE[:-1]] = torch.zeros(1)
    tensors["transformer.wte.weight"] = torch.zeros((1,) * 5000)
    save_file(tensors, path)
    lines(capsys, 1, "sample", "-n", 1, "--model", tmp_path / "model", "--out", tmp_path / "a.png")


def test_a_terminal_that_cannot_show_the_letters(tmp_path: Path) -> None:
    """The work is done, and said in what letters there are."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "igpt_fast", "quantize", str(tmp_path / "a.png"), "--out", str(tmp_path / "ü.npy")]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"/\xfc.npy: 1 x 16 x 16 tokens" in done.stdout
