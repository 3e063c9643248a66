"""The work of ``igpt sample`` and ``igpt complete``: draws, shows how far it is, writes what is finished, reports."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.draw.exports import Exports, weights_hash
from igpt_fast.cli.draw.options import ROUNDED, DrawOptions
from igpt_fast.interrupts import delayed_interrupt

if TYPE_CHECKING:
    import numpy as np

    from igpt_fast.cli.draw.preview import Preview
    from igpt_fast.pipeline import Pipeline
    from igpt_fast.sampling.request import Request
    from igpt_fast.sampling.results import Generation
    from igpt_fast.world import World


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command draws."""

    command: str  # its name
    request: Request  # all of it; every process draws its part
    exports: Exports  # where they go
    values: dict[str, Any]  # for sidecar and report: what is not known from the images
    pipeline: Pipeline
    world: World
    json: bool = False  # whether the report is one JSON object

    @property
    def total(self) -> int:
        """Images in all."""
        return len(self.request) * self.request.n

    @property
    def share(self) -> range:
        """Which of them this process draws."""
        part = self.world.share(len(self.request))
        return range(part.start * self.request.n, part.stop * self.request.n)


def load_pipeline(drawing: DrawOptions, local_rank: int | None) -> Pipeline:
    """The pipeline that the options ask for."""
    checks.choose_backend(drawing.backend)
    device = checks.choose_device(drawing.device, local_rank)
    from igpt_fast.pipeline import Pipeline

    # Those are made of bfloat16: half the memory of float32; to the rounding of int8 it adds a hundredth.
    dtype = "bfloat16" if drawing.dtype in ROUNDED else drawing.dtype
    return Pipeline.from_pretrained(drawing.model, device=device, dtype=dtype)


def run(job: Job, preview: bool = False) -> None:
    """Draws a job, with the other processes if there are some; the first one writes and reports.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after what was finished has been saved.
        PeerGoneError: Another process is gone.
        Exception: What ended the drawing, after the same.
    """
    from igpt_fast.sampling.results import merge, without_processor

    world = job.world
    with _previewing(job, preview) as view, ExitStack() as held:
        with contextlib.closing(Progress(job)) as progress:
            part, error = _follow(job, progress, view, held)
            interrupted = isinstance(error, KeyboardInterrupt)
            why = "interrupted" if interrupted else "" if error is None else terminal.reason(error)
            drawn = list(job.share), without_processor(part), interrupted, why
            parts = world.gather(drawn, interrupted, progress.show)
            seconds = progress.seconds
        if parts is None:  # the first process says what has failed, and must not be stopped before
            if interrupted:
                raise KeyboardInterrupt
            return
        held.enter_context(delayed_interrupt())
        interrupted = any(stopped for *_, stopped, _ in parts)
        reasons = [why if rank == world.rank else f"rank {rank}: {why}" for rank, (*_, why) in enumerate(parts) if why]
        finished = [(numbers[: len(part)], part) for numbers, part, *_ in parts if part is not None]
        if finished:
            whole = merge([part for _, part in finished], job.pipeline.processor)
            which = [number for numbers, _ in finished for number in numbers]
            if view is not None and not reasons:
                view.finish(whole.images)
            _save(job, whole, which, seconds, interrupted, reasons)
        elif interrupted:
            terminal.say("igpt: no image is finished, nothing is saved; a smaller --batch-size saves more often")
    if interrupted:
        raise KeyboardInterrupt
    if error is not None:
        raise error
    if reasons:
        raise RuntimeError(reasons[0])


def _follow(
    job: Job, progress: Progress, view: Preview | None, held: ExitStack
) -> tuple[Generation | None, BaseException | None]:
    """What this process has drawn, and what ended it before its time, Ctrl-C or an error: then it is what was finished,
    and from there on ``held`` holds Ctrl-C back. So it does where nobody else has to be waited for.

    Raises:
        Exception: Nothing was begun.
        PeerGoneError: Another process is gone.
    """
    from igpt_fast.world import PeerGoneError

    request, stream = job.request.shard(job.world.share(len(job.request))), None
    if not len(request):
        return None, None
    try:
        stream = job.pipeline.start(request)
        for event in stream:
            progress(event.done / event.total * len(job.share))
            if view is not None and view.put(event.first, event.row, event.tokens):
                progress.bar.refresh()  # the picture went over it
        if job.world.size == 1:
            held.enter_context(delayed_interrupt())
        return stream.result, None
    except PeerGoneError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        held.enter_context(delayed_interrupt())
        if stream is None and isinstance(error, Exception):
            raise
        return None if stream is None else getattr(error, "partial", None) or stream.partial, error


def _save(
    job: Job, generation: Generation, which: list[int], seconds: float, interrupted: bool, reasons: list[str]
) -> None:
    """Writes and reports what is finished: all, or where there are ``reasons``, what was before them."""
    import torch

    from igpt_fast import __version__

    size = [generation.processor.height, generation.processor.width]
    nats = -float(torch.nanmean(generation.logprobs))
    values = {
        "images": len(generation),
        "size": size,
        "seed": generation.seed,
        **generation.settings,
        "labels": None if generation.labels is None else generation.labels.tolist(),
        "nats_per_pixel": nats if math.isfinite(nats) else None,
        "processes": job.world.size,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(generation) / seconds, 3) if seconds else None,
        "interrupted": interrupted,
    }
    if reasons and not interrupted:
        values["error"] = reasons[0]
    if job.request.images is not None:
        counts = collections.Counter(number // job.request.n for number in which)
        values["completions"] = [counts[i] for i in range(len(job.request))]
    details: dict[str, Any] = {}
    if job.exports.files.sidecar is not None:
        details = {"command": job.command, **job.values, "model_sha256": weights_hash(job.pipeline.model), **values}
        details |= {"columns": job.exports.columns, "upscale": job.exports.files.upscale}
        details |= {"igpt_fast": __version__, "torch": torch.__version__}
    try:
        names = job.exports.write(generation, which, details)
    except BaseException as error:  # be it a second Ctrl-C: hours of work may be in it
        said = f"{terminal.reason(error)}; {job.exports.rescue(generation)}"
        if isinstance(error, Exception) and not reasons:
            raise RuntimeError(said) from error
        terminal.say(f"igpt: the finished images cannot be saved: {said}")
        if not isinstance(error, Exception):
            raise
        return
    if "error" in values:
        terminal.say(f"igpt: {len(generation)} of {job.total} images are finished and saved")
    written = next(name for name in names.values() if name is not None)
    text = f"{written}: {len(generation)} images of {size[0]}x{size[1]}, seed {generation.seed}, {seconds:.1f} s"
    terminal.report(job.json, names | values, f"{text} ({values['images_per_second']} images/s, {values['engine']})")


def _palette(pipeline: Pipeline) -> np.ndarray:
    """(K, 3) uint8: the colours of the tokens."""
    import numpy as np

    from igpt_fast.image import dequantize

    clusters = cast(np.ndarray, pipeline.processor.clusters)
    return dequantize(np.arange(len(clusters)), clusters)


class Progress:
    """A bar with images a second and the time left, on a terminal; measures the time in any case."""

    def __init__(self, job: Job) -> None:
        self._world = job.world
        what = {"sample": "sampling", "complete": "completing"}[job.command]
        # A narrow terminal cuts the end.
        form = "{desc} {percentage:.0f}% of {total} images, {rate_noinv_fmt}, {remaining} left |{bar}|"
        self.bar = terminal.bar(what, job.total, "images", job.world.first, miniters=0, bar_format=form)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._start

    def __call__(self, images: float) -> None:
        """This process has drawn so many, partly drawn ones counted in part."""
        self.show(self._world.progress(images))

    def show(self, images: float) -> None:
        """All have."""
        self.bar.update(images - self.bar.n)

    def close(self) -> None:
        self.bar.close()


@contextlib.contextmanager
def _previewing(job: Job, wanted: bool) -> Iterator[Preview | None]:
    """The preview, if it is asked for; of several processes the first one's share, and at the end the whole."""
    if not wanted or not job.world.first:
        yield None
        return
    from igpt_fast.cli.draw.preview import Preview

    size = job.pipeline.processor.height, job.pipeline.processor.width
    with checks.as_usage():
        view = Preview(sys.stderr, len(job.share), *size, _palette(job.pipeline))
    with contextlib.closing(view):
        yield view
