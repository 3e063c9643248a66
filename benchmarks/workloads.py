"""What a workload is, one call of an op at one size with everybody who can do it, and who of them gives what is right.

How they are timed is the business of cuda_timing.py and of cpu_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import common
import torch
from torch import Tensor

OURS = "igpt_fast"

Function = Callable[..., Any]
Size = TypeVar("Size")


@dataclass(frozen=True)
class Workload:
    """One call.

    Attributes:
        op: A name of ``igpt_fast.ops``.
        size: What distinguishes it from the op's other workloads.
        inputs: Makes them on a device; another seed, other values.
        ours: The op.
        definition: The same in plain PyTorch, called also with float64 in place of the floating-point inputs. It is
            timed as "torch eager".
        peers: Name -> others who do it; those whose names begin with ``OURS`` are other ways of ours.
        differentiable: How many of the inputs, from the first on, gradients are taken for; 0: forward alone.
        bytes: Moved at least, forward and backward; 0 where arithmetic is the limit.
        flops: Done at least, forward and backward; 0 where memory is the limit.
        may_differ: Share of integer outputs that may be others: near ties, draws beside a boundary.
        not_compared: Peers that draw other numbers.
        graph: Whether a graph calls it. Without one the calls have to last longer than it takes to start them.
    """

    op: str
    size: str
    inputs: Callable[[torch.device, int], tuple[Any, ...]]
    ours: Function
    definition: Function
    peers: dict[str, Function] = field(default_factory=dict)
    differentiable: int = 0
    bytes: tuple[float, float] = (0.0, 0.0)
    flops: tuple[float, float] = (0.0, 0.0)
    may_differ: float = 0.0
    not_compared: tuple[str, ...] = ()
    graph: bool = True


def workloads(
    makers: Mapping[str, Callable[[Size], Iterator[Workload]]], names: Sequence[str] | None, sizes: Sequence[Size]
) -> Iterator[Workload]:
    """Those of the named ops, or of all, at every size."""
    for name, make in makers.items():
        if names is None or name in names:
            for size in sizes:
                yield from make(size)


# ---- Equality -----------------------------------------------------------------------------------------------


def flat(out: Any) -> list[Tensor]:
    """The tensors of an output."""
    if isinstance(out, Tensor):
        return [out]
    return [tensor for item in out or () for tensor in flat(item)]


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference."""
    return float((found.double() - exact).square().mean().sqrt()) if found.numel() else 0.0


def difference(found: Any, plain: Any, exact: Any, may_differ: float) -> str:
    """Why a result is wrong, or nothing.

    Floating point: its error against float64 may be twice that of the definition in the same dtype, and one unit of
    rounding. Integers: the share of others.
    """
    results = flat(found), flat(plain), flat(exact)
    if len({len(result) for result in results}) != 1:
        return f"{len(results[0])} tensors instead of {len(results[2])}"
    for i, (mine, usual, right) in enumerate(zip(*results, strict=True)):
        if mine.shape != right.shape:
            return f"output {i} has shape {tuple(mine.shape)}; want {tuple(right.shape)}"
        if not mine.is_floating_point():
            share = float((mine != usual).double().mean()) if mine.numel() else 0.0
            if share > may_differ:
                return f"output {i}: {100 * share:.3g} % are others"
            continue
        unit = torch.finfo(mine.dtype).eps * float(right.square().mean().sqrt())
        limit = 2 * error(usual, right) + unit
        if not error(mine, right) <= limit:
            return f"output {i}: error {error(mine, right):.3g}, allowed {limit:.3g}"
    return ""


def doubled(inputs: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def copied(inputs: Sequence[Any]) -> list[Any]:
    """Ops that write into an input start from the same."""
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]


# ---- Forward and backward -----------------------------------------------------------------------------------


def prepare(function: Function, inputs: Sequence[Any], differentiable: int) -> Callable[[], Any]:
    """What one turn calls: the forward, or with ``differentiable`` the backward of a forward that has been."""
    if not differentiable:
        return lambda: function(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs[:differentiable]]
    smooth = [out for out in flat(function(*leaves, *inputs[differentiable:])) if out.requires_grad]
    upstream = [ramp(out) for out in smooth]
    return lambda: torch.autograd.grad(smooth, leaves, upstream, retain_graph=True)


def ramp(like: Tensor) -> Tensor:
    """An upstream gradient that is the same for every dtype."""
    values = torch.arange(like.numel(), device=like.device) * 7 % 61
    return ((values - 30) / 32).to(like.dtype).view(like.shape)


def passes(workload: Workload) -> list[str]:
    return ["forward", "backward"] if workload.differentiable else ["forward"]


def everybody(workload: Workload) -> dict[str, Function]:
    return {OURS: workload.ours, "torch eager": workload.definition, **workload.peers}


@contextmanager
def gradients(wanted: bool) -> Iterator[None]:
    with torch.set_grad_enabled(wanted):
        yield


def check(workload: Workload, device: torch.device, direction: str) -> dict[str, str]:
    """Name -> why that candidate's result is wrong, or that it cannot run; nobody is in it who is right.

    Raises:
        Lost: One of them ended the CUDA context.
    """
    count = workload.differentiable if direction == "backward" else 0
    inputs = workload.inputs(device, 0)
    wrong = {}
    with gradients(bool(count)):
        exact = prepare(workload.definition, doubled(inputs), count)()
        plain = prepare(workload.definition, copied(inputs), count)()
        for name, function in everybody(workload).items():
            try:
                found = prepare(function, copied(inputs), count)()
                skipped = name in workload.not_compared
                problem = "" if skipped else difference(found, plain, exact, workload.may_differ)
            except Exception as failure:  # a peer that this machine or this torch does not have
                problem = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:200]}"
                common.check_context(name, problem)
            if problem:
                wrong[name] = problem
    return wrong
