"""Which part of a run is whose, and who speaks when a process is gone; whole commands: cli/draw/test_sharding.py."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from igpt_fast import world


def test_shares_are_all_and_nothing_twice() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 5, 7, 100):
            shares = []
            for rank in range(size):
                together = world.World()
                together.rank, together.size = rank, size
                shares.append(together.share(count))
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def leaving(together: world.Torchrun, rank: int) -> object:
    """What process ``rank`` leaves with on SIGTERM."""
    together.rank = rank
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            world._leave(together)
    finally:
        signal.signal(signal.SIGTERM, before)
    return stop.value.code


def test_who_says_that_a_process_is_gone() -> None:
    """The first that is left; nobody, where one has already said why it failed."""
    together = object.__new__(world.Torchrun)
    together.size, together.outcome, together._store = 3, "nothing is written", dist.HashStore()
    for rank in range(3):
        together._store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")
    stopped = "igpt: stopped by SIGTERM; nothing is written"
    assert [leaving(together, rank) for rank in range(3)] == [stopped, 1, 1]
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    together._store.set("process/0", f"{gone.pid} {socket.gethostname()}")
    assert [leaving(together, rank) for rank in (1, 2)] == ["igpt: rank 0 is gone; nothing is written", 1]
    together._store.set("failed/others", "1")
    assert [leaving(together, rank) for rank in (1, 2)] == [1, 1]
