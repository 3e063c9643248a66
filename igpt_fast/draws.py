"""How images are drawn: the numbers that are asked for, each checked once. Standard library only."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

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
        put = object.__setattr__  # past the frozen attributes; torch 2.8 compiles no vars()
        put(self, "temperature", finite_number("sample: temperature", self.temperature, 0, sys.float_info.max))
        if self.top_k is not None:
            put(self, "top_k", whole_number("sample: top_k", self.top_k, most=(1 << 63) - 1))
        if self.top_p is not None:
            put(self, "top_p", finite_number("sample: top_p", self.top_p, 0, 1, without=(0,)))
        if self.min_p is not None:
            put(self, "min_p", finite_number("sample: min_p", self.min_p, 0, 1))

    def keywords(self) -> dict[str, Any]:
        """The four, as the ops take them."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


PLAIN = Sampling()  # in proportion to the probabilities
MAX_IMAGES = 1 << 24  # of one call
MAX_SCALE = 1000.0  # of guidance; its logits stay far within float32


def check_seed(seed: int) -> int:
    """The seed; ValueError unless it is an integer in 0..2^64-1."""
    return whole_number("seed", seed, 0, (1 << 64) - 1)


def check_scale(name: str, value: float) -> float:
    """The scale of a guidance; ValueError, which says ``name``, unless it is a number in 0..1000."""
    return finite_number(name, value, 0, MAX_SCALE)
