"""The work of ``igpt sample`` and ``igpt complete``: draws, shows how far it is, writes what is finished, reports.

Heavy imports stay inside the functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from igpt_fast.cli import checks as terminal
from igpt_fast.cli.draw.exports import Exports, weights_hash
from igpt_fast.cli.draw.options import ROUNDED, Drawing
from igpt_fast.interrupts import undisturbed

if TYPE_CHECKING:
    import numpy as np

    from igpt_fast.cli.draw.preview import Preview
    from igpt_fast.cli.draw.sharding import World
    from igpt_fast.pipeline import Pipeline
    from igpt_fast.sampling.results import Generation
    from igpt_fast.sampling.streaming import Stream


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command draws.

    Args:
        command: Its name.
        total: Images in all.
        mine: Which of them this process draws.
        stream: Begins to draw them; not called where there are none.
        exports: Where they go.
        values: For sidecar and report: what is not known from the images.
    """

    command: str
    total: int
    mine: range
    stream: Callable[[], Stream]
    exports: Exports
    values: dict[str, Any]


def load_pipeline(drawing: Drawing, local_rank: int | None) -> Pipeline:
    """The pipeline that the options ask for."""
    terminal.choose_backend(drawing.backend)
    device = terminal.choose_device(drawing.device, local_rank)
    from igpt_fast.pipeline import Pipeline

    # Those are made of bfloat16: half the memory of float32; to the rounding of int8 it adds a hundredth.
    dtype = "bfloat16" if drawing.dtype in ROUNDED else drawing.dtype
    return Pipeline.from_pretrained(drawing.model, device=device, dtype=dtype)


def check_completion(
    pipeline: Pipeline, labels: list[int] | None, inputs: int, kept: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Fails as a mistake of usage, before an image is read: errors of the images themselves are none of usage."""
    from PIL import Image

    blank = Image.new("RGB", (pipeline.processor.width, pipeline.processor.height))
    with terminal.as_usage():
        pipeline.stream(inputs, labels=labels, **asked)
        pipeline.stream_complete(blank, labels=None if labels is None else labels[0], **kept, **asked)


def rehearse(exports: Exports, model: str | None, n: int, inputs: int) -> None:
    """Makes an empty grid of the size that the model's images give it, before it is read and hours of work are put in.

    Raises:
        UsageError: The grid or the animation would be too large.
        FileNotFoundError, ValueError: As ``ImageGPTImageProcessor.from_pretrained``.
    """
    import numpy as np
    import torch
    from PIL import Image

    from igpt_fast.files import BUNDLED
    from igpt_fast.image import ImageGPTImageProcessor
    from igpt_fast.sampling.results import Generation

    processor = ImageGPTImageProcessor.from_pretrained(BUNDLED if model is None else model)
    height, width = processor.height, processor.width
    white = ImageGPTImageProcessor(clusters=np.ones((1, 3), np.float32), size={"height": height, "width": width})
    tokens = torch.zeros((1, 1), dtype=torch.int64).expand(n * max(1, inputs), height * width)
    blank = Generation(tokens, tokens, white, 0)
    if inputs:
        blank.inputs = [Image.new("RGB", (1, 1))] * inputs
        blank.originals = tokens[:inputs]
    exports.rehearse(blank)


def run(job: Job, pipeline: Pipeline, drawing: Drawing, world: World, *, json: bool) -> None:
    """Draws a job, with the other processes if there are some; the first one writes and reports.

    Raises:
        KeyboardInterrupt: On Ctrl-C, after what was finished has been saved.
        PeerGoneError: Another process is gone.
    """
    from igpt_fast.sampling.results import merge, without_processor

    with _previewing(job, pipeline, drawing, world) as preview:
        with contextlib.closing(Progress(job, world)) as progress:
            part, interrupted = _follow(job, progress, preview)
            mine = list(job.mine), without_processor(part), interrupted
            parts = world.gather(mine, interrupted, progress.show)
            seconds = progress.seconds
        if parts is None:
            if interrupted:
                raise KeyboardInterrupt
            return
        interrupted = any(stopped for *_, stopped in parts)
        finished = [(numbers[: len(part)], part) for numbers, part, _ in parts if part is not None]
        with undisturbed():
            if finished:
                whole = merge([part for _, part in finished], pipeline.processor)
                which = [number for numbers, _ in finished for number in numbers]
                if preview is not None and not interrupted:
                    preview.finish(_pixels(whole))
                _save(job, whole, which, pipeline, world, seconds, json, interrupted)
            else:
                print(
                    "igpt: no batch is finished, nothing is saved; a smaller --batch-size saves more often",
                    file=sys.stderr,
                )
    if interrupted:
        raise KeyboardInterrupt


def _follow(job: Job, progress: Progress, preview: Preview | None) -> tuple[Generation | None, bool]:
    """What has been drawn of a job, and whether Ctrl-C ended it before its time: then it is what was finished."""
    if not job.mine:
        return None, False
    stream = job.stream()
    try:
        for event in stream:
            progress(event.done / event.total * len(job.mine))
            if preview is not None and preview.put(event.first, event.row, event.tokens):
                progress.refresh()  # the picture went over it
        return stream.result, False
    except KeyboardInterrupt:
        return stream.partial, True


def _save(
    job: Job,
    generation: Generation,
    which: Sequence[int],
    pipeline: Pipeline,
    world: World,
    seconds: float,
    json: bool,
    interrupted: bool,
) -> None:
    import torch

    from igpt_fast import __version__

    height, width = generation.processor.height, generation.processor.width
    nats = -float(torch.nanmean(generation.logprobs))
    values = {
        "images": len(generation),
        "size": [height, width],
        "seed": generation.seed,
        **generation.settings,
        "labels": None if generation.labels is None else generation.labels.tolist(),
        "nats_per_pixel": nats if math.isfinite(nats) else None,
        "processes": world.size,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(generation) / seconds, 3) if seconds else None,
        "interrupted": interrupted,
    }
    details: dict[str, Any] = {}
    if job.exports.files.sidecar is not None:
        details = {"command": job.command, **job.values, "model_sha256": weights_hash(pipeline.model), **values}
        details |= {"columns": job.exports.columns, "upscale": job.exports.files.upscale}
        details |= {"igpt_fast": __version__, "torch": torch.__version__}
    try:
        names = job.exports.write(generation, which, details)
    except BaseException as error:  # be it a second Ctrl-C: hours of work may be in it
        reason = f"{terminal.told(error)}; {job.exports.rescue(generation)}"
        if isinstance(error, Exception) and not interrupted:
            raise RuntimeError(reason) from error
        print(f"igpt: the finished images cannot be saved: {reason}", file=sys.stderr)
        if not isinstance(error, Exception):
            raise
        return
    terminal.report(
        json,
        names | values,
        f"{names['out']}: {len(generation)} images of {height}x{width}, seed {generation.seed}, {seconds:.1f} s"
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
def _previewing(job: Job, pipeline: Pipeline, drawing: Drawing, world: World) -> Iterator[Preview | None]:
    """The preview, if it is asked for; of several processes the first one's share, and at the end the whole."""
    if not drawing.preview or not world.first:
        yield None
        return
    from igpt_fast.cli.draw.preview import Preview

    size = pipeline.processor.height, pipeline.processor.width
    with terminal.as_usage():
        preview = Preview(sys.stderr, len(job.mine), *size, _palette(pipeline))
    with contextlib.closing(preview):
        yield preview
