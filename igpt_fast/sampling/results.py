"""Results: generated images with their likelihoods, and the pictures made of them."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import image as images_module
from igpt_fast.checks import whole_number
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.image.writing import grid_size


@dataclass
class Generation:
    """Generated images, image-major: for completions, the ``n`` of the first input come first.

    Args:
        tokens: (N, T) int64 on the CPU, the given pixels included.
        logprobs: (N, T) float32 on the CPU, nats per pixel under the model itself, given the class if there is one:
            before guidance, temperature, top-k, top-p and min-p. NaN where the pixel was given.
        processor: Knows the colours and the size.
        seed: What the streams were made of.
        settings: Temperature and so on, as plain values; ``engine`` is the decoder's name. Where it is the reference,
            and only there, ``engine_reason`` says why it is no faster one. ``kept_per_step``, where images were drawn
            alone and guessed ahead: pixels that a step of the network gave.
        inputs: For completions, the (M) inputs as RGB images, cropped to the model's aspect.
        counts: For completions, how many there are of each input; ``None`` where there are as many of all. After
            Ctrl-C the last one may have fewer.
        originals: For completions, (M, T) int64, the tokens of the whole inputs.
        given: For completions, how many pixels of all inputs were given before the first drawn one.
        known: For completions, (M, T) bool: which pixels were given.
        known_logprobs: For completions, (N, T) float32, as ``logprobs``, of the given pixels behind an image's first
            drawn one: how well what was drawn goes with them. NaN elsewhere.
        effective_sample_size: For completions by candidates, (N,) float32; see ``inpainting``.
        labels: (N,) int64, the classes that were asked for.
        guessed: Where images were guessed ahead: steps of the network, and the pixels that they gave.
    """

    tokens: Tensor
    logprobs: Tensor
    processor: ImageGPTImageProcessor
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[Image.Image] | None = None
    counts: list[int] | None = None
    originals: Tensor | None = None
    given: int = 0
    known: Tensor | None = None
    known_logprobs: Tensor | None = None
    effective_sample_size: Tensor | None = None
    labels: Tensor | None = None
    guessed: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        what = f"{len(self)} images of {self.processor.height}x{self.processor.width}"
        if self.inputs is not None:
            what += f", completions of {len(self.inputs)}"
        if bool(self.logprobs.isfinite().any()):
            what += f", {-float(self.logprobs.nanmean()):.3f} nats a drawn pixel"
        how = [f"{name} {self.settings[name]}" for name in ("engine", "dtype") if name in self.settings]
        return f"Generation({', '.join([what, f'seed {self.seed}', *how])})"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the grid, unless it would have too many pixels."""
        try:
            grid = self.grid()
        except ValueError:
            return None
        content = io.BytesIO()
        grid.save(content, format="PNG")
        return content.getvalue()

    @property
    def images(self) -> list[Image.Image]:
        """The N images, RGB, at the model's size."""
        return self.processor.decode(self.tokens)

    def grid(self, *, columns: int | None = None, scale: int | None = None, labels: bool = True) -> Image.Image:
        """All images in one.

        Args:
            columns: Images in a row; about square when ``None``. Completions have a row for each input instead:
                input, what was given of it, completions, and the original in the model's colours.
            scale: Edge of a pixel in the result; ``None`` makes an image 128 pixels high or wide.
            labels: Whether the columns of completions are named, where they are wide enough for it.

        Raises:
            ValueError: A value out of its range, ``columns`` for completions, or a grid of too many pixels.
        """
        scale = self._scale(scale, columns)
        inputs = len(self.inputs or ())
        cells = inputs * max(self._counts(), default=0) or len(self)
        grid_pixels(self.processor, cells, inputs, columns, scale, labels)  # before the images are made
        if self.inputs is None:
            return images_module.image_grid(self.images, columns, scale=scale, gap=scale)
        return self._completion_grid(scale, labels)

    def save_grid(
        self,
        path: str | os.PathLike[str],
        *,
        columns: int | None = None,
        scale: int | None = None,
        labels: bool = True,
        overwrite: bool = True,
    ) -> None:
        """Writes ``grid`` to a file, whole or not at all; the suffix names the format.

        Raises:
            FileExistsError: The file exists and ``overwrite`` is false.
            ValueError: An unknown suffix.
        """
        images_module.save_image(self.grid(columns=columns, scale=scale, labels=labels), path, overwrite=overwrite)

    def save_gif(
        self,
        path: str | os.PathLike[str] | IO[bytes],
        *,
        columns: int | None = None,
        scale: int | None = None,
        labels: bool = True,
        frame_ms: int = 80,
        overwrite: bool = True,
    ) -> None:
        """Writes the grid being drawn, a row of pixels a frame, as ``.gif`` or ``.apng``.

        Args:
            path: The file; or an open one, into which a GIF is written.
            columns, scale, labels: See ``grid``.
            frame_ms: Milliseconds a frame.
            overwrite: Whether an existing file may be replaced.

        Raises:
            FileExistsError: The file exists and ``overwrite`` is false.
            ValueError: An unknown suffix, or too many pixels; see ``save_animation``.
        """
        frames = self._frames(columns, self._scale(scale, columns), labels)
        images_module.save_animation(frames, path, frame_ms=frame_ms, overwrite=overwrite)

    def _frames(self, columns: int | None, scale: int, labels: bool) -> Iterator[Image.Image]:
        """The frames of the grid being drawn, ``height + 1`` at most."""
        width = self.processor.width
        for drawn in (self.given, *range(self.given - self.given % width + width, self.tokens.shape[1] + 1, width)):
            if self.inputs is None:
                cells = [self._partly(tokens, drawn) for tokens in self.tokens]
                yield images_module.image_grid(cells, columns, scale=scale, gap=scale)
            else:
                yield self._completion_grid(scale, labels, drawn)

    def _scale(self, scale: int | None, columns: int | None) -> int:
        if columns is not None and self.inputs is not None:
            raise ValueError("columns is given, but completions have a row for each input")
        return pixel_edge(self.processor, scale)

    def _counts(self) -> list[int]:
        """Completions of each input."""
        inputs = len(self.inputs or ())
        return [len(self) // inputs] * inputs if inputs and self.counts is None else self.counts or []

    def _partly(self, tokens: Tensor, drawn: int, known: Tensor | None = None) -> Image.Image:
        """The image of (T,) tokens, light grey from pixel ``drawn`` on, but where it is known."""
        pixels = np.array(self.processor.decode(tokens[None])[0])
        hidden = torch.arange(len(tokens), device="cpu") >= drawn
        pixels.reshape(-1, 3)[(hidden if known is None else hidden & ~known).numpy()] = 224
        return Image.fromarray(pixels)

    def _completion_grid(self, scale: int, labels: bool, drawn: int | None = None) -> Image.Image:
        assert self.inputs is not None
        assert self.originals is not None
        size = (self.processor.width * scale, self.processor.height * scale)
        counts = self._counts()
        missing = Image.new("RGB", (self.processor.width, self.processor.height), "white")
        cells: list[Image.Image] = []
        for i, (original, completions) in enumerate(zip(self.originals, self.tokens.split(counts), strict=True)):
            known = None if self.known is None else self.known[i]
            pictures = [self._partly(original, self.given, known)]
            pictures += [self._partly(row, row.shape[0] if drawn is None else drawn, known) for row in completions]
            pictures += [missing] * (max(counts) - len(completions))
            pictures += self.processor.decode(original[None])
            smaller = self.inputs[i].width <= self.processor.width  # its pixels are to be seen, as the others' are
            cells.append(self.inputs[i].resize(size, Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS))
            cells += [picture.resize(size, Image.Resampling.NEAREST) for picture in pictures]
        headings = completion_headings(max(counts)) if labels else ()
        return images_module.image_grid(cells, max(counts) + 3, gap=scale, headings=headings)


def completion_headings(n: int) -> list[str]:
    """Of the columns of completions."""
    return ["input", "kept", *(str(i + 1) for i in range(n)), "original"]


def pixel_edge(processor: ImageGPTImageProcessor, scale: int | None) -> int:
    """Edge of a pixel in a grid; ``None`` makes an image 128 pixels high or wide."""
    default = max(1, 128 // max(processor.height, processor.width))
    return default if scale is None else whole_number("scale", scale, 1, 64)


def grid_pixels(
    processor: ImageGPTImageProcessor,
    count: int,
    inputs: int,
    columns: int | None,
    scale: int | None,
    labels: bool = True,
) -> tuple[int, int]:
    """The (width, height) of the grid of ``count`` images, or as many completions of ``inputs``.

    Raises:
        ValueError: A value out of its range, or more than ``MAX_PIXELS``.
    """
    scale = pixel_edge(processor, scale)
    headings = completion_headings(count // inputs) if inputs and labels else ()
    if inputs:
        columns = count // inputs + 3
        count = inputs * columns
    return grid_size(count, columns, processor.width * scale, processor.height * scale, scale, headings)[1]


class InterruptedGeneration(KeyboardInterrupt):
    """Ctrl-C during a generation; ``partial`` holds the images that were finished, or ``None``."""

    def __init__(self, partial: Generation | None) -> None:
        super().__init__("interrupted")
        self.partial = partial


class NotFiniteError(FloatingPointError):
    """Logits that are no numbers; ``partial`` holds the images that were finished, a ``Generation`` or, of scoring,
    ``Scores``; or ``None``.
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


def merge(parts: Sequence[Generation], processor: ImageGPTImageProcessor) -> Generation:
    """The images of several processes as those of one; their order is that of the parts."""
    first = parts[0]
    changes: dict[str, Any] = {"processor": processor, "given": min(part.given for part in parts)}
    for name in ("tokens", "logprobs", "originals", "known", "known_logprobs", "effective_sample_size", "labels"):
        values = [getattr(part, name) for part in parts]
        changes[name] = None if values[0] is None else torch.cat(values)
    if first.inputs is not None:
        changes["inputs"] = [image for part in parts for image in part.inputs or ()]
        changes["counts"] = [count for part in parts for count in part._counts()]
    steps, pixels = changes["guessed"] = tuple(map(sum, zip(*(part.guessed for part in parts), strict=True)))
    places = ("first", "first_input", "kept_per_step")  # of a part in the whole
    changes["settings"] = {name: value for name, value in first.settings.items() if name not in places}
    changes["settings"]["batch_size"] = min(part.settings["batch_size"] for part in parts)
    changes["settings"] |= kept_per_step(steps, pixels)
    return dataclasses.replace(first, **changes)


def kept_per_step(steps: int, pixels: int) -> dict[str, float]:
    """What settings say of images that were guessed ahead; nothing where none was."""
    return {"kept_per_step": round(pixels / steps, 3)} if steps else {}


def without_processor(part: Generation | None) -> Generation | None:
    """What another process is sent: every one has its own processor."""
    return None if part is None else dataclasses.replace(part, processor=None)  # type: ignore[arg-type]


def save_tokens(generation: Generation, path: Path | IO[bytes]) -> None:
    """A .npz, at a path or in an open file, that ``numpy.load`` reads without unpickling.

    ``tokens`` (N, H, W) uint16, ``logprobs`` (N, H, W) float32 in nats, NaN where the pixel was given, ``seed`` uint64,
    ``clusters`` (K, 3) float32 in [-1, 1], the colours; for class-conditional images ``labels`` (N,) int64.
    """
    shape = (len(generation), generation.processor.height, generation.processor.width)
    arrays: dict[str, Any] = {
        "tokens": generation.tokens.numpy().astype(np.uint16).reshape(shape),
        "logprobs": generation.logprobs.numpy().reshape(shape),
        "seed": np.uint64(generation.seed),
        "clusters": np.asarray(generation.processor.clusters, dtype=np.float32),
    }
    if generation.labels is not None:
        arrays["labels"] = np.asarray(generation.labels, dtype=np.int64)
    with path.open("wb") if isinstance(path, Path) else nullcontext(path) as file:
        np.savez_compressed(file, **arrays)
