"""Several processes draw what one would have drawn, and end in a clear way when one of them is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt_fast.cli import main as cli

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "igpt_fast")
ENDLESS = ("sample", "-n", "1000", "--batch-size", "2", "--device", "cpu")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one(*args: object) -> None:
    assert cli.main([str(arg) for arg in args]) == 0


def two(*args: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *map(str, args)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    """Byte for byte; five images, which leaves unequal parts."""
    options = ("-n", 5, "--seed", 3, "--min-p", 0.01, "--device", "cpu", "--json")
    folders = {name: tmp_path / name for name in ("one", "two")}
    commands = {}
    for name, folder in folders.items():
        folder.mkdir()
        files = [("--out", "a.png"), ("--gif", "a.gif"), ("--tokens", "a.npz"), ("--singles", "s")]
        paths = [word for option, file in files for word in (option, folder / file)]
        commands[name] = ("sample", *options, *paths, "--sidecar", folder / "a.json")
    one(*commands["one"])
    done = two(*commands["two"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # the first process alone reports
    assert (report["images"], report["processes"], report["seed"]) == (5, 2, 3)
    assert report["images_per_second"] > 0.0
    for path in folders["one"].rglob("*.*"):
        if path.suffix != ".json":
            assert (folders["two"] / path.relative_to(folders["one"])).read_bytes() == path.read_bytes(), path.name
    sidecars = [json.loads((folder / "a.json").read_text()) for folder in folders.values()]
    timing = {"seconds", "images_per_second", "processes", "files"}
    first, second = ({key: value for key, value in sidecar.items() if key not in timing} for sidecar in sidecars)
    assert first == second
    # The same command again finds what is there; the first process says so, once.
    again = two(*commands["two"])
    assert again.returncode == 1
    assert [line for line in again.stderr.splitlines() if line.startswith(("igpt ", "igpt:"))] == [
        f"igpt sample: {folders['two'] / 'a.png'}: exists already; pass --force to overwrite it"
    ]


def test_two_processes_complete_the_inputs_of_one(tmp_path: Path) -> None:
    """By a mask and candidates, without a seed: the first process draws one for both."""
    inputs = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(inputs):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    mask = np.full((16, 16), 255, dtype=np.uint8)
    mask[13:15, 4:9] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command = ("complete", *inputs, "--mask", tmp_path / "mask.png", "-n", 2, "--candidates", 2, "--device", "cpu")
    names = ("--json", "--out", tmp_path / "a.png", "--tokens", tmp_path / "a.npz")
    done = two(*command, *names)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["processes"]) == (6, 2)
    one(*command, "--seed", report["seed"], "--out", tmp_path / "b.png", "--tokens", tmp_path / "b.npz")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # Two inputs that are read together may be rounded otherwise than one of them alone: the drawn numbers leave room.
    with np.load(tmp_path / "a.npz") as several, np.load(tmp_path / "b.npz") as alone:
        assert np.array_equal(several["tokens"], alone["tokens"])
        assert np.allclose(several["logprobs"], alone["logprobs"], atol=1e-4, equal_nan=True)


def workers(torchrun: int) -> dict[str, int]:
    """Rank -> process."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1] if folder.name.isdecimal() else ""
            variables = (folder / "environ").read_text().split("\0") if parent == str(torchrun) else []
        except OSError:
            continue
        found.update({name[5:]: int(folder.name) for name in variables if name.startswith("RANK=")})
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def draws(pid: int) -> bool:
    """Whether a process has been at work for some time: it listens to SIGTERM by then."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def worked(pid: int) -> float:
    """Seconds of a processor that a process has had: the others on the machine take nothing of them."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.clock
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the processes through /proc")
def test_a_process_that_is_killed_ends_the_run(tmp_path: Path) -> None:
    command = [*TORCHRUN, *ENDLESS, "--out", str(tmp_path / "a.png"), "--singles", str(tmp_path / "s")]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1, text=True) as run:
        try:
            eventually(lambda: len(found := workers(run.pid)) == 2 and all(map(draws, found.values())))
            time.sleep(1)
            start = time.monotonic()
            os.kill(workers(run.pid)["1"], signal.SIGKILL)
            out, error = run.communicate(timeout=300)
        finally:
            run.kill()
    assert time.monotonic() - start < 30
    assert run.returncode == 1
    assert out == ""
    said = [line for line in error.splitlines() if line.startswith(("igpt ", "igpt:"))]
    assert said[0] == "igpt: rank 1 is gone; nothing is written", error
    assert listing(tmp_path) == []


@pytest.mark.clock
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the processes through /proc")
def test_ctrl_c_saves_what_all_have_finished(tmp_path: Path) -> None:
    command = [*TORCHRUN, *ENDLESS, "--out", str(tmp_path / "a.png"), "--tokens", str(tmp_path / "a.npz")]
    command += ["--singles", str(tmp_path / "s"), "--seed", "1", "--json"]
    with subprocess.Popen(command, env=environment(), stdout=-1, stderr=-1, text=True) as run:
        try:
            eventually(lambda: len(found := workers(run.pid)) == 2 and all(map(draws, found.values())))
            before = {pid: worked(pid) for pid in workers(run.pid).values()}
            eventually(lambda: all(worked(pid) > begun + 3 for pid, begun in before.items()))
            run.send_signal(signal.SIGINT)
            out, error = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 1  # torchrun's own
    assert "igpt sample: interrupted" in error.splitlines()
    report = json.loads(out)
    assert report["interrupted"]
    assert 2 <= report["images"] < 1000
    numbers = [int(path.stem) for path in sorted((tmp_path / "s").iterdir())]
    assert len(numbers) == report["images"]
    assert {number >= 500 for number in numbers} == {False, True}  # of both
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["tokens"]) == report["images"]
    last = tmp_path / "last.npz"  # the number is the image's own
    one("sample", "-n", 1, "--seed", 1, "--out", tmp_path / "b.png", "--tokens", last, "--device", "cpu")
    with np.load(last) as alone, np.load(tmp_path / "a.npz") as together:
        assert np.array_equal(alone["tokens"][0], together["tokens"][0])


@pytest.mark.clock
def test_a_process_that_has_stopped_is_noticed(tmp_path: Path) -> None:
    """Without torchrun, which would kill it: no sign of life ends the others."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    code = (
        "import sys; from igpt_fast import world; from igpt_fast.cli import main;"
        " world.SILENCE = 2.0; sys.exit(main.main(sys.argv[1:]))"
    )
    runs = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", code, *ENDLESS, "--out", str(tmp_path / "a.png")]
        runs.append(
            subprocess.Popen(command, env=environment(**place, MASTER_PORT=port), stdout=-1, stderr=-1, text=True)
        )
    try:
        eventually(lambda: all(draws(run.pid) for run in runs))
        time.sleep(2)
        runs[1].send_signal(signal.SIGSTOP)
        out, error = runs[0].communicate(timeout=300)
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert (runs[0].returncode, out) == (1, "")
    assert error == "igpt sample: rank 1 is gone without a sign of life; nothing is written\n"
    assert listing(tmp_path) == []


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from igpt_fast.cli import checks as terminal

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert terminal.choose_device(None, None) == torch.device("cuda")
    assert [terminal.choose_device(None, rank) for rank in (0, 1)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert terminal.choose_device("cuda", 1) == torch.device("cuda:1")
    assert terminal.choose_device("cuda:0", 1) == torch.device("cuda:0")
    assert terminal.choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(terminal.DeviceUnavailableError, match="LOCAL_RANK"):
        terminal.choose_device(None, 2)


def test_a_world_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert cli.main(["sample", "-n", "1", "--out", "a.png"]) == 1
    assert "WORLD_SIZE is 'many'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["sample", "-n", "0"]) == 2
    assert capsys.readouterr().err == ""  # the first process says it
