"""Folders of pictures: which files are some, and their pixels."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from igpt_fast.image.reading import read_square
from igpt_fast.image.writing import FORMATS

# What is written here, and a few more. Pillow reads others, among them documents and films, which are no pictures.
IMAGE_SUFFIXES = (*FORMATS, ".avif", ".pbm", ".pgm", ".tga")


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The files below a folder whose suffix is that of a picture, ordered by name; hidden ones are left out.

    Raises:
        NotADirectoryError: No such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such directory")
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


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
