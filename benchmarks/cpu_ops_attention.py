"""Causal attention on the CPU: what bench_ops.py times, forward and backward, on iGPT's shapes.

``torch sdpa`` is ``scaled_dot_product_attention`` (torch's flash kernel for the CPU) of the same packed projection.
Both give the gradient of the projection, so that its copies count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import ops

# (name, batch, positions, heads, head_dim): training of iGPT-S, one image, iGPT-M's and -L's heads, an odd length.
SIZES = (
    ("S, batch 4", 4, 1024, 8, 64),
    ("S, batch 1", 1, 1024, 8, 64),
    ("M", 1, 1024, 8, 128),
    ("L", 1, 1024, 16, 96),
    ("odd", 3, 333, 8, 64),
)


@dataclass(frozen=True)
class Workload:
    """Candidates for one computation; their results are to be compared before they are timed."""

    op: str
    direction: str
    size: str
    flops: float
    candidates: dict[str, Callable[[], Tensor]]


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def workloads(dtype: torch.dtype = torch.bfloat16) -> Iterator[Workload]:
    """Ours first."""
    attend: dict[str, Callable[[Tensor], Tensor]] = {"igpt_fast": ops.causal_attention_packed, "torch sdpa": sdpa}
    for name, b, t, h, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(b, t, 3, h, d, generator=generator).to(dtype)
        upstream = torch.randn(b, t, h, d, generator=generator).to(dtype)
        products = 2.0 * b * h * t * (t + 1) / 2 * d
        with torch.no_grad():
            forward = {who: bind(function, qkv) for who, function in attend.items()}
            yield Workload("causal_attention_packed", "forward", name, 2 * products, forward)
        backward = {who: gradient(function, qkv, upstream) for who, function in attend.items()}
        yield Workload("causal_attention_packed", "backward", name, 5 * products, backward)


def bind(function: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def gradient(function: Callable[[Tensor], Tensor], qkv: Tensor, upstream: Tensor) -> Callable[[], Tensor]:
    """The backward alone, of a graph that is kept."""
    leaf = qkv.clone().requires_grad_()
    out = function(leaf)
    return lambda: torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0]


def main() -> None:
    """``python benchmarks/cpu_ops_attention.py``: the table of these alone."""
    import common

    rows = []
    for work in workloads():
        results = [run() for run in work.candidates.values()]
        error = float((results[0].float() - results[1].float()).norm() / results[1].float().norm())
        if not error < 2e-2:
            raise SystemExit(f"{work.op} {work.direction}, {work.size}: relative error {error:.1e}")
        times = common.interleave(work.candidates, rounds=9)
        torch_ms = times["torch sdpa"]["ms"]
        rows += [
            {
                "op": work.op,
                "pass": work.direction,
                "size": work.size,
                "threads": torch.get_num_threads(),
                "name": who,
                **time,
                "tflop_s": work.flops / time["ms"] / 1e9,
                "times_torch": torch_ms / time["ms"],
            }
            for who, time in times.items()
        ]
    columns = ("op", "pass", "size", "threads", "name", "ms", "ms_spread", "cpu_ms", "tflop_s", "times_torch")
    print(common.table(rows, columns))


if __name__ == "__main__":
    main()
