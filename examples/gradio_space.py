"""A Space on the hub: completions of a picture, row by row, behind Gradio.

Put this file into the Space as ``app.py``, with ``gradio`` and ``igpt_fast`` in its ``requirements.txt``; or run it
here: ``python examples/gradio_space.py``. On a machine of your own, ``igpt demo`` is quicker and can do more: masks,
surprise, classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from igpt_fast import Pipeline, dequantize

MODEL = None  # a directory or a hub id; the bundled emoji model
EDGE = 256  # of an image on the screen, about


@cache
def pipeline() -> Pipeline:
    """The model, which is loaded once."""
    return Pipeline.from_pretrained(MODEL)


def complete(
    picture: Image.Image | None, rows: float, n: float, temperature: float, seed: float
) -> Iterator[list[Image.Image]]:
    """The images so far, once for every row of pixels: completions of a picture whose upper ``rows`` are kept, or,
    where there is no picture, samples. Gradio's sliders give floats.
    """
    processor = pipeline().processor
    height, width, scale = processor.height, processor.width, max(1, EDGE // processor.width)
    how: dict[str, Any] = {"n": int(n), "temperature": temperature, "seed": int(seed)}
    stream = pipeline().stream(**how)
    if picture is not None:
        stream = pipeline().stream_complete(picture, keep=int(rows), **how)
    drawn = np.full((int(n), height, width, 3), 224, dtype=np.uint8)
    for event in stream:
        colours = dequantize(event.tokens, processor.clusters)
        drawn[event.first : event.first + len(colours), event.row] = colours.numpy()
        size = (width * scale, height * scale)
        yield [Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST) for pixels in drawn]


def space() -> Any:
    """The page."""
    import gradio

    height = pipeline().processor.height
    with gradio.Blocks(title="igpt_fast") as blocks:
        gradio.Markdown("# Finish the picture\nThe model draws the lower rows; without a picture, all of them.")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type="pil", label="Picture")
                rows = gradio.Slider(0, height - 1, value=height // 2, step=1, label="Rows kept")
                n = gradio.Slider(1, 16, value=4, step=1, label="Images")
                temperature = gradio.Slider(0, 2, value=1.0, label="Temperature")
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                go = gradio.Button("Complete", variant="primary")
            gallery = gradio.Gallery(label="Completions", columns=2)
        go.click(complete, [picture, rows, n, temperature, seed], gallery)
    return blocks


if __name__ == "__main__":
    space().queue(default_concurrency_limit=1, max_size=16).launch()
