"""A large folder of pictures as data for a run that begins at once: a picture is read when its turn comes, and its
tokens are kept."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files
from igpt_fast.files import printable
from igpt_fast.learning.data import ImageSet, check_classes
from igpt_fast.learning.folders import held_out
from igpt_fast.learning.sources.folder import Folder
from igpt_fast.learning.sources.protocol import digest_of
from igpt_fast.learning.taking import Taking, fit_palette, pixels_of
from igpt_fast.learning.tokenizers import ColourTokenizer


class FolderData(ImageSet):
    """The images below a folder, see ``objectives.protocol.Data``: the palette is fitted to a sample, see
    ``fit_palette``, and tokens take N * T bytes, or twice that of more than 256 colours, as they come.

    A picture that cannot be read shows when its turn comes. With ``skip_unreadable`` the next one of its part, the one
    that is trained on or the other, then stands in its place, with a warning of one line.

    Args:
        source: The images.
        taking: How images become tokens.
        skip_unreadable: Go on without pictures that cannot be read, instead of failing.

    Raises:
        ValueError: No images, none to train on, too few colours, or with classes an image in none of them. Later, from
            ``train_batch`` and ``heldout_batches``: an image that cannot be read; the message names it.
    """

    ready = False

    def __init__(self, source: Folder, taking: Taking, *, skip_unreadable: bool = False) -> None:
        folder = source.path
        if not len(source):
            raise ValueError(f"{folder}: no images in it")
        self._source, self._holdout, self._skip = source, taking.holdout, skip_unreadable
        self.heldout = torch.tensor([held_out(name, taking.holdout) for name in source.names])
        if bool(self.heldout.all()):
            raise ValueError(f"{folder}: holdout {taking.holdout} leaves none of the {len(source)} images to train on")
        self.labels, self.class_names = None, []
        if taking.classes:
            found = source.classes()
            self.labels = torch.from_numpy(found.labels)
            self.class_names = check_classes(self.labels, found.names, self.heldout)
        taking = taking.sized(source)
        palette = fit_palette(source, taking) if taking.clusters is None else taking.clusters
        tokenizer = ColourTokenizer(palette, taking.height or 0, taking.width or 0)
        self.tokenizer = self._colours = tokenizer
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_tokens", "_state")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        count = len(self._source)
        # Zeros, whose pages come with the tokens.
        self._tokens = np.zeros((count, self.tokenizer.length), self.tokenizer.dtype)
        self._state = np.zeros(count, np.int8)  # 0 not read yet, 1 read, -1 cannot be read

    @property
    def skipped(self) -> int:  # type: ignore[override] # a number elsewhere
        """Pictures that turned out not to be readable."""
        return int((self._state < 0).sum())

    @property
    def n_read(self) -> int:
        """Pictures that have been read."""
        return int((self._state > 0).sum())

    def at(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        self._read(places.numpy())
        found = torch.tensor([self._readable(place) for place in places.tolist()], dtype=torch.int64)
        tokens = torch.from_numpy(self._tokens[found.numpy()].astype(np.int64))
        return tokens, None if self.labels is None else self.labels[found]

    def _readable(self, place: int) -> int:
        """The place, or the next one of the same part whose picture can be read."""
        if self._state[place] > 0:
            return place
        own = self._places[int(self.heldout[place])]
        start = int(torch.searchsorted(own, place))
        for step in range(1, len(own)):
            other = int(own[(start + step) % len(own)])
            self._read(np.array([other]))
            if self._state[other] > 0:
                return other
        raise ValueError(f"{self._source.path}: none of the {len(own)} images of a part can be read")

    def _read(self, places: np.ndarray) -> None:
        """Fills in the tokens that are missing."""
        missing = np.unique(places[self._state[places] == 0])
        good, pictures = [], []
        for place, (name, content) in zip(missing, self._source.part(missing).pictures(), strict=True):
            try:
                pictures.append(pixels_of(content, self.height, self.width))
                good.append(place)
            except (OSError, ValueError) as error:
                if not self._skip:
                    raise
                warnings.warn(f"skipped {printable(name)}: {files.first_line(error)}", stacklevel=2)
                self._state[place] = -1
        if good:
            self._tokens[good] = self._colours.encode(np.stack(pictures))
            self._state[good] = 1

    def fingerprint(self) -> str:
        """Of the files, see ``Folder.fingerprint``, the tokenizer, the held-out part, and the classes."""
        parts = [self._source.fingerprint(), self.tokenizer.digest(), self._holdout, list(self.class_names)]
        return digest_of(parts)
