"""What the commands share: options of drawing, checks before the work, progress, and the report.

Heavy imports stay inside the functions.
"""

from __future__ import annotations

import contextlib
import json as json_module
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from igpt_fast.pipeline import Generation, Pipeline

GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATION_SUFFIXES = (".gif", ".apng")


class UsageError(Exception):
    """The command line asks for something that makes no sense; exit code 2."""


class DeviceUnavailableError(Exception):
    """The requested device is not there; exit code 3."""


@dataclass(frozen=True)
class Drawing:
    """Options of the commands that draw images.

    Args:
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        seed: The same seed gives the same images; drawn at random, and reported, if not given.
        temperature: Divides the logits; 0 takes the most likely colour.
        top_k: Draw among the k most likely colours only.
        top_p: Draw among the most likely colours that reach this probability only.
        batch_size: Images computed together; chosen by memory if not given.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        dtype: float32, bfloat16, float16, or auto for what the checkpoint is stored in; int8 draws with weights and
            cache rounded to 8 bits, on the CPU.
        backend: auto, reference, cpu or cuda; see igpt env.
    """

    model: str | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str = "float32"
    backend: str = "auto"


def check_output(path: Path | None, force: bool, suffixes: Sequence[str]) -> None:
    """Fails before the work is done if a result could not be written."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the name must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; pass --force to overwrite it")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # asks the file system, which permissions alone do not tell
    except OSError as error:
        raise OSError(f"{path.parent}: cannot be written to: {error.strerror}") from error


def choose_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}; want cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"device {name} is not available: torch sees {torch.cuda.device_count()}")
    return device


def choose_backend(name: str) -> None:
    from igpt_fast import backend

    if name not in backend.BACKENDS:
        raise UsageError(f"--backend is {name!r}; want one of {', '.join(backend.BACKENDS)}")
    if name != "auto":  # auto leaves what IGPT_FAST_BACKEND chose
        backend.set_backend(name)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Makes a value out of its range a mistake of usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def settings(drawing: Drawing) -> dict[str, Any]:
    """The options that ``Pipeline.sample`` and ``complete`` take as keywords."""
    names = ("seed", "batch_size", "temperature", "top_k", "top_p")
    options = {name: getattr(drawing, name) for name in names}
    return options | {"dtype": "int8" if drawing.dtype == "int8" else None}


def check_drawing(n: int, drawing: Drawing) -> None:
    """Fails early, as a mistake of usage, where a value is out of its range."""
    from igpt_fast.generation import Sampling, check_count, check_seed
    from igpt_fast.pipeline import MAX_IMAGES

    with as_usage():
        check_count("n", n, MAX_IMAGES)
        Sampling(drawing.temperature, drawing.top_k, drawing.top_p)
        if drawing.seed is not None:
            check_seed(drawing.seed)
        if drawing.batch_size is not None:
            check_count("batch_size", drawing.batch_size)


def rehearse(pipeline: Pipeline, out: Path, n: int, inputs: int, columns: int | None, scale: int | None) -> None:
    """Writes an empty grid of the same size and form to a place of no importance, before hours of work are put in."""
    import torch
    from PIL import Image

    from igpt_fast.pipeline import Generation

    shape = (n * max(1, inputs), pipeline.model.config.n_positions)
    blank = Generation(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), pipeline.processor, 0)
    if inputs:
        blank.inputs = [Image.new("RGB", (1, 1))] * inputs
        blank.originals = blank.tokens[:inputs]
    with tempfile.TemporaryDirectory() as folder, as_usage():
        blank.save_grid(Path(folder) / f"grid{out.suffix}", columns=columns, scale=scale)


def load_pipeline(drawing: Drawing) -> Pipeline:
    """The pipeline that the options ask for."""
    if drawing.dtype not in ("float32", "bfloat16", "float16", "int8", "auto"):
        raise UsageError(f"--dtype is {drawing.dtype!r}; want float32, bfloat16, float16, int8 or auto")
    choose_backend(drawing.backend)
    device = choose_device(drawing.device)
    from igpt_fast.pipeline import Pipeline

    # int8 is made of bfloat16, which takes half the memory of float32 and adds a hundredth to the rounding.
    dtype = "bfloat16" if drawing.dtype == "int8" else drawing.dtype
    return Pipeline.from_pretrained(drawing.model, device=device, dtype=dtype)


def check_clusters(count: int) -> None:
    """Fails early where scikit-learn or the format of tokens would fail late."""
    if not 2 <= count <= 1 << 16:
        raise UsageError(f"--n-clusters is {count}; want 2..{1 << 16}")


def check_images(paths: Sequence[Path]) -> None:
    """Says early what can be said early; the images are opened one by one when their turn comes."""
    if not paths:
        raise UsageError("give at least one image file")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")


def read_square(path: Path, side: int) -> Any:
    """The (side, side, 3) uint8 pixels of the middle of an image; the whole of it, as it is, for 0."""
    import numpy as np

    from igpt_fast import image as images_module

    picture = images_module.open_image(path)
    if side:
        picture = images_module.resize(images_module.center_crop(picture), side, side)
    return np.asarray(picture, dtype=np.uint8)


def read_palette(clusters: Path | None, model: str | None) -> tuple[Any, int]:
    """Colours, and the edge of the images that they are for."""
    from igpt_fast import image as images_module
    from igpt_fast.pipeline import BUNDLED

    if clusters is not None:
        return images_module.load_clusters(clusters), 32
    processor = images_module.ImageGPTImageProcessor.from_pretrained(BUNDLED if model is None else model)
    if processor.clusters is None:
        raise ValueError(f"{model}: its preprocessor_config.json has no clusters")
    return processor.clusters, processor.height


class _Progress:
    """A bar of pixels drawn, on a terminal; measures the time in any case."""

    def __init__(self, title: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=title, unit="px", file=sys.stderr, disable=None, leave=False)
        self._start = time.perf_counter()
        self.seconds = 0.0

    def __call__(self, done: int, total: int) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[_Progress]:
    progress = _Progress(title)
    try:
        yield progress
    finally:
        progress.close()


def saving_on_interrupt(run: Callable[[], Generation], save: Callable[[Generation], None]) -> Generation:
    """Runs a generation; on Ctrl-C saves the images that are finished, and goes on being interrupted."""
    from igpt_fast.pipeline import InterruptedGeneration

    try:
        return run()
    except InterruptedGeneration as stop:
        if stop.partial is not None:
            try:
                save(stop.partial)
            except (OSError, ValueError) as error:
                print(f"igpt: the finished images cannot be saved: {error}", file=sys.stderr)
        raise


def write_grid(
    generation: Generation,
    out: Path,
    gif: Path | None,
    columns: int | None,
    scale: int | None,
    json: bool,
    force: bool,
    seconds: float,
) -> None:
    """Writes grid and animation, and reports."""
    generation.save_grid(out, columns=columns, scale=scale, overwrite=force)
    if gif is not None:
        generation.save_gif(gif, columns=columns, scale=scale, overwrite=force)
    logprobs = generation.logprobs[:, generation.given :]
    height, width = generation.processor.height, generation.processor.width
    values = {
        "out": str(out),
        "gif": None if gif is None else str(gif),
        "images": len(generation),
        "size": [height, width],
        "seed": generation.seed,
        **generation.settings,
        "nats_per_pixel": -float(logprobs.mean()),
        "seconds": round(seconds, 3),
    }
    report(
        json, values, f"{out}: {len(generation)} images of {height}x{width}, seed {generation.seed}, {seconds:.1f} s"
    )


def report(json: bool, values: dict[str, Any], text: str) -> None:
    """The result on stdout: one JSON object, or a line."""
    print(json_module.dumps(values) if json else text)


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
