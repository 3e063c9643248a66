"""Palettes by how their colours crowd, and the rows of quantize with them: noise, beside the plain scan of all colours.

The plain scan is scan.cpp, in float32, for the instructions that quantize uses (``IGPT_FAST_ISA`` chooses others).
Every call has other pixels: a processor would learn the branches of a few thousand by heart.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Generator, Tensor

from igpt_fast import environment, ops, reference

COLUMNS = ("palette", "dtype", "pixels", "clusters", "threads", "ms", "plain_ms", "times_plain")


def _line(k: int) -> Tensor:
    return torch.linspace(-1, 1, k)[:, None].repeat(1, 3)


def _diagonal(k: int, generator: Generator) -> Tensor:
    return (_line(k) + 0.01 * torch.randn(k, 3, generator=generator)).clamp(-1, 1)


def _clumps(k: int, generator: Generator) -> Tensor:
    return torch.where(torch.arange(k)[:, None] % 2 == 0, 0.5, -0.5) + 0.01 * torch.randn(k, 3, generator=generator)


def _plane(k: int, generator: Generator) -> Tensor:
    return (torch.rand(k, 3, generator=generator) * 2 - 1) * torch.tensor([1.0, 1.0, 0.0]) + 0.1


def _twins(k: int, generator: Generator) -> Tensor:
    """Pairs that are a rounding apart."""
    half = torch.rand(k // 2, 3, generator=generator) * 2 - 1
    return torch.cat([torch.nextafter(half, torch.full_like(half, 2.0)), half])


def _within_a_rounding(k: int, generator: Generator) -> Tensor:
    """Closer to one another than float32 can tell from a distance."""
    return (torch.rand(k, 3, generator=generator) * 2 - 1) * 2e-7 + 0.5


KINDS: dict[str, Callable[[int, Generator], Tensor]] = {
    "spread": lambda k, generator: torch.rand(k, 3, generator=generator) * 2 - 1,
    "grey line": lambda k, _: _line(k),
    "jittered diagonal": _diagonal,
    "two clumps": _clumps,
    "plane": _plane,
    "ball": lambda k, generator: 0.1 * torch.randn(k, 3, generator=generator),
    "near twins": _twins,
    "within a rounding": _within_a_rounding,
}
SIZES = (64, 1024, 4096, 32768, 1 << 18)
CLOSEST = ("grey line", 4096)  # near-equal colours, of which lists help least


def palette(kind: str, k: int = 512) -> Tensor:
    """(k, 3) float32, the same at every call."""
    return KINDS[kind](k, torch.Generator().manual_seed(7))


def _plain(threads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The plain scan of float32 pixels."""
    import ctypes

    import ceilings

    live = environment.config()["isa"]["live"]
    level = {"generic": "x86-64", "avx2": "x86-64-v3"}.get(live, "x86-64-v4")
    march = [f"-march={level}"] if platform.machine() == "x86_64" else []
    scan = ceilings.compiled("scan", "-ffp-contract=off", *march).plain_scan
    scan.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    scan.restype = None

    def run(x: Tensor, clusters: Tensor) -> Tensor:
        out = torch.empty(len(x), dtype=torch.int64)
        scan(x.data_ptr(), clusters.data_ptr(), out.data_ptr(), len(x), len(clusters), threads if len(x) >= 4096 else 1)
        return out

    return run


def bench(threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each palette, size and dtype; ``times_plain`` is the share of the plain scan's time."""
    torch.set_num_threads(threads)
    x = torch.randint(0, 256, (SIZES[-1], 3), generator=Generator().manual_seed(0), dtype=torch.uint8)
    floats = torch.rand(SIZES[-1], 3, generator=Generator().manual_seed(1)) * 2 - 1
    scan, rows = _plain(threads), []
    for kind, k in (*((kind, 512) for kind in KINDS), CLOSEST):
        common.say(f"quantize: {kind}, {k} colours, {threads} thread(s)")
        clusters = palette(kind, k)
        for each in (x, floats):
            if not torch.equal(ops.quantize(each, clusters)[::61], reference.quantize(each[::61], clusters)):
                raise SystemExit(
                    f"quantize, {kind}, {k} colours: other tokens than the definition's; a time means nothing"
                )
        for pixels in SIZES:
            runs = {}
            for name, run, all_of_them in (
                ("uint8", ops.quantize, x),
                ("float32", ops.quantize, floats),
                ("plain", scan, floats),
            ):
                parts = itertools.cycle(all_of_them.split(pixels))
                runs[name] = lambda run=run, parts=parts, c=clusters: run(next(parts), c)
            times = common.interleave(runs, rounds, seconds=0.02)
            plain = times.pop("plain")["ms"]
            sizes = {"op": "quantize", "palette": kind, "pixels": pixels, "clusters": k, "threads": threads}
            for name, time in times.items():
                rows.append({**sizes, "dtype": name, **time, "plain_ms": plain, "times_plain": time["ms"] / plain})
    return rows
