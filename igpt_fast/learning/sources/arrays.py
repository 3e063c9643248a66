"""Pictures, or tokens, as one array: .npy files, which are mapped, and .npz files, which are read."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_fast import files
from igpt_fast.files import listed, shown
from igpt_fast.learning.sources.protocol import Classes, Content, check_labels, look_of

_IMAGES, _TOKENS, _LABELS = ("images", "x", "arr_0"), ("tokens", "images", "arr_0"), ("labels", "label", "y")


@dataclass(frozen=True)
class Arrays:
    """See ``Source``.

    Args:
        path: A .npy or .npz file of (N, H, W) or (N, H, W, 3) uint8, or of tokens, (N, T) or (N, H, W) integers.
        places: Which of them.
        tokens: Whether they are tokens.
        rows: Those of a part of a .npz, so that another process need not read the whole.
    """

    path: Path
    places: np.ndarray
    tokens: bool = False
    rows: np.ndarray | None = None
    block: int = 1

    @classmethod
    def open(cls, path: Path, tokens: bool = False) -> Arrays:
        """All of a file.

        Raises:
            FileNotFoundError, ValueError: No such file, or not such an array.
        """
        _array.cache_clear()  # the file may be another one now
        return cls(path, np.arange(len(_array(path, tokens))), tokens)

    @property
    def array(self) -> np.ndarray:
        """The whole, of all places."""
        return _array(self.path, self.tokens)

    @property
    def names(self) -> list[str]:
        return [str(place) for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def part(self, places: np.ndarray) -> Arrays:
        kept = self.places[places]
        return Arrays(self.path, kept, self.tokens, self.array[kept] if _is_npz(self.path) else None)

    def pictures(self) -> Iterator[tuple[str, Content]]:
        rows = (self.array[place] for place in self.places) if self.rows is None else self.rows
        for place, row in zip(self.places, rows, strict=True):
            yield str(place), row

    def fingerprint(self) -> str:
        return look_of(self.path)

    def classes(self) -> Classes:
        if not _is_npz(self.path):
            raise ValueError(f"{self.path}: a .npy file has no labels; a .npz with images and labels has")
        labels = _member(self.path, _LABELS)
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: labels are {shown(labels.shape)} {labels.dtype}; want ({len(self)},) integers"
            )
        labels = labels.astype(np.int64)
        high = min(int(labels.max(initial=0)) + 1, len(labels))
        return check_labels(self.path, Classes(labels, [str(i) for i in range(high)]))


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


@functools.lru_cache(maxsize=1)
def _array(path: Path, tokens: bool) -> np.ndarray:
    array = _member(path, _TOKENS if tokens else _IMAGES) if _is_npz(path) else _mapped(path)
    if tokens:
        good, wanted = array.ndim in (2, 3) and array.dtype.kind in "iu", "(N, T) or (N, H, W) integers"
    else:
        good = array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3))
        wanted = "(N, H, W) or (N, H, W, 3) uint8"
    if not good or 0 in array.shape[1:]:
        raise ValueError(f"{path}: holds {shown(array.shape)} {array.dtype}; want {wanted}")
    return array


def _mapped(path: Path) -> np.ndarray:
    files.open_input(path, 0).close()  # says what is wrong with a folder or a device
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is parsed by ast, whose errors have no common class
        raise ValueError(f"{path}: not a usable .npy file: {files.first_line(error)}") from error


def _member(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """The first of these that a .npz has."""
    with files.open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                there = [name.removesuffix(".npy") for name in archive.namelist()]
            found = [name for name in names if name in there]
            if not found:
                raise ValueError(f"has {listed(there)}; want one of {', '.join(names)}")
            return files.read_npz(file, found[:1])[found[0]]
        except MemoryError:
            raise
        except Exception as error:  # what zipfile raises on a damaged file has no common class
            raise ValueError(f"{path}: not a usable .npz file: {files.first_line(error)}") from error
