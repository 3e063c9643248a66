"""Pictures of surprise: heat maps over enlarged images, with a colour bar; all of a palette on one scale, 0 to ln K."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

from igpt_fast.checks import whole_number

_HEAT = np.array([(0, 0, 0), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 220)])  # dark to bright, evenly
_SHOWING = 0.25  # how much of the grey image shows through the map
_GAP, _BAR, _TEXT = 6, 12, 42  # pixels: between parts, of the colour bar, of what is written beside it
_LINE, _LETTERS = 16, 12  # pixels: of a line, of its font
_ROOM = 12  # pixels: around a grid, and below what is written under its images
_COLUMNS = 4  # of a grid
_EDGE = 112  # of an image in it, about


class Cell(NamedTuple):
    """An image of a grid: what is written under it, itself, its (T,) nats."""

    text: str
    image: Image.Image
    nats: Tensor


def surprise_map(image: Image.Image, nats: Tensor, colours: int, scale: int | None = None) -> Image.Image:
    """The image enlarged, its map, and the colour bar.

    Args:
        image: In the model's colours, at its size.
        nats: (T,) of its pixels.
        colours: K, whose logarithm is the end of the scale.
        scale: Edge of a pixel, 1..64; ``None`` makes the image 256 pixels high or wide.

    Raises:
        ValueError: ``scale`` is out of its range.
    """
    edge = max(1, 256 // max(image.size)) if scale is None else whole_number("scale", scale, 1, 64)
    pair = _pair(image, nats, colours, edge)
    picture = Image.new("RGB", (pair.width + _GAP + _BAR + _TEXT, max(pair.height, 4 * _LINE)), "white")
    picture.paste(pair, (0, 0))
    _draw_bar(picture, pair.width + _GAP, 0, picture.height, colours)
    return picture


def extremes(sections: Sequence[tuple[str, Sequence[Cell]]], colours: int) -> Image.Image:
    """Sections of images under a title each, with their maps; one colour bar beside them all."""
    first = sections[0][1][0].image
    edge = max(1, _EDGE // max(first.size))
    width, height = 2 * first.width * edge + _GAP, first.height * edge + 2 + _LINE
    columns = min(_COLUMNS, max(len(cells) for _, cells in sections))
    columns = max(columns, math.ceil(480 / (width + 2 * _GAP)))  # room for a title
    rows = [-(-len(cells) // columns) for _, cells in sections]
    right = columns * (width + 2 * _GAP)
    total = sum(_LINE + _GAP + count * (height + _ROOM) for count in rows) - _ROOM
    picture = Image.new("RGB", (right + _BAR + _TEXT, max(total, 6 * _LINE)), "white")
    top = 0
    for (title, cells), count in zip(sections, rows, strict=True):
        _write(picture, 0, top, title, right)
        top += _LINE + _GAP
        for i, cell in enumerate(cells):
            x, y = i % columns * (width + 2 * _GAP), top + i // columns * (height + _ROOM)
            picture.paste(_pair(cell.image, cell.nats, colours, edge), (x, y))
            _write(picture, x, y + height - _LINE, cell.text, width)
        top += count * (height + _ROOM)
    _draw_bar(picture, right, _LINE + _GAP, picture.height - _LINE - _GAP, colours)
    return ImageOps.expand(picture, _ROOM, "white")


def _pair(image: Image.Image, nats: Tensor, colours: int, edge: int) -> Image.Image:
    """The image, and its map over a grey copy."""
    size = (image.width * edge, image.height * edge)
    heat = _heat(nats.double().numpy().reshape(image.height, image.width) / math.log(max(colours, 2)))
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    over = Image.fromarray(np.rint((1.0 - _SHOWING) * heat + _SHOWING * grey).astype(np.uint8))
    pair = Image.new("RGB", (2 * size[0] + _GAP, size[1]), "white")
    pair.paste(image.resize(size, Image.Resampling.NEAREST), (0, 0))
    pair.paste(over.resize(size, Image.Resampling.NEAREST), (size[0] + _GAP, 0))
    return pair


def _heat(values: np.ndarray) -> np.ndarray:
    """(..., 3) of (...): the colours of 0 to 1; what is above is as 1."""
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    return np.stack([np.interp(values, stops, _HEAT[:, channel]) for channel in range(3)], axis=-1)


def _draw_bar(picture: Image.Image, left: int, top: int, height: int, colours: int) -> None:
    heat = (1.0 - _SHOWING) * _heat(np.linspace(1.0, 0.0, height)) + _SHOWING * 255.0 * 0.5  # over a middle grey
    bar = Image.fromarray(np.rint(heat).astype(np.uint8)[:, None].repeat(_BAR, axis=1))
    picture.paste(bar, (left, top))
    most = math.log(max(colours, 2))
    marks = ((f">{most:.1f}", 0.0), (f"{most / 2:.1f}", 0.5), ("0 nats", 1.0))
    for text, place in marks:
        _write(picture, left + _BAR + 2, top + round(place * (height - _LINE)), text, _TEXT)


def _write(picture: Image.Image, left: int, top: int, text: str, width: int) -> None:
    """A line, as far as there is room; names of files may hold anything."""
    font = ImageFont.load_default(_LETTERS if features.check("freetype2") else None)
    draw = ImageDraw.Draw(picture)
    line = "".join(mark if mark.isprintable() else "?" for mark in text[:200]).encode("ascii", "replace").decode()
    while line and draw.textlength(line, font=font) > width:
        line = line[:-1]
    draw.text((left, top), line, fill="black", font=font)
