"""Ctrl-C at the right moment: held back while something is written or half updated."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back to the end of the block, where it is raised; yields whether there was one.

    In the middle of a step weights may be half updated, and of files some may have their names; a second Ctrl-C does
    not wait. Where Python's own handler is not in force - in another thread, or a program with its own - it is left
    alone.
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
