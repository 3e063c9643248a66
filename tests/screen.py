"""What a terminal shows: as much of one as the preview needs, and an error for anything else."""

from __future__ import annotations

import io
import re

import numpy as np

_TOKEN = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n])")
Colour = tuple[int, int, int] | None


class Screen:
    """Characters with their colours, of a terminal of so many columns that scrolls for ever."""

    def __init__(self, columns: int = 80) -> None:
        self.columns, self.row, self.column, self.cursor = columns, 0, 0, True
        self.cells: dict[tuple[int, int], tuple[str, Colour, Colour]] = {}
        self.front: Colour = None
        self.back: Colour = None
        self.furthest = 0

    def feed(self, text: str) -> Screen:
        end = 0
        for match in _TOKEN.finditer(text):
            assert match.start() == end, repr(text[end : match.start() + 5])
            end = match.end()
            private, numbers, letter, back, down, character = match.groups()
            if letter:
                self._escape(private, numbers, letter)
            elif back:
                self.column = 0
            elif down:  # as a terminal that turns it into carriage return and line feed
                self.row, self.column = self.row + 1, 0
                self.furthest = max(self.furthest, self.row)
            else:
                assert self.column < self.columns, "a line is too long"
                self.cells[self.row, self.column] = (character, self.front, self.back)
                self.column += 1
        assert end == len(text)
        return self

    def _escape(self, private: str, numbers: str, letter: str) -> None:
        if private:
            assert (numbers, letter) in (("25", "l"), ("25", "h"))
            self.cursor = letter == "h"
        elif letter == "A":
            self.row -= int(numbers or 1)
            assert self.row >= 0, "above the first line"
        elif letter == "J":
            self.cells = {at: cell for at, cell in self.cells.items() if at < (self.row, self.column)}
        else:
            assert letter == "m", letter
            codes = [int(code) for code in numbers.split(";")]
            while codes:
                code = codes.pop(0)
                if code in (38, 48):
                    assert codes.pop(0) == 2
                    colour = (codes.pop(0), codes.pop(0), codes.pop(0))
                    self.front, self.back = (colour, self.back) if code == 38 else (self.front, colour)
                elif code == 49:
                    self.back = None
                else:
                    assert code == 0, code
                    self.front = self.back = None

    def line(self, row: int) -> str:
        return "".join(self.cells.get((row, column), (" ",))[0] for column in range(self.columns)).rstrip()

    def pixels(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The (H, W, 3) uint8 colours of half blocks from the first line on, and where there are some."""
        pixels, inked = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
        for (row, column), (character, front, back) in self.cells.items():
            if row * 2 >= height or column >= width:
                continue
            halves = {"▀": (front, back), "▄": (back, front), " ": (None, None)}[character]
            for i, colour in enumerate(halves):
                if colour is not None and row * 2 + i < height:
                    pixels[row * 2 + i, column], inked[row * 2 + i, column] = colour, True
        return pixels, inked


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal; its size is not known, which is 80 x 24 then."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True
