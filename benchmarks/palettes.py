"""Palettes by how their colours crowd, and the rows of quantize with them: noise, beside the plain scan of all colours.

The plain scan is quantize's own for pixels outside [-1, 1]: with such a one among every 64, all are compared with all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Generator, Tensor

from igpt_fast import ops, reference

COLUMNS = ("palette", "dtype", "pixels", "clusters", "threads", "ms", "plain_ms", "times_plain")


def _line(k: int) -> Tensor:
    return torch.linspace(-1, 1, k)[:, None].repeat(1, 3)


def _diagonal(k: int, generator: Generator) -> Tensor:
    return (_line(k) + 0.01 * torch.randn(k, 3, generator=generator)).clamp(-1, 1)


def _clumps(k: int, generator: Generator) -> Tensor:
    return torch.where(torch.arange(k)[:, None] % 2 == 0, 0.5, -0.5) + 0.01 * torch.randn(k, 3, generator=generator)


def _plane(k: int, generator: Generator) -> Tensor:
    return (torch.rand(k, 3, generator=generator) * 2 - 1) * torch.tensor([1.0, 1.0, 0.0]) + 0.1


KINDS: dict[str, Callable[[int, Generator], Tensor]] = {
    "spread": lambda k, generator: torch.rand(k, 3, generator=generator) * 2 - 1,
    "grey line": lambda k, _: _line(k),
    "jittered diagonal": _diagonal,
    "two clumps": _clumps,
    "plane": _plane,
    "ball": lambda k, generator: 0.1 * torch.randn(k, 3, generator=generator),
}
CLOSEST = ("grey line", 4096)  # near-equal colours, of which lists help least


def palette(kind: str, k: int = 512) -> Tensor:
    """(k, 3) float32, the same at every call."""
    return KINDS[kind](k, torch.Generator().manual_seed(7))


def bench(threads: int, rounds: int, pixels: int = 1 << 18) -> list[dict[str, Any]]:
    """A row for each palette and dtype; ``times_plain`` is the share of the plain scan's time."""
    torch.set_num_threads(threads)
    x = torch.randint(0, 256, (pixels, 3), generator=Generator().manual_seed(0), dtype=torch.uint8)
    floats = torch.rand(pixels, 3, generator=Generator().manual_seed(1)) * 2 - 1
    outside = floats.clone()
    outside[::64] = 2.0
    rows = []
    for kind, k in (*((kind, 512) for kind in KINDS), CLOSEST):
        common.say(f"quantize: {kind}, {k} colours, {threads} thread(s)")
        clusters = palette(kind, k)
        for each in (x, floats):
            if not torch.equal(ops.quantize(each, clusters)[::61], reference.quantize(each[::61], clusters)):
                raise SystemExit(
                    f"quantize, {kind}, {k} colours: other tokens than the definition's; a time means nothing"
                )
        inputs = {"uint8": x, "float32": floats, "plain": outside}
        runs = {name: lambda x=x, c=clusters: ops.quantize(x, c) for name, x in inputs.items()}
        times = common.interleave(runs, rounds)
        plain = times.pop("plain")["ms"]
        sizes = {"op": "quantize", "palette": kind, "pixels": pixels, "clusters": len(clusters), "threads": threads}
        for name, time in times.items():
            rows.append({**sizes, "dtype": name, **time, "plain_ms": plain, "times_plain": time["ms"] / plain})
    return rows
