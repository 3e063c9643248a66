"""Work in other processes, which end with the one that began them."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_stop: Any = None  # in a process that works for another: set where the work is given up


def given_up() -> bool:
    """Whether this process works for one that has given the work up."""
    return _stop is not None and bool(_stop.is_set())


def _begin(stop: Any) -> None:
    """Ctrl-C is the business of the process that began this one, and so is the end of it."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def in_processes(function: Callable[..., Any], jobs: Iterator[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """The results of all jobs, as they are done. Few jobs wait at a time, as each may hold much.

    Raises:
        RuntimeError: A process was killed.
    """
    if not workers:
        for job in jobs:
            yield function(*job)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([function.__module__])  # so that the imports are made, and held, once
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (stop,)) as pool:
        waiting: set[concurrent.futures.Future[Any]] = set()
        try:
            for job in jobs:
                waiting.add(pool.submit(function, *job))
                if len(waiting) >= 2 * workers:
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError("a process that decodes was killed, perhaps for want of memory; resume") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
