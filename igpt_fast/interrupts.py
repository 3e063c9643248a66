"""Ctrl-C at the right moment: held back while something is written or half updated."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def delayed_interrupt(echo: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C back to the end of the block, where it is raised; yields whether there was one.

    In the middle of a step weights may be half updated, and of files some may have their names; a second Ctrl-C does
    not wait, unless it comes within ``echo`` seconds, as the same one by another way. Where Python's own handler is
    not in force - in another thread, or a program with its own - it is left alone.
    """
    hits: list[float] = []

    def handler(number: int, frame: object) -> None:
        hits.append(time.monotonic())
        if len(hits) > 1 and hits[-1] - hits[0] >= echo:
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
