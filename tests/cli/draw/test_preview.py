"""The preview: what a terminal shows of it, whatever its size."""

import io
import itertools

import numpy as np
import pytest
import torch
from screen import FakeTerminal, Screen

from igpt_fast.cli.draw import preview
from igpt_fast.cli.draw.preview import Preview, half_blocks, layout


@pytest.fixture(autouse=True)
def _colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 12), (16, 16)])
def test_half_blocks_are_the_pixels(height: int, width: int) -> None:
    random = np.random.default_rng(height)
    pixels = random.integers(0, 3, (height, width, 3), dtype=np.uint8) * 100  # few colours, so that some repeat
    for inked in (
        np.ones((height, width), bool),
        random.random((height, width)) < 0.6,
        np.zeros((height, width), bool),
    ):
        screen = Screen().feed("".join(f"{line}\n" for line in half_blocks(pixels, inked)))
        shown, where = screen.pixels(height, width)
        assert np.array_equal(where, inked)
        assert np.array_equal(shown[inked], pixels[inked])
        assert (screen.front, screen.back) == (None, None)


def test_layout_fits_and_is_as_large_as_it_can() -> None:
    sizes = [(16, 16), (32, 32), (8, 20), (3, 3)]
    for count, (height, width), columns, lines in itertools.product(
        [1, 4, 16, 100, 5000], sizes, [8, 79, 200], [3, 22, 60]
    ):
        h, w, across, shown = layout(count, height, width, columns, lines)
        down = -(-shown // across)
        assert h <= height
        assert 1 <= shown <= count
        assert across * (w + 1) - 1 <= columns
        assert down * (h + 1) - 1 <= 2 * lines
        if shown == count and h < height:  # one pixel more and they would not fit
            wider = max(1, round(width * (h + 1) / height)) + 1
            assert (columns + 1) // wider * ((2 * lines + 1) // (h + 2)) < count
    assert layout(16, 16, 16, 79, 22) == (12, 12, 6, 16)
    assert layout(4, 16, 16, 79, 22) == (16, 16, 4, 4)


def draw(view: Preview, tokens: torch.Tensor, batch: int) -> None:
    count, height, _ = tokens.shape
    for first in range(0, count, batch):
        for row in range(height):
            view.put(first, row, tokens[first : first + batch, row])


def test_images_grow_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SECONDS", 0.0)
    stream = FakeTerminal()
    palette = np.random.default_rng(0).integers(0, 256, (9, 3), dtype=np.uint8)
    tokens = torch.randint(9, (3, 6, 5))
    view = Preview(stream, 3, 6, 5, palette)
    stream.write("above\n")
    screen = Screen()
    view.put(0, 0, tokens[:2, 0])
    shown, inked = screen.feed(stream.getvalue().removeprefix("above\n")).pixels(6, 17)
    assert np.array_equal(shown[0, :5], palette[tokens[0, 0]])
    assert (shown[1:6, :5] == preview.BLANK).all()
    assert np.array_equal(inked.all(axis=0), np.arange(17) % 6 != 5)
    draw(view, tokens, 2)
    view.finish(palette[tokens])
    view.close()
    screen = Screen().feed(stream.getvalue())
    assert screen.line(0) == "above"
    assert (screen.row, screen.furthest, screen.cursor) == (4, 4, True)
    shown, _ = Screen().feed(stream.getvalue().removeprefix("above\n")).pixels(6, 17)
    for i in range(3):
        assert np.array_equal(shown[:, 6 * i : 6 * i + 5], palette[tokens[i]])
    # Whatever moment ends the process, the cursor is there: each picture hides and shows it.
    assert stream.getvalue().count("\x1b[?25l") == len(stream.getvalue().split("\x1b[J")) - 1


def test_more_images_than_fit_show_the_batch_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SECONDS", 0.0)
    stream = FakeTerminal()
    palette = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    tokens = torch.randint(4, (300, 4, 4))
    view = Preview(stream, 300, 4, 4, palette)
    assert layout(300, 4, 4, 79, 22)[3] == 144
    draw(view, tokens, 50)
    screen = Screen().feed(stream.getvalue())
    assert screen.furthest <= 22
    shown, _ = screen.pixels(44, 79)
    assert np.array_equal(shown[:4, :4], palette[tokens[200]])  # the last move
    stream = FakeTerminal()
    view = Preview(stream, 300, 4, 4, palette)
    draw(view, tokens, 300)  # a batch that does not fit either: its beginning
    shown, _ = Screen().feed(stream.getvalue()).pixels(44, 79)
    assert np.array_equal(shown[:4, :4], palette[tokens[0]])
    assert np.array_equal(shown[40:44, 75:79], palette[tokens[143]])


def test_without_a_terminal_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SECONDS", 0.0)
    for stream in (io.StringIO(), FakeTerminal()):
        if stream.isatty():
            monkeypatch.setenv("TERM", "dumb")
        tokens = torch.randint(4, (2, 4, 4))
        palette = np.eye(4, 3, dtype=np.uint8) * 255
        view = Preview(stream, 2, 4, 4, palette)
        draw(view, tokens, 2)
        assert stream.getvalue() == ""
        view.finish(palette[tokens])
        view.close()
        shown, _ = Screen().feed(stream.getvalue()).pixels(4, 9)
        assert np.array_equal(shown[:, 5:], palette[tokens[1]])
        assert "\x1b[J" not in stream.getvalue()


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    palette = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
    view = Preview(stream, 1, 4, 4, palette)
    view.finish(palette[torch.tensor([[[0, 1, 0, 1]] * 2 + [[1, 1, 0, 0]] * 2])])
    stream.seek(0)
    assert stream.read() == " @ @\n@@\n"


def test_a_stream_without_the_characters_is_an_error() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(ValueError, match="UTF-8"):
        Preview(stream, 1, 4, 4, np.zeros((2, 3), np.uint8))
