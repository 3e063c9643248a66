"""Which of the processes that torchrun has started this one is."""

from __future__ import annotations

import os
import re

from igpt_fast.files import shown


def rank() -> int:
    """Number of this process; 0 where there is one."""
    return _number("RANK", os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int | None:
    """Number of this process on its machine, by which it takes its GPU; ``None`` where there is one process."""
    return _number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0")) if size() > 1 else None


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"{name} is {shown(text)}; torchrun sets it to the number of a process, or of all")
    return int(text)
