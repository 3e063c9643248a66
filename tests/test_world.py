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
        together._store.set(f"process/{rank}", f"{os.getpid()} {world._place()}")
    stopped = "igpt: stopped by SIGTERM; nothing is written"
    assert [leaving(together, rank) for rank in range(3)] == [stopped, 1, 1]
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    together._store.set("process/0", f"{gone.pid} {socket.gethostname()}")
    assert together.gone() == []  # of a container of the same name, whose numbers are others
    together._store.set("process/0", f"{gone.pid} {world._place()}")
    assert [leaving(together, rank) for rank in (1, 2)] == ["igpt: rank 0 is gone; nothing is written", 1]
    together._store.set("failed/others", "1")
    assert [leaving(together, rank) for rank in (1, 2)] == [1, 1]


WATCHED = """
import os, signal, sys, time
killed = int(sys.argv[1])
from igpt_fast import world
with world.world("kept") as together:
    world.GRACE = 0.5 + together.rank
    assert together.total([1.0, 2.0]) == [float(together.size), 2.0 * together.size]
    assert together.first_makes(lambda: [together.rank]) == [0]
    with together.watched():
        pass
    with together.watched():
        if together.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
"""


@pytest.mark.clock
@pytest.mark.parametrize(("size", "killed"), [(2, 1), (3, 1), (3, 0)])
def test_a_process_that_waits_for_one_that_is_gone_is_ended(size: int, killed: int) -> None:
    """Also where nothing comes back from what it waits in, as from a collective operation of a GPU; and where the first
    process, which holds the store, leaves before the others do.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    runs = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **place}
        command = [sys.executable, "-W", "ignore", "-c", WATCHED, str(killed)]
        runs.append(subprocess.Popen(command, env={**os.environ, **more}, stderr=-1, text=True))
    try:
        assert runs[killed].wait(timeout=120) == -signal.SIGKILL
        said = [run.communicate(timeout=30)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    codes = [1] * size
    codes[killed] = -signal.SIGKILL
    assert [run.returncode for run in runs] == codes
    if killed:
        assert said[0] == "igpt: rank 1 is gone; kept\n"
    for error in said[1:]:
        last = error.splitlines()[-1:]  # after what torch says
        assert not last or last[0].startswith("igpt: the store of the run is gone: ")
