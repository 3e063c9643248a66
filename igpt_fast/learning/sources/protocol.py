"""What a source of pictures is, and what several kinds share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from igpt_fast import files
from igpt_fast.files import printable, shown

MAX_FILE = 64 << 20  # bytes of one picture as it lies in an archive or a table, and of it unpacked there
_BLOCK = 4096  # bytes of a piece that the fingerprint of a file looks at

Content = Path | bytes | np.ndarray | ValueError  # a file, its content, pixels (H, W[, 3]) uint8, or why there is none


class Source(Protocol):
    """Pictures in a fixed order, each with a name. It goes to other processes, which read parts of it."""

    @property
    def path(self) -> Path:
        """Where they come from."""

    @property
    def block(self) -> int:
        """So many neighbours are read as quickly as one."""

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures, as ``pictures`` gives them."""

    def __len__(self) -> int:
        """How many."""

    def part(self, places: np.ndarray) -> Source:
        """These of them; the places ascend."""

    def pictures(self) -> Iterator[tuple[str, Content]]:
        """The name and the content of each.

        Raises:
            OSError, ValueError: The whole cannot be read any more.
        """

    def fingerprint(self) -> str:
        """A hash by which another source, or a changed one, is known."""

    def classes(self) -> Classes:
        """The class of each.

        Raises:
            ValueError: They have none, or one of them has none.
        """


@dataclass(frozen=True)
class Classes:
    """(N,) int64 labels, and the names of the classes."""

    labels: np.ndarray
    names: list[str]


def classes_of_names(path: Path, names: Sequence[str]) -> Classes:
    """The sub-directories are the classes, in the order of their names."""
    if loose := [name for name in names if "/" not in name]:
        raise ValueError(f"{path / printable(loose[0])}: lies in no class; those are the sub-directories of {path}")
    return classes_of_values(path, [name.split("/")[0] for name in names], names)


def classes_of_values(path: Path, values: Sequence[Any], names: Sequence[str]) -> Classes:
    """Of integers, which are the labels, or of strings, which are the names of the classes.

    Raises:
        ValueError: Something else, or below 0; the message names the picture.
    """
    if values and all(isinstance(value, str) for value in values):
        found = sorted(set(values))
        index = {name: i for i, name in enumerate(found)}
        return Classes(np.array([index[value] for value in values], np.int64), found)
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise ValueError(f"{path}: {printable(name)} has the label {shown(value)}; want a number from 0 on")
    labels = np.array(values, np.int64)
    return Classes(labels, [str(i) for i in range(min(int(labels.max()) + 1, len(labels)))])


def check_labels(path: Path, found: Classes) -> Classes:
    """``found``.

    Raises:
        ValueError: A label that no class has; the message names the first such picture by its number.
    """
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= len(found.names)))
    if len(wrong):
        label = found.labels[wrong[0]]
        raise ValueError(f"{path}: image {wrong[0]} has the label {label}, which is not in 0..{len(found.names) - 1}")
    return found


def look_of(path: Path, blocks: int = 64) -> str:
    """SHA-256 of a file's size and of pieces of 4 KiB, spread evenly, so that large ones are known at once."""
    with files.open_input(path) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for i in range(blocks):
            file.seek(max(0, size - _BLOCK) * i // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def digest_of(parts: Sequence[object]) -> str:
    """SHA-256 of their texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
