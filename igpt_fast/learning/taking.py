"""How a source becomes tokens: the settings, the palette, and the pixels of a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.files import printable
from igpt_fast.image.clusters import fit_clusters
from igpt_fast.image.reading import center_crop, read_middle, resize
from igpt_fast.learning.folders import held_out
from igpt_fast.learning.pool import in_processes
from igpt_fast.learning.sources.protocol import Content, Source
from igpt_fast.learning.tokenizers import ColourTokenizer

SAMPLE = 4096  # images that a palette is fitted to
_EACH = 1024  # pixels of each of them


@dataclass(frozen=True)
class Taking:
    """How a source becomes tokens.

    Args:
        height, width: Of the images, in pixels: the middle of each is cut out and resized; of an array its own, else
            32, if not given. Of tokens: the rows and columns of (N, T) ones; a square if not given.
        clusters: (K, 3) floats in [-1, 1] to use instead of fitting some.
        n_clusters: How many colours are fitted.
        vocabulary: The source holds tokens, and these are below it.
        classes: Keep the classes of the images.
        holdout: Expected fraction of the images that is held out, in [0, 1); see ``held_out``.
        shard_size: Images of a shard; 8,192, or as many as have 64 MiB, if not given.
        seed: Of the colours' fit.

    Raises:
        ValueError: A value out of its range.
    """

    height: int | None = None
    width: int | None = None
    clusters: np.ndarray | None = None
    n_clusters: int = 512
    vocabulary: int | None = None
    classes: bool = False
    holdout: float = 0.1
    shard_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout is {self.holdout}; want a fraction in [0, 1)")
        if self.shard_size is not None:
            whole_number("shard_size", self.shard_size, 1, 1 << 24)
        if self.vocabulary is not None and self.clusters is not None:
            raise ValueError("a vocabulary is of tokens, clusters are for pictures; give one of them")

    def sized(self, source: Source) -> Taking:
        """With the size that is meant where none is given."""
        if self.height is not None and self.width is not None:
            return self
        shape = getattr(source, "array", np.zeros((1, 32, 32))).shape
        if len(shape) == 2:
            side = round(shape[1] ** 0.5)
            if side * side != shape[1]:
                raise ValueError(f"{source.path}: {shape[1]} tokens are not a square; give --size HEIGHTxWIDTH")
            shape = (0, side, side)
        return dataclasses.replace(self, height=shape[1], width=shape[2])

    def colours(self) -> str:
        """What the colours are, in words that tell them apart."""
        if self.clusters is not None:
            return ColourTokenizer(self.clusters, 1, 1).digest()
        return f"codes {self.vocabulary}" if self.vocabulary else f"{self.n_clusters} fitted with seed {self.seed}"


def fit_palette(source: Source, taking: Taking, workers: int = 0) -> np.ndarray:
    """Colours of a sample: of at most 4,096 pictures that are trained on, and 1,024 pixels of each.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: None of them can be read, or they have too few colours; the message names the source.
    """
    places = _sampled(len(source), source.block, taking.seed)
    pieces = np.array_split(places, max(1, len(places) // 64))
    jobs = ((i, source.part(piece), taking) for i, piece in enumerate(pieces))
    found, reasons = [], []
    for number, pixels, reason in in_processes(_sample_pixels, jobs, workers):
        found.append((number, pixels))
        reasons += [(number, reason)] if reason else []
    pixels = np.concatenate([pixels for _, pixels in sorted(found, key=lambda pair: pair[0])])
    if not len(pixels):
        if not reasons:
            raise ValueError(
                f"{source.path}: holdout {taking.holdout} leaves none of the {len(source)} images to train on"
            )
        raise ValueError(f"{source.path}: none of the {len(places)} images tried can be read: {min(reasons)[1]}")
    try:
        return fit_clusters(pixels, taking.n_clusters, seed=taking.seed)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _sampled(count: int, block: int, seed: int) -> np.ndarray:
    """At most 4,096 ascending places, in stretches of ``block``, one of each of as many equal parts."""
    if count <= SAMPLE:
        return np.arange(count)
    stretches = SAMPLE // block
    parts = np.arange(stretches) + np.random.default_rng(seed).random(stretches) * (1 - block * stretches / count)
    return (np.floor(parts * (count / stretches)).astype(np.int64)[:, None] + np.arange(block)).ravel()


def _sample_pixels(number: int, part: Source, taking: Taking) -> tuple[int, np.ndarray, str]:
    """(n, 3) colours of a part of the sample, and why its first picture that cannot be read cannot be."""
    found, why = [np.zeros((0, 3), np.uint8)], ""
    rng = np.random.default_rng((taking.seed, number))
    for name, content in part.pictures():
        if held_out(name, taking.holdout):
            continue
        try:
            pixels = pixels_of(content, taking.height or 0, taking.width or 0).reshape(-1, 3)
        except (OSError, ValueError) as error:
            why = why or f"{printable(name)}: {files.first_line(error)}"
            continue
        found.append(pixels if len(pixels) <= _EACH else pixels[rng.choice(len(pixels), _EACH, replace=False)])
    return number, np.concatenate(found), why


def pixels_of(content: Content, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 of the middle of a picture.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    if isinstance(content, ValueError):
        raise content
    if not isinstance(content, np.ndarray):
        return read_middle(content, height, width)
    if content.ndim == 2:
        content = np.repeat(content[..., None], 3, axis=2)
    if content.shape[:2] == (height, width):
        return content
    return np.asarray(resize(center_crop(content, width / height), width, height))
