"""Generation: from a context and a source of uniform numbers to tokens. ``pipeline.py`` makes images of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.draws import Sampling
from igpt_fast.engines.choice import keep, make_decoder
from igpt_fast.engines.decoder import Decoder, check_dtype
from igpt_fast.engines.network import Model
from igpt_fast.locks import Lock
from igpt_fast.sampling.rules import Guidance, RandomStreams
from igpt_fast.sampling.speculation import speculating

StepCallback = Callable[[int, Tensor], None]


@dataclass
class Drawn:
    """Tokens and their log-probabilities, of drawn and known positions alike."""

    tokens: Tensor  # (B, T) int64
    # (B, T) float32, ``log p(token | what stands before it)`` in nats under the model itself, given the context: before
    # guidance, temperature, top-k, top-p and min-p.
    logprobs: Tensor
    first: int = 0  # number of the first row, for errors
    each: int = 1  # rows of an image, for errors
    engine: str | None = None  # name of the decoder; None where there was nothing to decode
    reason: str | None = None  # why it is no faster one, where it is none
    known: Tensor | None = None  # (B, T) int64 as of ``decode``
    given: int = 0  # pixels that stand before the first position
    steps: int = 0  # of the network for these tokens, where drafts were verified; else 0

    def check(self, begin: int, end: int) -> None:
        """Whether positions begin .. end - 1 come from logits that are numbers; waits for the device.

        Where a logit is NaN or infinite, so is the log-probability of what is drawn. Minus infinity is a number here,
        as of a colour that a hook forbids: it is never drawn, and where it is given its likelihood is 0.

        Raises:
            FloatingPointError: One does not; the message has the first image and its first such position.
        """
        logprobs = self.logprobs[:, begin:end]
        wrong = ~logprobs.isfinite()
        if self.known is not None:
            wrong &= logprobs.isnan() | (self.known[:, begin:end] < 0)
        if bool(wrong.any()):
            row, t = wrong.nonzero()[0].tolist()
            where = f"image {(self.first + row) // self.each}, position {self.given + begin + t}"
            what = "the model's weights, or what it computes in its dtype, hold NaN or infinity"
            raise FloatingPointError(f"the logits are not finite ({where}): {what}")


def decode(
    model: Model,
    context: Tensor,
    uniforms: Tensor | RandomStreams,
    sampling: Sampling,
    callback: StepCallback | None = None,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    first: int = 0,
    speculate: bool = True,
) -> Drawn:
    """Continues every row of a context n times, by as many colours as there are uniform numbers.

    Args:
        model: The model.
        context: (B, T_0) int64 on the model's device; SOS or a class first.
        uniforms: (B n, T) float32 in [0, 1) on the model's device, one number a draw, or what they are made of, which
            an engine that draws by itself does; the n continuations of the first row come first. They share what is
            computed of the context.
        sampling: How tokens are drawn.
        callback: Called after every position with its number, counted from 0, and its (B n,) tokens, its own to keep.
        dtype: ``None`` for the model's, ``"int8"``, ``"fp8_values"`` or ``"fp8_cache"``; see ``engines.choice``.
        known: (B n, T) int64: tokens that are given, which are read in place of drawn ones; -1 where one is drawn.
        guidance: Draws under guidance, which doubles the work; ``None`` and a scale of 1 cost nothing.
        first: Number of the first row, for errors.
        speculate: Whether drafts may be verified where that is exact; see ``speculation``.

    Returns:
        The T new tokens of every continuation, (B n, T).

    Raises:
        BackendUnavailableError: Nothing here decodes this model in ``dtype``.
        FloatingPointError: The model's logits are not finite; see ``Drawn.check``.
        ValueError: An unknown ``dtype``, or a context of the guidance of another shape.
    """
    rows, count = uniforms.shape
    drawn = blank(rows, count, context.device, first)
    width = None if speculate else 0
    steps = decoding(drawn, model, context, uniforms, sampling, dtype, known=known, guidance=guidance, width=width)
    with closing(steps):  # also where somebody keeps an error of the callback
        for t in steps:
            if callback is not None:
                callback(t, drawn.tokens[:, t].clone())  # else of memory that a decoder keeps for the next images
    return drawn


def blank(rows: int, count: int, device: torch.device, first: int = 0, each: int = 1) -> Drawn:
    """Room for (rows, count) tokens."""
    shape = rows, count
    tokens, logprobs = (torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    return Drawn(tokens, logprobs, first, each)


@torch.no_grad()
def decoding(
    drawn: Drawn,
    model: Model,
    context: Tensor,
    uniforms: Tensor | RandomStreams,
    sampling: Sampling,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    width: int | None = None,
) -> Generator[int, None, None]:
    """``decode`` position by position: yields t when column t of ``drawn``, which was ``blank``, is filled.

    ``width``: pixels of a row, by which drafts are made where they are verified; ``None`` those of a square image, 0
    verifies none. At the end all are checked. Who looks at them before may have them checked before (``Drawn.check``).
    """
    check_dtype(dtype)
    batch, steps = uniforms.shape
    if guidance is not None and guidance.context.shape != context.shape:
        shapes = f"{tuple(guidance.context.shape)}, the guided one {tuple(context.shape)}"
        raise ValueError(f"the context of the guidance has shape {shapes}; want one shape")
    if steps == 0 or batch == 0:
        return
    copies = batch // context.shape[0]
    drawn.known, drawn.given = known, context.shape[1] - 1
    guided = guidance is not None and guidance.scale != 1.0
    if guidance is not None and guided:
        context = torch.cat([context, guidance.context])
    with _evaluating(model):
        decoder = make_decoder(model, context.shape[0], context.shape[1] + steps - 1, dtype)
        drawn.engine, drawn.reason = decoder.name, decoder.reason
        logits = decoder.prefill(context).repeat_interleave(copies, dim=0)
        decoder.fork(copies)
        width = max(1, math.isqrt(model.config.n_positions)) if width is None else width
        try:
            if width > 0 and batch == len(context) == 1 and decoder.why_not_rows is None:
                numbers = _columns(uniforms, context.device)(slice(None))
                logits = logits[:, : model.config.n_colours]
                t, room = 0, (drawn.tokens, drawn.logprobs)
                for kept in speculating(*room, decoder, logits, context, numbers, sampling, known, width):
                    drawn.steps += 1
                    yield from range(t, t + kept)
                    t += kept
            else:
                scale = guidance.scale if guidance is not None else 1.0
                yield from _stepping(drawn, decoder, logits, uniforms, sampling, known, scale, guided)
        except GeneratorExit:  # nobody asks for more
            _leave(decoder, drawn)
            raise
        _leave(decoder, drawn)
    drawn.check(0, steps)


def _stepping(
    drawn: Drawn,
    decoder: Decoder,
    logits: Tensor,
    uniforms: Tensor | RandomStreams,
    sampling: Sampling,
    known: Tensor | None,
    scale: float,
    guided: bool,
) -> Generator[int, None, None]:
    """The loop of ``decoding``, a step for each position; ``logits`` are those that follow the context."""
    steps, device, colours = uniforms.shape[1], logits.device, decoder.model.config.n_colours
    given = None if known is None else known >= 0
    some = [False] * steps if given is None else given.any(0).tolist()
    free = known is None and not guided
    source = None
    if isinstance(uniforms, RandomStreams):
        source = uniforms.seed or 0, uniforms.numbers.to(device)
    numbers = _columns(uniforms, device)
    for t in range(steps):
        logits = logits[:, :colours]
        if free:
            token, logprob = decoder.draw(logits, partial(numbers, t), source, sampling, as_they_came=True)
        else:
            column = known[:, t] if known is not None and some[t] else None
            token, logprob = _constrained(logits, numbers(t), sampling, scale, column)
        if decoder.history is not None:
            drawn.tokens, drawn.logprobs = decoder.history
        else:
            drawn.tokens[:, t], drawn.logprobs[:, t] = token, logprob
        drawn.reason = decoder.reason  # something may have failed meanwhile
        yield t
        if t + 1 < steps:
            logits = decoder.step_drawn() if free else decoder.step(token.repeat(2) if guided else token)


def _leave(decoder: Decoder, drawn: Drawn) -> None:
    if decoder.history is not None:  # whose memory is for the next images
        drawn.tokens, drawn.logprobs = drawn.tokens.clone(), drawn.logprobs.clone()
    keep(decoder)


def _columns(uniforms: Tensor | RandomStreams, device: torch.device) -> Callable[[int | slice], Tensor]:
    """The (B n,) numbers of a position; all are made when the first are asked for."""

    @functools.cache
    def whole() -> Tensor:
        return uniforms if isinstance(uniforms, Tensor) else uniforms.made(device)

    return lambda t: whole()[:, t]


def _constrained(
    logits: Tensor, numbers: Tensor, sampling: Sampling, scale: float, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``Decoder.draw`` where tokens are given, or under guidance.

    Args:
        logits: (B, K); under guidance (2 B, K), those of the other context last.
        numbers: (B,) uniform numbers.
        sampling: How the others are drawn.
        scale: Of the guidance; 1 is none.
        known: (B,) tokens that are given, -1 where one is drawn; ``None`` where all are.
    """
    if scale == 1.0:
        token, logprob, _ = ops.draw_scored(logits, numbers, sampling, known)
        return token, logprob
    rows = len(logits) // 2
    logprobs = torch.log_softmax(logits[:rows].float(), dim=-1)
    without = torch.log_softmax(logits[rows:].float(), dim=-1)
    logits = (without + scale * (logprobs - without)).masked_fill(logprobs == -torch.inf, -torch.inf)
    # That the other context's are not finite shows where they are looked for.
    logprobs = logprobs.masked_fill(logits.isnan().any(dim=1, keepdim=True), torch.nan)
    token = ops.draw(logits, numbers, sampling)
    if known is not None:
        token = torch.where(known >= 0, known, token)
    return token, logprobs.gather(1, token[:, None])[:, 0]


# Model -> how many decode with it now that it must be put back into training mode for, and which of its modules were in
# that before the first; a list, which changes at once.
_users: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_users_lock = Lock()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off for the length of a block; on again after the last of the threads that decode with the model."""
    users, counts = _users.setdefault(model, [0, ()]), False
    try:
        with _users_lock:
            if counts := model.training or users[0] > 0:
                if not users[0]:
                    users[1] = [module.training for module in model.modules()]
                users[0] += 1
                model.eval()
        yield
    finally:
        if counts:
            with _users_lock:
                users[0] -= 1
                for module, training in zip(model.modules(), () if users[0] else users[1], strict=False):
                    if module.training != training:
                        module.train(training)
