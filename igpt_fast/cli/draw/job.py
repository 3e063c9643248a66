"""The work of ``igpt sample`` and ``igpt complete``: draws, shows how far it is, writes what is finished, reports.

Heavy imports stay inside the functions.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.draw.exports import Exports, weights_hash
from igpt_fast.cli.draw.options import ROUNDED, DrawOptions
from igpt_fast.interrupts import delayed_interrupt

if TYPE_CHECKING:
    import numpy as np

    from igpt_fast.cli.draw.preview import Preview
    from igpt_fast.cli.draw.sharding import World
    from igpt_fast.pipeline import Pipeline
    from igpt_fast.sampling.request import Request
    from igpt_fast.sampling.results import Generation


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command draws.

    Args:
        command: Its name.
        request: All of it; every process draws its part.
        exports: Where they go.
        values: For sidecar and report: what is not known from the images.
        json: Whether the report is one JSON object.
    """

    command: str
    request: Request
    exports: Exports
    values: dict[str, Any]
    json: bool = False

    @property
    def total(self) -> int:
        """Images in all."""
        return len(self.request) * self.request.n

    def share(self, world: World) -> range:
        """Which of them this process draws."""
        part = world.share(len(self.request))
        return range(part.start * self.request.n, part.stop * self.request.n)


def load_pipeline(drawing: DrawOptions, local_rank: int | None) -> Pipeline:
    """The pipeline that the options ask for."""
    checks.choose_backend(drawing.backend)
    device = checks.choose_device(drawing.device, local_rank)
    from igpt_fast.pipeline import Pipeline

    # Those are made of bfloat16: half the memory of float32; to the rounding of int8 it adds a hundredth.
    dtype = "bfloat16" if drawing.dtype in ROUNDED else drawing.dtype
    return Pipeline.from_pretrained(drawing.model, device=device, dtype=dtype)


def run(job: Job, pipeline: Pipeline, drawing: DrawOptions, world: World) -> None:
    """Draws a job, with the other processes if there are some; the first one writes and reports.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after what was finished has been saved.
        PeerGoneError: Another process is gone.
        Exception: What ended the drawing, after the same.
    """
    from igpt_fast.sampling.results import merge, without_processor

    with _previewing(job, pipeline, drawing, world) as preview, ExitStack() as held:
        with contextlib.closing(Progress(job, world)) as progress:
            part, error = _follow(job, pipeline, world, progress, preview, held)
            interrupted = isinstance(error, KeyboardInterrupt)
            why = "interrupted" if interrupted else "" if error is None else terminal.reason(error)
            parts = world.gather(
                (list(job.share(world)), without_processor(part), interrupted, why), interrupted, progress.show
            )
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
            whole = merge([part for _, part in finished], pipeline.processor)
            which = [number for numbers, _ in finished for number in numbers]
            if preview is not None and not reasons:
                preview.finish(_pixels(whole))
            _save(job, whole, which, pipeline, world, seconds, interrupted, reasons)
        elif interrupted:
            terminal.say("igpt: no image is finished, nothing is saved; a smaller --batch-size saves more often")
    if interrupted:
        raise KeyboardInterrupt
    if error is not None:
        raise error
    if reasons:
        raise RuntimeError(reasons[0])


def _follow(
    job: Job, pipeline: Pipeline, world: World, progress: Progress, preview: Preview | None, held: ExitStack
) -> tuple[Generation | None, BaseException | None]:
    """What this process has drawn, and what ended it before its time, Ctrl-C or an error: then it is what was finished,
    and from there on ``held`` holds Ctrl-C back. So it does where nobody else has to be waited for.

    Raises:
        Exception: Nothing was begun.
        PeerGoneError: Another process is gone.
    """
    from igpt_fast.cli.draw.sharding import PeerGoneError

    request, stream = job.request.shard(world.share(len(job.request))), None
    if not len(request):
        return None, None
    try:
        stream = pipeline.start(request)
        for event in stream:
            progress(event.done / event.total * len(job.share(world)))
            if preview is not None and preview.put(event.first, event.row, event.tokens):
                progress.refresh()  # the picture went over it
        if world.size == 1:
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
    job: Job,
    generation: Generation,
    which: list[int],
    pipeline: Pipeline,
    world: World,
    seconds: float,
    interrupted: bool,
    reasons: list[str],
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
        "processes": world.size,
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
        details = {"command": job.command, **job.values, "model_sha256": weights_hash(pipeline.model), **values}
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
    terminal.report(
        job.json,
        names | values,
        f"{names['out']}: {len(generation)} images of {size[0]}x{size[1]}, seed {generation.seed}, {seconds:.1f} s"
        f" ({values['images_per_second']} images/s, {values['engine']})",
    )


def _pixels(generation: Generation) -> np.ndarray:
    import numpy as np

    return np.stack([np.asarray(image) for image in generation.images])


def _palette(pipeline: Pipeline) -> np.ndarray:
    """(K, 3) uint8: the colours of the tokens."""
    import numpy as np
    import torch

    count, pixels = len(pipeline.processor.clusters), pipeline.model.config.n_positions  # type: ignore[arg-type]
    tokens = torch.arange(-(-count // pixels) * pixels).clamp(max=count - 1).view(-1, pixels)
    colours = [np.asarray(image).reshape(-1, 3) for image in pipeline.processor.decode(tokens)]
    return np.concatenate(colours)[:count]


class Progress:
    """A bar with images a second and the time left, on a terminal; measures the time in any case."""

    def __init__(self, job: Job, world: World) -> None:
        from tqdm import tqdm

        self._world = world
        self._bar = tqdm(
            desc={"sample": "sampling", "complete": "completing"}[job.command],
            total=job.total,
            unit=" images",
            file=sys.stderr,
            disable=None if world.first else True,
            leave=False,
            miniters=0,
            dynamic_ncols=True,
            # A narrow terminal cuts the end.
            bar_format="{desc} {percentage:.0f}% of {total} images, {rate_noinv_fmt}, {remaining} left |{bar}|",
        )
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
        self._bar.update(images - self._bar.n)

    def refresh(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def _previewing(job: Job, pipeline: Pipeline, drawing: DrawOptions, world: World) -> Iterator[Preview | None]:
    """The preview, if it is asked for; of several processes the first one's share, and at the end the whole."""
    if not drawing.preview or not world.first:
        yield None
        return
    from igpt_fast.cli.draw.preview import Preview

    size = pipeline.processor.height, pipeline.processor.width
    with checks.as_usage():
        preview = Preview(sys.stderr, len(job.share(world)), *size, _palette(pipeline))
    with contextlib.closing(preview):
        yield preview
