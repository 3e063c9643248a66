"""Causal attention on the CPU, for cpu_ops.py: of a packed projection, so that the copies of its gradient count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from cuda_timing import Workload
from torch import Tensor

from igpt_fast import ops, reference

if TYPE_CHECKING:
    from cpu_ops import Size

# (heads, head_dim, positions) of each model.
SHAPES = {"S": (8, 64, 1024), "M": (8, 128, 1024), "L": (16, 96, 1024), "tiny": (2, 32, 33)}


def causal_attention(size: Size) -> Iterator[Workload]:
    h, d, t = SHAPES[size.name]
    b = min(size.rows // t, 4)  # a training step's batch at most: the definition writes all scores out
    if b == 0 or size.dtype != torch.bfloat16:
        return

    def inputs(_: torch.device, seed: int) -> tuple[Tensor]:
        return (torch.randn(b, t, 3, h, d, generator=torch.Generator().manual_seed(seed)).to(size.dtype),)

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        return q, k, v

    products = 4.0 * b * h * d * t * (t + 1) / 2
    yield Workload(
        op="causal_attention",
        size=f"{size}: {b} x {h} x {t} x {d}",
        inputs=inputs,
        ours=lambda packed: ops.causal_attention_packed(packed).transpose(1, 2),
        definition=lambda packed: reference.causal_attention(*split(packed), scale=d**-0.5)[0],
        peers={"SDPA": lambda packed: F.scaled_dot_product_attention(*split(packed), is_causal=True)},
        differentiable=1,
        flops=(products, 2.5 * products),
    )
