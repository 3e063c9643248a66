"""Images to train on that stay on the GPU, as narrow as their vocabulary allows: a batch is gathered there.

Which images a step takes, and how they are augmented, is drawn on the host as ever, by a generator of (seed, step): a
GPU's generator draws other numbers, and a run would be another one by where it was begun. What is drawn are some
numbers an image; they are sent from pinned memory, which nobody waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igpt_fast.learning.data import narrow_dtype
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.likelihood.transfer import sent

SHARE = 0.25  # of the GPU's memory that is free when the run begins, and stays so, that the images may take
_AT_ONCE = 4096  # images that are widened together on their way


class Resident:
    """Another's images to train on, on a device.

    Args:
        data: The other.
        device: Where they stay.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        self.height, self.width, self.n_train, self._device = data.height, data.width, data.n_train, device
        dtype = narrow_dtype(data.vocabulary)
        self.tokens = torch.empty(self.n_train, self.height * self.width, dtype=dtype, device=device)
        labels = []
        for start in range(0, self.n_train, _AT_ONCE):
            stop = min(start + _AT_ONCE, self.n_train)
            tokens, classes = data.train_batch(range(start, stop))
            self.tokens[start:stop] = tokens.to(dtype)
            labels += [] if classes is None else [classes]
        self.labels = torch.cat(labels).to(device) if labels else None

    def train_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """See ``objectives.protocol.Data``; on the device."""
        places = sent(torch.as_tensor(indices, dtype=torch.int64), self._device)
        return self.tokens[places].long(), None if self.labels is None else self.labels[places]


def nearby(data: Data, device: torch.device, images: int, wanted: int) -> Any:
    """The data, on the device where that is a GPU with enough free memory and their tokens are at hand.

    Args:
        data, device: See ``Resident``.
        images: How many will be asked for, one after the other; to read more than these beforehand would take longer.
        wanted: Bytes of the free memory that others will take.
    """
    if device.type != "cuda" or not getattr(data, "ready", False) or data.n_train > images:
        return data
    image = data.height * data.width * narrow_dtype(data.vocabulary).itemsize + (8 if data.n_classes else 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Resident(data, device) if data.n_train * image <= SHARE * (free - wanted) else data
