"""``igpt quantize`` and ``igpt clusters``: pictures to colour tokens, and the palette that they are made with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.checks import GRID_SUFFIXES, Paths

if TYPE_CHECKING:
    import numpy as np


def quantize(
    images: Paths,
    out: Path = Path("tokens.npy"),
    clusters: Path | None = None,
    model: str | None = None,
    side: int | None = None,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    grid: Path | None = None,
    device: str | None = None,
    backend: checks.Backend = "auto",
    json: bool = False,
    force: bool = False,
) -> None:
    """Turn images into colour tokens: an (N, H, W) uint16 array in a .npy file.

    Example: igpt quantize photo.jpg --out tokens.npy --grid colours.png

    Args:
        images: Image files, directories that are searched for them, or - for the standard input.
        out: The .npy file to write.
        clusters: Colours to use: a .npy file of (K, 3) floats in [-1, 1], or a preprocessor_config.json.
        model: Directory or hub id whose colours and size to use; the bundled emoji model if neither is given.
        fit: How an image becomes a square: crop, its middle is cut out; pad, white is put around it; stretch.
        side: Edge of the images in pixels; 0 takes a single image as it is; the model's if not given.
        grid: Also write the images in their new colours, as a grid.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given.
        backend: auto, reference, cpu or cuda; see igpt env.
        json: Print one JSON object.
        force: Overwrite files.
    """
    if clusters is not None and model is not None:
        raise checks.UsageError("give --clusters or --model, not both")
    checks.check_range("--side", side, 0, 4096)
    checks.check_output(out, force, (".npy",))
    checks.check_output(grid, force, GRID_SUFFIXES)
    paths = checks.find_pictures(images)
    if side == 0 and len(paths) > 1:
        raise checks.UsageError("--side 0 takes a single image")
    checks.choose_backend(backend)
    device_ = checks.choose_device(device)
    import numpy as np
    import torch

    from igpt_fast import files
    from igpt_fast import image as images_module
    from igpt_fast.image.reading import read_square

    palette, default_side = checks.read_palette(clusters, model)
    pixels = np.stack([read_square(path, default_side if side is None else side, fit) for path in paths])
    colours = torch.from_numpy(pixels).to(device_)
    start = time.perf_counter()
    tokens = images_module.quantize(colours, palette).cpu().numpy()
    seconds = time.perf_counter() - start
    with files.replacing_together([out, *([grid] if grid else [])], overwrite=force) as (partial, *pictures):
        with partial.open("wb") as file:
            np.save(file, tokens.astype(np.uint16), allow_pickle=False)
        for picture in pictures:
            decoded = images_module.dequantize(tokens, palette)
            images_module.save_image(images_module.image_grid(list(decoded)), picture)
    used, shape = len(np.unique(tokens)), list(tokens.shape)
    values = {"out": str(out), "shape": shape, "colours": len(palette), "used": used, "seconds": seconds}
    text = f"{out}: {' x '.join(map(str, shape))} tokens, {used} of {len(palette)} colours used"
    terminal.report(json, values, text)


def clusters(
    images: Paths,
    n_clusters: Annotated[int, arg(aliases=["-k"])] = 512,
    out: Path = Path("clusters.npy"),
    side: int = 32,
    seed: int = 0,
    all_pixels: bool = False,
    grid: Path | None = None,
    skip_unreadable: bool = False,
    json: bool = False,
    force: bool = False,
) -> None:
    """Fit colour clusters to images, by mini-batch k-means; needs scikit-learn.

    Example: igpt clusters pictures/ -k 512 --out clusters.npy

    Args:
        images: Image files, and directories that are searched for them.
        n_clusters: Number of clusters.
        out: The .npy file to write: (K, 3) float32 in [-1, 1].
        side: The square in the middle of each image is resized to this edge before its colours are counted.
        seed: Of the fit.
        all_pixels: Fit to every pixel, which takes minutes for millions of them, and not to a sample of 400,000.
        grid: Also write the colours as a picture.
        skip_unreadable: Leave out files of a directory that are not readable images, instead of failing.
        json: Print one JSON object.
        force: Overwrite files.
    """
    checks.check_range("--side", side, 1, 4096)
    checks.check_clusters(n_clusters)
    if not 0 <= seed < 1 << 32:
        raise checks.UsageError(f"--seed is {seed}; want 0..2^32-1")
    if not images:
        raise checks.UsageError("give at least one image file or directory")
    checks.check_output(out, force, (".npy",))
    checks.check_output(grid, force, GRID_SUFFIXES)
    import numpy as np

    from igpt_fast import files
    from igpt_fast import image as images_module

    squares, skipped = _read_squares(images, side, skip_unreadable)
    fitted = images_module.fit_clusters(np.stack(squares), n_clusters, seed=seed, all_pixels=all_pixels)
    with files.replacing_together([out, *([grid] if grid else [])], overwrite=force) as (partial, *pictures):
        images_module.save_clusters(fitted, partial)
        for picture in pictures:
            colours = images_module.dequantize(np.arange(n_clusters), fitted)
            patches = [np.full((8, 8, 3), colour, dtype=np.uint8) for colour in colours]
            images_module.save_image(images_module.image_grid(patches, 32, gap=0), picture)
    values = {"out": str(out), "clusters": n_clusters, "images": len(squares), "skipped": skipped}
    terminal.report(json, values, f"{out}: {n_clusters} clusters of the colours of {len(squares)} images")


def _read_squares(images: Sequence[Path], side: int, skip_unreadable: bool) -> tuple[list[np.ndarray], int]:
    """The squares of files, and of the files in directories; and how many of these were left out."""
    from igpt_fast.image.folders import find_images
    from igpt_fast.image.reading import read_square

    squares, skipped = [], 0
    for item in images:
        for path in find_images(item) if item.is_dir() else [item]:
            try:
                squares.append(read_square(path, side))
            except (OSError, ValueError) as error:
                if not (skip_unreadable and item.is_dir()):
                    raise
                terminal.say(f"left out: {error}")
                skipped += 1
    if not squares:
        raise ValueError(f"{images[0]}: no images in it")
    return squares, skipped
