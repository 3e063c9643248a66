"""Preview: the images in a terminal while they are drawn, two pixels a character, redrawn in place.

A character cell is about twice as high as wide. The upper half block in one colour on a background of another shows
two square pixels, one above the other.

Sources: ECMA-48 (cursor, erasing, SGR), xterm's 24-bit SGR 38;2 and 48;2, https://no-color.org.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 4  # pixels: the edge below which an image is not worth a look
BLANK = 224  # grey of pixels that are still to be drawn, as in the animation
SECONDS = 0.1  # between two pictures at least
_SHADES = " .:-=+*#%@"  # from dark to bright, where colours are not wanted
_RESET, _HIDE, _SHOW = "\x1b[0m", "\x1b[?25l", "\x1b[?25h"


def layout(count: int, height: int, width: int, columns: int, lines: int) -> tuple[int, int, int, int]:
    """How ``count`` images of ``height`` x ``width`` pixels fit best into a terminal, a gap of a pixel between them.

    Returns:
        (height, width, images in a row, images): the size at which each one is shown, never enlarged, and how many
        are, where not even the smallest size has room for all.
    """
    least = min(height, LEAST)
    for h in range(min(height, 2 * lines), least - 1, -1):
        w = max(1, round(width * h / height))
        across, down = (columns + 1) // (w + 1), (2 * lines + 1) // (h + 1)
        if across * down >= count:
            return h, w, min(across, count), count
    w = max(1, min(columns, round(width * least / height)))
    across, down = max(1, (columns + 1) // (w + 1)), max(1, (2 * lines + 1) // (least + 1))
    return least, w, min(across, count), min(across * down, count)


def half_blocks(pixels: np.ndarray, inked: np.ndarray, colour: bool = True) -> list[str]:
    """Lines of text that show (H, W, 3) uint8 pixels where the (H, W) bool ``inked`` is true; blanks elsewhere."""
    odd = len(pixels) % 2
    pixels, inked = np.pad(pixels, ((0, odd), (0, 0), (0, 0))), np.pad(inked, ((0, odd), (0, 0)))
    upper, lower, ink_upper, ink_lower = pixels[::2], pixels[1::2], inked[::2], inked[1::2]
    if not colour:
        luminance = pixels @ np.array([0.299, 0.587, 0.114])
        bright = (luminance[::2] * ink_upper + luminance[1::2] * ink_lower) / np.maximum(ink_upper + 1 * ink_lower, 1)
        shades = (bright * len(_SHADES) / 256).astype(int)
        return ["".join(_SHADES[shade] for shade in row).rstrip() for row in shades]
    return [_line(*rows) for rows in zip(upper, lower, ink_upper, ink_lower, strict=True)]


def _line(upper: np.ndarray, lower: np.ndarray, ink_upper: np.ndarray, ink_lower: np.ndarray) -> str:
    """A line of characters; a colour is named when it changes."""
    parts: list[str] = []
    before: tuple[Any, Any] = None, None
    used = 0
    cells = zip(*(row.tolist() for row in (upper, lower, ink_upper, ink_lower)), strict=True)
    for above, below, has_above, has_below in cells:
        front = tuple(above) if has_above else tuple(below) if has_below else None
        back = tuple(below) if has_above and has_below else None
        codes = []
        if front is not None and front != before[0]:
            codes.append("38;2;{};{};{}".format(*front))
        if back != before[1]:
            codes.append("49" if back is None else "48;2;{};{};{}".format(*back))
        if codes:
            parts.append(f"\x1b[{';'.join(codes)}m")
        before = (before[0] if front is None else front, back)
        parts.append("▀" if has_above else "▄" if has_below else " ")
        used = len(parts) if front is not None else used
    return "".join(parts[:used]) + (_RESET if used else "")


class Preview:
    """Images that grow, on a terminal, or once at the end where there is none.

    Nothing of the terminal's state is changed between two pictures: each is one write that hides the cursor, goes back
    over the last one, and leaves the cursor below, visible.

    Args:
        stream: Where it is shown.
        count: How many images are drawn in all.
        height, width: Of each, in pixels.
        palette: (K, 3) uint8, the colours of the tokens.

    Raises:
        ValueError: The stream cannot show the characters; the message says how it can.
    """

    def __init__(self, stream: TextIO, count: int, height: int, width: int, palette: np.ndarray) -> None:
        self._stream, self._count, self._height, self._width, self._palette = stream, count, height, width, palette
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = not os.environ.get("NO_COLOR")
        if self._colour:
            try:
                "▀▄".encode(stream.encoding or "utf-8")
            except (UnicodeEncodeError, LookupError):
                raise ValueError(
                    f"the preview needs half-block characters, which {stream.encoding} has not: use a UTF-8 locale,"
                    " or NO_COLOR=1 for plain characters"
                ) from None
        self._first = 0
        self._pixels = np.empty((0, height, width, 3), dtype=np.uint8)
        self._lines, self._time = 0, -math.inf

    def put(self, first: int, row: int, tokens: Tensor) -> bool:
        """The (b, W) tokens of row ``row`` of the images from ``first`` on; shows them if it is time to: then true."""
        room = layout(self._count, self._height, self._width, *self._size())[3]
        if first < self._first or first + min(len(tokens), room) > self._first + room:
            self._first, self._pixels = first, self._pixels[:0]  # what does not fit goes; the batch at work is shown
        if len(self._pixels) < room:  # at the beginning, after a move, and when the terminal has grown
            blank = np.full((room, self._height, self._width, 3), BLANK, dtype=np.uint8)
            blank[: len(self._pixels)] = self._pixels
            self._pixels = blank
        begin = first - self._first
        colours = self._palette[tokens.numpy()]
        part = self._pixels[begin : begin + len(colours)]
        part[:, row] = colours[: len(part)]
        due = self._live and time.monotonic() - self._time >= SECONDS
        if due:
            self.show()
        return due

    def show(self) -> None:
        """Draws what is known by now."""
        columns, lines = self._size()
        height, width, across, room = layout(self._count, self._height, self._width, columns, lines)
        text = half_blocks(*_arrange(self._pixels[:room], height, width, across), self._colour)
        if not self._live:
            self._write("".join(f"{line}\n" for line in text))
            return
        back = f"\x1b[{self._lines}A" if self._lines else ""
        self._write(f"{_HIDE}\r{back}\x1b[J" + "".join(f"{line}\n" for line in text) + _SHOW)
        self._lines, self._time = len(text), time.monotonic()

    def finish(self, images: Iterable[Any]) -> None:
        """The images as they have become, (H, W, 3) uint8 each: the last picture, or the only one."""
        pixels = np.stack([np.asarray(image) for image in images])
        self._count, self._first = len(pixels), 0
        self._pixels = pixels[: layout(len(pixels), self._height, self._width, *self._size())[3]]
        self.show()

    def close(self) -> None:
        """Sets right what a write left that was broken off in the middle."""
        if self._live:
            self._write(_RESET + _SHOW)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _size(self) -> tuple[int, int]:
        """Columns and lines for the picture: below it are a line for the progress and one for the shell."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            size = os.terminal_size((80, 24))
        return max(1, (size.columns or 80) - 1), max(1, (size.lines or 24) - 2)


def _arrange(images: np.ndarray, height: int, width: int, across: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) images as one picture of cells of a size, and where there are images in it."""
    from PIL import Image

    down = -(-len(images) // across)
    shape = (down * (height + 1) - 1, across * (width + 1) - 1)
    pixels, inked = np.zeros((*shape, 3), dtype=np.uint8), np.zeros(shape, dtype=bool)
    for i, image in enumerate(images):
        top, left = i // across * (height + 1), i % across * (width + 1)
        if image.shape[:2] != (height, width):
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
        pixels[top : top + height, left : left + width] = image
        inked[top : top + height, left : left + width] = True
    return pixels, inked
