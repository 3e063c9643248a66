"""Between the host and a GPU without waiting for either. Where the device is no GPU, plain copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MOST_PINNED = 1 << 28  # bytes of one tensor: more takes its time in any case, and pinned memory is the machine's


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: to a GPU from pinned memory, so that the host goes on before it has arrived."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= _MOST_PINNED:
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # of others the copy would wait
    return tensor.to(device)


class Arriving:
    """A tensor on its way to the host, behind what the device computes it by.

    Args:
        tensor: On any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda" or tensor.nbytes > _MOST_PINNED:
            self._here = tensor.cpu()
            return
        with torch.cuda.device(tensor.device):
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """The tensor, on the host, when it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._here


def one_ahead(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """The items; on a GPU each when the next one has been begun, so that the device has work while one is looked at."""
    if device.type != "cuda":
        yield from items
        return
    before: list[T] = []
    for item in items:
        before.append(item)
        if len(before) == 2:
            yield before.pop(0)
    yield from before
