"""The decode step of the CUDA kernels: a static cache, CUDA graphs, tokens drawn on the device.

The step itself, and how it is captured: step.py. Nothing here waits for the device but a capture, which a step has
at its first position and where attention is launched in another way.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from igpt_fast import backend
from igpt_fast.draws import PLAIN, Sampling
from igpt_fast.engines.cache import StaticCache
from igpt_fast.engines.cuda.capture import Order, failed, numerics
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.cuda.step import FUSED_DTYPES, CudaStep
from igpt_fast.engines.decoder import SCALED, Decoder, Numbers, PositionBytes, cache_dtype, check_dtype, check_fork
from igpt_fast.engines.network import Model, Network, why_not_head, why_not_modules
from igpt_fast.ops.activation import KERNELS
from igpt_fast.ops.attention_decode import dequantize_e4m3
from igpt_fast.ops.dispatch import HEAD_DIMS

MOST_COLOURS = 1024  # that the kernel of ops.sample_step takes
KEPT_SHARE = 8  # a step whose caches take more of the device's memory than one part of so many is not kept


class CudaDecoder(Decoder):
    """The CUDA kernels' decode step, captured in CUDA graphs.

    Few images in bfloat16 or float16: five kernels a layer. More, and float32: torch's products, the rest fused around
    them. A primer is read by the model's forward pass. Continuations that ``fork`` makes share its keys and
    values in bfloat16 and float16; in float32 each has a copy. Weights are read where the model has them: a change in
    place reaches the next step, another tensor in a parameter's place does not. An image's logits are equal up to
    rounding between batch sizes, which choose the kernels and the order of their sums.

    ``"fp8_values"``: as in the model's dtype, bfloat16 or float16, but that values are cached in 8 bits, float8_e4m3fn
    with a scale for each image, head and position; ``"fp8_cache"``: and keys so as well. A head's value or key with a
    NaN or an infinity becomes NaN as a whole. The forward pass reads a primer with its own keys and values, which are
    rounded as they come into the cache; those that continuations share stay in the model's dtype.

    Args:
        model, batch_size, capacity, dtype: As of ``Decoder``.
        options: How steps are computed. What fails is left out from then on, and ``reason`` says so.

    Raises:
        BackendUnavailableError, ValueError: As ``Decoder``.
    """

    name = "cuda"

    def __init__(
        self,
        model: Model,
        batch_size: int,
        capacity: int,
        dtype: str | None = None,
        options: CudaOptions = CudaOptions(),  # noqa: B008 - frozen
    ) -> None:
        self.options = options if model.device.type == "cuda" else replace(options, graphs=False)
        self._order = Order()
        self._spare: CudaStep | None = None  # of images before, and what it is for
        self._key: Any = None
        super().__init__(model, batch_size, capacity, dtype)

    def start(self, model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> None:
        """See ``Decoder.start``. Where sizes, settings and the place of the weights are as before, the graphs of the
        images before are those of the next ones; else they go with their memory.
        """
        self._start(model, batch_size, capacity, dtype, why_not_cuda(model, dtype))
        self._network = Network(model)
        # Why its options are no longer those that were asked for.
        left_out, reason = failed.get(model.device, ({}, None))
        self._failed: str | None = reason
        self.options = replace(self.options, **left_out)
        if self._spare is not None and not self._may_serve():
            self._spare = None  # before the images' memory is taken
        self._position = 0  # tokens read
        self._primer: tuple[Tensor, Tensor] | None = None  # what was read before the first step
        self._step: CudaStep | None = None
        self._own = 0  # position in its caches
        self._drawn = False  # whether the step's input is what ``draw`` drew
        self._first = 0  # tokens read before the first draw of ``history``
        self._how: tuple[int, Sampling, int] = (0, PLAIN, 0)  # of the last draw: seed, sampling, colours
        self._streams: Tensor | None = None  # and the numbers of its streams
        self._ahead = False  # whether the step has drawn of its logits already, as ``_how`` says

    def rest(self) -> int:
        """See ``Decoder.rest``. A step with large caches is not kept: capturing is little beside its work."""
        step, self._spare = self._step or self._spare, None
        self._step = self._primer = self._next = self._streams = self.history = None
        del self.model, self._network  # the weights may go, or be others in the same place
        if step is None or step.bytes > most_kept(step.x.device):
            return 0
        del step.network
        self._spare = step
        return step.bytes

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] == 0:
            raise ValueError(f"decoder: tokens is {tuple(tokens.shape)}; want ({self.batch_size}, T), T >= 1")
        self._check_room(self._position + tokens.shape[1])
        if self._position == 0:
            return self._read_primer(tokens)
        for column in tokens.unbind(1):
            logits = self.step(column)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        device = self._network.device
        if tokens.shape != (self.batch_size,) or tokens.dtype != torch.int64 or tokens.device != device:
            got = f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
            raise ValueError(f"decoder: tokens is {got}; want ({self.batch_size},) int64 on {device}")
        self._check_room(self._position + 1)
        step, net = self._begin(), self._network
        torch.index_select(net.wte, 0, tokens, out=step.x)
        step.x += net.wpe[self._position]
        return self._advance(step).clone()

    def draw(
        self,
        logits: Tensor,
        uniform: Numbers,
        streams: tuple[int, Tensor] | None = None,
        sampling: Sampling = PLAIN,
        *,
        as_they_came: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``Decoder.draw``. Of streams, ``step_drawn`` has drawn these already, if its logits are as they came, and
        streams and sampling are those of the draw before; else numbers, draw and the next step's input are one kernel.
        Either way there is no wait, and no copy by the host but of new settings. What is returned is of ``history``.

        Raises:
            ValueError: Nothing was read, or an argument out of its range.
        """
        if self._position == 0:
            raise ValueError("decoder: nothing has been read after which to draw; call prefill first")
        ahead, self._ahead = self._ahead and as_they_came, False
        self._drawn, self._next = False, None
        alone = self._step is None and self._position >= self.capacity  # the only token, which no step reads
        if streams is None or alone:
            return super().draw(logits, uniform, None, sampling)
        step, (seed, numbers) = self._begin(), streams
        how = seed, sampling, logits.shape[1]
        if self.history is None:
            self._first = self._position
            most = self.capacity - self._first + 1
            self.history = step.draws.tokens[:, :most], step.draws.logprobs[:, :most]
        if not ahead or how != self._how or numbers is not self._streams:
            step.draws.set(seed, numbers, sampling, self._position - self._own, self._first - 1)
            step.draw(logits)
            self._how, self._streams = how, numbers
        self._drawn = True
        return self.history[0][:, self._position - self._first], self.history[1][:, self._position - self._first]

    def step_drawn(self) -> Tensor:
        """See ``Decoder.step_drawn``."""
        if not self._drawn:
            return super().step_drawn()
        self._check_room(self._position + 1)
        colours = self._how[2]
        if not self.options.drawing or colours > MOST_COLOURS:
            colours = 0
        logits = self._advance(self._begin(), colours)
        self._ahead = colours > 0
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. In bfloat16 and float16 the primer stays in memory once, and is read once a step."""
        check_fork(n, self._position, self._forked)
        self._forked = True
        if n > 1 and self._step is not None:  # what it has read is the primer now
            self._order.follow(self._network.device, self._held)
            step, read = self._step, slice(self._position)
            keys, values = (
                cache[..., read, :] if scales is None else dequantize_e4m3(cache, scales, step.x.dtype)[..., read, :]
                for cache, scales in zip((step.keys, step.values), step.scales, strict=True)
            )
            self._primer = keys, values
            self._step = None
        self._drawn, self._next, self._ahead, self.history = False, None, False, None
        self.batch_size *= n

    def _read_primer(self, tokens: Tensor) -> Tensor:
        net, (batch, length) = self._network, tokens.shape
        self._order.follow(net.device, self._held)
        sizes = len(net.layers), batch, net.heads, length, net.head_dim
        with torch.inference_mode(False):  # a step may have it, which serves other images outside of the mode
            cache = StaticCache(*sizes, dtype=net.dtype, device=net.device)
        with torch.no_grad():
            hidden = self.model.transformer(tokens, past_key_values=cache, use_cache=True).last_hidden_state
            logits = self.model.lm_head(hidden[:, -1])
        self._primer, self._position = cache.buffers, length
        return logits

    def _begin(self) -> CudaStep:
        """The step, which is made when it is known how many images go on from the primer."""
        self._order.follow(self._network.device, self._held)
        if self._step is not None:
            return self._step
        if self._primer is None:
            raise ValueError("decoder: nothing has been read; call prefill first")
        net, primer = self._network, self._primer
        shares = self.batch_size > primer[0].shape[1] and net.dtype in FUSED_DTYPES
        positions = self.capacity - (self._position if shares else 0)
        shape = (self.batch_size, positions, primer[0].shape if shares else None)
        key = (*self._settings(), *shape)
        step, self._spare = self._spare if key == self._key else None, None
        if step is None:
            step = CudaStep(net, self.batch_size, positions, primer if shares else None, self.dtype, self.options)
        step.network, self._key = net, key
        step.start(primer)
        self._step, self._primer, self._own = step, None, 0 if shares else self._position
        return step

    def _settings(self) -> tuple[Any, ...]:
        """What a step is for, besides its sizes."""
        return self.options, self.dtype, self._network.key(), numerics()

    def _may_serve(self) -> bool:
        """Whether the spare step may be that of the next images, whose primer and continuations are yet to come."""
        *settings, rows, positions, primer = self._key
        images = rows if primer is None else primer[1]
        capacity = positions + (0 if primer is None else primer[3])
        return tuple(settings) == self._settings() and capacity == self.capacity and images % self.batch_size == 0

    def _held(self) -> list[Tensor]:
        step = self._step or self._spare
        return [*(self._primer or ()), *(() if step is None else step.held())]

    def _advance(self, step: CudaStep, colours: int = 0) -> Tensor:
        logits = step.run(self._own, colours)
        if step.options != self.options and step.reason is not None:  # it failed, and others shall not try it again
            changed = {name: getattr(step.options, name) for name in ("dependent", "graphs")}
            changed = {name: value for name, value in changed.items() if value != getattr(self.options, name)}
            device = self._network.device
            if "memory" not in step.reason and "ALLOC_FAILED" not in step.reason:  # which there may be the next time
                failed[device] = failed.get(device, ({}, ""))[0] | changed, step.reason
            self.options, self._key = step.options, (step.options, *self._key[1:])
        self._failed = step.reason or self._failed
        self.reason = self._failed or self.reason
        self._own += 1
        self._position += 1
        self._drawn, self._next, self._ahead = False, None, False
        return logits

    @staticmethod
    def position_bytes(model: Model, dtype: str | None) -> PositionBytes:
        """See ``Decoder.position_bytes``. What has 8 bits has a scale for each head; a shared primer has 16."""
        config, item = model.config, cache_dtype(model).itemsize
        scaled = sum(SCALED.get(dtype or "", ()))
        own = config.n_embd * (scaled + (2 - scaled) * item) + 4 * config.n_head * scaled
        return PositionBytes(own, 2 * config.n_embd * item if model.dtype in FUSED_DTYPES else None)


def most_kept(device: torch.device) -> int:
    """Bytes of caches that are kept for the next images at most."""
    if device.type != "cuda":
        return sys.maxsize
    return torch.cuda.get_device_properties(device).total_memory // KEPT_SHARE


def why_not_cuda(model: Model, dtype: str | None = None) -> str | None:
    """Why ``CudaDecoder`` cannot serve a model; ``None`` when it can.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    check_dtype(dtype)
    if reason := no_cuda_decoder(model.device):
        return reason
    if dtype is not None and dtype not in SCALED:
        return f"it decodes in the model's dtype or in {' or '.join(map(repr, SCALED))}, not in {dtype!r}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return f"the weights are {', '.join(sorted(map(str, dtypes)))}; want all float32, bfloat16 or float16"
    if dtype is not None and not dtypes <= set(FUSED_DTYPES):
        return f"the weights are float32; want bfloat16 or float16 for {dtype!r}"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "the weights are on several devices"
    config = model.config
    if config.activation_function not in KERNELS:
        return f"activation_function is {config.activation_function!r}; want {', '.join(KERNELS)}"
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim is {config.head_dim}; want {', '.join(map(str, HEAD_DIMS))}"
    if config.n_embd % 8 or config.inner % 8:
        return f"n_embd is {config.n_embd}, n_inner {config.inner}; want multiples of 8"
    return why_not_modules(model) or why_not_head(model)


def no_cuda_decoder(device: torch.device) -> str | None:
    """Why the CUDA kernels' decoder serves no model on a device; ``None`` when it does."""
    if backend.get_backend() not in ("auto", "cuda"):
        return f"the backend {backend.get_backend()!r} is chosen"
    if backend._emulated is not None and device.type == "cpu":
        return None
    return backend.no_kernels("attention_decode", device) if device.type == "cuda" else f"the model is on {device}"
