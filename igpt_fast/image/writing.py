"""Pictures and animations to files, written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, features

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.image.clusters import colour_codes
from igpt_fast.image.reading import _MAX_EDGE, CHANNELS_LAST, MAX_PIXELS, to_pil

# Suffix -> Pillow's format and options that lose nothing, or little in JPEG's case.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".gif": ("GIF", {}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".ppm": ("PPM", {}),
}
_ANIMATED = {".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
# Pixels of all frames, which Pillow keeps until the last one, in a byte each or in twice four; and of an edge.
_MOST_ANIMATED = {"GIF": 1 << 31, "PNG": 1 << 28}
INK = (36, 41, 47)  # of headings
_LETTERS = 10, 28  # pixels that they are high at least, to be read, and at most
_EDGES = {"GIF": (1 << 16) - 1, "WEBP": (1 << 14) - 1, "JPEG": 65_500}


def image_grid(
    images: Iterable[Any],
    columns: int | None = None,
    *,
    scale: int = 1,
    gap: int = 1,
    background: str | tuple[int, int, int] = "white",
    headings: Sequence[str] = (),
) -> Image.Image:
    """One picture of several of the same size, row by row.

    Args:
        images: PIL images, or arrays or tensors (H, W, C) or (H, W); one (N, H, W, C) too.
        columns: ``None`` makes the grid about square.
        scale: Edge of a pixel in the result.
        gap: Pixels of background between two images, after scaling.
        background: A colour as ``PIL.ImageColor`` names it, or (r, g, b).
        headings: What stands above the columns, where these are wide enough for it to be read.

    Raises:
        TypeError, ValueError: No image, different sizes, an argument out of range, a result above ``MAX_PIXELS``.
    """
    cells = list(_frames("image_grid", images))
    scale = whole_number("scale", scale, 1, _MAX_EDGE)
    gap = whole_number("gap", gap, 0, _MAX_EDGE)
    width, height = (side * scale for side in cells[0].size)
    columns, size = grid_size(len(cells), columns, width, height, gap, headings)
    grid = Image.new("RGB", size, ImageColor.getrgb(background) if isinstance(background, str) else background)
    top = heading_height(headings, width)
    draw = ImageDraw.Draw(grid)
    for column, text in enumerate(headings[:columns] if top else ()):
        centre = column * (width + gap) + width / 2
        draw.text((centre, top / 2), text, INK, ImageFont.load_default(_heading_size(headings, width)), anchor="mm")
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        scaled = cell.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(scaled, (column * (width + gap), top + row * (height + gap)))
    return grid


def heading_height(headings: Sequence[str], width: int) -> int:
    """Pixels that headings take above columns of ``width`` pixels: none where they could not be read."""
    return round(1.6 * _heading_size(headings, width))


def _heading_size(headings: Sequence[str], width: int) -> int:
    """Of the letters, in pixels; 0 where the smallest that can be read are too wide, or Pillow has no FreeType."""
    if not headings or not features.check("freetype2"):
        return 0
    largest = max(_LETTERS[0], min(_LETTERS[1], width // 8))
    for size in range(largest, _LETTERS[0] - 1, -1):
        font = ImageFont.load_default(size)
        if max(font.getlength(text) for text in headings) <= width:
            return size
    return 0


def grid_size(
    count: int, columns: int | None, width: int, height: int, gap: int, headings: Sequence[str] = ()
) -> tuple[int, tuple[int, int]]:
    """Images in a row, and the (width, height) of a grid of ``count`` images of ``width`` x ``height`` pixels.

    Raises:
        ValueError: ``columns`` is out of its range, or the grid has more than ``MAX_PIXELS``.
    """
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    columns = min(whole_number("columns", columns, 1, _MAX_EDGE), count)
    size = (columns * (width + gap) - gap, -(-count // columns) * (height + gap) - gap)
    size = (size[0], size[1] + heading_height(headings, width))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"image_grid: {size[0]}x{size[1]} is more than {MAX_PIXELS} pixels")
    return columns, size


def save_image(image: Any, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes an image, whole or not at all, in the format that the suffix names.

    A GIF of more than 256 colours gets the nearest of 256; a JPEG is of quality 95; the rest is lossless.

    Raises:
        ValueError: An unknown suffix.
        FileExistsError: The file exists and ``overwrite`` is false.
        FileNotFoundError, OSError: The folder does not exist or cannot be written to.
        TypeError, ValueError: Not an image; see ``to_rgb``.
    """
    path = Path(path)
    picture = to_pil(image, input_data_format=None if isinstance(image, Image.Image) else CHANNELS_LAST)
    form, options = check_image(path, *picture.size)
    if form == "GIF":
        (picture,) = _indexed([picture])
    _check_folder(path)
    with files.replacing(path, overwrite=overwrite) as partial:
        picture.save(partial, format=form, **options)


def check_image(path: Path, width: int, height: int) -> tuple[str, dict[str, Any]]:
    """The format that the suffix names, and Pillow's options for it.

    Raises:
        ValueError: An unknown suffix, or an edge that the format cannot have.
    """
    form, options = _by_suffix(path, FORMATS)
    _check_edges(path, form, width, height)
    return form, options


def _check_edges(path: Path, form: str, width: int, height: int) -> None:
    most = _EDGES.get(form, max(width, height))
    if max(width, height) > most:
        raise ValueError(f"{path}: is to be {width}x{height} pixels; a {form} has {most} at most along an edge")


def save_animation(
    frames: Iterable[Any],
    path: str | os.PathLike[str] | IO[bytes],
    *,
    frame_ms: int = 40,
    last_ms: int = 1500,
    overwrite: bool = True,
) -> None:
    """Writes an animation that loops: a GIF, or an animated PNG.

    A GIF keeps the colours as they are while 256 suffice, for all frames together or for each; a frame of more
    gets the nearest of 256. It is never dithered. A PNG is lossless; of a single frame it is a plain one.

    Args:
        frames: Images of one size, as ``image_grid`` takes them; taken one by one.
        path: Ends in ``.gif``, ``.png`` or ``.apng``. Or an open file, into which a GIF is written.
        frame_ms: Milliseconds a frame, 10..60000; a GIF counts in steps of 10.
        last_ms: Those of the last frame.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ValueError: An unknown suffix, no frames, different sizes, a time out of its range, or as ``check_animation``.
        FileExistsError, FileNotFoundError, OSError: As ``save_image``.
    """
    opened = None if isinstance(path, str | os.PathLike) else path
    path = Path(path) if isinstance(path, str | os.PathLike) else Path("animation.gif")
    form = _by_suffix(path, _ANIMATED)
    frame_ms = whole_number("frame_ms", frame_ms, 10, 60_000)
    last_ms = whole_number("last_ms", last_ms, 10, 60_000)
    if opened is None:
        _check_folder(path)
    bounded = _bounded(path, _frames("save_animation", frames))
    pictures = _indexed(bounded) if form == "GIF" else list(bounded)
    durations = [frame_ms] * (len(pictures) - 1) + [last_ms]
    first, rest = pictures[0], pictures[1:]
    del pictures
    with files.replacing(path, overwrite=overwrite) if opened is None else nullcontext(opened) as partial:
        # Pillow copies the frames of a GIF as it takes them; those of a PNG it looks through beforehand.
        taken = (rest.pop(0) for _ in durations[1:]) if form == "GIF" else rest
        first.save(partial, format=form, save_all=True, append_images=taken, duration=durations, loop=0, optimize=False)


def check_animation(path: str | os.PathLike[str], width: int, height: int, count: int) -> None:
    """Fails where ``save_animation`` would with ``count`` frames of ``width`` x ``height`` pixels.

    Raises:
        ValueError: An unknown suffix, an edge that a GIF cannot have, or more pixels in all than memory is taken for.
    """
    form = _by_suffix(Path(path), _ANIMATED)
    _check_edges(Path(path), form, width, height)
    if width * height * count > _MOST_ANIMATED[form]:
        raise ValueError(f"{path}: {count} frames of {width}x{height} are more than {_MOST_ANIMATED[form]} pixels")


def _by_suffix(path: Path, formats: dict[str, Any]) -> Any:
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; want one of {', '.join(formats)}")
    return formats[path.suffix.lower()]


def _bounded(path: Path, frames: Iterable[Image.Image]) -> Iterator[Image.Image]:
    for i, frame in enumerate(frames):
        check_animation(path, *frame.size, i + 1)
        yield frame


def _frames(where: str, images: Iterable[Any]) -> Iterator[Image.Image]:
    """Several images as PIL ones of one size. Arrays have the channels last, as ``dequantize`` returns them."""
    if isinstance(images, str | Image.Image) or not isinstance(images, Iterable):
        raise TypeError(f"{where}: got a {type(images).__name__}; want several images")
    size = None
    for i, image in enumerate(images):
        picture = to_pil(image, input_data_format=CHANNELS_LAST)
        size = size or picture.size
        if picture.size != size:
            (w, h), (w0, h0) = picture.size, size
            raise ValueError(f"{where}: image {i} is {w}x{h} pixels, the first {w0}x{h0}; want one size")
        yield picture
    if size is None:
        raise ValueError(f"{where}: got no images; want at least one")


def _indexed(pictures: Iterable[Image.Image]) -> list[Image.Image]:
    """Mode P of RGB pictures, with a palette of all of them, else of each, else the nearest of 256 colours.

    They are taken one by one; what is kept of each is a byte a pixel.
    """
    pages, own, shared = [], [], np.empty(0, np.int32)
    for picture in pictures:
        pixels = np.asarray(picture)
        bands = [pixels[top : top + 64] for top in range(0, len(pixels), 64)]  # what is wider than a byte is of a few
        colours = np.unique(np.concatenate([np.unique(colour_codes(band)) for band in bands]))
        shared = np.union1d(shared, colours) if len(shared) <= 256 else shared
        if len(colours) > 256:
            pages.append(picture.quantize(256, dither=Image.Dither.NONE))
        else:
            indices = [np.searchsorted(colours, colour_codes(band)).astype(np.uint8) for band in bands]
            pages.append(_page(np.concatenate(indices), colours))
            own.append(colours)
    if len(shared) <= 256:
        for i, colours in enumerate(own):
            pages[i] = _page(np.searchsorted(shared, colours).astype(np.uint8)[np.asarray(pages[i])], shared)
    return pages


def _page(index: np.ndarray, colours: np.ndarray) -> Image.Image:
    page = Image.fromarray(index)
    channels = np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], axis=1)
    page.putpalette(channels.astype(np.uint8).tobytes())
    return page


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
