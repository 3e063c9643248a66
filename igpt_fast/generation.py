"""Generation: from a context and a source of uniform numbers to tokens. ``pipeline.py`` makes images of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import ops, reference
from igpt_fast.decoders import CudaDecoder, check_dtype, make_decoder

if TYPE_CHECKING:
    from igpt_fast.model import ImageGPTForCausalImageModeling

StepCallback = Callable[[int, Tensor], None]
MAX_SCALE = 1000.0  # of guidance; its logits stay far within float32


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: temperature, then top-k, top-p and min-p, each among what is left.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw among the k most likely tokens only; ``None`` for all.
        top_p: Draw among the most likely tokens whose probability reaches it; ``None`` for all.
        min_p: Draw among the tokens at least ``min_p`` times as likely as the likeliest one; ``None`` for all.

    Raises:
        ValueError: A setting out of its range.

    Source: see ``reference.sample``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        ops.check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: tokens are drawn from what a context changes, amplified.

    With the log-probabilities of the next token after the context, c, and after another one, u, the logits that are
    drawn from are ``u + scale * (c - u)``; temperature and filters follow.

    Args:
        scale: In 0..1000; 1 is no guidance, 0 the other context alone.
        context: (B, T_0) int64, on the model's device, as long as the guided ones: without class, as a rule.

    Source: "Classifier-Free Diffusion Guidance" (Ho & Salimans, 2022), where w = scale - 1; for tokens, "Stay on topic
    with Classifier-Free Guidance" (Sanchez et al., 2023) and transformers' guidance_scale.
    """

    scale: float
    context: Tensor

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)


@dataclass(frozen=True)
class Streams:
    """Where the uniform numbers of a batch come from, for a decoder that makes them on its device.

    Args:
        seed: In 0..2^64-1.
        numbers: (B n,) int64: of each image's stream. A token's number is that of its index in the image; the context
            begins at its first pixel, behind SOS or a class.
    """

    seed: int
    numbers: Tensor


@dataclass
class Drawn:
    """Tokens and their log-probabilities, of drawn and known positions alike.

    Args:
        tokens: (B, T) int64.
        logprobs: (B, T) float32, ``log p(token | what stands before it)`` in nats under the model itself, given the
            context: before guidance, temperature, top-k, top-p and min-p.
        engine: Name of the decoder; ``None`` where there was nothing to decode.
    """

    tokens: Tensor
    logprobs: Tensor
    engine: str | None = None


def check_seed(seed: int) -> int:
    """The seed.

    Raises:
        ValueError: Not an integer in 0..2^64-1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed!r}; want an integer in 0..2^64-1")
    return seed


def check_count(name: str, value: int, most: int = 1 << 30, least: int = 1) -> int:
    """The value.

    Raises:
        ValueError: Not an integer in least..most; the message says ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; want an integer in {least}..{most}")
    return value


def check_scale(name: str, value: float) -> float:
    """The scale of a guidance.

    Raises:
        ValueError: Not a number in 0..1000; the message says ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= MAX_SCALE:
        raise ValueError(f"{name} is {value!r}; want a number in 0..{MAX_SCALE:.0f}")
    return value


def stream_uniforms(seed: int, streams: Tensor, first: int, count: int, device: torch.device) -> Tensor:
    """(N, count) uniform numbers of the images' own streams; see ``reference.uniform``."""
    return reference.uniform(check_seed(seed), streams.to("cpu", torch.int64), first, count).to(device)


def decode(
    model: ImageGPTForCausalImageModeling,
    context: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    callback: StepCallback | None = None,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    streams: Streams | None = None,
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
    model: ImageGPTForCausalImageModeling,
    context: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    dtype: str | None = None,
    *,
    known: Tensor | None = None,
    guidance: Guidance | None = None,
    streams: Streams | None = None,
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
        drawn.engine = decoder.name
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
                    token = torch.where(given[:, t], token, _draw(logits, uniforms[:, t], sampling))
            else:
                token = _draw(logits, uniforms[:, t], sampling)
            drawn.tokens[:, t] = token
            drawn.logprobs[:, t] = logprobs.gather(1, token[:, None])[:, 0]
            yield t
            if t + 1 < steps:
                logits = decoder.step(token.repeat(2) if guided else token)


def _drawn_by(
    decoder: CudaDecoder, drawn: Drawn, logits: Tensor, streams: Streams, sampling: Sampling
) -> Iterator[int]:
    """The loop of a decoder that draws on its device: numbers, draw and the next input are one kernel."""
    settings, (steps, colours) = asdict(sampling), (drawn.tokens.shape[1], logits.shape[1])
    numbers = streams.numbers.to(logits.device)
    for t in range(steps):
        drawn.tokens[:, t], drawn.logprobs[:, t] = decoder.draw(logits, streams.seed, numbers, **settings)
        yield t
        if t + 1 < steps:
            logits = decoder.step_drawn()[:, :colours]


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    return ops.sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


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
