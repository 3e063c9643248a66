"""Batches: which sequences are decoded together, and fewer of them where memory does not suffice."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from igpt_fast.engines.choice import forget

T = TypeVar("T")
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",  # CUBLAS_, CUDNN_
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_
)


class Batches:
    """The parts of a number of sequences, of which a number that follow each other are copies of one input.

    A part has all copies of some inputs or, when they are more than a batch, some copies of one input.

    Args:
        count: Sequences.
        copies: Of each input.
        size: Sequences of a part at most; halved where memory does not suffice.
    """

    def __init__(self, count: int, copies: int, size: int) -> None:
        self.count, self.copies, self.size = count, copies, size

    def end(self, start: int) -> tuple[int, int]:
        """The end of the part that begins at ``start``, and how many sequences that follow each other are copies."""
        if start % self.copies == 0 and self.copies <= self.size:
            return min(start + self.size // self.copies * self.copies, self.count), self.copies
        stop = min(start + self.size, start - start % self.copies + self.copies)
        return stop, stop - start

    def run(self, work: Callable[[int, int, int], Iterator[T]]) -> Iterator[T]:
        """What ``work(start, stop, copies)`` yields, part after part; again with half of a part that does not fit.

        Warns: RuntimeWarning: Of each halving.

        Raises:
            MemoryError, RuntimeError: A single sequence does not fit.
        """
        start = 0
        while start < self.count:
            stop, together = self.end(start)
            reason = None
            try:
                yield from work(start, stop, together)
            except (MemoryError, RuntimeError) as error:
                if stop - start == 1 or not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            if reason is None:
                start = stop
                continue
            # Here the error is gone, and with it the frames that held the decoder, unless they are in a cycle.
            self.size = (stop - start) // 2
            said = f"out of memory with {stop - start} images at a time; goes on with {self.size} ({reason})"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
            forget()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; torch's CPU allocator, drivers and libraries say it in
    words alone.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(words in text for words in OUT_OF_MEMORY)
