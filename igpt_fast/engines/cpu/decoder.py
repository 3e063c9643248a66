"""The compiled module's decode step on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.draws import Sampling
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu import weights
from igpt_fast.engines.cpu.weights import packed_weights, why_not_shape
from igpt_fast.engines.decoder import Decoder, Drafts, PositionBytes, check_dtype, check_fork
from igpt_fast.engines.network import Model, why_not_head, why_not_modules


class CpuDecoder(Decoder):
    """The compiled module's decode step: all layers and the head in one call, on packed copies of the weights.

    The weights are packed for a model's first decoder, and again for the first after a change of them; what changes
    them during a decoder's life does not reach it. Activations and logits are float32, whatever the weights are:

    - float32: the model's own numbers.
    - float16: packed wider, in float32, as are keys and values: the numbers of that model in float32.
    - bfloat16: the model's weights; keys and values are rounded to bfloat16. With several images, so are activations
      where they meet weights, on processors that multiply bfloat16.
    - int8: weights rounded to 8 bits with a scale for each output; keys and values with a scale for each position
      and head. The other side of each product keeps 15 bits or more, so the rounding of these is all there is.

    A primer is read by the compiled forward pass (``forward``), however short it is and however many images there are,
    in the model's own dtype (float16 in float32) and from its weights, not the int8 ones. As many threads compute as
    torch is set to. Arguments and errors as of ``Decoder``.
    """

    name = "cpu"

    def start(self, model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> None:
        """See ``Decoder.start``."""
        self._start(model, batch_size, capacity, dtype, why_not_cpu(model, dtype))
        assert backend._C is not None
        packed = packed_weights(model.transformer, model.lm_head.weight, dtype)
        self._decoder = backend._C.Decoder(packed, batch_size, capacity)
        self._rewindable = capacity  # to this position

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] == 0:
            raise ValueError(f"decoder: tokens is {tuple(tokens.shape)}; want ({self.batch_size}, T), T >= 1")
        self._check_room(self._decoder.position + tokens.shape[1])
        if self._decoder.position == 0 and tokens.shape[1] > 1:
            return self._read_primer(tokens)
        for column in tokens.unbind(1):
            logits = self.step(column)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        batch, _, _, colours = self._decoder.sizes
        if tokens.shape != (batch,) or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
            got = f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
            raise ValueError(f"decoder: tokens is {got}; want ({batch},) int64 on the CPU")
        self._check_room(self._decoder.position + 1)
        tokens = tokens.contiguous()
        logits = torch.empty(batch, colours, dtype=torch.float32, device="cpu")
        self._next = None
        self._decoder.step(tokens.data_ptr(), logits.data_ptr(), torch.get_num_threads())
        return logits

    @property
    def why_not_rows(self) -> str | None:
        """See ``Decoder.why_not_rows``. A row of several has a step's bits in float32, and in int8 where the level
        multiplies integers; bfloat16 sums one row in another order than several, or rounds their activations.
        """
        assert backend._C is not None
        if backend._C.cpu_isa() == "generic":
            return "a row costs what a step does at the level 'generic'"
        if self._decoder.rows_are_steps:
            return None
        return f"in {self.dtype} at the level {backend._C.cpu_isa()!r} several rows round otherwise than one"

    def step_rows(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step_rows``."""
        self._check_rows(tokens)
        self._check_room(self._decoder.position + len(tokens))
        tokens, colours = tokens.contiguous(), self._decoder.sizes[3]
        logits = torch.empty(len(tokens), colours, dtype=torch.float32, device="cpu")
        self._next, first = None, self._decoder.position
        self._decoder.step_rows(tokens.data_ptr(), len(tokens), logits.data_ptr(), torch.get_num_threads())
        self._rewindable = first
        return logits

    def rewind(self, count: int) -> None:
        """See ``Decoder.rewind``."""
        position = self._decoder.position
        if not 0 <= count <= max(0, position - self._rewindable):
            raise ValueError(f"decoder: cannot forget {count} of {position} positions; want those of step_rows alone")
        self._next = None
        self._decoder.rewind(position - count)

    def drafts(
        self, context: Tensor, numbers: Tensor, known: Tensor | None, sampling: Sampling, width: int
    ) -> CpuDrafts:
        """See ``Decoder.drafts``."""
        return CpuDrafts(context, numbers, known, sampling, width, self.model.config.n_colours)

    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. The primer's keys and values stay in memory once, and are read once a step."""
        check_fork(n, self._decoder.position, self._forked)
        self._decoder.fork(n, torch.get_num_threads())
        self._forked, self._next = True, None
        self.batch_size *= n

    @staticmethod
    def position_bytes(model: Model, dtype: str | None) -> PositionBytes:
        """See ``Decoder.position_bytes``. In int8 each head has two scales and a sum."""
        config = model.config
        own = Decoder.position_bytes(model, dtype).own * (2 if model.dtype == torch.float16 else 1)
        own = 2 * config.n_embd + 12 * config.n_head if dtype == "int8" else own
        return PositionBytes(own, own)

    def _read_primer(self, tokens: Tensor) -> Tensor:
        """At the speed of a forward pass: the model's keys and values become the cache's."""
        threads = torch.get_num_threads()
        batch, heads, dim, _ = self._decoder.sizes
        body, head = self.model.transformer, self.model.lm_head.weight
        with torch.no_grad():
            states = forwards.run(body, tokens, cache=True, primer=True)
            if states is None:
                output = body(tokens, use_cache=True, return_dict=True)
                last, cached = output.last_hidden_state, output.past_key_values
            else:
                last, keys, values = states.last, states.keys, states.values
                assert last is not None and keys is not None and values is not None  # noqa: PT018
                cached = zip(keys, values, strict=True)
            logits = F.linear(last[:, -1].float(), head.float())
        for layer, (keys, values) in enumerate(cached):
            pair = keys.float().contiguous(), values.float().contiguous()
            shape = torch.Size((batch, heads, tokens.shape[1], dim))
            if pair[0].shape != shape or pair[1].shape != shape:
                raise ValueError("decoder: the model has changed its shape since the decoder was made")
            self._decoder.load(layer, pair[0].data_ptr(), pair[1].data_ptr(), tokens.shape[1], threads)
        self._decoder.advance(tokens.shape[1])
        self._rewindable = self.capacity
        return logits


class CpuDrafts(Drafts):
    """``Drafts`` of the compiled module (``csrc/cpu/drafts.h``)."""

    def __init__(
        self, context: Tensor, numbers: Tensor, known: Tensor | None, sampling: Sampling, width: int, colours: int
    ) -> None:
        assert backend._C is not None
        given = (context, torch.int64, 1), (numbers, torch.float32, 0), (known, torch.int64, 0)
        for tensor, dtype, least in given:
            if tensor is not None and (
                tensor.dtype != dtype or tensor.ndim != 2 or len(tensor) != 1 or tensor.shape[1] < least
            ):
                raise ValueError(f"drafts: got {tuple(tensor.shape)} {tensor.dtype}; want (1, T) {dtype}")
        if known is not None and known.shape != numbers.shape:
            raise ValueError(f"drafts: known is {tuple(known.shape)}, numbers {tuple(numbers.shape)}; want one shape")
        pixels, numbers = context[0, 1:].contiguous(), numbers[0].contiguous()
        fixed = None if known is None else known[0].contiguous()
        temperature, top_k, top_p, min_score = ops.sampling_numbers(sampling)
        self._drafts = backend._C.Drafts(
            pixels=pixels.data_ptr(),
            count=len(pixels),
            uniform=numbers.data_ptr(),
            known=0 if fixed is None else fixed.data_ptr(),
            length=len(numbers),
            width=width,
            k=colours,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_score=min_score,
        )
        self._colours = colours
        self._tokens = torch.empty(backend._C.most_draft_rows, dtype=torch.int64, device="cpu")
        self._logprobs = torch.empty(backend._C.most_draft_rows, dtype=torch.float32, device="cpu")

    def learn(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Drafts.learn``."""
        if (
            logits.dtype != torch.float32
            or logits.ndim != 2
            or logits.shape[1] < self._colours
            or logits.stride(1) != 1
        ):
            got = f"{tuple(logits.shape)} {logits.dtype} with strides {logits.stride()}"
            raise ValueError(f"drafts: logits is {got}; want (W, {self._colours}) float32 rows")
        places = self._tokens.data_ptr(), self._logprobs.data_ptr()
        kept = self._drafts.learn(logits.data_ptr(), logits.stride(0), len(logits), *places)
        return self._tokens[:kept], self._logprobs[:kept]

    def following(self) -> Tensor:
        """See ``Drafts.following``."""
        return self._tokens[: self._drafts.following(self._tokens.data_ptr())]


def why_not_cpu(model: Model, dtype: str | None = None) -> str | None:
    """Why ``CpuDecoder`` cannot serve a model; ``None`` when it can.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    check_dtype(dtype)
    if reason := weights.no_native_decoder():
        return reason
    if dtype not in (None, "int8"):
        return f"it decodes in the model's dtype or in 'int8', not in {dtype!r}"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return f"the weights are {', '.join(sorted(map(str, dtypes)))}; want all float32, bfloat16 or float16"
    return why_not_shape(model.config) or why_not_modules(model) or why_not_head(model)
