"""Several processes train what one would have trained: see run_training.py. Whole commands under torchrun as well."""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import run_training
import torch
import torch.distributed as dist
from run_training import SIZES
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from igpt_fast.cli import main as cli
from igpt_fast.cli.commands import train as train_command
from igpt_fast.learning import checkpoints
from igpt_fast.learning.data import save_tokens
from igpt_fast.learning.distributed import Team, check_same
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.settings import Execution, TrainConfig
from igpt_fast.learning.throughput import image_operations, peak_operations
from igpt_fast.learning.train import new_model, train
from igpt_fast.world import World

pytestmark = pytest.mark.xdist_group("training_together")

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "ddp_accumulated": {"accumulate": 2, "checkpointing": True},
    "fsdp_accumulated": {"parallel": "fsdp", "accumulate": 2, "checkpointing": True},
}
JOBS = [
    *({"name": name, **way} for name, way in WAYS.items()),
    *({"name": f"{name}_bits", "dropout": 0.2, "bf16": True, **WAYS[name]} for name in ("ddp", "fsdp")),
    *(
        {"name": f"{name}_halves", "dropout": 0.2, "bf16": True, **WAYS[name], "stop_after": 11}
        for name in ("ddp", "fsdp")
    ),
    *(
        {"name": f"{name}_halves", "dropout": 0.2, "bf16": True, **WAYS[name], "resume": True, "late": True}
        for name in ("ddp", "fsdp")
    ),
    *({"name": f"from_one_{name}", **WAYS[name], "resume": True} for name in ("ddp", "fsdp")),
    *({"name": f"to_other_{name}", **WAYS[name], "stop_after": 11} for name in ("ddp", "fsdp")),
    {"name": "over", "stop_after": 8},
    {"name": "over", "stop_after": 2},
    {"name": "full", "stop_after": 6},
    {"name": "full", "resume": True, "limit": 8000},
    {"name": "crowded", "batch_size": 1},
]


def start(command: list[str], rank: int, size: int, port: int) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **{key: str(value) for key, value in place.items()}}
    return subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True)


def together(size: int, folder: Path, jobs: list[dict[str, Any]]) -> list[list[str]]:
    """What each process says."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-W", "ignore", run_training.__file__, str(folder), json.dumps(jobs)]
    processes = [start(command, rank, size, port) for rank in range(size)]
    try:
        return [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has trained, what two have, and what three have gone on with."""
    folder = tmp_path_factory.mktemp("together")
    alone = World()
    run_training.job(folder, alone, "one")
    for name in ("ddp", "fsdp"):
        run_training.job(folder, alone, f"from_one_{name}", stop_after=11)
    said = together(2, folder, JOBS)
    assert said[0][:-2] == said[1][:-2] == [""] * (len(JOBS) - 2)
    for name in ("full", "crowded"):
        (folder / f"{name}.txt").write_text("\n".join(process[-2 if name == "full" else -1] for process in said))
    for name in ("ddp", "fsdp"):
        shutil.copytree(folder / f"to_other_{name}", folder / f"to_one_{name}")
    return folder


@pytest.fixture(scope="module")
def three(folder: Path) -> Path:
    """The same folder, when three processes have trained as well, or gone on with what two had."""
    jobs = [
        *({"name": f"three_{name}", **WAYS[name]} for name in ("ddp", "fsdp")),
        *({"name": f"to_other_{name}", **WAYS[name], "resume": True} for name in ("ddp", "fsdp")),
    ]
    assert together(3, folder, jobs) == [[""] * len(jobs)] * 3
    return folder


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_as_one(folder: Path, name: str) -> None:
    """Every step's figures, and the weights at the end, within 1e-5."""
    want, found = records(folder / "one"), records(folder / name)
    assert [record["step"] for record in found] == list(range(1, 15))
    for one, other in zip(want, found, strict=True):
        for figure in ("nats", "grad_norm", "lr", *(["heldout_nats"] if "heldout_nats" in one else [])):
            assert other[figure] == pytest.approx(one[figure], abs=1e-5), (name, one["step"], figure)
    weights = [torch.load(folder / f"{run}.pt", weights_only=True) for run in ("one", name)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WAYS)
def test_as_one_process(folder: Path, name: str) -> None:
    assert_as_one(folder, name)


@pytest.mark.soak
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_three_processes(three: Path, way: str) -> None:
    assert_as_one(three, f"three_{way}")
    assert_as_one(three, f"to_other_{way}")  # of two, by three


@pytest.mark.soak
def test_a_part_over_another(three: Path) -> None:
    """Of three, whose first two are of one size."""
    shutil.copytree(three / "three_fsdp", three / "a")
    first, second, _ = sorted(checkpoints.finished(three / "a")[-1].glob("*.safetensors"))
    shutil.copy(second, first)
    with pytest.raises(ValueError, match="is not whole"):
        run_training.job(three, World(), "a", resume=True)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_resumed_by_another_number_of_processes(folder: Path, way: str) -> None:
    assert_as_one(folder, f"from_one_{way}")  # by two
    with pytest.warns(
        UserWarning, match=rf"was computed by 2 processes \({way}\), --accumulate 1, goes on by 1 process,"
    ):
        run_training.job(folder, World(), f"to_one_{way}", resume=True)
    assert_as_one(folder, f"to_one_{way}")
    assert sorted(os.listdir(folder / f"from_one_{way}")) == ["checkpoint", "log.jsonl"]  # what is newer alone
    assert not checkpoints.finished(folder / f"to_one_{way}")


def parts(folder: Path) -> dict[tuple[Any, ...], torch.Tensor]:
    """What stands in a folder's files, by name and place; in which file a whole tensor stands is chance."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            found |= {(name, *places[name]["saved_offsets"]): file.get_tensor(name) for name in places}
    return found


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_resumed_by_as_many_it_is_bit_identical(folder: Path, way: str) -> None:
    """With dropout, which each process draws for itself; and where a part is computed as on a GPU, see ``job``."""
    names = [path.name for path in checkpoints.finished(folder / f"{way}_bits")]
    assert names == ["step-00000014"] == [path.name for path in checkpoints.finished(folder / f"{way}_halves")]
    straight, halves = (folder / f"{way}_{run}" / "checkpoint" / names[0] for run in ("bits", "halves"))
    found = [parts(straight), parts(halves)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert json.loads((straight / "state.json").read_text()) == json.loads((halves / "state.json").read_text())
    times = {"seconds", "images_per_second", "tokens_per_second", "flops_per_second", "peak_memory"}
    logs = [[{k: v for k, v in r.items() if k not in times} for r in records(folder / f"{way}_{run}")]
            for run in ("bits", "halves")]  # fmt: skip
    assert logs[0] == logs[1]


def test_a_disk_that_is_full(folder: Path) -> None:
    """One line that names the folder, on both; what was saved before is there, whole."""
    target = folder / "full" / "checkpoint" / "step-00000012"
    said = (folder / "full.txt").read_text().splitlines()
    assert said == [f"OSError: [Errno 27] File too large: '{target}'"] * 2
    assert [path.name for path in checkpoints.finished(folder / "full")] == ["step-00000006"]
    with pytest.warns(UserWarning, match="goes on by 1 process, --accumulate 1: not bit for bit$"):
        run_training.job(folder, World(), "full", resume=True)
    assert_as_one(folder, "full")


def test_a_disk_that_is_full_for_one_process(tmp_path: Path) -> None:
    run_training.job(tmp_path, World(), "a", stop_after=6)
    before = (tmp_path / "a" / "train.pt").read_bytes()
    with pytest.raises(OSError, match=r"File too large: '.*train\.pt'"):
        run_training.job(tmp_path, World(), "a", resume=True, limit=8000)
    assert (tmp_path / "a" / "train.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "a")) == ["log.jsonl", "train.pt"]
    lines = (tmp_path / "a" / "log.jsonl").read_bytes().splitlines(keepends=True)[:6]
    with pytest.raises(OSError, match=r"File too large: '.*log\.jsonl'"):
        run_training.job(tmp_path, World(), "a", resume=True, limit=len(b"".join(lines)) + 9)


def test_more_processes_than_images(folder: Path) -> None:
    text = "ValueError: batch_size is 1; want at least 2, an image for each of 2 processes and --accumulate 1"
    assert (folder / "crowded.txt").read_text().splitlines() == [text] * 2
    assert not (folder / "crowded").exists()
    config, data = TrainConfig(n_layer=1, n_embd=8, n_head=1, batch_size=3), run_training.data()
    model = new_model(data, config, NextPixel())
    with pytest.raises(ValueError, match="batch_size is 3; want at least 4"):
        Team(model, torch.device("cpu"), NextPixel(), config, Execution(accumulate=4), World())


def test_a_fresh_run_over_an_older_one(folder: Path, tmp_path: Path) -> None:
    """Which was at a later step: nothing of it is left to be taken for this one's, by any number of processes."""
    for name in ("ddp", "one"):  # a folder, a file
        shutil.copytree(folder / name, tmp_path / name)
        with pytest.raises(OSError, match="File too large"):
            run_training.job(tmp_path, World(), name, limit=3000)
        assert not checkpoints.finished(tmp_path / name)
        assert not (tmp_path / name / "train.pt").exists()
    assert [path.name for path in checkpoints.finished(folder / "over")] == ["step-00000002"]


def test_accumulated_with_dropout_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With the same setting, and silently; with another, a line says that it does not. Nothing is said of states from
    before that was written down."""
    how = {"dropout": 0.2, "bf16": True, "accumulate": 3}
    run_training.job(tmp_path, World(), "straight", **how)
    run_training.job(tmp_path, World(), "halves", **how, stop_after=11)
    path = tmp_path / "halves" / "train.pt"
    half = torch.load(path, weights_only=True)
    assert half["computed"] == "1 process, --accumulate 3"
    two = {"computed": "2 processes (ddp), --accumulate 1"}
    what = (
        f"{path}: was computed by {two['computed']}, goes on by {half['computed']}: not bit for bit, with other dropout"
    )
    for state, expected in ((half, []), ({k: v for k, v in half.items() if k not in two}, []), (half | two, [what])):
        torch.save(state, path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run_training.job(tmp_path, World(), "halves", **how, resume=True, stop_after=14 if state is half else 12)
        assert [str(warning.message) for warning in said] == expected
        if state is half:
            states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("straight", "halves")]
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    torch.save(half | {"computed": 1}, path)
    with pytest.raises(ValueError, match="not a usable training state: computed is no text"):
        run_training.job(tmp_path, World(), "halves", **how, resume=True)


def test_a_parameter_that_is_not_used() -> None:
    """Of several processes, DDP would fail at the next step without naming it."""
    model = new_model(run_training.data(), TrainConfig(**SIZES), NextPixel())
    model.unused = torch.nn.Parameter(torch.zeros(1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        team = Team(model, torch.device("cpu"), NextPixel(), TrainConfig(**SIZES), Execution(), Told())
        with pytest.raises(ValueError, match="ddp: no gradient of unused; the objective next_pixel does not use it"):
            team.backward((run_training.data().tokens[:7].long(),))
    finally:
        dist.destroy_process_group()


def test_parts_of_a_batch_are_summed_as_one(tmp_path: Path) -> None:
    run_training.job(tmp_path, World(), "one")
    run_training.job(tmp_path, World(), "parts", accumulate=3, checkpointing=True)
    assert_as_one(tmp_path, "parts")


class Hostile:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damage(kind: str, path: Path) -> str:
    """Damages a folder; returns what is said of it."""
    shard, state = sorted(path.glob("*.safetensors"))[-1], path / "state.json"
    about = json.loads(state.read_text())
    if kind == "missing file":
        shard.unlink()
        return "not whole|its tensors are others|want"
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "header":
        shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    elif kind == "nan":
        content = shard.read_bytes()
        shard.write_bytes(content[:-4] + b"\xff" * 4)
        return "is not finite"
    elif kind == "pipe":
        os.mkfifo(path / "shard-00009-model-00001-of-00001.safetensors")
        return "is not a file"
    elif kind == "twice":
        shutil.copy(shard, path / "shard-00009-model-00001-of-00001.safetensors")
        return "not whole"
    elif kind == "other step":
        state.write_text(json.dumps(about | {"step": 10}))
        return "is of step 10"
    elif kind == "no step":
        state.write_text(json.dumps(about | {"step": True}))
        return "step"
    elif kind == "not json":
        state.write_text("{")
        return "not usable JSON"
    elif kind == "other data":
        state.write_text(json.dumps(about | {"identity": about["identity"] | {"data": "x"}}))
        return "written by another run: the data differ"
    elif kind == "late":
        path.rename(path.parent / "step-00000015")
        (path.parent / "step-00000015" / "state.json").write_text(json.dumps(about | {"step": 15}))
        return "behind the end of the run"
    elif kind == "not identity":
        state.write_text(json.dumps(about | {"identity": [1]}))
        return "identity names no configuration"
    return "."


@pytest.mark.parametrize(
    ("chunks", "whole"),
    [
        ([((2, 0), (2, 3)), ((0, 0), (2, 3))], True),
        ([((0, 0), (4, 3)), ((4, 0), (0, 3))], True),  # more processes than rows
        ([((2, 0), (2, 3)), ((2, 0), (2, 3))], False),  # one over another
        ([((0, 0), (3, 3)), ((1, 0), (1, 3))], False),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], False),
        ([((0, 0), (4, 2)), ((0, 1), (2, 2))], False),
        ([((-1, 0), (5, 3))], False),
        ([], False),
    ],
)
def test_parts_are_a_whole_tensor(chunks: list[Any], whole: bool) -> None:
    parts = [ChunkStorageMetadata(*map(torch.Size, chunk)) for chunk in chunks]
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 3)), parts)
    with contextlib.nullcontext() if whole else pytest.raises(ValueError, match="a is not whole"):
        checkpoints._check({"a": stored}, {"a": torch.zeros(4, 3)})


KINDS = ["missing file", "truncated", "header", "nan", "pipe", "twice", "other step", "no step"]


@pytest.mark.parametrize("kind", [*KINDS, "not json", "late", "other data", "not identity"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_bad_folder_is_refused(folder: Path, tmp_path: Path, way: str, kind: str) -> None:
    shutil.copytree(folder / way, tmp_path / "a")
    log = (tmp_path / "a" / "log.jsonl").read_text()
    path = checkpoints.finished(tmp_path / "a")[-1]
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    expected = damage(kind, path)
    with pytest.raises(ValueError, match=rf"checkpoint/step-.*({expected})") as caught:
        run_training.job(tmp_path, World(), "a", resume=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "a" / "log.jsonl").read_text() == log


def test_an_unfinished_folder_is_none(folder: Path, tmp_path: Path) -> None:
    """What a kill leaves: a folder without its name, or without what is written last."""
    shutil.copytree(folder / "ddp", tmp_path / "a")
    path = checkpoints.finished(tmp_path / "a")[-1]
    shutil.copytree(path, path.parent / ".step-00000030.partial")
    shutil.copytree(path, path.parent / "step-00000040")
    (path.parent / "step-00000040" / "state.json").unlink()
    assert checkpoints.finished(tmp_path / "a") == [path]
    assert checkpoints.finished(tmp_path / "none") == []


class Told(World):
    """A second process of two, which hears a number."""

    rank, size = 1, 2

    def agree(self, name: str, value: int) -> int:
        return 7


def test_processes_with_other_data() -> None:
    with pytest.raises(ValueError, match="rank 1 was given other settings or other data than rank 0"):
        check_same(Told(), "x")
    check_same(World(), "x")


def test_operations_of_an_image_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from igpt_fast import backend

    config = TrainConfig(n_layer=2, n_embd=32, n_head=2)
    model = new_model(run_training.data(), config, NextPixel())
    torch.nn.init.normal_(model.lm_head.weight)
    before = backend.get_backend()
    backend.set_backend("reference")
    try:
        with FlopCounterMode(display=False) as counter:
            NextPixel().losses(model, run_training.data().tokens[:1].long()).sum().backward()
    finally:
        backend.set_backend(before)
    assert image_operations(model) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_operations(torch.device("cuda")) == peak
    assert peak_operations(torch.device("cpu")) is None


def test_figures_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(**(SIZES | {"save_every": 6, "eval_every": 10}))
    execution = Execution(tensorboard=True)
    train(run_training.data(), tmp_path / "a", config, execution=execution, stop_after=10)
    train(run_training.data(), tmp_path / "a", config, execution=execution, resume=True)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    for name in ("nats", "heldout_nats", "lr"):
        want = [(record["step"], record[name]) for record in records(tmp_path / "a") if name in record]
        assert [event.step for event in events.Scalars(name)] == [step for step, _ in want]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([value for _, value in want])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard is not installed; pip install 'igpt_fast\[train\]'"):
        train(run_training.data(), tmp_path / "b", config, execution=execution)
    assert not (tmp_path / "b").exists()


# ---- Under torchrun -----------------------------------------------------------------------------------------

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "igpt_fast", "train")


def workers(torchrun: int) -> dict[str, int]:
    """Rank -> process."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1] if place.name.isdecimal() else ""
            variables = (place / "environ").read_text().split("\0") if parent == str(torchrun) else []
        except OSError:
            continue
        found.update({name[5:]: int(place.name) for name in variables if name.startswith("RANK=")})
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.clock
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the processes through /proc")
@pytest.mark.parametrize(
    ("end", "parallel"),
    [
        (signal.SIGKILL, "ddp"),
        pytest.param(signal.SIGKILL, "fsdp", marks=pytest.mark.soak),
        (signal.SIGINT, "ddp"),
    ],
)
def test_a_run_that_ends_early_goes_on(tmp_path: Path, end: signal.Signals, parallel: str) -> None:
    """One process is killed, or all hear Ctrl-C; no step that was saved is lost."""
    save_tokens(run_training.data(), tmp_path / "a.npz")
    out = tmp_path / "run"
    sizes = {**SIZES, "steps": 3000, "save_every": 20, "eval_every": 3000, "dropout": 0.0}
    options = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [str(tmp_path / "a.npz"), "--out", str(out), "--device", "cpu", *options]
    command = [*TORCHRUN, *arguments, "--parallel", parallel]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as run:
        try:
            eventually(lambda: len(checkpoints.finished(out)) > 0)
            saved = checkpoints.step_of(checkpoints.finished(out)[-1])
            begin = time.monotonic()
            if end == signal.SIGINT:
                run.send_signal(signal.SIGINT)
            else:
                os.kill(workers(run.pid)["1"], signal.SIGKILL)
            out_text, error = run.communicate(timeout=120)
        finally:
            run.kill()
    assert time.monotonic() - begin < 20
    assert (run.returncode, out_text) == (1, "")
    said = [line for line in error.splitlines() if line.startswith(("igpt ", "igpt:"))]
    if end == signal.SIGINT:
        assert said.pop() == "igpt train: interrupted"
        assert all(re.match(r"igpt: (step \d+ of 3000 is saved|what was saved last is) in ", line) for line in said)
        assert len(said) <= 1, error
    else:
        assert [line.removeprefix("igpt train: ").removeprefix("igpt: ") for line in said] == [
            "rank 1 is gone; what was saved is kept; go on with --resume"
        ], error
    (newest,) = map(checkpoints.step_of, checkpoints.finished(out))
    assert saved <= newest < 3000
    config, seen = TrainConfig(**sizes), []
    with pytest.warns(UserWarning, match="not bit for bit"), mock.patch("igpt_fast.learning.train.LOG_EVERY", 1):
        train(run_training.data(), out, config, resume=True, stop_after=newest + 2, progress=seen.append)
    assert [record["step"] for record in seen] == [newest + 1, newest + 2]
    assert torch.load(out / "train.pt", weights_only=True)["step"] == newest + 2


@pytest.mark.soak
def test_torchrun_reports_once(tmp_path: Path) -> None:
    save_tokens(run_training.data(), tmp_path / "a.npz")
    options = ["--n-layer", "1", "--n-embd", "8", "--n-head", "1", "--steps", "2", "--batch-size", "2", "--json"]
    command = [*TORCHRUN, str(tmp_path / "a.npz"), "--out", str(tmp_path / "run"), "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["world_size"], report["steps"], report["mfu"]) == (2, 2, None)
    assert report["images_per_second"] > 0 < report["peak_memory"]
    assert report["tokens_per_second"] == pytest.approx(16 * report["images_per_second"], rel=0.01)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint", "log.jsonl", "model", "samples.png"]


def test_parallel_alone(tmp_path: Path) -> None:
    assert cli.main(["train", "--parallel", "fsdp", "--out", str(tmp_path / "b")]) == 2


MISTAKES = ["--resume --force", "--classes", "--label-dropout 0.5", "--device meta"]


@pytest.mark.parametrize("arguments", [*MISTAKES, "--all-pixels", "--objective masked --init x", "absent.npz"])
def test_a_mistake_of_all_processes_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    """Whatever is wrong is found among the others, who know who speaks."""

    @contextlib.contextmanager
    def second_of_two(*_: str) -> Iterator[World]:
        try:
            yield Told()
        except Exception as error:
            raise SystemExit(1) from error

    monkeypatch.setattr(train_command, "world", second_of_two)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", *arguments.split()])
    assert capsys.readouterr() == ("", "")
