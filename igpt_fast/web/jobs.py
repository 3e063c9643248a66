"""Jobs on the model, one after another, and their results in lines while they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from igpt_fast.files import first_line

MAX_JOBS = 16  # the one that has the model included
PATIENCE = 30.0  # seconds for a line to be taken
_TICK = 0.1  # seconds between two lines that say how far a drawing is


class Stopped(Exception):
    """Nobody waits for a job's result any more."""


class Job:
    """Work on the model, which says what it finds in lines; ``None`` is their end."""

    def __init__(self, work: Callable[[Job], None]) -> None:
        self.lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.future: Future[None] | None = None
        self._work, self._loop = work, asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._said = 0.0

    def stop(self) -> None:
        """Ends the work at its next line, a tenth of a second or a pixel away."""
        self._stopped.set()

    def say(self, **line: Any) -> None:
        """From the model's thread: a line for whoever has asked; ``Stopped`` where nobody listens."""
        if self._stopped.is_set():
            raise Stopped
        self._said = time.monotonic()
        self._loop.call_soon_threadsafe(self.lines.put_nowait, line)

    def advance(self, done: int, total: int) -> None:
        """From the model's thread, at every pixel; the ``Progress`` of a stream."""
        if time.monotonic() - self._said > _TICK:
            self.say(done=done, total=total)

    def run(self, ended: Callable[[Job], None]) -> None:
        """In the model's thread."""
        try:
            with contextlib.suppress(Stopped):
                try:
                    self._work(self)
                except Exception as error:  # whatever it is: who has asked is told, and the next one has the model
                    if isinstance(error, Stopped):
                        raise
                    self.say(error=first_line(error))
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(ended, self)


class Turns:
    """Jobs in their order; those that wait are told how many are before them.

    All have one thread: OpenMP keeps a team of threads for each one that calls it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "model")
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs)

    def prepare(self, work: Callable[[], object]) -> None:
        """Does something in the model's thread before the first job."""
        self._thread.submit(work)

    def add(self, work: Callable[[Job], None]) -> Job:
        """Puts a job at the end of the queue; HTTPException where that is full."""
        if len(self._jobs) >= MAX_JOBS:
            raise HTTPException(503, f"{MAX_JOBS} others are drawing or waiting; try again later")
        job = Job(work)
        job.lines.put_nowait({"waiting": len(self._jobs)})
        self._jobs.append(job)
        job.future = self._thread.submit(job.run, self._ended)
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.stop()
        if job.future is not None and job.future.cancel():
            self._ended(job)

    def stop(self) -> None:
        """Ends all, as if everybody had left."""
        for job in self._jobs:
            job.stop()

    def close(self) -> None:
        """When the loop has ended: waits for the thread."""
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _ended(self, job: Job) -> None:
        self._jobs.remove(job)
        job.lines.put_nowait(None)
        for place, other in enumerate(self._jobs):
            other.lines.put_nowait({"waiting": place})


class Lines(Response):
    """A job's lines, as JSON, while they come. It ends with its reader: one who leaves, or who takes no line for
    ``PATIENCE`` seconds. The work does not wait for them: a slow reader keeps nobody from the model.
    """

    media_type = "application/x-ndjson"

    def __init__(self, turns: Turns, job: Job) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._turns, self._job = turns, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing, leaving = asyncio.create_task(self._write(send)), asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writing.cancel()
            leaving.cancel()
            self._turns.leave(self._job)
        with contextlib.suppress(asyncio.CancelledError, TimeoutError):
            await writing

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (line := await self._job.lines.get()) is not None:
            body = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            async with asyncio.timeout(PATIENCE):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
