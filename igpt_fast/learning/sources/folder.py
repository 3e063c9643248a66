"""Pictures as files below a directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_fast.image.folders import find_images
from igpt_fast.learning.sources.protocol import Classes, Content, check_labels, classes_of_names, digest_of


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
        """Of the names and sizes of the files."""
        return digest_of([f"{name}\0{(self.path / name).stat().st_size}" for name in self.names])

    def classes(self) -> Classes:
        return check_labels(self.path, classes_of_names(self.path, self.names))
