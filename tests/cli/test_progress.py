"""How far a training is: a bar on a terminal, else JSON lines, the first at once; what Ctrl-C leaves."""

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from igpt_fast.cli import main as cli

TINY = ("--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "2", "--no-bf16", "--device", "cpu")


def train(out: Path, *more: str) -> list[str]:
    return ["train", "--out", str(out), *TINY, *more]


def test_lines_where_no_terminal_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step at once, which is no line of the log; a short run warms up for a tenth of its steps."""
    assert cli.main(train(tmp_path / "a", "--steps", "30", "--json")) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.err.splitlines()]
    assert [record["step"] for record in records] == [1, 30]
    assert set(records[0]) == {"step", "nats", "grad_norm", "lr"}
    assert records[0]["lr"] == pytest.approx(2e-3 / 3)
    logged = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert logged == records[1:]
    assert 0 <= json.loads(captured.out)["preparation_share"] <= 1


def test_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(train(tmp_path / "a", "--steps", "1", "--quiet")) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["sample", "-q", "-n", "1", "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["sample", "-q", "-n", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["sample", "-q", "-n", "1", "--out", str(tmp_path / "b.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert cli.main(["-q", "sample", "-n", "1", "--out", str(tmp_path / "c.png")]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["-q", "-V"]) == 0
    assert capsys.readouterr().out.startswith("igpt_fast ")
    assert cli.main(["-q"]) == 2
    assert "there is no command -q" in capsys.readouterr().err


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    plot = tmp_path / "curve.png"
    assert cli.main(train(tmp_path / "a", "--steps", "4", "--eval-every", "2", "--plot", str(plot))) == 0
    with Image.open(plot) as picture:
        assert picture.size == (1050, 600)
    assert cli.main(train(tmp_path / "b", "--steps", "4", "--plot", str(plot))) == 1  # before the work
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    plot = tmp_path / "c" / "curve.png"  # in the directory that is made
    assert cli.main(train(tmp_path / "c", "--steps", "4", "--plot", str(plot))) == 0
    assert plot.exists()
    assert cli.main(train(tmp_path / "d", "--steps", "4", "--plot", str(tmp_path / "e" / "curve.png"))) == 1
    assert "e: no such directory" in capsys.readouterr().err


def test_a_bar_on_a_terminal_and_what_ctrl_c_leaves(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "igpt_fast", *train(tmp_path / "run", "--steps", "100000")]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    written = b""

    def read() -> None:
        nonlocal written
        try:
            while part := os.read(ours, 1 << 16):
                written += part
        except OSError:  # the end of a terminal
            pass

    thread = threading.Thread(target=read)
    thread.start()
    bar = rb"training \d+% of 100000 steps, +[\d.]+k? images/s, [\d:]+ left, nats \d\.\d{3}"
    try:
        deadline = time.monotonic() + 60
        while not re.search(bar, written) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
        thread.join()
        os.close(ours)
    shown = written.decode()
    assert process.returncode == 130, shown
    assert re.search(bar, written), shown
    assert '{"step"' not in shown
    saved, last = shown.splitlines()[-2:]
    what = r"step \d+ of 100000 is saved|what was saved last is"  # the latter where Ctrl-C meets an evaluation
    assert re.search(rf"igpt: ({what}) in {tmp_path}/run; the same command with --resume", saved)
    assert last.endswith("igpt train: interrupted")
    assert (tmp_path / "run" / "train.pt").exists()


def test_ctrl_c_before_anything_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from igpt_fast.learning import run

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", pressed)
    assert cli.main(train(tmp_path / "a")) == 130
    assert capsys.readouterr().err == "igpt: nothing is saved yet\nigpt train: interrupted\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.pt").touch()
    assert cli.main(train(tmp_path / "a", "--resume")) == 130  # a second Ctrl-C, which does not wait
    assert "igpt: what was saved last is in" in capsys.readouterr().err
