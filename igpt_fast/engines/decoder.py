"""What generation asks of a decoder, and the checks that all of them share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# What a caller may ask for besides the model's own dtype.
DTYPES = (None, "int8", "fp8_values")


class Decoder(Protocol):
    """What generation asks of a decoder. It holds the state of ``batch_size`` images.

    Attributes:
        name: ``"reference"``, ``"cpu"`` or ``"cuda"``.
        batch_size: Images decoded together; ``fork`` multiplies it.
        capacity: Positions that can be read.
        dtype: What it computes in, such as ``"float32"``, ``"int8"`` or ``"fp8_values"``.
        reason: Why it is no faster one, where one was asked for.
    """

    name: str
    batch_size: int
    capacity: int
    dtype: str
    reason: str | None

    def prefill(self, tokens: Tensor) -> Tensor:
        """Reads (B, T) int64 tokens, SOS first; returns the (B, vocab_size - 1) logits of the next position."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Reads (B,) int64 tokens; returns the (B, vocab_size - 1) logits of the next position."""
        ...

    def fork(self, n: int) -> None:
        """Continues each of the B images n times: from here on there are B n, the n of the first one first.

        They share what has been read so far; it cannot be taken back. The logits that came last are those of all n.

        Raises:
            ValueError: ``n`` is not a positive integer, nothing has been read, or it was forked before.
        """
        ...


def check_capacity(capacity: int, n_positions: int) -> None:
    """Raises ValueError unless a decoder of a model of ``n_positions`` can have the capacity."""
    if not 1 <= capacity <= n_positions:
        raise ValueError(f"decoder: capacity is {capacity}; want 1..{n_positions}, the model's n_positions")


def check_fork(n: int, position: int, forked: bool) -> None:
    """Raises ValueError unless a decoder that has read ``position`` positions can be forked; see ``Decoder.fork``."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"decoder: fork is given n={n!r}; want a positive integer")
    if forked:
        raise ValueError("decoder: it was forked before; a decoder forks once")
    if position == 0:
        raise ValueError("decoder: nothing has been read that a fork could share; call prefill first")


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError unless the dtype is one that a decoder may be asked for."""
    if dtype not in DTYPES:
        raise ValueError(
            f"decoder: dtype is {dtype!r}; want None, which is the model's, {' or '.join(map(repr, DTYPES[1:]))}"
        )
