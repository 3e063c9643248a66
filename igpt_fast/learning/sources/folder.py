"""Pictures as files below a directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_fast.image.folders import find_images
from igpt_fast.learning.sources.protocol import Classes, Content, check_labels, classes_of_names, digest_of, look_of


@dataclass(frozen=True)
class Folder:
    """See ``Source``.

    Args:
        path: The directory.
        names: The files, relative to it.
    """

    path: Path
    names: list[str]
    block: int = 1

    @classmethod
    def open(cls, path: Path) -> Folder:
        """All pictures below a directory, see ``find_images``."""
        return cls(path, [found.relative_to(path).as_posix() for found in find_images(path)])

    def __len__(self) -> int:
        return len(self.names)

    def part(self, places: np.ndarray) -> Folder:
        return Folder(self.path, [self.names[place] for place in places])

    def pictures(self) -> Iterator[tuple[str, Content]]:
        for name in self.names:
            yield name, self.path / name

    def fingerprint(self) -> str:
        """Of the names and sizes of the files, and of the 4 KiB at both ends of each: a copy has the same."""
        return digest_of([f"{name}\0{_look(self.path / name)}" for name in self.names])

    def classes(self) -> Classes:
        return check_labels(self.path, classes_of_names(self.path, self.names))


def _look(path: Path) -> str:
    try:
        return look_of(path, 2)
    except (OSError, ValueError) as error:  # whether that matters is decided where its turn comes
        return type(error).__name__
