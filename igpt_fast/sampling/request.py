"""Requests: what is to be drawn, checked before anything is read or computed, and which part of it a process draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from igpt_fast.draws import Sampling
from igpt_fast.sampling.inpainting import primer_lengths

MAX_CANDIDATES = 256
MAX_FIRST = 1 << 30  # index of the first input


@dataclass(frozen=True)
class Request:
    """n images of each of M inputs, the n of the first input first; samples have an input each, which gives nothing.

    ``Pipeline.request`` makes and checks it; there the fields are described that are not here.
    """

    height: int  # of the images, in pixels
    width: int
    given: Tensor  # (M, height * width) bool: pixels that are not drawn
    images: Sequence[Any] | None  # the inputs of completions, not yet read; None of samples
    keep: float | None  # what is given, if it is a fraction or number of rows
    labels: Tensor | None  # (M,) int64 classes
    n: int  # images of each input
    candidates: int
    first: int  # index of the first input
    seed: int
    sampling: Sampling
    scale: float  # cfg_scale
    batch_size: int | None
    dtype: str | None
    speculate: bool = True  # whether drafts may be verified
    fit: str = "crop"  # how the inputs get the aspect of the images; see ``image.reading.fitted``

    def __len__(self) -> int:
        """Inputs."""
        return len(self.given)

    def shard(self, part: range) -> Request:
        """Some of the inputs, of which the same is drawn as in the whole."""
        cut = slice(part.start, part.stop)
        images = None if self.images is None else self.images[cut]
        labels = None if self.labels is None else self.labels[cut]
        return replace(self, given=self.given[cut], images=images, labels=labels, first=self.first + part.start)

    @property
    def copies(self) -> int:
        """Sequences that share a primer."""
        return self.n * self.candidates

    @cached_property
    def primer(self) -> int:
        """Pixels that all inputs have given first."""
        return 0 if self.images is None else int(primer_lengths(self.given).min())

    @cached_property
    def streams(self) -> Tensor:
        """(M n,) int64: the random stream of each image."""
        numbers = torch.arange(self.first, self.first + len(self), device="cpu")
        if self.images is None:
            return numbers
        # From 1 on: completion j of the first image is not drawn with the numbers of sample j.
        return ((numbers[:, None] + 1 << 32) + torch.arange(self.n, device="cpu")).flatten()

    def described(self) -> dict[str, Any]:
        """What was asked for, as plain values; of samples but for their number."""
        more: dict[str, Any] = {"first": self.first} if self.first else {}
        if self.images is not None:
            more = {"first_input": self.first} if self.first else {}
            more |= {"n": self.n, "keep": "mask" if self.keep is None else self.keep}
            more |= {} if self.keep is None else {"rows": self.primer // self.width}
            more |= {} if self.fit == "crop" else {"fit": self.fit}
            more |= {"candidates": self.candidates} if self.candidates > 1 else {}
        return {**more, **self.sampling.keywords(), "cfg_scale": self.scale}
