"""How a colour is drawn: four numbers, checked once and handed on as one. Standard library only."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from igpt_fast.checks import finite_number, whole_number


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
        checked = {"temperature": finite_number("sample: temperature", self.temperature, 0, sys.float_info.max)}
        if self.top_k is not None:
            checked["top_k"] = whole_number("sample: top_k", self.top_k)
        if self.top_p is not None:
            checked["top_p"] = finite_number("sample: top_p", self.top_p, 0, 1, without=(0,))
        if self.min_p is not None:
            checked["min_p"] = finite_number("sample: min_p", self.min_p, 0, 1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


PLAIN = Sampling()  # in proportion to the probabilities
