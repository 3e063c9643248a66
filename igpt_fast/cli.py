"""The ``igpt`` command. Each sub-command is a function with a typed signature; heavy imports stay inside.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 the requested backend
or device is not available, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json as json_module
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from igpt_fast.recipes.settings import TrainConfig

if TYPE_CHECKING:
    import torch

    from igpt_fast.pipeline import Generation, Pipeline

Paths = Positional[tuple[Path, ...]]
GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ANIMATION_SUFFIXES = (".gif", ".apng")


class UsageError(Exception):
    """The command line asks for something that makes no sense; exit code 2."""


class DeviceUnavailableError(Exception):
    """The requested device is not there; exit code 3."""


def sample(
    n: Annotated[int, arg(aliases=["-n"])] = 16,
    out: Path = Path("samples.png"),
    gif: Path | None = None,
    model: str | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    columns: int | None = None,
    scale: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Draw images and write them as a grid.

    Args:
        n: Number of images.
        out: Grid to write; .png, .jpg, .webp or .bmp.
        gif: Also write the grid being drawn; .gif or .apng.
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        seed: The same seed gives the same images; drawn at random, and reported, if not given.
        temperature: Divides the logits; 0 takes the most likely colour.
        top_k: Draw among the k most likely colours only.
        top_p: Draw among the most likely colours that reach this probability only.
        batch_size: Images computed together; chosen by memory if not given.
        columns: Images in a row of the grid.
        scale: Edge of a pixel in the grid.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        dtype: float32, bfloat16, float16, or auto for what the checkpoint is stored in.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    _check_output(out, force, GRID_SUFFIXES)
    _check_output(gif, force, ANIMATION_SUFFIXES)
    pipeline = _load(model, device, dtype, backend)
    with _progress("sampling") as progress:
        generation = _interruptible(
            lambda: pipeline.sample(
                n,
                seed=seed,
                batch_size=batch_size,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                progress=progress,
            ),
            lambda partial: _write(partial, out, gif, columns, scale, json, progress.seconds, pipeline),
        )
    _write(generation, out, gif, columns, scale, json, progress.seconds, pipeline)


def complete(
    images: Paths,
    keep: float = 0.5,
    n: Annotated[int, arg(aliases=["-n"])] = 4,
    out: Path = Path("completions.png"),
    gif: Path | None = None,
    model: str | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    scale: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Complete images of which the upper part is kept; one row each: input, kept part, completions, original.

    Args:
        images: Image files of any size; the middle is cut out in the model's aspect and resized.
        keep: Fraction of the rows that is kept, 0 or above and below 1.
        n: Completions of each image.
        out: Grid to write; .png, .jpg, .webp or .bmp.
        gif: Also write the grid being drawn; .gif or .apng.
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        seed: The same seed gives the same images; drawn at random, and reported, if not given.
        temperature: Divides the logits; 0 takes the most likely colour.
        top_k: Draw among the k most likely colours only.
        top_p: Draw among the most likely colours that reach this probability only.
        batch_size: Images computed together; chosen by memory if not given.
        scale: Edge of a pixel in the grid.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        dtype: float32, bfloat16, float16, or auto for what the checkpoint is stored in.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    _check_output(out, force, GRID_SUFFIXES)
    _check_output(gif, force, ANIMATION_SUFFIXES)
    pictures = _open_images(images)
    pipeline = _load(model, device, dtype, backend)
    with _progress("completing") as progress:
        generation = pipeline.complete(
            pictures,
            keep=keep,
            n=n,
            seed=seed,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            progress=progress,
        )
    _write(generation, out, gif, None, scale, json, progress.seconds, pipeline)


def quantize(
    images: Paths,
    out: Path = Path("tokens.npy"),
    clusters: Path | None = None,
    model: str | None = None,
    size: int | None = None,
    preview: Path | None = None,
    backend: str = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Turn images into colour tokens: an (N, H, W) uint16 array in a .npy file.

    Args:
        images: Image files; resized to a square, whatever their aspect, as transformers' processor does.
        out: The .npy file to write.
        clusters: Colours to use: a .npy file of (K, 3) floats in [-1, 1], or a preprocessor_config.json.
        model: Directory or hub id whose colours and size to use; the bundled emoji model if neither is given.
        size: Edge of the images in pixels; 0 keeps the size of a single image; the model's if not given.
        preview: Also write the images in their new colours, as a grid.
        backend: auto, reference or cpu; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    if clusters is not None and model is not None:
        raise UsageError("give --clusters or --model, not both")
    if size is not None and not 0 <= size <= 4096:
        raise UsageError(f"--size is {size}; want 0..4096")
    _check_output(out, force, (".npy",))
    _check_output(preview, force, GRID_SUFFIXES)
    pictures = _open_images(images)
    _set_backend(backend)
    import numpy as np

    from igpt_fast import files
    from igpt_fast import image as images_module
    from igpt_fast.pipeline import BUNDLED

    if clusters is not None:
        palette, default_size = images_module.load_clusters(clusters), 32
    else:
        processor = images_module.ImageGPTImageProcessor.from_pretrained(BUNDLED if model is None else model)
        if processor.clusters is None:
            raise ValueError(f"{model}: its preprocessor_config.json has no clusters")
        palette, default_size = np.asarray(processor.clusters), processor.height
    edge = default_size if size is None else size
    if edge == 0 and len(pictures) != 1:
        raise UsageError("--size 0 takes a single image")
    arrays = [
        np.asarray(picture if edge == 0 else images_module.resize(picture, edge, edge), dtype=np.uint8)
        for picture in pictures
    ]
    start = time.perf_counter()
    tokens = images_module.quantize(np.stack(arrays), palette)
    seconds = time.perf_counter() - start
    with files.replacing(out, overwrite=force) as partial, partial.open("wb") as file:
        np.save(file, tokens.astype(np.uint16), allow_pickle=False)
    if preview is not None:
        colours = images_module.dequantize(tokens, palette)
        images_module.save_image(images_module.image_grid(list(colours)), preview, overwrite=force)
    used = len(np.unique(tokens))
    _result(
        json,
        {"out": str(out), "shape": list(tokens.shape), "colours": len(palette), "used": used, "seconds": seconds},
        f"{out}: {' x '.join(map(str, tokens.shape))} tokens, {used} of {len(palette)} colours used",
    )


def clusters(
    images: Paths,
    k: Annotated[int, arg(aliases=["-k"])] = 512,
    out: Path = Path("clusters.npy"),
    size: int = 32,
    seed: int = 0,
    preview: Path | None = None,
    json: bool = False,
    force: bool = False,
) -> None:
    """Fit colour clusters to images, by mini-batch k-means; needs scikit-learn.

    Args:
        images: Image files, and directories that are searched for them.
        k: Number of clusters.
        out: The .npy file to write: (K, 3) float32 in [-1, 1].
        size: The images are resized to a square of this edge before their colours are counted.
        seed: Of the fit.
        preview: Also write the colours as a picture.
        json: Print one JSON object.
        force: Overwrite files.
    """
    if not 1 <= size <= 4096:
        raise UsageError(f"--size is {size}; want 1..4096")
    _check_output(out, force, (".npy",))
    _check_output(preview, force, GRID_SUFFIXES)
    import numpy as np

    from igpt_fast import image as images_module
    from igpt_fast.recipes.data import find_images

    if not images:
        raise UsageError("give at least one image file or directory")
    found = [path for item in images for path in (find_images(item) if item.is_dir() else [item])]
    if not found:
        raise ValueError(f"{images[0]}: no images in it")
    pictures = [images_module.resize(images_module.open_image(path), size, size) for path in found]
    fitted = images_module.fit_clusters(np.stack([np.asarray(picture) for picture in pictures]), k, seed=seed)
    images_module.save_clusters(fitted, out, overwrite=force)
    if preview is not None:
        colours = images_module.dequantize(np.arange(k), fitted)
        columns = min(32, k)
        patches = [np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours]
        images_module.save_image(images_module.image_grid(patches, columns, gap=0), preview, overwrite=force)
    _result(
        json,
        {"out": str(out), "clusters": k, "images": len(pictures)},
        f"{out}: {k} clusters of the colours of {len(pictures)} images",
    )


def train(
    data: Positional[Path | None] = None,
    out: Path = Path("runs/train"),
    side: int = 32,
    clusters: int = 512,
    holdout: float = 0.1,
    resume: bool = False,
    device: str | None = None,
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - a frozen value
    json: bool = False,
    force: bool = False,
) -> None:
    """Train a model: images, colour clusters, tokens, network; writes a checkpoint that all commands take.

    Args:
        data: A directory of images, or a token file (.npz with tokens, clusters, heldout); the bundled emoji if
            not given.
        out: Directory for model/, samples.png, log.jsonl and the training state.
        side: Images of a directory are resized to a square of this edge.
        clusters: Colours that are fitted to the images of a directory.
        holdout: Fraction of the images of a directory that is held out for evaluation.
        resume: Continue an interrupted run bit for bit; the settings must be the same.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        config: The run.
        json: Print one JSON object.
        force: Start afresh in a directory that holds a run.
    """
    device_ = _device(device)
    from igpt_fast.pipeline import BUNDLED
    from igpt_fast.recipes import data as data_module
    from igpt_fast.recipes import train as recipe

    if data is None:
        tokens = data_module.load_tokens(BUNDLED.parent / "emoji16.npz")
    elif data.is_dir():
        tokens = data_module.tokens_from_images(data, side, clusters, holdout=holdout, seed=config.seed)
    else:
        tokens = data_module.load_tokens(data)

    def progress(record: dict[str, Any]) -> None:
        print(json_module.dumps(record), file=sys.stderr, flush=True)

    summary = recipe.run(tokens, out, config, device=device_, resume=resume, overwrite=force, progress=progress)
    _result(
        json,
        summary,
        f"{out / 'model'}: {summary['parameters'] / 1e6:.2f} M parameters, {summary['steps']} steps,"
        f" held out {_nats(summary['heldout_nats'])} nats/token"
        f" (left+up lookup table {_nats(summary['lookup_table_nats'])})",
    )


def env(json: bool = False) -> None:
    """Show versions, build, devices, instruction sets, and which implementation of every op is live and why.

    Args:
        json: Print one JSON object.
    """
    from igpt_fast import backend

    report = backend.config()
    print(json_module.dumps(report, indent=2) if json else backend.format_config(report))


COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "complete": complete,
    "quantize": quantize,
    "clusters": clusters,
    "train": train,
    "env": env,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    from igpt_fast import __version__

    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"igpt_fast {__version__}")
        return 0
    name = args[0] if args and args[0] in COMMANDS else ""
    try:
        with _parsing():
            command = tyro.extras.subcommand_cli_from_dict(
                {key: _deferred(function) for key, function in COMMANDS.items()},
                prog="igpt",
                description=f"ImageGPT made fast. igpt_fast {__version__}",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        command()
        sys.stdout.flush()
    except UsageError as error:
        return _fail(name, error, 2)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout does not fail again
        return 1
    except (DeviceUnavailableError, OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        unavailable = isinstance(error, DeviceUnavailableError) or type(error).__name__ == "BackendUnavailableError"
        return _fail(name, error, 3 if unavailable else 1)
    return 0


def _deferred(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function of the same signature that parses now and runs later, so that only parsing is quiet."""
    import functools

    @functools.wraps(function)
    def parse(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: function(*args, **kwargs)

    return parse


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """tyro's framed message as one line; its exits for help pass."""
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [re.sub(r"[\u2500-\u257f]", " ", line).strip() for line in framed.getvalue().splitlines()]
        words = [line for line in lines[1:] if line and not line.startswith("For full helptext")]
        raise UsageError(f"{'; '.join(words) or 'wrong arguments'} (see igpt --help)") from None


def _fail(name: str, error: object, code: int) -> int:
    """Says the reason in one line."""
    text = str(error) if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"igpt {name}".strip() + ": " + " ".join(text.split()), file=sys.stderr)
    return code


def _check_output(path: Path | None, force: bool, suffixes: Sequence[str]) -> None:
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


def _device(name: str | None) -> torch.device:
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


def _set_backend(name: str) -> None:
    from igpt_fast import backend

    if name not in backend.BACKENDS:
        raise UsageError(f"--backend is {name!r}; want one of {', '.join(backend.BACKENDS)}")
    if name != "auto":  # auto leaves what IGPT_FAST_BACKEND chose
        backend.set_backend(name)


def _load(model: str | None, device: str | None, dtype: str, backend: str) -> Pipeline:
    """The pipeline that the common options ask for."""
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise UsageError(f"--dtype is {dtype!r}; want float32, bfloat16, float16 or auto")
    _set_backend(backend)
    device_ = _device(device)
    from igpt_fast.pipeline import Pipeline

    return Pipeline.from_pretrained(model, device=device_, dtype=dtype)


def _open_images(paths: Sequence[Path]) -> list[Any]:
    from igpt_fast.image import open_image

    if not paths:
        raise UsageError("give at least one image file")
    return [open_image(path) for path in paths]


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
def _progress(title: str) -> Iterator[_Progress]:
    progress = _Progress(title)
    try:
        yield progress
    finally:
        progress.close()


def _interruptible(run: Callable[[], Generation], save: Callable[[Generation], None]) -> Generation:
    """Runs a generation; on Ctrl-C saves the images that are finished, and goes on being interrupted."""
    from igpt_fast.pipeline import InterruptedGeneration

    try:
        return run()
    except InterruptedGeneration as stop:
        if stop.partial is not None:
            save(stop.partial)
        raise


def _write(
    generation: Generation,
    out: Path,
    gif: Path | None,
    columns: int | None,
    scale: int | None,
    json: bool,
    seconds: float,
    pipeline: Pipeline,
) -> None:
    """Writes grid and animation, and reports. Existing files were refused before the work, unless forced."""
    generation.save_grid(out, columns=columns, scale=scale)
    if gif is not None:
        generation.save_gif(gif, columns=columns, scale=scale)
    logprobs = generation.logprobs[:, generation.given :]
    height, width = pipeline.processor.height, pipeline.processor.width
    report = {
        "out": str(out),
        "gif": None if gif is None else str(gif),
        "images": len(generation),
        "size": [height, width],
        "seed": generation.seed,
        **generation.settings,
        "nats_per_pixel": -float(logprobs.mean()),
        "device": str(pipeline.device),
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
    }
    _result(
        json, report, f"{out}: {len(generation)} images of {height}x{width}, seed {generation.seed}, {seconds:.1f} s"
    )


def _result(json: bool, report: dict[str, Any], text: str) -> None:
    print(json_module.dumps(report) if json else text)


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
