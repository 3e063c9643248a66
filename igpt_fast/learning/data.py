"""What a model is trained on: images as tokens, and the files of them, read with bounds and written whole."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.files import shown
from igpt_fast.learning.tokenizers import CodeTokenizer, ColourTokenizer, Tokenizer

_CHUNK = 1 << 20  # tokens that are widened at once for the fingerprint
_MAX_NAME = 200  # characters
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class ImageSet:
    """What all data sets have: some images are trained on, the others held out. See ``objectives.protocol.Data``."""

    tokenizer: Tokenizer
    heldout: Tensor  # (N,) bool
    labels: Tensor | None  # (N,) int64
    class_names: Sequence[str]
    skipped: int
    ready = True  # whether tokens are at hand, and need not be made of pictures first

    @property
    def height(self) -> int:
        """Pixels."""
        return self.tokenizer.height

    @property
    def width(self) -> int:
        """Pixels."""
        return self.tokenizer.width

    @property
    def vocabulary(self) -> int:
        """Tokens of pixels are below it; the ids of the classes follow."""
        return self.tokenizer.vocabulary

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 if the images have none."""
        return len(self.class_names)

    @functools.cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the images to train on stand, and the held-out ones."""
        return torch.nonzero(~self.heldout)[:, 0], torch.nonzero(self.heldout)[:, 0]

    @property
    def n_train(self) -> int:
        """Images to train on."""
        return len(self._places[0])

    @property
    def n_heldout(self) -> int:
        """Images that are held out."""
        return len(self._places[1])

    def train_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """See ``objectives.protocol.Data``."""
        return self.at(self._places[0][torch.as_tensor(indices, dtype=torch.int64)])

    def heldout_batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor | None]]:
        """See ``objectives.protocol.Data``."""
        return map(self.at, self._places[1].split(batch_size) if self.n_heldout else ())

    def fingerprint(self) -> str:
        """See ``objectives.protocol.Data``."""
        raise NotImplementedError

    def at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T) int64 tokens of the images at these places, and their labels."""
        raise NotImplementedError

    def in_memory(self, most: int) -> TokenData:
        """At most so many images to train on, and a quarter as many held-out ones, spread evenly; without classes."""
        parts = [_spread(places, count) for places, count in zip(self._places, (most, most // 4), strict=True)]
        tokens = self.at(torch.cat(parts))[0]
        heldout = torch.arange(len(tokens)) >= len(parts[0])
        return TokenData(tokens, self.tokenizer.clusters, heldout, tokenizer=self.tokenizer)


def _spread(places: Tensor, most: int) -> Tensor:
    return places if len(places) <= most else places[torch.arange(most) * len(places) // most]


@dataclass
class TokenData(ImageSet):
    """Images as tokens, all in memory.

    Args:
        tokens: (N, height * width) integers in 0..K-1. The functions here keep them in the smallest type, uint8 for up
            to 256 clusters; what is taken out is widened.
        clusters: (K, 3) float32 in [-1, 1]; ``None``: the tokens are no colours, and ``tokenizer`` says what they are.
        heldout: (N,) bool, images that are never trained on.
        skipped: Files that were left out because they are not readable images.
        labels: (N,) int64, the class of each image in 0..C-1; ``None``: the images have no classes.
        class_names: The C names; ``"0"``, ``"1"`` and so on if there are labels alone.
        tokenizer: What the tokens are, and the size of the images; the clusters and a square, if not given.

    Raises:
        ValueError: Arrays that do not fit together, nothing to train on, or a class without an image to train on.
    """

    tokens: Tensor
    clusters: np.ndarray | None
    heldout: Tensor
    skipped: int = 0
    labels: Tensor | None = None
    class_names: Sequence[str] = ()
    tokenizer: Tokenizer = None  # type: ignore[assignment] # made below

    def __post_init__(self) -> None:
        tokens, heldout = self.tokens, self.heldout
        if tokens.ndim != 2 or tokens.dtype not in _INTEGERS or tokens.numel() == 0:
            raise ValueError(f"tokens must be (N, T) integers, got {tuple(tokens.shape)} {tokens.dtype}")
        if self.tokenizer is None:
            self.tokenizer = _square(tokens.shape[1], self.clusters)
        if not _same(self.clusters, self.tokenizer.clusters):
            raise ValueError("the clusters are not the tokenizer's")
        if tokens.shape[1] != self.tokenizer.length:
            raise ValueError(f"{tokens.shape[1]} tokens are not an image of {self.height} x {self.width}")
        check_tokens(tokens.numpy(), self.vocabulary)
        if heldout.shape != tokens.shape[:1] or heldout.dtype != torch.bool or bool(heldout.all()):
            raise ValueError("heldout must be (N,) bool with at least one image to train on")
        if self.labels is not None:
            self.class_names = check_classes(self.labels, self.class_names, heldout)
        elif self.class_names:
            raise ValueError("there are class_names, and no labels")

    def at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.tokens[places].long(), None if self.labels is None else self.labels[places]

    def in_memory(self, most: int) -> TokenData:
        """Itself: it is."""
        return self

    @property
    def side(self) -> int:
        """Edge of the images, which are squares."""
        if self.height != self.width:
            raise ValueError(f"the images are no squares: {self.height} x {self.width}")
        return self.height

    @property
    def n_clusters(self) -> int:
        """The vocabulary, most often of colours."""
        return self.vocabulary

    @property
    def train_tokens(self) -> Tensor:
        """(N_train, T) of the type of ``tokens``."""
        return self.tokens[~self.heldout]

    @property
    def heldout_tokens(self) -> Tensor:
        """(N_heldout, T) of the type of ``tokens``."""
        return self.tokens[self.heldout]

    @property
    def train_labels(self) -> Tensor | None:
        """(N_train,) int64, if there are classes."""
        return None if self.labels is None else self.labels[~self.heldout]

    @property
    def heldout_labels(self) -> Tensor | None:
        """(N_heldout,) int64, if there are classes."""
        return None if self.labels is None else self.labels[self.heldout]

    def fingerprint(self) -> str:
        """SHA-256 of the arrays, the tokens as int64 whatever their type, and of the names of the classes."""
        digest = hashlib.sha256()
        flat = self.tokens.numpy().reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            digest.update(flat[start : start + _CHUNK].astype(np.int64).tobytes())
        digest.update(b"" if self.clusters is None else self.clusters.tobytes())
        digest.update(self.heldout.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes() + "\0".join(self.class_names).encode())
        if self.clusters is None or self.height != self.width:  # of squares of colours the above is all
            digest.update(self.tokenizer.digest().encode())
        return digest.hexdigest()


def check_classes(labels: Tensor, class_names: Sequence[str], heldout: Tensor) -> list[str]:
    """The names of the classes; ``"0"``, ``"1"`` and so on if there are none.

    Raises:
        ValueError: Labels that are not (N,) int64 or out of range, names that are no names, or a class without an image
            to train on.
    """
    if labels.shape != heldout.shape or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (N,) integers, got {tuple(labels.shape)} {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    n_classes = len(class_names) or min(high + 1, len(labels))  # with a gap there would be no more classes
    if low < 0 or high >= n_classes:
        want = f"not in 0..{n_classes - 1}" if n_classes > 0 else "no class: the labels name none"
        raise ValueError(f"label {low if low < 0 else high} is {want}")
    names = [str(name) for name in class_names or range(n_classes)]
    if len(set(names)) != len(names):
        raise ValueError("two classes have the same name")
    if wrong := [name for name in names if not name.isprintable() or not 0 < len(name) <= _MAX_NAME]:
        raise ValueError(f"a class is called {wrong[0][:_MAX_NAME]!r}; want 1..{_MAX_NAME} printable characters")
    counts = torch.bincount(labels[~heldout], minlength=n_classes)
    if not bool(counts.all()):
        raise ValueError(f"class {names[int(counts.argmin())]!r} has no image to train on")
    return names


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _square(length: int, clusters: np.ndarray | None) -> Tokenizer:
    side = math.isqrt(length)
    if side**2 != length:
        raise ValueError(f"{length} tokens are not a square image; say its height and width")
    if clusters is None:
        raise ValueError("there are no clusters, and no tokenizer")
    return ColourTokenizer(clusters, side, side)


def load_tokens(path: str | os.PathLike[str], *, classes: bool = False) -> TokenData:
    """Reads a token file: a .npz with ``tokens`` (N, T), ``heldout`` (N,), and ``clusters`` (K, 3) or, where the tokens
    are no colours, ``vocabulary``, an integer; with ``size`` (height, width) where the images are no squares.

    With ``classes`` also ``labels`` (N,), integers, and ``class_names`` (C,), strings, if it has them.

    Nothing is unpickled, and the arrays are refused where they would unpack to more than 400 times the file's size
    (1 MiB for a small file). The tokens stay as narrow as they are stored.

    Raises:
        FileNotFoundError: No such file.
        MemoryError: The arrays are believed, and too large for this machine.
        ValueError: The file is not such a file; the message names it and the reason.
    """
    names = ("tokens", "heldout", *(("labels",) if classes else ()))
    optional = ("clusters", "vocabulary", "size", *(("class_names",) if classes else ()))
    with files.open_input(path) as file:
        try:
            return _data_of(files.read_npz(file, names, optional))
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # what zipfile raises on a damaged file has no common class
            raise ValueError(f"{path}: not a token file: {files.first_line(error)}") from error


def _data_of(arrays: dict[str, np.ndarray]) -> TokenData:
    tokens, heldout = arrays["tokens"], arrays["heldout"]
    if tokens.dtype.kind not in "iu" or tokens.dtype == np.uint64:
        raise ValueError(f"tokens must be (N, T) integers, got {shown(tokens.shape)} {tokens.dtype}")
    if heldout.dtype != np.bool_:
        raise ValueError(f"heldout must be (N,) bool, got {shown(heldout.shape)} {heldout.dtype}")
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be (N, T) integers, got {shown(tokens.shape)} {tokens.dtype}")
    tokenizer = _tokenizer(arrays, tokens.shape[1])
    narrow = _narrow(tokens, tokenizer.vocabulary)
    labels = _labels(arrays["labels"]) if "labels" in arrays else None
    names = _class_names(arrays.get("class_names"))
    chosen = torch.from_numpy(heldout.copy())
    return TokenData(narrow, tokenizer.clusters, chosen, labels=labels, class_names=names, tokenizer=tokenizer)


def _tokenizer(arrays: dict[str, np.ndarray], length: int) -> Tokenizer:
    if ("clusters" in arrays) == ("vocabulary" in arrays):
        raise ValueError("has no array 'clusters'" if "clusters" not in arrays else "has both clusters and vocabulary")
    side = math.isqrt(length)
    size = arrays.get("size", np.array([side, side]))
    if size.shape != (2,) or size.dtype.kind not in "iu" or size.prod(dtype=np.uint64) != length:
        wanted = "size must be two integers, height and width, whose product is T" if "size" in arrays else ""
        raise ValueError(wanted or f"{length} tokens are not a square image, and there is no size")
    if "clusters" in arrays:
        return ColourTokenizer(arrays["clusters"], *size.tolist())
    vocabulary = arrays["vocabulary"]
    if vocabulary.shape != () or vocabulary.dtype.kind not in "iu":
        raise ValueError(f"vocabulary must be an integer, got {shown(vocabulary.shape)} {vocabulary.dtype}")
    return CodeTokenizer(vocabulary.item(), *size.tolist())


def check_tokens(tokens: np.ndarray, vocabulary: int) -> None:
    """Raises ``ValueError`` where a token is none of the vocabulary's."""
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token {low if low < 0 else high} is not in 0..{vocabulary - 1}")


def _labels(labels: np.ndarray) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.dtype == np.uint64:
        raise ValueError(f"labels must be (N,) integers, got {shown(labels.shape)} {labels.dtype}")
    return torch.from_numpy(labels.astype(np.int64))


def _class_names(names: np.ndarray | None) -> list[str]:
    if names is None:
        return []
    if names.dtype.kind != "U" or names.ndim != 1 or not len(names):
        raise ValueError(f"class_names must be (C,) strings, got {shown(names.shape)} {names.dtype}")
    return names.tolist()


def _narrow(tokens: np.ndarray, n_clusters: int) -> Tensor:
    """A copy in the smallest type that holds the ids of the clusters and that torch computes with."""
    check_tokens(tokens, n_clusters)
    return torch.from_numpy(tokens.astype(str(narrow_dtype(n_clusters)).removeprefix("torch."), order="C"))


def narrow_dtype(vocabulary: int) -> torch.dtype:
    """The smallest type that holds the tokens below ``vocabulary`` and that torch computes with."""
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return next(kind for kind in kinds if vocabulary - 1 <= torch.iinfo(kind).max)


def save_tokens(
    data: TokenData, path: str | os.PathLike[str], *, names: Sequence[str] | None = None, overwrite: bool = True
) -> None:
    """Writes a token file, whole or not at all; the same data gives the same bytes.

    Args:
        data: What to write; the tokens are stored in the smallest unsigned type.
        path: A name that ends in ``.npz``.
        names: (N) what the images are called, kept for the reader.
        overwrite: Whether ``path`` may exist.

    Raises:
        ValueError: Another suffix, or not one name an image.
        FileExistsError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: want a name that ends in .npz")
    arrays: dict[str, Any] = {
        "tokens": data.tokens.numpy().astype(np.min_scalar_type(data.n_clusters - 1)),
        **({"vocabulary": np.array(data.vocabulary)} if data.clusters is None else {"clusters": data.clusters}),
        "heldout": data.heldout.numpy(),
    }
    if data.height != data.width:
        arrays["size"] = np.array([data.height, data.width])
    if data.labels is not None:
        arrays["labels"] = data.labels.numpy().astype(np.min_scalar_type(data.n_classes - 1))
        arrays["class_names"] = np.array(list(data.class_names), dtype=np.str_)
    if names is not None:
        if len(names) != len(data.tokens):
            raise ValueError(f"{len(names)} names for {len(data.tokens)} images")
        arrays["names"] = np.array(list(names), dtype=np.str_)
    with files.replacing(path, overwrite=overwrite) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
