"""benchmarks/bench_ops.py on the CPU: every candidate of every CUDA row runs, small, and gives the same; the sums."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from implementations import ISAS, Implementation, isas_of

from igpt_fast import backend

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# The ops with rows, and those whose kernels are another op's, or differ from one in a line of arithmetic.
ROWS = (
    *("rms_norm", "layer_norm", "quick_gelu", "cross_entropy", "causal_attention", "attention_decode", "gemv"),
    *("sample", "sample_next", "quantize", "dequantize"),
)
# The last is timed where it stands, behind a step: each call moves its position on (bench_sample_cuda.py).
NO_ROW = {"activation", "gelu_tanh", "gelu_erf", "causal_attention_packed", "sample_step"}

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run outside the repository")


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cuda_timing")


@pytest.fixture
def work(timing: ModuleType) -> ModuleType:
    return importlib.import_module("workloads")


@pytest.fixture
def calls(timing: ModuleType) -> ModuleType:
    return importlib.import_module("cuda_ops")


def wrong(work: ModuleType, workload: Any) -> dict[str, str]:
    return {k: v for direction in work.passes(workload) for k, v in work.check(workload, CPU, direction).items()}


def test_every_op_with_a_kernel_has_a_row(work: ModuleType, calls: ModuleType) -> None:
    rows = {workload.op for workload in work.workloads(calls.MAKERS, None, calls.TINY)}
    assert rows == set(ROWS) == {name for name, op in backend.OPS.items() if "cuda" in op.native} - NO_ROW
    assert {workload.op for workload in work.workloads(calls.MAKERS, ["quantize"], calls.TINY)} == {"quantize"}


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("kind", ["reference", "emulated"])
def test_everybody_gives_the_same(
    work: ModuleType, calls: ModuleType, request: pytest.FixtureRequest, kind: str, op: str
) -> None:
    """The shapes, views and arguments of every row, and that the kernel serves them."""
    launches = 0
    if kind == "emulated":
        emulation: Implementation = request.getfixturevalue("emulation")
        assert emulation.module is not None
        emulation.module.reset_counters()
    for workload in work.workloads(calls.MAKERS, [op], calls.TINY):
        assert wrong(work, workload) == {}, workload.size
        if kind == "emulated":
            assert emulation.module is not None
            before, launches = launches, emulation.module.counters()["launches"]
            assert launches > before or "cuda" not in backend.OPS[op].native, f"{workload.size}: no kernel ran"


@pytest.fixture
def cpu_calls(timing: ModuleType) -> ModuleType:
    return importlib.import_module("cpu_ops")


CPU_ROWS = ("rms_norm", "layer_norm", "quick_gelu", "gelu_tanh", "gelu_erf", "cross_entropy", "dequantize")
CPU_ROWS += ("causal_attention",)


def test_every_op_with_a_cpu_kernel_has_a_row_there(work: ModuleType, cpu_calls: ModuleType) -> None:
    """quantize has rows of its own; an activation by name is one of the others."""
    rows = {workload.op for workload in work.workloads(cpu_calls.MAKERS, None, cpu_calls.TINY)}
    native = {name for name, op in backend.OPS.items() if "cpu" in op.native}
    assert rows == set(CPU_ROWS) == native & set(CPU_ROWS)


@pytest.mark.parametrize("op", CPU_ROWS)
@pytest.mark.parametrize("kind", ["reference", "native_cpu"])
def test_everybody_gives_the_same_on_the_cpu(
    work: ModuleType,
    cpu_calls: ModuleType,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    op: str,
) -> None:
    """But torch.compile, which takes seconds for each."""
    native = request.getfixturevalue(kind) if kind == "native_cpu" else None
    monkeypatch.setattr(cpu_calls, "compiled", lambda function: function)
    for workload in work.workloads(cpu_calls.MAKERS, [op], cpu_calls.TINY):
        if native is not None:
            native.module.reset_counters()
        assert wrong(work, workload) == {}, workload.size
        served = native is not None and ISAS[-1] in isas_of(op)  # attention's kernels want a tile unit
        assert not served or native.module.counters()["launches"] > 0, f"{workload.size}: no kernel ran"


def test_rows_of_the_cpu(work: ModuleType, cpu_calls: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_calls, "compiled", lambda function: function)
    (workload, *_) = work.workloads(cpu_calls.MAKERS, ["quick_gelu"], cpu_calls.TINY)
    before = torch.get_num_threads()
    rows = cpu_calls.bench(workload, 1, 2, ceiling=10.0)
    torch.set_num_threads(before)
    assert [(row["pass"], row["name"]) for row in rows] == [
        (direction, name)
        for direction in ("forward", "backward")
        for name in ("igpt_fast", "torch eager", "torch.compile")
    ]
    for row in rows:
        assert "error" not in row
        assert math.isclose(row["of_copy"], row["gb_s"] / 10.0)
    assert math.isclose(rows[0]["times_best_peer"], min(row["ms"] for row in rows[1:3]) / rows[0]["ms"])


def test_inputs_differ_and_none_is_zero(work: ModuleType, calls: ModuleType) -> None:
    for workload in work.workloads(calls.MAKERS, None, calls.TINY):
        first, again, second = (workload.inputs(CPU, seed) for seed in (0, 0, 1))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        for tensor in first:
            assert tensor.numel() == 1 or tensor.count_nonzero() > tensor.numel() // 2
        assert not torch.equal(first[0], second[0])
        assert any(workload.bytes) or any(workload.flops)


def test_a_wrong_result_is_found(work: ModuleType) -> None:
    inputs = lambda device, seed: (torch.randn(50, generator=torch.Generator().manual_seed(seed)).bfloat16(),)  # noqa: E731

    def row(ours: Any, **more: Any) -> dict[str, str]:
        return wrong(work, work.Workload("square", "50", inputs, ours, lambda x: x * x, **more))

    assert row(lambda x: x * x) == {}
    assert row(lambda x: x * x, differentiable=1) == {}
    assert "error" in row(lambda x: x * x * 1.02)[work.OURS]
    assert "error" in row(lambda x: x * x + torch.nan)[work.OURS]
    assert "shape" in row(lambda x: (x * x)[:-1])[work.OURS]
    assert "tensors" in row(lambda x: (x * x, x))[work.OURS]
    assert "error" in row(lambda x: x * x.detach(), differentiable=1)[work.OURS]  # half of the gradient
    assert row(lambda x: x * x, peers={"peer": lambda x: 1 / 0}) == {"peer": "ZeroDivisionError: division by zero"}
    assert row(lambda x: x * x, peers={"peer": lambda x: -x})["peer"].startswith("output 0: error")


def test_integers_may_differ_by_a_share(work: ModuleType) -> None:
    right, other = torch.arange(100), torch.arange(100)
    other[3] = 7
    assert work.difference(other, right, right, 0.02) == ""
    assert "others" in work.difference(other, right, right, 0.005)


def test_rates(timing: ModuleType, work: ModuleType) -> None:
    ceilings = timing.Ceilings(4000.0, 800.0)
    workload = work.Workload("op", "", lambda *_: (), abs, abs, bytes=(2e9, 0.0), flops=(4e11, 0.0))
    found = timing.rates(workload, 0, 1000.0, ceilings)  # a millisecond
    assert found == pytest.approx({"gb_s": 2000.0, "of_bandwidth": 0.5, "tflop_s": 400.0, "of_bf16": 0.5})
    assert timing.rates(workload, 1, 1000.0, ceilings) == {}


def test_turns_and_medians(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two graphs with 10 calls each, replayed 5 times a turn."""
    turns: list[str] = []
    milliseconds = {"a": iter([1.0, 9.0, 2.0]), "b": iter([4.0, 4.0, 4.0])}

    def replay(captured: Any) -> float:
        turns.append(captured.graph)
        return next(milliseconds[captured.graph])

    monkeypatch.setattr(timing, "replay_ms", replay)
    graphs = {name: timing.Captured(name, 10, [], 5) for name in ("a", "b")}
    times = timing.interleave(graphs, rounds=3)
    assert turns == ["a", "b"] * 3
    assert math.isclose(times["a"]["us"], 2000.0 / 50)
    assert times["b"] == {"us": 80.0, "us_spread": 0.0}


def test_the_outcome(work: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer may be missing, one of ours not; no row is no success."""
    bench = importlib.import_module("bench_ops")
    row = {"op": "f", "pass": "forward", "size": "1", "name": work.OURS, "us": 1.0}
    peer = row | {"name": "peer", "error": "not here"}
    assert bench.failures([row, peer]) == 0
    assert bench.failures([row | {"error": "wrong"}, peer]) == 1
    assert bench.failures([]) == 1
    assert "wrong" in capsys.readouterr().err


def test_a_workload_that_fails_costs_no_other(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, file, done = importlib.import_module("bench_ops"), tmp_path / "rows.json", []

    def measure(workload: Any, *_: Any) -> list[dict[str, Any]]:
        done.append(workload.op)
        if workload.op == "layer_norm":
            raise RuntimeError("no memory")
        return [{"op": workload.op, "pass": "forward", "size": workload.size, "name": "igpt_fast", "us": 1.0}]

    monkeypatch.setattr(backend, "unavailable", lambda _: None)
    monkeypatch.setattr(backend, "_too_old", lambda _: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(timing, "measure_ceilings", lambda _: timing.Ceilings(4000.0, 800.0))
    monkeypatch.setattr(timing, "bench", measure)
    options = ["--device", "cuda", "--ops", "rms_norm", "layer_norm", "cross_entropy", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench_ops.py", *options])
    assert bench.main() == 1
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert [row.get("error") for row in rows] == [None] * 6 + ["RuntimeError: no memory"] * 3 + [None]
    file.write_text(json.dumps({"rows": rows[:-2]}), "utf-8")
    done.clear()
    monkeypatch.setattr("sys.argv", ["bench_ops.py", *options, "--resume"])
    assert bench.main() == 1
    assert done == ["layer_norm", "cross_entropy"]
    assert json.loads(file.read_text("utf-8"))["rows"] == rows


def test_a_peer_that_ends_the_context_costs_its_own_row(
    timing: ModuleType, work: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether a call of its own does it, or a graph; the workload is measured without it after the new start."""
    bench, file = importlib.import_module("bench_ops"), tmp_path / "rows.json"
    works, x = [True], torch.ones(3)

    def ends(*_: Any) -> None:
        works[0] = False
        raise RuntimeError("CUDA error")

    def rows_of(workload: Any, *_: Any) -> list[dict[str, Any]]:
        assert not work.check(workload, torch.device("cpu"), "forward")
        return [{"op": "op", "size": "1", "name": name} for name in work.everybody(workload)]

    class Ended(BaseException):
        pass

    def start(*_: Any) -> None:
        works[0] = True
        raise Ended

    peers = {"fine": torch.square, "ends": ends}
    workload = work.Workload("op", "1", lambda *_: (x,), torch.square, torch.square, peers)
    monkeypatch.setattr(timing.common, "context_works", lambda: works[0])
    monkeypatch.setattr("os.execve", start)
    monkeypatch.setattr(backend, "unavailable", lambda _: None)
    monkeypatch.setattr(backend, "_too_old", lambda _: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(timing, "measure_ceilings", lambda _: timing.Ceilings(4000.0, 800.0))
    monkeypatch.setattr(timing, "bench", rows_of)
    monkeypatch.setattr(bench.workloads, "workloads", lambda *_: [workload])
    monkeypatch.setattr("sys.argv", ["bench_ops.py", "--device", "cuda", "--json", str(file)])
    with pytest.raises(Ended):
        bench.main()
    rows = json.loads(file.read_text("utf-8"))["rows"]
    row = {"op": "op", "size": "1", "pass": "all", "name": "ends"}
    assert rows == [row | {"lost": True, "error": "Lost: RuntimeError: CUDA error"}]
    monkeypatch.setattr("sys.argv", ["bench_ops.py", "--device", "cuda", "--json", str(file), "--resume"])
    for _ in range(2):  # and nothing more after that
        bench.main()
        rows = json.loads(file.read_text("utf-8"))["rows"]
        assert [row["name"] for row in rows] == ["ends", work.OURS, "torch eager", "fine"]
    monkeypatch.setattr(timing, "replay_ms", ends)
    with pytest.raises(timing.common.Lost, match="CUDA error") as lost:
        timing.interleave({"peer": timing.Captured("peer", 1, [])})
    assert lost.value.name == "peer"


def test_the_commands(timing: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("bench_ops")
    monkeypatch.setattr("sys.argv", ["bench_ops.py", "--device", "cuda", "--dry-run", "--ops", "rms_norm"])
    assert bench.main() == 0
    assert "torch.compile" in capsys.readouterr().out
    if backend.unavailable("cuda"):
        monkeypatch.setattr("sys.argv", ["bench_ops.py", "--device", "cuda"])
        assert bench.main() == 3
        assert "no kernel can be measured" in capsys.readouterr().err
