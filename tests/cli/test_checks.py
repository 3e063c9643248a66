"""What is given to a command: files, directories, the standard input, links; names of backends and devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from igpt_fast import backend, image
from igpt_fast.cli import checks
from igpt_fast.cli import main as cli
from igpt_fast.cli.draw.options import Dtype
from igpt_fast.engines.decoder import check_dtype
from igpt_fast.image.reading import FITS


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), ("inner/c.png", "green")):
        Image.new("RGB", (30, 20), colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_directories(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.find_pictures([pictures / "b.png", pictures])
    assert [str(path.relative_to(pictures)) for path in found] == ["b.png", "a.jpg", "b.png", "inner/c.png"]
    out = ["--out", str(tmp_path / "a.png"), "--json"]
    assert cli.main(["complete", str(pictures), "-n", "1", "--keep", "15rows", *out]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["completions"]) == (3, [1, 1, 1])
    assert cli.main(["quantize", str(pictures), "--out", str(tmp_path / "t.npy")]) == 0
    assert np.load(tmp_path / "t.npy").shape == (3, 16, 16)
    assert cli.main(["quantize", str(pictures), "--side", "0", "--out", str(tmp_path / "u.npy")]) == 2
    assert "--side 0 takes a single image" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images in it"):
        checks.find_pictures([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="none: no such file or directory"):
        checks.find_pictures([pictures, tmp_path / "none"])
    with pytest.raises(checks.UsageError, match="reads once"):
        checks.find_pictures([Path("-"), Path("-")])


@pytest.mark.parametrize("pipe", [True, False])
def test_the_standard_input(pictures: Path, tmp_path: Path, pipe: bool) -> None:
    command = [sys.executable, "-m", "igpt_fast", "quantize", "-", "--side", "4", "--out", str(tmp_path / "t.npy")]
    how = {"input": (pictures / "b.png").read_bytes()} if pipe else {"stdin": (pictures / "b.png").open("rb")}
    done = subprocess.run(command, capture_output=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "t.npy").shape == (1, 4, 4)
    wrong = subprocess.run([*command, "--force"], capture_output=True, check=False, input=b"no picture")
    assert wrong.returncode == 1
    assert b"/dev/stdin: not a readable image" in wrong.stderr


def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link is no free name, wherever it leads; and when it is replaced, that is said."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for target in ("kept.npy", "nothing.npy"):
        (tmp_path / "kept.npy").write_text("kept")
        link = tmp_path / "link.npy"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        command = ["quantize", str(tmp_path / "a.png"), "--out", str(link)]
        assert cli.main(command) == 1
        assert "link.npy: exists already" in capsys.readouterr().err
        assert cli.main([*command, "--force"]) == 0
        assert f"link.npy: is a link, which is replaced; {target} stays as it is" in capsys.readouterr().err
        assert not link.is_symlink()
        assert np.load(link).shape == (1, 16, 16)
        assert (tmp_path / "kept.npy").read_text() == "kept"


def test_the_grid_and_what_it_shows_come_together(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the picture cannot be written, nothing is."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    commands = (["quantize", str(pictures / "b.png")], ["clusters", str(pictures), "-k", "2"])
    files = ["--out", str(tmp_path / "a.npy"), "--grid", str(tmp_path / "a.png")]
    for command in commands:
        with monkeypatch.context() as patched:
            patched.setattr(image, "save_image", full)
            assert cli.main([*command, *files]) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"pictures"}
        assert cli.main([*command, *files]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"pictures", "a.npy", "a.png"}
        (tmp_path / "a.npy").unlink()
        Image.open(tmp_path / "a.png").load()
        (tmp_path / "a.png").unlink()


def test_fit(tmp_path: Path) -> None:
    """A wide picture of two colours: its middle, all of it on white, all of it squeezed."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255, 0, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "c.npy", np.array([[-1, -1, -1], [1, -1, -1], [1, 1, 1]], np.float32))
    shared = ["--clusters", str(tmp_path / "c.npy"), "--side", "8", "--out", str(tmp_path / "t.npy"), "--force"]
    found = {}
    for fit in FITS:
        assert cli.main(["quantize", str(tmp_path / "a.png"), "--fit", fit, *shared]) == 0
        found[fit] = np.load(tmp_path / "t.npy")[0]
    assert (found["crop"] == 1).all()
    assert (found["pad"][[0, 1, 6, 7]] == 2).all()
    assert (found["pad"][2:6, [0, 7]] == 0).all()
    assert (found["pad"][2:6, 3:5] == 1).all()
    assert (found["stretch"][:, [0, 7]] == 0).all()
    assert (found["stretch"][:, 3:5] == 1).all()


def test_names_are_those_of_the_library() -> None:
    assert get_args(checks.Backend) == backend.BACKENDS
    for name in get_args(Dtype)[3:-1]:
        check_dtype(name)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "mps", None])
def test_names_of_devices(name: str | None) -> None:
    checks.check_device_name(name)
    for wrong in ("gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda:99999", "CPU", os.sep):
        with pytest.raises(checks.UsageError, match="--device is"):
            checks.check_device_name(wrong)
