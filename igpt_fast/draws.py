"""How a colour is drawn: four numbers, checked once and handed on as one. Standard library only."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

_NUMBERS = (  # those that become floats: name, whether a value is within, what is wanted
    ("temperature", lambda value: 0 <= value <= sys.float_info.max, "a finite number, 0 or above"),
    ("top_p", lambda value: 0 < value <= 1, "a number in (0, 1], or None"),
    ("min_p", lambda value: 0 <= value <= 1, "a number in [0, 1], or None"),
)


@dataclass(frozen=True)
class Sampling:
    """How a colour is drawn from logits: temperature, then top-k, top-p and min-p, each among what is left.

    Args:
        temperature: Divides the logits; 0 takes the most likely colour.
        top_k: Draw among the k most likely colours only.
        top_p: Draw among the most likely colours that reach this probability only.
        min_p: Draw among the colours that are at least this fraction as likely as the most likely one only.

    Raises:
        ValueError: A number out of its range, or something that is no number.

    Source: see ``reference.sample``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        for name, within, wanted in _NUMBERS:
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            # Compared as it is: an integer may be too large for a float.
            is_number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
            if not is_number or not within(value):
                raise ValueError(f"sample: {name} is {_shown(value)}; want {wanted}")
            if type(value) is not float:
                object.__setattr__(self, name, float(value))
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"sample: top_k is {_shown(k)}; want an integer, 1 or above, or None")


PLAIN = Sampling()  # in proportion to the probabilities


def _shown(value: Any) -> str:
    """``repr``, of a length that a message has room for."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value[:80]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
