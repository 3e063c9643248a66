"""What stands between pictures and a model: what its tokens are, how many of them, and in what rows.

``ColourTokenizer``: the tokens are colours of a palette. ``CodeTokenizer``: they are somebody else's codes, such as the
rows of a VQ-VAE's codebook, which no picture can be made of here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from igpt_fast.checks import whole_number
from igpt_fast.image.clusters import MAX_CLUSTERS, check_clusters, dequantize, quantize

MAX_EDGE = 4096


class Tokenizer:
    """What both have: ``height`` and ``width``, in tokens, and their ``vocabulary``."""

    kind: ClassVar[str]
    clusters: np.ndarray | None  # (K, 3), where the tokens are colours
    height: int
    width: int

    @property
    def vocabulary(self) -> int:
        """Tokens are below it."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.height * self.width

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds a token."""
        return np.min_scalar_type(self.vocabulary - 1)

    def entry(self) -> dict[str, Any]:
        """What a manifest says of it; ``tokenizer_of`` reads that, and the clusters, which stand in their own file."""
        sizes = {"vocabulary": self.vocabulary, "height": self.height, "width": self.width}
        return {"kind": self.kind, **sizes, "sha256": self.digest()}

    def digest(self) -> str:
        """SHA-256 of all that it is."""
        said = json.dumps([self.kind, self.vocabulary, self.height, self.width]).encode()
        colours = b"" if self.clusters is None else self.clusters.astype("<f4").tobytes()
        return hashlib.sha256(said + colours).hexdigest()

    def _check_size(self) -> None:
        for name in ("height", "width"):
            whole_number(name, getattr(self, name), 1, MAX_EDGE)


@dataclass(frozen=True, eq=False)
class ColourTokenizer(Tokenizer):
    """Colours to tokens and back.

    Args:
        clusters: (K, 3) floats in [-1, 1], K at least 1.
        height, width: Of the images, in pixels.

    Raises:
        TypeError, ValueError: Unusable clusters, or a size that is none.
    """

    clusters: np.ndarray
    height: int
    width: int
    kind: ClassVar[str] = "colours"

    def __post_init__(self) -> None:
        self._check_size()
        object.__setattr__(self, "clusters", check_clusters(self.clusters))

    @property
    def vocabulary(self) -> int:
        """Colours."""
        return len(self.clusters)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(N, T) tokens of ``dtype`` of (N, height, width, 3) uint8.

        Raises:
            ValueError: Images of another size.
        """
        if pixels.shape[1:] != (self.height, self.width, 3):
            raise ValueError(f"images have the shape {pixels.shape}; want (N, {self.height}, {self.width}, 3)")
        return quantize(pixels, self.clusters).reshape(len(pixels), self.length).astype(self.dtype)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """(N, height, width, 3) uint8 of (N, T) tokens.

        Raises:
            ValueError: Another number of tokens, or one out of range.
        """
        return dequantize(tokens.reshape(-1, self.height, self.width), self.clusters)


@dataclass(frozen=True)
class CodeTokenizer(Tokenizer):
    """Tokens that something else made, taken as they are.

    Args:
        codes: How many there are; tokens are below it.
        height, width: Of the grid of tokens that an image is.

    Raises:
        ValueError: A number out of its range.
    """

    codes: int
    height: int
    width: int
    kind: ClassVar[str] = "codes"
    clusters: ClassVar[None] = None  # type: ignore[misc] # of an instance elsewhere

    def __post_init__(self) -> None:
        self._check_size()
        whole_number("vocabulary", self.codes, 2, MAX_CLUSTERS)

    @property
    def vocabulary(self) -> int:
        """Codes."""
        return self.codes


def tokenizer_of(entry: Any, clusters: np.ndarray | None) -> Tokenizer:
    """The tokenizer of a manifest's entry.

    Args:
        entry: See ``Tokenizer.entry``; may be anything.
        clusters: Where its tokens are colours.

    Raises:
        ValueError: No such entry, or these are not its clusters.
    """
    if not isinstance(entry, dict) or entry.get("kind") not in ("colours", "codes"):
        raise ValueError("its tokenizer is neither of colours nor of codes")
    made: Tokenizer
    if entry["kind"] == "codes":
        made = CodeTokenizer(entry.get("vocabulary", 0), entry.get("height", 0), entry.get("width", 0))
    elif clusters is None:
        raise ValueError("its tokens are colours, and there are no clusters")
    else:
        made = ColourTokenizer(clusters, entry.get("height", 0), entry.get("width", 0))
    if made.entry() != entry:
        what = "another palette" if made.clusters is not None else "another tokenizer"
        raise ValueError(f"written with {what}: its SHA-256 is {made.digest()[:12]}, the manifest's is not")
    return made
