"""What generation asks of a decoder, what all of them share, and their checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.checks import dtype_name
from igpt_fast.draws import PLAIN, Sampling
from igpt_fast.engines.network import Model

# Dtypes with a cache of fp8 on a GPU: whether keys are cached so, and whether values are.
SCALED = {"fp8_values": (False, True), "fp8_cache": (True, True)}
# What a caller may ask for besides the model's own dtype.
DTYPES = (None, "int8", *SCALED)


Numbers = Tensor | Callable[[], Tensor]


class PositionBytes(NamedTuple):
    """Bytes of key/value cache that one position takes in one layer.

    Attributes:
        own: Of an image's own position.
        shared: Of a primer's position, where its continuations share it; ``None`` where each has a copy.
    """

    own: int
    shared: int | None


class Drafts(ABC):
    """Pixels of one image, drawn by turns: a draft of several is read in one step; what of it is what the pixels' own
    numbers draw stands, and so does the pixel behind it.
    """

    @abstractmethod
    def learn(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the (W, K) logits that follow the tokens of ``following``, at first the (1, K) ones of the context.

        Returns the pixels that stand, 1 to W, int64, and their log-probabilities, float32; good until the next call.
        """

    @abstractmethod
    def following(self) -> Tensor:
        """The (W,) int64 tokens to read next: the last pixel that stands, and a draft of those behind it."""


class Decoder(ABC):
    """What generation asks of a decoder. It holds the state of ``batch_size`` images.

    Args:
        model: The model; in eval mode.
        batch_size: Images decoded together; ``fork`` multiplies it.
        capacity: Positions that will be read at most, ``n_positions`` or fewer.
        dtype: ``None`` for the model's, or another that the decoder offers.

    Raises:
        BackendUnavailableError: The model, or this machine, is not covered; the message says why.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.

    Attributes:
        name: ``"reference"``, ``"cpu"`` or ``"cuda"``.
        reason: Why it is no faster one, where one was looked for.
        dtype: What it computes in, such as ``"float32"``, ``"int8"`` or ``"fp8_cache"``.
    """

    name: str
    reason: str | None = None
    model: Model
    batch_size: int
    capacity: int
    dtype: str
    _forked: bool
    # (B, T) int64 tokens and (B, T) float32 log-probabilities of all draws from the first on, which may be yet to come,
    # where they are written by the device into the decoder's own memory; good until the next ``start``.
    history: tuple[Tensor, Tensor] | None = None
    _next: Tensor | None = None  # what ``draw`` drew since the last ``start``, ``step`` or ``fork``

    def __init__(self, model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> None:
        self.start(model, batch_size, capacity, dtype)

    def _start(self, model: Model, batch_size: int, capacity: int, dtype: str | None, reason: str | None) -> None:
        """What every ``start`` begins with; ``reason`` says why the decoder does not serve the model."""
        if not 1 <= capacity <= model.config.n_positions:
            want = f"1..{model.config.n_positions}, the model's n_positions"
            raise ValueError(f"decoder: capacity is {capacity}; want {want}")
        if reason is not None:
            raise backend.BackendUnavailableError(f"decoder: {reason}")
        self.model, self.batch_size, self.capacity = model, batch_size, capacity
        self.dtype = dtype or dtype_name(model.dtype)
        self._forked, self._next, self.history = False, None, None

    def _check_room(self, end: int) -> None:
        if end > self.capacity:
            raise ValueError(f"decoder: {end} positions do not fit into capacity={self.capacity}")

    @abstractmethod
    def start(self, model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> None:
        """Begins anew, with arguments as of the class, on the weights as they are. What was made for images before, and
        captured, serves again where the sizes are the same.
        """

    def rest(self) -> int:
        """Lets go of the model and of the images until the next ``start``; returns the bytes of what is kept for it, 0
        where there is nothing that a new decoder would not have as soon.
        """
        return 0

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """Reads (B, T) int64 tokens, SOS first; returns the (B, vocab_size - 1) logits of the next position."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Reads (B,) int64 tokens; returns the (B, vocab_size - 1) logits of the next position."""

    @abstractmethod
    def fork(self, n: int) -> None:
        """Continues each of the B images n times: from here on there are B n, the n of the first one first.

        They share what has been read so far; it cannot be taken back. The logits that came last are those of all n.

        Raises:
            ValueError: ``n`` is not a positive integer, nothing has been read, or it was forked before.
        """

    def draw(
        self,
        logits: Tensor,
        uniform: Numbers,
        streams: tuple[int, Tensor] | None = None,
        sampling: Sampling = PLAIN,
        *,
        as_they_came: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draws the tokens that follow, which ``step_drawn`` reads.

        Args:
            logits: (B, K) of the next position, from ``prefill``, ``step`` or ``step_drawn``, or their first columns.
            uniform: (B,) float32 in [0, 1), or what makes them when it is called.
            streams: What ``uniform`` is made of, where it is: a seed and (B,) int64 numbers of streams, as
                ``ops.sample_next`` takes them, the token's index being the tokens read so far less SOS. A decoder may
                make the numbers by itself, on its device, and leave ``uniform`` alone.
            sampling: How they are drawn.
            as_they_came: The logits are those that came last, or their first columns, and nobody has written to them:
                a decoder may have drawn of them already.

        Returns:
            (B,) int64 tokens, and their (B,) float32 log-probabilities under the logits as they are.
        """
        tokens, logprobs, _ = ops.draw_scored(logits, uniform if isinstance(uniform, Tensor) else uniform(), sampling)
        self._next = tokens
        return tokens, logprobs

    def step_drawn(self) -> Tensor:
        """``step`` of the tokens that ``draw`` has drawn. The logits may be in memory that the next step writes to.

        Raises:
            ValueError: Nothing was drawn since the last start, step or fork.
        """
        tokens, self._next = self._next, None
        if tokens is None:
            raise ValueError("decoder: nothing was drawn since the last step; call draw first")
        return self.step(tokens)

    @property
    def why_not_rows(self) -> str | None:
        """Why ``step_rows`` is not asked to verify drafts; ``None`` where its logits are those of steps, bit for bit,
        and come sooner.
        """
        return f"the {self.name} decoder reads one position of an image at a time"

    def step_rows(self, tokens: Tensor) -> Tensor:
        """Reads (W,) int64 tokens of the only image, one position after the other; returns (W, vocab_size - 1), the
        logits that follow each.

        Raises:
            BackendUnavailableError: This decoder has no such step.
            ValueError: Several images, no token, or more than there is room for.
        """
        raise backend.BackendUnavailableError(f"decoder: {self.why_not_rows}")

    def rewind(self, count: int) -> None:
        """Forgets the last ``count`` positions, of those that ``step_rows`` has read last, and what was drawn.

        Raises:
            BackendUnavailableError: This decoder has no such step.
            ValueError: More than these.
        """
        raise backend.BackendUnavailableError(f"decoder: {self.why_not_rows}")

    def drafts(self, context: Tensor, numbers: Tensor, known: Tensor | None, sampling: Sampling, width: int) -> Drafts:
        """Draws the only image with guesses of its next pixels, which ``step_rows`` reads.

        Args:
            context: (1, T_0) int64, which was read; the first token is SOS, or a class.
            numbers: (1, T) float32 in [0, 1), of the pixels to draw.
            known: (1, T) int64: tokens that are given, below 0 where one is drawn; ``None`` where all are.
            sampling: How they are drawn.
            width: Pixels of a row of the image, by whose neighbours they are guessed.

        Raises:
            BackendUnavailableError: This decoder has no such step.
        """
        raise backend.BackendUnavailableError(f"decoder: {self.why_not_rows}")

    def _check_rows(self, tokens: Tensor) -> None:
        wrong = tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype != torch.int64
        if self.batch_size != 1 or wrong or tokens.device.type != "cpu":
            got = f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device} of {self.batch_size} images"
            raise ValueError(f"decoder: tokens is {got}; want (W,) int64 of one image on the CPU, W >= 1")

    @staticmethod
    def position_bytes(model: Model, dtype: str | None) -> PositionBytes:
        """What a position of a layer takes."""
        return PositionBytes(2 * model.config.n_embd * cache_dtype(model).itemsize, None)


def cache_dtype(model: Model) -> torch.dtype:
    """One that holds the keys without loss: that of the weights that make them, and what autocast makes of it."""
    attention: Any = model.transformer.h[0].attn
    dtype, kind = attention.c_attn.weight.dtype, model.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.promote_types(dtype, torch.get_autocast_dtype(kind))
    return dtype


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
        others = ", ".join(map(repr, DTYPES[1:-1]))
        raise ValueError(f"decoder: dtype is {dtype!r}; want None, which is the model's, {others} or {DTYPES[-1]!r}")
