"""Ctrl-C at the right moment: held back while something is written or half updated."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a block is done, so that it does not cost the finished images; a second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = False

    def note(number: int, frame: Any) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back to the end of the block, where it is raised; yields whether there was one.

    In the middle of a step the weights may be half updated. Where Python's own handler is not in force - in
    another thread, or a program with its own - it is left alone.
    """
    hits: list[int] = []

    def handler(number: int, frame: object) -> None:
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hits:
        raise KeyboardInterrupt
