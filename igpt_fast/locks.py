"""Locks that are free in a forked child, which lacks the thread that may have held them."""

from __future__ import annotations

import os
from threading import RLock
from weakref import WeakSet


class Lock:
    """A lock for ``with``; reentrant, as the collector may end something that takes it in the middle of a block."""

    def __init__(self) -> None:
        self._lock = RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_locks: WeakSet[Lock] = WeakSet()


def _renew() -> None:
    for lock in _locks:
        if not lock._lock._is_owned():  # type: ignore[attr-defined] # by whoever forks, who will release it
            lock._lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
