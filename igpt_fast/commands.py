"""The commands of ``igpt``: functions with typed signatures, which ``cli.py`` turns into a command line.

Results go to stdout, progress to stderr. Heavy imports stay inside the functions.
"""

from __future__ import annotations

import json as json_module
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from igpt_fast import options, sharding, terminal
from igpt_fast.drawing import Job, check_completion, load_pipeline, rehearse, run
from igpt_fast.exports import Exports, file_hash
from igpt_fast.options import Drawing, Files
from igpt_fast.recipes.settings import TrainConfig
from igpt_fast.terminal import GRID_SUFFIXES

Paths = Positional[tuple[Path, ...]]


def sample(
    n: Annotated[int, arg(aliases=["-n"])] = 16,
    out: Path = Path("samples.png"),
    files: OmitArgPrefixes[Files] = Files(),  # noqa: B008 - a frozen value
    columns: int | None = None,
    drawing: OmitArgPrefixes[Drawing] = Drawing(),  # noqa: B008
    json: bool = False,
) -> None:
    """Draw images and write them as a grid; under torchrun, with all its processes.

    Args:
        n: Number of images.
        out: Grid to write; .png, .jpg, .webp or .bmp.
        files: What else is written.
        columns: Images in a row of the grid.
        drawing: How they are drawn.
        json: Print one JSON object.
    """
    options.check_drawing(n, drawing)
    classes = options.labels(drawing.label, n)
    names = [f"{i:05}.png" for i in range(n)] if files.singles is not None else ()
    exports = Exports(out, files, names, columns)
    with sharding.world() as world:
        if world.first:
            exports.check()
            rehearse(exports, drawing.model, n, 0)
        pipeline = load_pipeline(drawing, sharding.local_rank())
        mine = world.share(n)
        asked = options.settings(drawing, world.agree("seed", options.seed(drawing)))
        with terminal.as_usage():  # before anything is computed
            pipeline.stream(n, labels=classes, **asked)
        job = Job(
            command="sample",
            total=n,
            mine=mine,
            stream=lambda: pipeline.stream(
                len(mine),
                first=mine.start,
                labels=None if classes is None else classes[mine.start : mine.stop],
                **asked,
            ),
            exports=exports,
            values={"model": drawing.model or "bundled"},
        )
        run(job, pipeline, drawing, world, json=json)


def complete(
    images: Paths,
    keep: str | None = None,
    mask: Path | None = None,
    n: Annotated[int, arg(aliases=["-n"])] = 4,
    candidates: int = 1,
    out: Path = Path("completions.png"),
    files: OmitArgPrefixes[Files] = Files(),  # noqa: B008 - a frozen value
    drawing: OmitArgPrefixes[Drawing] = Drawing(),  # noqa: B008
    json: bool = False,
) -> None:
    """Complete images of which a part is kept; one row each: input, kept part, completions, original.

    Args:
        images: Image files of any size; the middle is cut out in the model's aspect and resized.
        keep: What is kept: a fraction of the rows, 0 or above and below 1, or a number of them like 12rows; 0.5 if
            neither this nor a mask is given.
        mask: Image file that says what is kept instead: white is kept, black is drawn; cut out like the images, and
            resized by nearest neighbour.
        n: Completions of each image.
        candidates: Draw so many for each completion, and choose one by how well it goes with what is kept below it;
            approximate, for masks.
        out: Grid to write; .png, .jpg, .webp or .bmp.
        files: What else is written.
        drawing: How they are drawn.
        json: Print one JSON object.
    """
    terminal.check_images(images)
    options.check_drawing(n, drawing)
    classes = options.labels(drawing.label, len(images))
    names = [f"{i:05}-{j:02}.png" for i in range(len(images)) for j in range(n)] if files.singles is not None else ()
    exports = Exports(out, files, names)
    with sharding.world() as world:
        if world.first:
            exports.check()
            rehearse(exports, drawing.model, n, len(images))
        pipeline = load_pipeline(drawing, sharding.local_rank())
        size = pipeline.processor.height, pipeline.processor.width
        mine = world.share(len(images))
        asked = options.settings(drawing, world.agree("seed", options.seed(drawing)))
        kept: dict[str, Any] = {"keep": options.kept(keep, mask, *size), "n": n, "candidates": candidates}
        check_completion(pipeline, classes, len(images), kept, asked)
        values: dict[str, Any] = {"inputs": list(map(str, images)), "mask": mask and str(mask)}
        if world.first and files.sidecar is not None:
            values |= {"inputs_sha256": [file_hash(path) for path in images], "mask_sha256": mask and file_hash(mask)}
        job = Job(
            command="complete",
            total=n * len(images),
            mine=range(mine.start * n, mine.stop * n),
            stream=lambda: pipeline.stream_complete(
                images[mine.start : mine.stop],
                first_input=mine.start,
                labels=None if classes is None else classes[mine.start : mine.stop],
                **kept,
                **asked,
            ),
            exports=exports,
            values={"model": drawing.model or "bundled"} | values,
        )
        run(job, pipeline, drawing, world, json=json)


def quantize(
    images: Paths,
    out: Path = Path("tokens.npy"),
    clusters: Path | None = None,
    model: str | None = None,
    side: int | None = None,
    preview: Path | None = None,
    device: str | None = None,
    backend: str = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Turn images into colour tokens: an (N, H, W) uint16 array in a .npy file.

    Args:
        images: Image files; the square in the middle is cut out and resized.
        out: The .npy file to write.
        clusters: Colours to use: a .npy file of (K, 3) floats in [-1, 1], or a preprocessor_config.json.
        model: Directory or hub id whose colours and size to use; the bundled emoji model if neither is given.
        side: Edge of the images in pixels; 0 takes a single image as it is; the model's if not given.
        preview: Also write the images in their new colours, as a grid.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    if clusters is not None and model is not None:
        raise terminal.UsageError("give --clusters or --model, not both")
    if side is not None and not 0 <= side <= 4096:
        raise terminal.UsageError(f"--side is {side}; want 0..4096")
    if side == 0 and len(images) > 1:
        raise terminal.UsageError("--side 0 takes a single image")
    terminal.check_output(out, force, (".npy",))
    terminal.check_output(preview, force, GRID_SUFFIXES)
    terminal.check_images(images)
    terminal.choose_backend(backend)
    device_ = terminal.choose_device(device)
    import numpy as np
    import torch

    from igpt_fast import files
    from igpt_fast import image as images_module

    palette, default_side = terminal.read_palette(clusters, model)
    pixels = np.stack([terminal.read_square(path, default_side if side is None else side) for path in images])
    colours = torch.from_numpy(pixels).to(device_)
    start = time.perf_counter()
    tokens = images_module.quantize(colours, palette).cpu().numpy()
    seconds = time.perf_counter() - start
    with files.replacing(out, overwrite=force) as partial, partial.open("wb") as file:
        np.save(file, tokens.astype(np.uint16), allow_pickle=False)
    if preview is not None:
        decoded = images_module.dequantize(tokens, palette)
        images_module.save_image(images_module.image_grid(list(decoded)), preview, overwrite=force)
    used = len(np.unique(tokens))
    terminal.report(
        json,
        {"out": str(out), "shape": list(tokens.shape), "colours": len(palette), "used": used, "seconds": seconds},
        f"{out}: {' x '.join(map(str, tokens.shape))} tokens, {used} of {len(palette)} colours used",
    )


def clusters(
    images: Paths,
    n_clusters: Annotated[int, arg(aliases=["-k"])] = 512,
    out: Path = Path("clusters.npy"),
    side: int = 32,
    seed: int = 0,
    preview: Path | None = None,
    skip_unreadable: bool = False,
    json: bool = False,
    force: bool = False,
) -> None:
    """Fit colour clusters to images, by mini-batch k-means; needs scikit-learn.

    Args:
        images: Image files, and directories that are searched for them.
        n_clusters: Number of clusters.
        out: The .npy file to write: (K, 3) float32 in [-1, 1].
        side: The square in the middle of each image is resized to this edge before its colours are counted.
        seed: Of the fit.
        preview: Also write the colours as a picture.
        skip_unreadable: Leave out files of a directory that are not readable images, instead of failing.
        json: Print one JSON object.
        force: Overwrite files.
    """
    if not 1 <= side <= 4096:
        raise terminal.UsageError(f"--side is {side}; want 1..4096")
    terminal.check_clusters(n_clusters)
    if not 0 <= seed < 1 << 32:
        raise terminal.UsageError(f"--seed is {seed}; want 0..2^32-1")
    if not images:
        raise terminal.UsageError("give at least one image file or directory")
    terminal.check_output(out, force, (".npy",))
    terminal.check_output(preview, force, GRID_SUFFIXES)
    import numpy as np

    from igpt_fast import image as images_module
    from igpt_fast.recipes.data import find_images

    squares, skipped = [], 0
    for item in images:
        for path in find_images(item) if item.is_dir() else [item]:
            try:
                squares.append(terminal.read_square(path, side))
            except ValueError as error:
                if not (skip_unreadable and item.is_dir()):
                    raise
                print(f"left out: {error}", file=sys.stderr)
                skipped += 1
    if not squares:
        raise ValueError(f"{images[0]}: no images in it")
    fitted = images_module.fit_clusters(np.stack(squares), n_clusters, seed=seed)
    images_module.save_clusters(fitted, out, overwrite=force)
    if preview is not None:
        colours = images_module.dequantize(np.arange(n_clusters), fitted)
        patches = [np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours]
        images_module.save_image(images_module.image_grid(patches, 32, gap=0), preview, overwrite=force)
    terminal.report(
        json,
        {"out": str(out), "clusters": n_clusters, "images": len(squares), "skipped": skipped},
        f"{out}: {n_clusters} clusters of the colours of {len(squares)} images",
    )


def train(
    data: Positional[Path | None] = None,
    out: Path = Path("runs/train"),
    side: int | None = None,
    n_clusters: Annotated[int | None, arg(aliases=["-k"])] = None,
    clusters: Path | None = None,
    holdout: float | None = None,
    skip_unreadable: bool = False,
    classes: bool = False,
    resume: bool = False,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    config: OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008 - a frozen value
    json: bool = False,
    force: bool = False,
) -> None:
    """Train a model: images, colour clusters, tokens, network; writes a checkpoint that all commands take.

    Args:
        data: A directory of images, or a token file (.npz with tokens, clusters, heldout); the bundled emoji if
            not given.
        out: Directory for model/, samples.png, log.jsonl and the training state.
        side: For a directory: edge that the square in the middle of each image is resized to; 32 if not given.
        n_clusters: For a directory: how many colours are fitted to its images; 512 if not given.
        clusters: For a directory: a .npy file of colours to use instead of fitting some.
        holdout: For a directory: fraction of the images that is held out for evaluation; 0.1 if not given.
        skip_unreadable: For a directory: leave out files that are not readable images, instead of failing.
        classes: Learn to draw images of a class on demand. The classes are the sub-directories of a directory, or
            stand in a token file that has labels (and class_names).
        resume: Continue an interrupted run bit for bit; the settings must be the same.
        device: cpu, cuda or cuda:N; cuda if torch has it, if not given.
        dtype: float32, bfloat16 or float16, of the weights in model/; the training itself keeps float32 ones.
        backend: auto, reference, cpu or cuda; see igpt env.
        config: The run.
        json: Print one JSON object.
        force: Start afresh in a directory that holds a run.
    """
    if resume and force:
        raise terminal.UsageError("--resume goes on with a run, --force starts afresh; give one of them")
    preparation = {"--side": side, "--n-clusters": n_clusters, "--clusters": clusters, "--holdout": holdout}
    given = [name for name, value in preparation.items() if value is not None]
    if (data is None or data.is_file()) and (given or skip_unreadable):
        names = ", ".join(given or ["--skip-unreadable"])
        raise terminal.UsageError(f"{names}: only for a directory of images; a token file is taken as it is")
    if classes and data is None:
        raise terminal.UsageError(
            "--classes: the bundled emoji have none; give a directory or a token file with labels"
        )
    if not classes and config.label_dropout != TrainConfig.label_dropout:
        raise terminal.UsageError("--label-dropout: only with --classes")
    if clusters is not None and n_clusters is not None:
        raise terminal.UsageError("give --clusters or --n-clusters, not both")
    if n_clusters is not None:
        terminal.check_clusters(n_clusters)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise terminal.UsageError(f"--dtype is {dtype!r}; want float32, bfloat16 or float16")
    if side is not None and not 1 <= side <= 256:
        raise terminal.UsageError(f"--side is {side}; want 1..256")
    if holdout is not None and not 0.0 <= holdout < 1.0:
        raise terminal.UsageError(f"--holdout is {holdout}; want a fraction in [0, 1)")
    terminal.choose_backend(backend)
    device_ = terminal.choose_device(device)
    import torch

    from igpt_fast.image import load_clusters
    from igpt_fast.pipeline import BUNDLED
    from igpt_fast.recipes import data as data_module
    from igpt_fast.recipes import train as recipe

    if classes and data is not None and data.is_file() and not data_module.has_labels(data):
        raise terminal.UsageError(f"--classes: {data} has no labels; train without, or write some into it")
    recipe.check_directory(out, resume=resume, overwrite=force)  # before the images are read, which takes its time
    if data is not None and data.is_dir():
        palette = None if clusters is None else load_clusters(clusters)
        tokens = data_module.tokens_from_images(
            data,
            side or 32,
            len(palette) if palette is not None else n_clusters or 512,
            holdout=0.1 if holdout is None else holdout,
            seed=config.seed,
            clusters=palette,
            skip_unreadable=skip_unreadable,
            classes=classes,
        )
    else:
        tokens = data_module.load_tokens(BUNDLED.parent / "emoji16.npz" if data is None else data, classes=classes)

    def progress(record: dict[str, Any]) -> None:
        print(json_module.dumps(record), file=sys.stderr, flush=True)

    summary = recipe.run(
        tokens,
        out,
        config,
        device=device_,
        resume=resume,
        overwrite=force,
        save_dtype=getattr(torch, dtype),
        progress=progress,
    )
    terminal.report(
        json,
        summary,
        f"{out / 'model'}: {summary['parameters'] / 1e6:.2f} M parameters, {summary['steps']} steps,"
        f" held out {terminal.nats(summary['heldout_nats'])} nats/token"
        + (f", {terminal.nats(summary['heldout_class_nats'])} given the class" if classes else "")
        + f" (left+up lookup table {terminal.nats(summary['lookup_table_nats'])})",
    )


def env(json: bool = False) -> None:
    """Show versions, build, devices, instruction sets, and which implementation of every op is live and why.

    Args:
        json: Print one JSON object.
    """
    from igpt_fast import backend

    report = backend.config()
    print(json_module.dumps(report, indent=2) if json else backend.format_config(report))
