"""Generation: from a context and a source of uniform numbers to tokens. ``pipeline.py`` makes images of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.draws import Sampling
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cuda.decoder import CudaDecoder
from igpt_fast.engines.decoder import check_dtype
from igpt_fast.engines.network import Model
from igpt_fast.sampling.rules import Guidance, RandomStreams

StepCallback = Callable[[int, Tensor], None]


@dataclass
class Drawn:
    """Tokens and their log-probabilities, of drawn and known positions alike.

    Args:
        tokens: (B, T) int64.
        logprobs: (B, T) float32, ``log p(token | what stands before it)`` in nats under the model itself, given the
            context: before guidance, temperature, top-k, top-p and min-p.
        engine: Name of the decoder; ``None`` where there was nothing to decode.
        reason: Why it is no faster one, where it is none.
    """

    tokens: Tensor
    logprobs: Tensor
    engine: str | None = None
    reason: str | None = None


def decode(
    model: Model,
    context: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    callback: StepCallback | None = None,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    streams: RandomStreams | None = None,
) -> Drawn:
    """Continues every row of a context n times, by as many colours as there are uniform numbers.

    Args:
        model: The model.
        context: (B, T_0) int64 on the model's device; SOS or a class first.
        uniforms: (B n, T) float32 in [0, 1) on the model's device, one number a draw; the n continuations of the
            first row come first. They share what is computed of the context.
        sampling: How tokens are drawn.
        callback: Called after every position with its number, counted from 0, and its (B n,) tokens.
        dtype: ``None`` for the model's, ``"int8"`` or ``"fp8_values"``; see ``decoders.make_decoder``.
        known: (B n, T) int64: tokens that are given, which are read in place of drawn ones; -1 where one is drawn.
        guidance: Draws under guidance, which doubles the work; ``None`` and a scale of 1 cost nothing.
        streams: What ``uniforms`` were made of, where they were: an engine that draws by itself then does.

    Returns:
        The T new tokens of every continuation, (B n, T).

    Raises:
        BackendUnavailableError: Nothing here decodes this model in ``dtype``.
        ValueError: An unknown ``dtype``, or a context of the guidance of another shape.
    """
    drawn = blank(uniforms)
    positions = decoding(
        drawn, model, context, uniforms, sampling, dtype, known=known, guidance=guidance, streams=streams
    )
    for t in positions:
        if callback is not None:
            callback(t, drawn.tokens[:, t])
    return drawn


def blank(uniforms: Tensor) -> Drawn:
    """Room for as many tokens as there are numbers."""
    shape, device = uniforms.shape, uniforms.device
    return Drawn(torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device))


@torch.no_grad()
def decoding(
    drawn: Drawn,
    model: Model,
    context: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    streams: RandomStreams | None = None,
) -> Iterator[int]:
    """``decode`` position by position: yields t when column t of ``drawn``, which is ``blank(uniforms)``, is filled."""
    check_dtype(dtype)
    batch, steps = uniforms.shape
    copies = batch // context.shape[0] if batch else 1
    if guidance is not None and guidance.context.shape != context.shape:
        shapes = f"{tuple(guidance.context.shape)}, the guided one {tuple(context.shape)}"
        raise ValueError(f"the context of the guidance has shape {shapes}; want one shape")
    if steps == 0 or batch == 0:
        return
    guided = guidance is not None and guidance.scale != 1.0
    if guidance is not None and guided:
        context = torch.cat([context, guidance.context])
    given = None if known is None else known >= 0
    some, every = ([False] * steps,) * 2 if given is None else (given.any(0).tolist(), given.all(0).tolist())
    colours = model.config.n_colours
    with _evaluating(model):
        decoder = make_decoder(model, context.shape[0], context.shape[1] + steps - 1, dtype)
        drawn.engine, drawn.reason = decoder.name, decoder.reason
        logits = decoder.prefill(context).repeat_interleave(copies, dim=0)
        decoder.fork(copies)
        if isinstance(decoder, CudaDecoder) and streams is not None and known is None and not guided:
            yield from _drawn_by(decoder, drawn, logits[:, :colours], streams, sampling)
            return
        for t in range(steps):
            logits = logits[:, :colours]
            logprobs = torch.log_softmax(logits[:batch].float(), dim=-1)
            if guidance is not None and guided and not every[t]:
                without = torch.log_softmax(logits[batch:].float(), dim=-1)
                logits = without + guidance.scale * (logprobs - without)
            if known is not None and given is not None and some[t]:
                token = known[:, t]
                if not every[t]:
                    token = torch.where(given[:, t], token, ops.draw(logits, uniforms[:, t], sampling))
            else:
                token = ops.draw(logits, uniforms[:, t], sampling)
            drawn.tokens[:, t] = token
            drawn.logprobs[:, t] = logprobs.gather(1, token[:, None])[:, 0]
            yield t
            if t + 1 < steps:
                logits = decoder.step(token.repeat(2) if guided else token)


def _drawn_by(
    decoder: CudaDecoder, drawn: Drawn, logits: Tensor, streams: RandomStreams, sampling: Sampling
) -> Iterator[int]:
    """The loop of a decoder that draws on its device: numbers, draw and the next input are one kernel."""
    steps, colours = drawn.tokens.shape[1], logits.shape[1]
    numbers = streams.numbers.to(logits.device)
    for t in range(steps):
        drawn.tokens[:, t], drawn.logprobs[:, t] = decoder.draw(logits, streams.seed, numbers, sampling)
        yield t
        if t + 1 < steps:
            logits = decoder.step_drawn()[:, :colours]


# Model -> how many decode with it now that it must be put back into training mode for; a list, which changes at once.
_users: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_users_lock = RLock()  # the collector may end an abandoned decoding, which counts, inside of a block


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for the length of a block; on again after the last of the threads that decode with the model."""
    users, counts = _users.setdefault(model, [0]), False
    try:
        with _users_lock:
            if counts := model.training or users[0] > 0:
                users[0] += 1
                model.eval()
        yield
    finally:
        if counts:
            with _users_lock:
                users[0] -= 1
                if not users[0]:
                    model.train()
