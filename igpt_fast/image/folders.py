"""Folders of pictures: which files are some, and their pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from igpt_fast.image.reading import read_square

# Pillow reads more, among them documents and films; these are what folders of pictures hold.
IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The files below a folder whose suffix is that of a picture, ordered by name; hidden ones are left out.

    Raises:
        NotADirectoryError: No such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such directory")
    return sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield path


def _read_pictures(folder: Path, side: int, skip_unreadable: bool) -> tuple[list[str], np.ndarray, int]:
    """Names below the folder, (N, side, side, 3) uint8, and how many files were skipped."""
    found = find_images(folder)
    names, pictures, failures = [], [], []
    for path in found:
        try:
            picture = read_square(path, side)
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            reason = reason if str(path) in reason else f"{path}: {reason}"
            failures.append(" ".join(reason.splitlines()))  # even a file name may hold a line break
            continue
        names.append(path.relative_to(folder).as_posix())
        pictures.append(picture)
    if failures and not skip_unreadable:
        shown = "; ".join(failures[:3]) + ("; ..." if len(failures) > 3 else "")
        raise ValueError(f"{folder}: {len(failures)} of {len(found)} images cannot be read: {shown}")
    for failure in failures:
        warnings.warn(f"skipped {failure}", stacklevel=3)
    if not pictures:
        reason = f"none of its {len(found)} images can be read" if found else "no images in it"
        raise ValueError(f"{folder}: {reason}")
    return names, np.stack(pictures), len(failures)
