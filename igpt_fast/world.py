"""The processes of a run: under ``torchrun`` each takes a part, the first one writes; how they know of each other.

Each one shows in the store that torchrun keeps that it is alive; one that has stopped to do so ends the others.
Sampling does without collective operations while it draws: a slow process keeps nobody from anything. Process r of R
draws the r-th of R parts, each of images that follow each other. When all have said that they are ready, the images are
gathered (gloo).

Training does one collective operation after the other (gloo, nccl), in which Python cannot be reached: while it is
watched over (``watched``), a process that is gone ends the others, at the latest some seconds after the operation
should have failed by itself.

On SIGTERM, by which torchrun ends the rest when one process has failed, the first that is left says which one is gone.
On Ctrl-C, which torchrun passes on to all, each hands over what it has finished; torchrun gives them half a minute.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from igpt_fast.processes import size

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

BEAT = 1.0  # seconds between two signs of life
SILENCE = 120.0  # without one, after which a process counts as gone: more than reading a file may hold Python up
GRACE = 5.0  # seconds in which a collective operation may fail by itself, and say so, when a process is gone
START = 300.0  # for all processes to start, and for gathering
HANDOVER = 20.0  # for all processes to hand over after Ctrl-C; torchrun kills after 30


class PeerGoneError(RuntimeError):
    """Another process of the run is gone."""


class World:
    """The processes that work together: one, which needs nobody."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process checks, writes and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things are this process's."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def agree(self, name: str, value: int) -> int:
        """The first process's value."""
        return value

    def first_makes(self, make: Callable[[], T]) -> T:
        """What the first process makes, however long it takes; the others get a copy, and do not call ``make``.

        Raises:
            PeerGoneError: Another one is gone.
        """
        return make()

    def total(self, values: list[float]) -> list[float]:
        """The sums over all processes, of numbers that each one has; a collective operation."""
        return values

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes of a tensor that each one has; a collective operation, on its device, which the
        host does not wait for on a GPU."""
        return value

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For a block with collective operations: see above.

        Raises:
            PeerGoneError: An operation failed because another process is gone.
        """
        yield

    def progress(self, done: float) -> float:
        """Says how much this process has done; returns what all have.

        Raises:
            PeerGoneError: Another one is gone.
        """
        return done

    def gather(self, part: Any, interrupted: bool, tick: Callable[[float], None]) -> list[Any] | None:
        """The parts of all processes, on the first one; ``None`` on the others. It is to be quick if ``interrupted``;
        ``tick`` is called now and then with what all have done.

        Raises:
            PeerGoneError: Another one is gone.
        """
        return [part]


class Torchrun(World):
    """Several processes."""

    def __init__(self, outcome: str, backend: str) -> None:
        import torch.distributed as dist

        self.outcome = outcome

        patience = timedelta(seconds=START)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=patience))
        self._store: Store = dist.PrefixStore("igpt", store)
        self._store.set(f"process/{self.rank}", f"{os.getpid()} {_place()}")
        self._done = 0.0
        self._elsewhere = [0.0] * self.size
        self._heard = [("", time.monotonic() + START - SILENCE)] * self.size
        self._lost = ""
        self._watching = False
        self._blocks = self._agreed = 0  # how many there were; all processes count alike
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        store = dist.PrefixStore("gloo", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=patience)

    def _beat(self) -> None:
        """Shows that this process is alive, and listens to the others; in a thread of its own."""
        count = 0
        while not self._stop.wait(BEAT):
            count, absent = count + 1, []
            try:
                if not self._lost:
                    self._store.set(f"beat/{self.rank}", f"{count} {self._done}")
                    for peer in range(self.size):
                        if peer != self.rank and self._store.check([f"beat/{peer}"]):
                            self._listen(peer, self._store.get(f"beat/{peer}").decode())
                    absent = self._absent() if self._watching else []
            except RuntimeError as error:
                self._lost = _no_store(error)
            if self._watching and (self._lost or absent):
                self._end()

    def _absent(self) -> list[int]:
        """Processes that are gone or silent, and have not left the watched block by its end."""
        now = time.monotonic()
        silent = [i for i, (_, heard) in enumerate(self._heard) if i != self.rank and now - heard > SILENCE]
        return [i for i in sorted({*self.gone(), *silent}) if not self._store.check([f"left/{self._blocks}/{i}"])]

    def _end(self) -> None:
        """Ends this process from the thread, where the main one waits in an operation that does not end."""
        end = time.monotonic() + GRACE
        while self._watching and time.monotonic() <= end:
            time.sleep(0.1)
        if not self._watching:
            return
        absent: list[int] = []
        try:
            absent = [] if self._lost else self._absent()
            speaks = not absent or (not self.said() and self.rank == min(set(range(self.size)).difference(absent)))
        except RuntimeError as error:  # who held the store has left meanwhile
            self._lost, speaks = _no_store(error), True
        try:
            if speaks:
                print(f"igpt: {self._lost or _ranks(absent)}; {self.outcome}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    def _listen(self, peer: int, beat: str) -> None:
        if beat != self._heard[peer][0]:
            self._heard[peer] = beat, time.monotonic()
            self._elsewhere[peer] = float(beat.split()[1])

    def _check_peers(self) -> None:
        if self._lost:
            raise PeerGoneError(self._lost)
        now = time.monotonic()
        silent = [i for i, (_, heard) in enumerate(self._heard) if i != self.rank and now - heard > SILENCE]
        if silent and not self._store.check([f"ready/{peer}" for peer in silent]):
            raise PeerGoneError(f"{_ranks(silent)} without a sign of life; {self.outcome}")

    def gone(self) -> list[int]:
        """Processes of this machine that are no longer there."""
        gone = []
        for peer in range(self.size):
            if self._store.check([f"process/{peer}"]):
                pid, place = self._store.get(f"process/{peer}").decode().split(" ", 1)
                if place == _place() and not _exists(int(pid)):
                    gone.append(peer)
        return gone

    def agree(self, name: str, value: int) -> int:
        self._agreed += 1
        name = f"{name}/{self._agreed}"
        if self.first:
            self._store.set(name, str(value))
            return value
        self._wait([name])
        return int(self._store.get(name))

    def first_makes(self, make: Callable[[], T]) -> T:
        import torch
        import torch.distributed as dist

        made: list[Any] = [make() if self.first else None]
        self.agree("made", 1)
        dist.broadcast_object_list(made, device=torch.device("cpu"))
        return made[0]

    def total(self, values: list[float]) -> list[float]:
        import torch

        sums = torch.tensor(values, dtype=torch.float64)
        return self.summed(sums).tolist()

    def summed(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(value)
        return value

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._blocks += 1
        self._watching = True
        try:
            yield
            self._store.set(f"left/{self._blocks}/{self.rank}", "1")
        except RuntimeError as error:
            if type(error).__module__ not in ("builtins", "torch._C._distributed_c10d", "torch.distributed"):
                raise
            end = time.monotonic() + GRACE / 2
            try:
                while not (gone := self.gone()) and time.monotonic() < end:  # SIGTERM may come meanwhile: ``_leave``
                    time.sleep(0.05)
            except RuntimeError as lost:
                raise PeerGoneError(f"{_no_store(lost)}; {self.outcome}") from error
            if not gone:
                raise
            raise PeerGoneError(f"{_ranks(gone)}; {self.outcome}") from error
        finally:
            self._watching = False

    def progress(self, done: float) -> float:
        self._done = done
        self._check_peers()
        return done + sum(self._elsewhere)

    def gather(self, part: Any, interrupted: bool, tick: Callable[[float], None]) -> list[Any] | None:
        import torch.distributed as dist

        self._store.set(f"ready/{self.rank}", "interrupted" if interrupted else "done")
        self._wait([f"ready/{peer}" for peer in range(self.size)], tick, HANDOVER if interrupted else None)
        parts: list[Any] | None = [None] * self.size if self.first else None
        try:
            dist.gather_object(part, parts)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise PeerGoneError(f"another process is gone; {self.outcome}: {why}") from error
        return parts

    def _wait(self, keys: list[str], tick: Callable[[float], None] | None = None, limit: float | None = None) -> None:
        """Until the keys are there; for ``limit`` seconds, or as long as the others live.

        With a ``tick`` there is something to hand over: then Ctrl-C, which the others hear as well, is such a limit.
        """
        start = time.monotonic()
        while not self._store.check(keys):
            try:
                time.sleep(0.02)
                done = self.progress(self._done)
                if tick is not None:
                    tick(done)
            except KeyboardInterrupt:
                if tick is None:
                    raise
                start, limit = time.monotonic(), HANDOVER
            if limit is not None and time.monotonic() - start > limit:
                missing = [i for i, key in enumerate(keys) if not self._store.check([key])]
                names = ", ".join(map(str, missing))
                raise PeerGoneError(f"rank {names} not ready {limit:.0f} s after Ctrl-C; {self.outcome}")

    def speaks(self) -> bool:
        """Whether it is for this process to say that it fails: the first, and others where it does not fail too."""
        try:
            if self.first:
                self._store.set("failed/first", "1")
                return True
            if self._store.add("failed/others", 1) > 1:
                return False
            self._store.wait(["failed/first"], timedelta(seconds=3))
        except RuntimeError:  # the first one is silent, or there is no store any more
            return True
        return False

    def said(self) -> bool:
        """Whether some process has said why it failed."""
        return any(self._store.check([f"failed/{who}"]) for who in ("first", "others"))

    def close(self) -> None:
        """Leaves the run. Nobody waits for anybody: who comes last here may be killed, and others are not."""
        import torch.distributed as dist

        self._stop.set()
        self._thread.join()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def world(outcome: str = "nothing is written", backend: str = "gloo") -> Iterator[World]:
    """The processes of this run, for the length of a block.

    A process other than the first leaves without a word where the first has the same to say. ``outcome``: what is said
    of the results where the run ends because a process is gone. ``backend``: of torch.distributed.

    Raises:
        SystemExit: With code 1, where another process is gone or has spoken.
    """
    if size() == 1:
        yield World()
        return
    together = Torchrun(outcome, backend)
    before = signal.signal(signal.SIGTERM, lambda *_: _leave(together))
    try:
        yield together
    except KeyboardInterrupt:
        if together.first:
            raise
        raise SystemExit(130) from None
    except Exception as error:
        if not together.speaks():
            raise SystemExit(1) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        together.close()


def _leave(together: Torchrun) -> None:
    """On SIGTERM: cleans up as any exit does; the first process that is left says which one is gone without a word."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        gone = together.gone()
        speaks = not together.said() and together.rank == min(set(range(together.size)).difference(gone))
    except RuntimeError as error:
        raise SystemExit(f"igpt: {_no_store(error)}; {together.outcome}") from error
    if not speaks:
        raise SystemExit(1)
    raise SystemExit(f"igpt: {_ranks(gone) if gone else 'stopped by SIGTERM'}; {together.outcome}")


@functools.cache
def _place() -> str:
    """Where a process has its number: host, its start, namespace. Containers may share a name, without seeing into each
    other; systems without /proc have the name alone."""
    place = socket.gethostname()
    with suppress(OSError):
        place += f" {Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()}"
        place += f" {os.readlink('/proc/self/ns/pid')}"
    return place


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _no_store(error: RuntimeError) -> str:
    """What a failed question to the store says (DistError and its kin): who held it is gone."""
    return f"the store of the run is gone: {str(error).splitlines()[0]}"


def _ranks(numbers: list[int]) -> str:
    names = ", ".join(map(str, numbers))
    return f"rank {names} is gone" if len(numbers) == 1 else f"ranks {names} are gone"
