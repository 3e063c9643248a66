"""``igpt decode``: colour tokens to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.draw.exports import Exports
from igpt_fast.cli.draw.options import Files

if TYPE_CHECKING:
    from igpt_fast.sampling.results import Generation


def decode(
    tokens: Positional[Path],
    out: Path | None = None,
    singles: Path | None = None,
    grid: bool = True,
    columns: int | None = None,
    upscale: int | None = None,
    clusters: Path | None = None,
    model: str | None = None,
    number: bool = False,
    json: bool = False,
    force: bool = False,
) -> None:
    """Turn colour tokens back into pictures: a grid, or every picture by itself.

    Example: igpt decode tokens.npz --out pictures.png

    Args:
        tokens: A .npz with tokens, (N, H, W) or of squares (N, H * W), and clusters, as sample, complete and score
            write it; or the .npy of quantize, with --model or --clusters.
        out: Grid to write; .png, .jpg, .webp or .bmp; decoded.png if not given.
        singles: Also write every picture by itself into this directory: 00000.png and so on.
        grid: The grid; left out of its own accord where it would have more than 1,024 pictures, unless --out names it.
        columns: Pictures in a row of the grid.
        upscale: Edge of a pixel. If not given, a grid's pictures are enlarged to 128 pixels and single ones stay as
            they are.
        clusters: Colours to use: a .npy file of (K, 3) floats in [-1, 1], or a preprocessor_config.json.
        model: Directory or hub id whose colours to use; the bundled emoji model's where the file has none.
        number: Where one of the files is there already, give all of them the next free number: decoded-2.png.
        json: Print one JSON object.
        force: Overwrite files; a link is replaced by the file.
    """
    if clusters is not None and model is not None:
        raise checks.UsageError("give --clusters or --model, not both")
    if not tokens.exists():
        raise FileNotFoundError(f"{tokens}: no such file")
    generation = _read(tokens, clusters, model)
    count, processor = len(generation), generation.processor
    names = [f"{i:05}.png" for i in range(count)] if singles is not None else ()
    files = Files(grid, singles=singles, upscale=upscale, number=number, force=force)
    exports = Exports.of(out, "decoded.png", files, count, names=names, columns=columns)
    exports.check()
    exports.check_size(processor, count)
    written = exports.write(generation, range(count), {})
    size = f"{processor.height}x{processor.width}"
    values = {"out": written["out"], "singles": written["singles"], "images": count}
    values |= {"size": [processor.height, processor.width]}
    terminal.report(json, values, f"{written['out'] or written['singles']}: {count} pictures of {size}")


def _read(path: Path, clusters: Path | None, model: str | None) -> Generation:
    """The pictures of a file; their nats are not known.

    Raises:
        ValueError: Not such a file; the message names it.
    """
    import math

    import numpy as np
    import torch

    from igpt_fast import files
    from igpt_fast.image import ImageGPTImageProcessor
    from igpt_fast.sampling.results import Generation

    with files.open_input(path) as file:
        try:
            if path.suffix.lower() == ".npz":
                found = files.read_npz(file, ["tokens"], ["clusters"])
            else:
                size = file.seek(0, 2)
                file.seek(0)
                found = {"tokens": files.read_npy(file, size, kinds="iu")}
        except Exception as error:  # what zipfile raises on a damaged file has no common class
            raise ValueError(f"{path}: not a usable file of tokens: {files.first_line(error)}") from error
    tokens, palette = found["tokens"], found.get("clusters")
    if palette is not None and (palette.ndim != 2 or palette.dtype.kind not in "iuf"):
        raise ValueError(f"{path}: its clusters are {palette.dtype} {palette.shape}; want (K, 3) numbers")
    if palette is None or clusters is not None or model is not None:
        palette = checks.read_palette(clusters, model)[0]
    side = math.isqrt(tokens.shape[1]) if tokens.ndim == 2 else 0
    if side and side * side == tokens.shape[1]:
        tokens = tokens.reshape(-1, side, side)
    if tokens.ndim != 3 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path}: its tokens are {tokens.dtype} {tokens.shape}; want (N, H, W) integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= len(palette):
        raise ValueError(f"{path}: token {low if low < 0 else high} is not in 0..{len(palette) - 1}, its colours")
    count, height, width = tokens.shape
    try:
        processor = ImageGPTImageProcessor(clusters=palette, size={"height": height, "width": width})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {files.first_line(error)}") from error
    numbers = torch.from_numpy(tokens.reshape(count, -1).astype(np.int64))
    return Generation(numbers, torch.full(numbers.shape, torch.nan), processor, 0)
