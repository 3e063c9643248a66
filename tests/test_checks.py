"""Checks of single arguments, and what messages show of values from outside."""

import math
from typing import Any

import numpy as np
import pytest

from igpt_fast.checks import dtype_name, finite_number, whole_number
from igpt_fast.files import listed, printable, shown

HUGE = pytest.param(10**5000, id="huge")  # Python does not write it


def test_whole_numbers() -> None:
    assert type(whole_number("n", np.uint8(3), 0, 3)) is int
    assert whole_number("n", (1 << 64) - 1, 0, (1 << 64) - 1) == (1 << 64) - 1


@pytest.mark.parametrize("value", [True, np.True_, 1.0, "1", None, -1, 4, 10**100, float("nan"), HUGE])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n is .*; want an integer in 0\.\.3$") as caught:
        whole_number("n", value, 0, 3)
    assert len(str(caught.value)) < 150
    with pytest.raises(ValueError, match=r"want an integer in 0\.\.2\^64-1$"):
        whole_number("seed", -1, 0, (1 << 64) - 1)


def test_finite_numbers() -> None:
    for value in (1, np.float32(1.0), np.int64(1), 1.0):
        assert type(finite_number("x", value, 0, 1)) is float
    assert finite_number("x", 1, 0, 1, without=(0,)) == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_numbers_of_numpy_are_compared_as_floats(kind: type[np.floating]) -> None:
    """Not the bounds as numpy's: the largest ones would be infinite."""
    assert finite_number("x", kind(0.5), 0) == 0.5
    for value in (np.inf, -np.inf, np.nan):
        with pytest.raises(ValueError, match="want a number in"):
            finite_number("x", kind(value))


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, math.nan, math.inf, 10**400, HUGE, -0.1, 1.1])
def test_what_is_no_finite_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^x is .*; want a number in \[0, 1\]$"):
        finite_number("x", value, 0, 1)


def test_bounds_that_are_out_of_bounds() -> None:
    with pytest.raises(ValueError, match=r"^x is 0; want a number in \(0, 1\]$"):
        finite_number("x", 0, 0, 1, without=(0,))
    with pytest.raises(ValueError, match=r"want a number in \[0, 1\)$"):
        finite_number("x", 1.0, 0, 1, without=(1,))


def test_messages_show_little_and_only_what_prints() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    many = {i: i for i in range(10**5)}
    for value in ("\x1b[31m\u202e" * 999, [10**5000], 10**5000, deep, many, np.zeros((99, 9)), b"\n" * 999):
        for text in (shown(value), printable(value), listed([value])):
            assert len(text) <= 100
            assert text.isascii()
            assert text.isprintable()
    assert shown("a\nb") == r"'a\nb'"
    assert printable("a\nb") == r"a\nb"
    assert listed([3, "b", "a\n"], limit=2) == r"3, a\n and 1 more"
    assert dtype_name("torch.float16") == dtype_name("float16") == "float16"
