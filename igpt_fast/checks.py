"""Checks of single arguments: one value, its name, its bounds."""

from __future__ import annotations

from typing import Any

import numpy as np


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """An argument as an int.

    Raises:
        ValueError: Not an integer (``True`` is none), or out of bounds; the message starts with ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        text = repr(value)
        text = text if len(text) < 80 else text[:77] + "..."
        raise ValueError(f"{name} is {text}; want a whole number in {least}..{most}")
    return int(value)


def check_count(name: str, value: int, most: int = 1 << 30, least: int = 1) -> int:
    """The value.

    Raises:
        ValueError: Not an integer in least..most; the message says ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; want an integer in {least}..{most}")
    return value
