"""Runs every case of cases.py once on the GPU, forward and backward: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/ops/run_cases.py
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cases import CASES, Case

from igpt_fast import backend, ops
from igpt_fast.ops import colour_table


@contextmanager
def tables_at_once() -> Iterator[None]:
    """quantize builds its table of all colours for the first pixel."""
    before, colour_table.WORK = colour_table.WORK, 1
    try:
        yield
    finally:
        colour_table.WORK = before


def _with_table(x: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
    with tables_at_once():
        return ops.quantize(x, clusters)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Kernels that no case of CASES reaches, since the emulator is too slow for them, or that others stand for there.
MORE = [
    Case(
        "quantize",
        "quantize_with_a_table",
        lambda: (torch.arange(600).to(torch.uint8).view(200, 3), torch.rand(300, 3, generator=_generator())),
        _with_table,
    ),
]  # fmt: skip


def main() -> int:
    reason = backend.unavailable("cuda")
    if reason is not None:
        print(f"no case ran: {reason}", file=sys.stderr)
        return 3
    with backend.use_backend("cuda"):
        for case in (*CASES, *MORE):
            case.run(case.on("cuda"))
            torch.cuda.synchronize()  # an error belongs to the case that made it
            print(case.name)
    print(f"{len(CASES) + len(MORE)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
