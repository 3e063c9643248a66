"""What a model is trained on: images as tokens, and the files of them, read with bounds and written whole."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.files import shown
from igpt_fast.image.clusters import check_clusters

_CHUNK = 1 << 20  # tokens that are widened at once for the fingerprint
_MAX_NAME = 200  # characters
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class TokenData:
    """Images as tokens.

    Args:
        tokens: (N, side * side) integers in 0..K-1. The functions here keep them in the smallest type, uint8 for up
            to 256 clusters; what is taken out is widened.
        clusters: (K, 3) float32 in [-1, 1].
        heldout: (N,) bool, images that are never trained on.
        skipped: Files that were left out because they are not readable images.
        labels: (N,) int64, the class of each image in 0..C-1; ``None``: the images have no classes.
        class_names: The C names; ``"0"``, ``"1"`` and so on if there are labels alone.

    Raises:
        ValueError: Arrays that do not fit together, nothing to train on, or a class without an image to train on.
    """

    tokens: Tensor
    clusters: np.ndarray
    heldout: Tensor
    skipped: int = 0
    labels: Tensor | None = None
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        tokens, heldout = self.tokens, self.heldout
        if tokens.ndim != 2 or tokens.dtype not in _INTEGERS or tokens.numel() == 0:
            raise ValueError(f"tokens must be (N, T) integers, got {tuple(tokens.shape)} {tokens.dtype}")
        if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are not a square image")
        _check_range(tokens.numpy(), len(self.clusters))
        if heldout.shape != tokens.shape[:1] or heldout.dtype != torch.bool or bool(heldout.all()):
            raise ValueError("heldout must be (N,) bool with at least one image to train on")
        if self.labels is not None:
            self._check_classes(self.labels)
        elif self.class_names:
            raise ValueError("there are class_names, and no labels")

    def _check_classes(self, labels: Tensor) -> None:
        if labels.shape != self.tokens.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be (N,) integers, got {tuple(labels.shape)} {labels.dtype}")
        low, high = int(labels.min()), int(labels.max())
        n_classes = len(self.class_names) or min(high + 1, len(labels))  # with a gap there would be no more classes
        if low < 0 or high >= n_classes:
            raise ValueError(f"label {low if low < 0 else high} is not in 0..{n_classes - 1}")
        names = self.class_names = [str(name) for name in self.class_names or range(n_classes)]
        if len(set(names)) != len(names):
            raise ValueError("two classes have the same name")
        if wrong := [name for name in names if not name.isprintable() or not 0 < len(name) <= _MAX_NAME]:
            raise ValueError(f"a class is called {wrong[0][:_MAX_NAME]!r}; want 1..{_MAX_NAME} printable characters")
        counts = torch.bincount(labels[~self.heldout], minlength=n_classes)
        if not bool(counts.all()):
            raise ValueError(f"class {names[int(counts.argmin())]!r} has no image to train on")

    @property
    def height(self) -> int:
        """Pixels; a square's."""
        return math.isqrt(self.tokens.shape[1])

    width = side = height

    @property
    def vocabulary(self) -> int:
        """Tokens of pixels are below it."""
        return len(self.clusters)

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
        return self._at(self._places[0][torch.as_tensor(indices, dtype=torch.int64)])

    def heldout_batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor | None]]:
        """See ``objectives.protocol.Data``."""
        return map(self._at, self._places[1].split(batch_size) if self.n_heldout else ())

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.tokens[places].long(), None if self.labels is None else self.labels[places]

    @property
    def n_clusters(self) -> int:
        """Number of colours; their ids come first, then those of the classes."""
        return len(self.clusters)

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 if the images have none."""
        return len(self.class_names)

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
        digest.update(self.clusters.tobytes() + self.heldout.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes() + "\0".join(self.class_names).encode())
        return digest.hexdigest()


def load_tokens(path: str | os.PathLike[str], *, classes: bool = False) -> TokenData:
    """Reads a token file: a .npz with ``tokens`` (N, T), ``clusters`` (K, 3) and ``heldout`` (N,).

    With ``classes`` also ``labels`` (N,), integers, and ``class_names`` (C,), strings, if it has them.

    Nothing is unpickled, and the arrays are refused where they would unpack to more than 400 times the file's size
    (1 MiB for a small file). The tokens stay as narrow as they are stored.

    Raises:
        FileNotFoundError: No such file.
        MemoryError: The arrays are believed, and too large for this machine.
        ValueError: The file is not such a file; the message names it and the reason.
    """
    names = ("tokens", "clusters", "heldout", *(("labels",) if classes else ()))
    with files.open_input(path) as file:
        try:
            return _data_of(files.read_npz(file, names, ("class_names",) if classes else ()))
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
    palette = check_clusters(arrays["clusters"])
    narrow = _narrow(tokens, len(palette))
    labels = _labels(arrays["labels"]) if "labels" in arrays else None
    names = _class_names(arrays.get("class_names"))
    return TokenData(narrow, palette, torch.from_numpy(heldout.copy()), labels=labels, class_names=names)


def has_labels(path: Path) -> bool:
    """Whether a token file has ``labels``; true of what is no token file, of which ``load_tokens`` says more."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "labels.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True


def _check_range(tokens: np.ndarray, n_clusters: int) -> None:
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= n_clusters:
        raise ValueError(f"token {low if low < 0 else high} is not in 0..{n_clusters - 1}")


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
    _check_range(tokens, n_clusters)
    dtype = next(kind for kind in (np.uint8, np.int16, np.int32, np.int64) if n_clusters - 1 <= np.iinfo(kind).max)
    return torch.from_numpy(tokens.astype(dtype, order="C"))


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
        "clusters": data.clusters,
        "heldout": data.heldout.numpy(),
    }
    if data.labels is not None:
        arrays["labels"] = data.labels.numpy().astype(np.min_scalar_type(data.n_classes - 1))
        arrays["class_names"] = np.array(list(data.class_names), dtype=np.str_)
    if names is not None:
        if len(names) != len(data.tokens):
            raise ValueError(f"{len(names)} names for {len(data.tokens)} images")
        arrays["names"] = np.array(list(names), dtype=np.str_)
    with files.replacing(path, overwrite=overwrite) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
