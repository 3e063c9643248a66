"""Ctrl-C is held back to the end of a block, a second one is not, and an echo of the first is none."""

import signal

import pytest

from igpt_fast.interrupts import delayed_interrupt


def twice(echo: float, done: list[float]) -> None:
    with delayed_interrupt(echo) as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        done.append(echo)


def test_a_second_interrupt_and_an_echo() -> None:
    done: list[float] = []
    for echo in (60.0, 0.0):
        with pytest.raises(KeyboardInterrupt):
            twice(echo, done)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == [60.0]
