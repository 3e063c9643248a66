"""Checks of single arguments: one value, its name, its bounds. Standard library only."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from igpt_fast.files import shown

LARGEST = 1e30  # of numbers without bounds of their own: float32 holds it, and its inverse


def whole_number(name: str, value: Any, least: int = 1, most: int = 1 << 30) -> int:
    """An argument as an int; numpy's integers are some.

    Raises:
        ValueError: Not an integer (``True`` is none), or out of bounds; the message starts with ``name``.
    """
    if type(value) is int and least <= value <= most:  # at once: the classes of numbers are slow to ask
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name} is {shown(value)}; want an integer in {_bound(least)}..{_bound(most)}")
    return int(value)


def finite_number(
    name: str, value: Any, least: float = -LARGEST, most: float = LARGEST, *, without: tuple[float, ...] = ()
) -> float:
    """An argument as a float; integers and numpy's numbers are some.

    Args:
        name: What the message starts with.
        value: The argument.
        least, most: Its bounds.
        without: Those of the bounds that are out of bounds themselves.

    Raises:
        ValueError: Not a number (``True`` is none), NaN, or out of bounds.
    """
    if type(value) is float and least <= value <= most and value not in without:
        return value
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and not isinstance(value, Integral):
        value = float(value)  # numpy would make its own type, in which a bound may be infinite, of the bounds
    if not number or not least <= value <= most or value in without:
        interval = f"{'[('[least in without]}{least:g}, {most:g}{'])'[most in without]}"
        raise ValueError(f"{name} is {shown(value)}; want a number in {interval}")
    return float(value)


def true_or_false(name: str, value: Any) -> bool:
    """An argument as it is; TypeError, whose message starts with ``name``, unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; want True or False")
    return value


def _bound(number: int) -> str:
    """Large ones as powers of two."""
    power = number.bit_length()
    return f"2^{power}-1" if power >= 32 and number == (1 << power) - 1 else str(number)


def dtype_name(dtype: Any) -> str:
    """``"float16"`` for ``torch.float16``, and for its name."""
    return str(dtype).removeprefix("torch.")


def plain_dtype(value: Any) -> Any:
    """``torch.float16`` as ``"float16"``; anything else as it is."""
    return dtype_name(value) if str(value).startswith("torch.") else value
