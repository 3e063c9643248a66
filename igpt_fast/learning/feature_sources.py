"""What features are made of: a folder of pictures, read a part at a time, or a token file, or shards of tokens."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from igpt_fast.files import first_line
from igpt_fast.image import ImageGPTImageProcessor, center_crop, open_image, quantize, resize
from igpt_fast.image.folders import find_images
from igpt_fast.learning.data import ImageSet, load_tokens
from igpt_fast.learning.folders import _classes_of
from igpt_fast.learning.shards import ShardData, has_labels


class Source(Protocol):
    """Images in an order that does not change.

    ``names``: what they are called, if anything. ``labels``: (N,) int64 with ``class_names``, if they have classes.
    """

    names: Sequence[str]
    labels: Tensor | None
    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Another one for other images."""
        ...

    def tokens(self, part: range) -> tuple[np.ndarray, Tensor]:
        """Which of a part can be read, (len(part),) bool, and the (n, T) tokens of those."""
        ...


class Pictures:
    """The pictures below a folder; the middle of each is cut out in the model's aspect and resized.

    Args:
        folder: See ``find_images``.
        processor: Colours and size.
        classes: Whether its sub-directories are classes.
        skip_unreadable: Leave out what is no readable image, with a warning, instead of failing.

    Raises:
        NotADirectoryError: No such folder.
        ValueError: No images, a processor without colours, or with ``classes`` an image in none of them.
    """

    def __init__(
        self, folder: Path, processor: ImageGPTImageProcessor, classes: bool = False, skip_unreadable: bool = False
    ) -> None:
        self.paths = find_images(folder)
        if not self.paths:
            raise ValueError(f"{folder}: no images in it")
        if processor.clusters is None:
            raise ValueError(f"{folder}: the model has no colours that the images could be turned into")
        self.names: Sequence[str] = [path.relative_to(folder).as_posix() for path in self.paths]
        self.labels: Tensor | None = None
        self.class_names: Sequence[str] = ()
        if classes:
            self.labels, self.class_names = _classes_of(folder, self.names)
        self._processor, self._skip = processor, skip_unreadable

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and times of the files, so that none of them has to be read, and of how they are."""
        how, clusters = self._processor, self._processor.clusters
        assert clusters is not None
        digest = hashlib.sha256(f"{how.height} {how.width} {self._skip} {clusters.dtype} {clusters.shape}".encode())
        digest.update(clusters.tobytes())
        for name, path in zip(self.names, self.paths, strict=True):
            about = path.stat()
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        digest.update(str(self.labels is not None).encode())
        return digest.hexdigest()

    def pixels(self, part: range) -> tuple[np.ndarray, np.ndarray]:
        """Which of a part can be read, and the (n, height, width, 3) uint8 pixels of those.

        Raises:
            OSError, ValueError: One cannot be read, and it is not to be skipped; the message names it.
        """
        height, width = self._processor.height, self._processor.width
        readable, found = np.zeros(len(part), dtype=bool), []
        for i, number in enumerate(part):
            try:
                picture = center_crop(open_image(self.paths[number]), width / height)
                found.append(np.asarray(resize(picture, width, height), dtype=np.uint8))
                readable[i] = True
            except (OSError, ValueError) as error:
                if not self._skip:
                    raise
                warnings.warn(f"skipped {first_line(error)}", stacklevel=2)
        return readable, np.stack(found) if found else np.empty((0, height, width, 3), dtype=np.uint8)

    def tokens(self, part: range) -> tuple[np.ndarray, Tensor]:
        """See ``Source``."""
        assert self._processor.clusters is not None
        readable, pixels = self.pixels(part)
        return readable, torch.from_numpy(quantize(pixels, self._processor.clusters)).flatten(1)


class TokenImages:
    """The images of a token file or of shards, all readable."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data
        self.names: Sequence[str] = ()
        self.labels, self.class_names = data.labels, data.class_names

    def __len__(self) -> int:
        return len(self.data.heldout)

    def fingerprint(self) -> str:
        """See ``ImageSet``."""
        return self.data.fingerprint()

    def tokens(self, part: range) -> tuple[np.ndarray, Tensor]:
        """See ``Source``."""
        return np.ones(len(part), dtype=bool), self.data.at(torch.arange(part.start, part.stop))[0]


def open_tokens(path: Path) -> ImageSet:
    """The images of a token file or of shards, with their classes, if they have any."""
    classes = has_labels(path)
    return ShardData(path, classes=classes) if path.is_dir() else load_tokens(path, classes=classes)


def check_palette(path: str | os.PathLike[str], data: ImageSet, processor: Any, model: Any) -> None:
    """Fails where the tokens of a file are not those of a model; of codes that are no colours their number is all there
    is to compare, and ``processor`` may be ``None``.

    Raises:
        ValueError: Another number of colours, other colours, or other pixels.
    """
    clusters = data.tokenizer.clusters
    if data.tokenizer.length != model.config.n_positions:
        size = f"{data.tokenizer.length} tokens an image, the model {model.config.n_positions}"
        raise ValueError(f"{path}: has {size}")
    if clusters is None:
        if data.vocabulary != model.config.n_colours:
            raise ValueError(f"{path}: has {data.vocabulary} codes, the model {model.config.n_colours}")
        return
    theirs = processor.clusters
    if theirs is None or clusters.shape != theirs.shape:
        have = "none" if theirs is None else len(theirs)
        raise ValueError(f"{path}: has a palette of {len(clusters)} colours, the model {have}")
    if not np.allclose(clusters, theirs, rtol=0.0, atol=1e-6):
        raise ValueError(f"{path}: its palette has other colours than the model's: its tokens mean something else")
