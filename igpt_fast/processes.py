"""Which of the processes that torchrun has started this one is."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process; 0 where there is one."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise ValueError(f"WORLD_SIZE is {text!r}; torchrun sets it to the number of processes")
    return int(text)


def local_rank() -> int | None:
    """Number of this process on its machine, by which it takes its GPU; ``None`` where there is one process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else None
