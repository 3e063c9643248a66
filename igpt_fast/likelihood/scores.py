"""Scores: how unusual a model finds images. Every figure is higher for what is more unusual.

A likelihood alone is a poor judge of that: plain images are likely under any model, detailed ones unlikely. ``ood``
takes the image's complexity off, as a general compressor sees it: the log-ratio of two models, of which one has learned
nothing. Neither measure sees what leaves the colours and their neighbourhoods as they are, an image upside down, say.

Source: "Input complexity and out-of-distribution detection with likelihood-based generative models" (Serra et al.,
2020), S(x) = -log2 p(x) - L(x). L is here the length of the compressed tokens, not of a PNG, whose header and 24-bit
colours have nothing to do with what the model predicts.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from igpt_fast import files
from igpt_fast.checks import whole_number
from igpt_fast.files import shown
from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.image.clusters import check_clusters
from igpt_fast.likelihood import maps as pictures
from igpt_fast.model import ImageGPTForCausalImageModeling

MEASURES = ("nats_per_pixel", "ood")  # by which images are put in order
_SAMPLE = 256  # numbers of each weight that a model is known by
_COLUMNS = (
    *("image", "nats_per_pixel", "bits_per_pixel", "bits", "complexity", "ood", "label", "palette", "model"),
    "number",  # of the row, which a map of ``igpt score`` is called by
)


@dataclass(frozen=True)
class Scores:
    """Images as a model sees them.

    Args:
        nats: (N, T) float32 on the CPU, the surprise of each pixel: ``-ln p(colour | the pixels before it)``, given the
            class if there is one.
        tokens: (N, T) int64 on the CPU, the images in the model's colours.
        processor: Knows the colours and the size. Figures over different palettes are not comparable.
        names: N, what the images are called.
        model: What the model is known by, see ``model_hash``.
        labels: (N,) int64, the classes that the images were said to be of.
    """

    nats: Tensor
    tokens: Tensor
    processor: ImageGPTImageProcessor
    names: Sequence[str]
    model: str
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nats)

    @property
    def nats_per_pixel(self) -> Tensor:
        """(N,) float64."""
        return self.nats.double().mean(dim=1)

    @property
    def bits_per_pixel(self) -> Tensor:
        """(N,) float64. Over the palette's K colours: not the bits a dimension of 8-bit channels."""
        return self.nats_per_pixel / math.log(2.0)

    @property
    def bits(self) -> Tensor:
        """(N,) float64: ``-log2 p(image)``."""
        return self.bits_per_pixel * self.nats.shape[1]

    @cached_property
    def complexity(self) -> Tensor:
        """(N,) float64: bits of the tokens compressed by zlib, a byte a token (two for over 256 colours)."""
        narrow = self.tokens.numpy().astype(np.uint8 if self._colours <= 256 else "<u2")
        return torch.tensor([8.0 * len(zlib.compress(row.tobytes(), 9)) for row in narrow], dtype=torch.float64)

    @property
    def ood(self) -> Tensor:
        """(N,) float64: ``bits - complexity``. High: harder for the model than its complexity explains, so unusual."""
        return self.bits - self.complexity

    @property
    def images(self) -> list[Image.Image]:
        """The N images in the model's colours, at its size."""
        return self.processor.decode(self.tokens)

    @property
    def palette(self) -> str:
        """The palette that the figures are over, by its size and the start of its SHA-256: ``128 colours 1a2b3c4d``."""
        return f"{self._colours} colours {hashlib.sha256(self._clusters.tobytes()).hexdigest()[:8]}"

    @property
    def _clusters(self) -> np.ndarray:
        return np.asarray(self.processor.clusters, dtype=np.float32)

    @property
    def _colours(self) -> int:
        return len(self._clusters)

    def measure(self, by: str) -> Tensor:
        """(N,) float64: ``nats_per_pixel`` or ``ood``.

        Raises:
            ValueError: Another name.
        """
        if by not in MEASURES:
            raise ValueError(f"by is {shown(by)}; want {' or '.join(MEASURES)}")
        return self.nats_per_pixel if by == "nats_per_pixel" else self.ood

    def order(self, by: str = "nats_per_pixel") -> list[int]:
        """The images from the most unusual one on; of equals the first one first."""
        return torch.sort(self.measure(by), descending=True, stable=True).indices.tolist()

    def compare(self, reference: Scores, by: str = "ood") -> float:
        """How well a measure tells these images, as the unusual ones, from those of ``reference``: the AUROC.

        It is the probability that one of these scores higher than one of those, equal scores counted half: 1.0 where
        all do, 0.5 where it cannot tell, below that where it takes them for more usual.

        Raises:
            ValueError: No images, or scores of another palette, size or model, or of which only one was given classes.
        """
        self.check_comparable(reference)
        if not len(self) or not len(reference):
            raise ValueError("compare: one of the two has no images")
        return auroc(self.measure(by).numpy(), reference.measure(by).numpy())

    def check_comparable(self, reference: Scores) -> None:
        """Fails where ``compare`` would, were there images.

        Raises:
            ValueError: Scores of another palette, size or model, or of which only one was given classes.
        """
        mine, other = self.processor, reference.processor
        if self.palette != reference.palette:
            raise ValueError(f"compare: the reference is of {reference.palette}, these are of {self.palette}")
        if (mine.height, mine.width) != (other.height, other.width):
            size = f"{mine.height}x{mine.width}"
            raise ValueError(f"compare: the reference is of {other.height}x{other.width} pixels, these are of {size}")
        if self.model != reference.model:
            raise ValueError(f"compare: the reference is of the model {reference.model}, these are of {self.model}")
        if (self.labels is None) != (reference.labels is None):
            theirs, ours = ("without", "with") if reference.labels is None else ("with", "without")
            raise ValueError(f"compare: the reference was scored {theirs} classes given, these are {ours}")

    def maps(self, scale: int | None = None) -> list[Image.Image]:
        """A picture of each image: enlarged, and beside it its surprise as a heat map over it, with a colour bar.

        All have one scale: black is a pixel that was certain, white one that surprised as much as a draw from all
        colours at random (ln K nats), or more.

        Args:
            scale: Edge of a pixel in the picture, 1..64; ``None`` makes an image 256 pixels high or wide.
        """
        return list(self.each_map(scale))

    def each_map(self, scale: int | None = None) -> Iterator[Image.Image]:
        """``maps``, one at a time: of many images they fill the memory."""
        for tokens, nats in zip(self.tokens, self.nats, strict=True):
            yield pictures.surprise_map(self.processor.decode(tokens[None])[0], nats, self._colours, scale)

    def grid(self, n: int = 8, by: str = "nats_per_pixel") -> Image.Image:
        """The ``n`` most and the ``n`` least unusual images with their maps and figures, in one picture; each once.

        Raises:
            ValueError: No images, or ``n`` out of 1..64.
        """
        n = whole_number("n", n, 1, 64)
        order = self.order(by)
        if not order:
            raise ValueError("grid: there are no images")
        half = -(-len(order) // 2)
        most, least = order[: min(n, half)], order[: half - 1 : -1][:n] if len(order) > 1 else []
        unit = "nats/pixel" if by == "nats_per_pixel" else "bits above complexity"
        kinds = ((f"most unusual first, {unit} over {self.palette}", most), ("least unusual first", least))
        figures = self.measure(by).tolist()
        sections = []
        for title, which in kinds:
            images = self.processor.decode(self.tokens[which]) if which else []
            texts = [f"{figures[i]:.{3 if by == 'nats_per_pixel' else 0}f}  {self.names[i]}" for i in which]
            cells = [pictures.Cell(*cell) for cell in zip(texts, images, self.nats[which], strict=True)]
            sections += [(title, cells)] if cells else []
        return pictures.extremes(sections, self._colours)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Writes a ``.npz``, which ``load`` reads, or a ``.csv`` with a line for each image; whole or not at all.

        Raises:
            ValueError: Another suffix.
            FileExistsError: The file exists and ``overwrite`` is false.
        """
        write = self.writer(Path(path))
        with files.replacing(path, overwrite=overwrite) as partial:
            write(partial)

    def writer(self, path: Path) -> Callable[[Path], None]:
        """What writes a file of this suffix.

        Raises:
            ValueError: Neither ``.npz`` nor ``.csv``.
        """
        kinds = {".npz": self._write_npz, ".csv": self._write_csv}
        if path.suffix.lower() not in kinds:
            raise ValueError(f"{path}: want a name that ends in .npz or .csv")
        return kinds[path.suffix.lower()]

    def _write_npz(self, path: Path) -> None:
        shape = (len(self), self.processor.height, self.processor.width)
        arrays: dict[str, Any] = {
            "nats": self.nats.numpy().reshape(shape),
            "tokens": self.tokens.numpy().astype(np.uint16).reshape(shape),
            "clusters": self._clusters,
            "names": np.array(list(self.names), dtype=np.str_),
            "model": np.array(self.model),
            "nats_per_pixel": self.nats_per_pixel.numpy(),
            "complexity": self.complexity.numpy(),
            "ood": self.ood.numpy(),
        }
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        with path.open("wb") as file:
            np.savez(file, **arrays)  # as it is: float32 hardly shrinks, and no reader has to believe a ratio

    def _write_csv(self, path: Path) -> None:
        labels = [""] * len(self) if self.labels is None else self.labels.tolist()
        figures = (self.nats_per_pixel, self.bits_per_pixel, self.bits, self.complexity, self.ood)
        columns = (self.names, *(figure.tolist() for figure in figures), labels)
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows([*row, self.palette, self.model, i] for i, row in enumerate(zip(*columns, strict=True)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Reads a ``.npz`` of ``save``; nothing is unpickled, and sizes are checked before they are believed.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not such a file; the message names it and the reason.
        """
        with files.open_input(path) as file:
            try:
                wanted = ("nats", "tokens", "clusters", "names", "model")
                return _of_arrays(files.read_npz(file, wanted, ("labels",)))
            except (PermissionError, MemoryError):
                raise
            except Exception as error:  # what zipfile raises on a damaged file has no common class
                raise ValueError(f"{path}: not a file of scores: {files.first_line(error)}") from error


def _of_arrays(arrays: dict[str, np.ndarray]) -> Scores:
    nats, tokens, names, model = (arrays[name] for name in ("nats", "tokens", "names", "model"))
    if nats.ndim != 3 or nats.dtype != np.float32 or not nats.size or not np.isfinite(nats).all():
        raise ValueError(f"nats must be (N, H, W) finite float32, got {shown(nats.shape)} {nats.dtype}")
    clusters = check_clusters(arrays["clusters"])
    if tokens.shape != nats.shape or tokens.dtype != np.uint16 or int(tokens.max()) >= len(clusters):
        raise ValueError(
            f"tokens must be {nats.shape} uint16 below {len(clusters)}, got {shown(tokens.shape)} {tokens.dtype}"
        )
    if names.shape != nats.shape[:1] or names.dtype.kind != "U":
        raise ValueError(f"names must be (N,) strings, got {shown(names.shape)} {names.dtype}")
    if model.shape != () or model.dtype.kind != "U":
        raise ValueError(f"model must be a string, got {shown(model.shape)} {model.dtype}")
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != nats.shape[:1] or labels.dtype != np.int64):
        raise ValueError(f"labels must be (N,) int64, got {shown(labels.shape)} {labels.dtype}")
    count, height, width = nats.shape
    processor = ImageGPTImageProcessor(clusters=clusters, size={"height": height, "width": width})
    return Scores(
        torch.from_numpy(nats.reshape(count, -1).copy()),
        torch.from_numpy(tokens.reshape(count, -1).astype(np.int64)),
        processor,
        names.tolist(),
        str(model),
        None if labels is None else torch.from_numpy(labels.copy()),
    )


def auroc(unusual: np.ndarray, usual: np.ndarray) -> float:
    """The probability that one of ``unusual`` is above one of ``usual``, equal ones counted half."""
    ordered = np.sort(usual)
    below, upto = (np.searchsorted(ordered, unusual, side).astype(np.float64) for side in ("left", "right"))
    return float((below + upto).mean() / (2.0 * len(ordered)))


def merge(parts: Sequence[Scores], processor: ImageGPTImageProcessor) -> Scores:
    """The scores of several parts as one, in their order."""
    first = parts[0]
    labels = None if first.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    nats, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("nats", "tokens"))
    names = [name for part in parts for name in part.names]
    return replace(first, nats=nats, tokens=tokens, processor=processor, names=names, labels=labels)


def select(scores: Scores, which: Sequence[int]) -> Scores:
    """Those of some of the images."""
    labels = None if scores.labels is None else scores.labels[list(which)]
    names = [scores.names[i] for i in which]
    return replace(scores, nats=scores.nats[list(which)], tokens=scores.tokens[list(which)], names=names, labels=labels)


def without_processor(part: Scores | None) -> Scores | None:
    """What another process is sent: every one has its own processor."""
    return None if part is None else replace(part, processor=None)  # type: ignore[arg-type]


def model_hash(model: ImageGPTForCausalImageModeling) -> str:
    """What a model is known by: twelve digits of a SHA-256 of the first numbers of each of its weights, in bfloat16.

    So that it is the same whatever dtype a checkpoint is loaded in (float16 aside, which rounds otherwise), and takes
    no time; models that differ in training differ in it.
    """
    digest, weights, device = hashlib.sha256(), sorted(model.state_dict().items()), model.device
    parts = [tensor.detach().reshape(-1)[:_SAMPLE].to(device) for _, tensor in weights]
    # Together, as a hundred conversions take longer than a small image. What `cat` widens is narrowed again.
    some, end = torch.cat(parts).to(torch.bfloat16).float().cpu().numpy(), 0
    for (name, tensor), part in zip(weights, parts, strict=True):
        start, end = end, end + len(part)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + some[start:end].tobytes())
    return digest.hexdigest()[:12]


class InterruptedScoring(KeyboardInterrupt):
    """Ctrl-C during scoring; ``partial`` holds the scores of the images that were finished, or ``None``."""

    def __init__(self, partial: Scores | None) -> None:
        super().__init__("interrupted")
        self.partial = partial
