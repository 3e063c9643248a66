"""Locks: a forked child has them free, whoever held them."""

import os
import signal
import threading
import time

import pytest

from igpt_fast import locks
from igpt_fast.engines.cpu import weights
from igpt_fast.engines.cuda import step
from igpt_fast.ops import colour_table
from igpt_fast.sampling import decoding


def test_every_lock_of_the_package_is_one() -> None:
    for lock in (weights._lock, step._capturing, decoding._users_lock, colour_table.ColourTables()._lock):
        assert isinstance(lock, locks.Lock)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_while_another_thread_holds_it() -> None:
    lock, held, done = locks.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    child = os.fork()
    if child == 0:
        with lock, lock:
            os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.005)
    finally:
        done.set()
        thread.join()
    assert os.waitstatus_to_exitcode(ended[1]) == 0
