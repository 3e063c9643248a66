"""How the figures of CUDA kernels are made: equality first, then CUDA graphs, by turns, with a cold L2 cache.

The inputs of a workload (workloads.py) are made several times over, until together they are five times as large as the
L2 cache; a graph calls a candidate once with each of them, so every call finds its inputs in memory. The graphs of all
candidates are replayed in turns, between two events; a figure is the median over the rounds, divided by the calls in a
graph. No input is zero: zeros draw less power, and clock higher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch import Tensor
from workloads import OURS, Function, Workload, check, everybody, gradients, passes, prepare

MAX_SETS = 256
ROUNDS = 15
REPLAY_MS = 4.0  # a turn replays a fast graph until it has lasted about this long


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at its best, measured."""

    copy_gb_s: float
    bf16_tflop_s: float


# ---- Time ---------------------------------------------------------------------------------------------------


def input_bytes(inputs: Sequence[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))


def input_sets(workload: Workload, device: torch.device) -> tuple[list[tuple[Any, ...]], bool]:
    """Inputs, several times over, and whether they are enough to find the L2 cache cold."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [workload.inputs(device, 0)]
    wanted = max(2, -(-5 * cache // max(1, input_bytes(sets[0]))))
    sets += [workload.inputs(device, seed) for seed in range(1, min(wanted, MAX_SETS))]
    return sets, wanted <= MAX_SETS


@dataclass
class Calls:
    """In place of a graph."""

    calls: list[Callable[[], Any]]

    def replay(self) -> None:
        for call in self.calls:
            call()


@dataclass
class Captured:
    """A graph with one call for each set of inputs."""

    graph: torch.cuda.CUDAGraph | Calls
    calls: int
    held: list[Callable[[], Any]]  # whose tensors the graph uses
    replays: int = 1


def capture(function: Function, sets: Sequence[Sequence[Any]], differentiable: int, as_graph: bool = True) -> Captured:
    """Captures the calls on a stream of their own; the forward of a backward runs on it too."""
    if not as_graph:
        return measured(
            Captured(Calls(found := [prepare(function, x, differentiable) for x in sets]), len(sets), found)
        )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), gradients(bool(differentiable)):
        calls = [prepare(function, inputs, differentiable) for inputs in sets]
        for _ in range(3):  # compiles, chooses algorithms, allocates workspaces
            calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with gradients(bool(differentiable)), torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return measured(Captured(graph, len(calls), calls))


def measured(captured: Captured) -> Captured:
    """With as many replays in a turn as make it long enough."""
    replay_ms(captured)
    captured.replays = max(1, min(1000, round(REPLAY_MS / max(replay_ms(captured), 1e-3))))
    return captured


def replay_ms(captured: Captured) -> float:
    """Milliseconds of ``captured.replays`` replays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(captured.replays):
        captured.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(graphs: dict[str, Captured], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Name -> ``us`` of a call (median over the rounds), ``us_spread`` (third minus first quartile).

    Raises:
        Lost: One of them ended the CUDA context.
    """
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, captured in graphs.items():
            try:
                found[name].append(1e3 * replay_ms(captured) / captured.replays / captured.calls)
            except Exception as failure:
                common.check_context(name, f"{type(failure).__name__}: {str(failure).strip()[:200]}")
                raise
    times = {}
    for name, us in found.items():
        quartiles = statistics.quantiles(us, n=4)
        times[name] = {"us": statistics.median(us), "us_spread": quartiles[2] - quartiles[0]}
    return times


def measure_ceilings(device: torch.device) -> Ceilings:
    """The bandwidth of a copy of 4 GiB, read and written, and the speed of an 8192-cubed product in bfloat16.

    The best of several ways to copy: a plain one in a graph is left to the driver, and was seen at two thirds of what
    kernels reach.
    """
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randn(1 << 29, generator=generator, device=device, dtype=torch.bfloat16).repeat(4)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))

    def negate(x: Tensor) -> Tensor:
        return torch.neg(x, out=target)

    graphs = {
        "copy": capture(target.copy_, [(source,)], 0),
        "copy outside a graph": capture(target.copy_, [(source,)], 0, as_graph=False),
        "negation": capture(negate, [(source,)], 0),
        "matmul": capture(torch.matmul, [(a, b)], 0),
    }
    times = interleave(graphs)
    matmul = times.pop("matmul")["us"]
    for name, time in times.items():
        common.say(f"{name}: {2 * input_bytes([source]) / time['us'] / 1e3:.0f} GB/s")
    copy = min(time["us"] for time in times.values())
    return Ceilings(2 * input_bytes([source]) / copy / 1e3, 2 * 8192**3 / matmul / 1e6)


def bench(workload: Workload, device: torch.device, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of a workload: one for each pass and candidate; ``error`` in place of a time where there is none.

    Raises:
        Lost: One of them ended the CUDA context.
    """
    rows = []
    for number, direction in enumerate(passes(workload)):
        common.say(f"{workload.op} {direction}, {workload.size}")
        count = workload.differentiable if direction == "backward" else 0
        wrong = check(workload, device, direction)
        sets, cold = input_sets(workload, device)
        graphs: dict[str, Captured] = {}
        for name, function in everybody(workload).items():
            if name not in wrong:
                try:
                    graphs[name] = capture(function, sets, count, workload.graph)
                except Exception as failure:
                    wrong[name] = f"not captured: {type(failure).__name__}: {str(failure).strip()[:200]}"
                    common.check_context(name, wrong[name])
        times = interleave(graphs) if graphs else {}
        peers = [time["us"] for name, time in times.items() if not name.startswith(OURS)]
        for name in everybody(workload):
            row = {"op": workload.op, "pass": direction, "size": workload.size, "name": name, "cold": cold}
            if name in wrong:
                rows.append(row | {"error": wrong[name]})
                continue
            row |= times[name] | rates(workload, number, times[name]["us"], ceilings)
            if name == OURS and peers:
                row["times_best_peer"] = min(peers) / times[name]["us"]
            rows.append(row)
        del graphs, sets
        torch.compiler.reset()  # its graphs are captured; the next size would count as one more recompilation
        torch.cuda.empty_cache()
    return rows


def rates(workload: Workload, number: int, us: float, ceilings: Ceilings) -> dict[str, float]:
    """Speed, absolute and as a share of the measured ceilings."""
    found: dict[str, float] = {}
    if size := workload.bytes[number]:
        gb_s = size / us / 1e3
        found |= {"gb_s": gb_s, "of_bandwidth": gb_s / ceilings.copy_gb_s}
    if operations := workload.flops[number]:
        tflop_s = operations / us / 1e6
        found |= {"tflop_s": tflop_s, "of_bf16": tflop_s / ceilings.bf16_tflop_s}
    return found
