"""Locks: a forked child has them free, whoever held them."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from igpt_fast import locks
from igpt_fast.engines.cpu import weights
from igpt_fast.engines.cuda import capture
from igpt_fast.ops import colour_table
from igpt_fast.sampling import decoding

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
threaded = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def test_every_lock_of_the_package_is_one() -> None:
    for lock in (weights._lock, capture._lock, decoding._users_lock, colour_table.ColourTables()._lock):
        assert isinstance(lock, locks.Lock)


def in_a_child(work: Callable[[], object]) -> int:
    """The exit code of a forked child that does some work: 0 where it comes to its end, within 20 seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


@forks
@threaded
def test_a_fork_while_another_thread_holds_it() -> None:
    lock, held, done = locks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        assert in_a_child(lambda: lock.__enter__() or lock.__enter__()) == 0
    finally:
        done.set()
        thread.join()


@forks
def test_a_fork_while_this_thread_holds_it() -> None:
    lock = locks.Lock()

    def leave() -> None:
        with lock:
            pass
        lock.__exit__()
        lock.__exit__()
        with pytest.raises(RuntimeError):  # it is held no more
            lock.__exit__()

    with lock, lock:
        assert in_a_child(leave) == 0
    assert in_a_child(lock.__enter__) == 0
