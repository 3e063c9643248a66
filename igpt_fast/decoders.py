"""Decoders: a model that reads tokens one position at a time, behind one interface.

``prefill`` reads a primer in one go, ``step`` one more token of every image; both return the logits of the next
position. ``fork`` goes on with several images for each primer. ``TorchDecoder`` runs the PyTorch model on a static
key/value cache; it is right everywhere and the measure for the faster ones. ``CpuDecoder`` runs the compiled module's
decode step. ``make_decoder`` chooses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from igpt_fast import backend, ops
from igpt_fast.cache import StaticCache
from igpt_fast.layers import Conv1D, ImageGPTAttention, ImageGPTBlock, ImageGPTLayerNorm, ImageGPTMLP
from igpt_fast.packed import packed

if TYPE_CHECKING:
    from igpt_fast.config import ImageGPTConfig
    from igpt_fast.model import ImageGPTForCausalImageModeling, ImageGPTModel

# What a caller may ask for besides the model's own dtype.
DTYPES = (None, "int8")


class Decoder(Protocol):
    """What generation asks of a decoder. It holds the state of ``batch_size`` images."""

    batch_size: int
    capacity: int

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


class TorchDecoder:
    """The PyTorch model on a static cache.

    Args:
        model: The model; in eval mode.
        batch_size: Images decoded together.
        capacity: Positions that will be read at most, ``n_positions`` or fewer.

    Raises:
        ValueError: ``capacity`` exceeds ``n_positions``.
    """

    def __init__(self, model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int) -> None:
        config = model.config
        _check_capacity(capacity, config.n_positions)
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self._forked = False
        self._cache = StaticCache(
            config.n_layer,
            batch_size,
            config.n_head,
            capacity,
            config.head_dim,
            dtype=_cache_dtype(model),
            device=model.device,
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        hidden = self.model.transformer(tokens, past_key_values=self._cache, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        return self.prefill(tokens[:, None])

    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. Every image takes a copy of its primer's keys and values."""
        _check_fork(n, self._cache.get_seq_length(), self._forked)
        self._forked = True
        self.batch_size *= n
        if n > 1:
            self._cache = self._cache.repeat_interleave(n)


# As csrc/cpu/decoder_kernels.h numbers them.
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2}
_ACTIVATIONS = {
    "quick_gelu": 2,
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_fast", "gelu_python_tanh", "gelu_pytorch_tanh"), 3),
    **dict.fromkeys(("gelu", "gelu_python"), 4),
}
# The modules of a model that is computed as this package computes it; anything else may mean anything.
MODULES = (
    ImageGPTBlock,
    ImageGPTAttention,
    ImageGPTMLP,
    ImageGPTLayerNorm,
    Conv1D,
    nn.Embedding,
    nn.Linear,
    nn.Dropout,
    nn.ModuleList,
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class CpuDecoder:
    """The compiled module's decode step: all layers and the head in one call, on packed copies of the weights.

    The weights are packed for a model's first decoder, and again for the first after a change of them; what changes
    them during a decoder's life does not reach it. Activations and logits are float32, whatever the weights are:

    - float32: the model's own numbers.
    - bfloat16: the model's weights; keys and values are rounded to bfloat16. With several images, so are activations
      where they meet weights, on processors that multiply bfloat16.
    - int8: weights rounded to 8 bits with a scale for each output; keys and values with a scale for each position
      and head. The other side of each product keeps 15 bits or more, so the rounding of these is all there is.

    A primer is read by the model's forward pass (``forwards``), in the model's own dtype and from its weights, not
    the int8 ones. As many threads compute as torch is set to.

    Args:
        model: The model, on the CPU; in eval mode.
        batch_size: Images decoded together.
        capacity: Positions that will be read at most, ``n_positions`` or fewer.
        dtype: ``None`` for the model's, or ``"int8"``.

    Raises:
        BackendUnavailableError: The model, or this machine, is not covered; the message says why.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.
    """

    def __init__(
        self, model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int, dtype: str | None = None
    ) -> None:
        _check_capacity(capacity, model.config.n_positions)
        if reason := why_not_cpu(model, dtype):
            raise backend.BackendUnavailableError(f"decoder: {reason}")
        assert backend._C is not None
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self._forked = False
        self._decoder = backend._C.Decoder(
            packed_weights(model.transformer, model.lm_head.weight, dtype), batch_size, capacity
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] == 0:
            raise ValueError(f"decoder: tokens is {tuple(tokens.shape)}; want ({self.batch_size}, T), T >= 1")
        self._check_room(tokens.shape[1])
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
        self._check_room(1)
        tokens = tokens.contiguous()
        logits = torch.empty(batch, colours, dtype=torch.float32, device="cpu")
        self._decoder.step(tokens.data_ptr(), logits.data_ptr(), torch.get_num_threads())
        return logits

    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. The primer's keys and values stay in memory once, and are read once a step."""
        _check_fork(n, self._decoder.position, self._forked)
        self._decoder.fork(n, torch.get_num_threads())
        self._forked = True
        self.batch_size *= n

    def _check_room(self, count: int) -> None:
        end = self._decoder.position + count
        if end > self.capacity:
            raise ValueError(f"decoder: {end} positions do not fit into capacity={self.capacity}")

    def _read_primer(self, tokens: Tensor) -> Tensor:
        """At the speed of a forward pass: the model's keys and values become the cache's."""
        threads = torch.get_num_threads()
        batch, heads, dim, _ = self._decoder.sizes
        with torch.no_grad():
            output = self.model.transformer(tokens, use_cache=True, return_dict=True)
            logits = self.model.lm_head(output.last_hidden_state[:, -1]).float()
        for layer, (keys, values) in enumerate(output.past_key_values):
            pair = keys.float().contiguous(), values.float().contiguous()
            shape = torch.Size((batch, heads, tokens.shape[1], dim))
            if pair[0].shape != shape or pair[1].shape != shape:
                raise ValueError("decoder: the model has changed its shape since the decoder was made")
            self._decoder.load(layer, pair[0].data_ptr(), pair[1].data_ptr(), tokens.shape[1], threads)
        self._decoder.advance(tokens.shape[1])
        return logits


def why_not_cpu(model: ImageGPTForCausalImageModeling, dtype: str | None = None) -> str | None:
    """Why ``CpuDecoder`` cannot serve a model; ``None`` when it can.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    check_dtype(dtype)
    if reason := backend.no_native_decoder():
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) != 1 or dtypes - ({torch.float32, torch.bfloat16} if dtype is None else {*_FLOATS}):
        return f"the weights are {', '.join(sorted(map(str, dtypes)))}; want all float32 or all bfloat16"
    if reason := why_not_shape(model.config) or _why_not_modules(model):
        return reason
    head, config = model.lm_head.weight, model.config
    if head.shape != (config.vocab_size - 1, config.n_embd):
        return f"lm_head is {tuple(head.shape)}; the configuration says {(config.vocab_size - 1, config.n_embd)}"
    return why_not_settings(model.transformer, weights_of(model.transformer))


_LEAST_SCALE = 2.0**-126  # a normal float32: smaller ones are flushed to zero
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not_shape(config: ImageGPTConfig) -> str | None:
    """Why the compiled module's kernels do not take a model's sizes; ``None`` when they do."""
    inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    if config.activation_function not in _ACTIVATIONS:
        return f"activation_function is {config.activation_function!r}; want {', '.join(_ACTIVATIONS)}"
    if config.head_dim % 8 or config.head_dim > 256:
        return f"head_dim is {config.head_dim}; want a multiple of 8, 256 at most"
    for name, value, multiple in (("n_embd", config.n_embd, 16), ("n_inner", inner, 8)):
        if value % multiple or value > 65536:
            return f"{name} is {value}; want a multiple of {multiple}, 65536 at most"
    return None


def why_not_settings(model: ImageGPTModel, weights: list[Any]) -> str | None:
    """Whether modules and weights are not those of the configuration, which the packed copy is made from."""
    config, blocks = model.config, blocks_of(model)
    embd, inner = config.n_embd, config.n_inner if config.n_inner is not None else 4 * config.n_embd
    shapes = [(config.vocab_size, embd), (config.n_positions, embd), (embd,)]
    linear = ((embd, 3 * embd), (3 * embd,), (embd, embd), (embd,), (embd, inner), (inner,), (inner, embd), (embd,))
    shapes += config.n_layer * [(embd,), (embd,), *linear]
    if [weight.shape for weight in weights] != shapes:
        return "a weight has another shape than the configuration says"
    activation, eps = ops.check_activation(config.activation_function), config.layer_norm_epsilon
    norms = [model.ln_f, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    if any(norm.eps != eps for norm in norms) or any(block.mlp.activation != activation for block in blocks):
        return "a norm or an activation is not the configuration's"
    if any(block.attn.n_head != config.n_head for block in blocks):
        return "the heads are not the configuration's"
    if any(not _LEAST_SCALE <= block.attn.scale < math.inf for block in blocks):
        return "the scale of the scores is not a normal, positive float32"
    if model.wte.max_norm is not None or model.wpe.max_norm is not None:
        return "an embedding has a max_norm"
    return None


def blocks_of(model: ImageGPTModel) -> list[Any]:
    return list(model.h)


def weights_of(model: ImageGPTModel) -> list[Any]:
    """The parameters of a network whose modules are this package's, in the order of its computation."""
    found: list[Any] = [model.wte.weight, model.wpe.weight, model.ln_f.weight]
    for block in blocks_of(model):
        found += [block.ln_1.weight, block.ln_2.weight]
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            found += [linear.weight, linear.bias]
    return found


def _why_not_modules(model: ImageGPTForCausalImageModeling) -> str | None:
    """Whether something has been put into the model, or around its modules, that only PyTorch runs."""
    ours = {"": "ImageGPTForCausalImageModeling", "transformer": "ImageGPTModel"}
    for name, module in model.named_modules():
        kind = type(module)
        known = (kind.__module__, kind.__name__) == ("igpt_fast.model", ours[name]) if name in ours else kind in MODULES
        if not known:
            return f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}"
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
            return f"{name or 'the model'} has a hook or a forward of its own"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            return f"{name} is a {type(parameter).__name__}"
    return "lm_head has a bias" if model.lm_head.bias is not None else None


def packed_weights(body: ImageGPTModel, head: Tensor | None, dtype: str | None) -> Any:
    """The compiled module's copy of the weights of a network that ``why_not_cpu`` has nothing against, and of a head.

    One that was made with a head serves where none is wanted, so decoders and ``forwards`` share it.
    """
    scales = tuple(block.attn.scale for block in cast("list[Any]", body.h))
    settings = repr((sorted(body.config.to_dict().items(), key=repr), scales))
    others = {} if head is None else {"head": head}
    return packed(body, dtype, settings, lambda: _pack(body, head, dtype or body.dtype), others)


def _pack(body: ImageGPTModel, head: Tensor | None, dtype: str | torch.dtype) -> Any:
    """The compiled module's copy of a network's weights, and of a head's where there is one."""
    assert backend._C is not None
    config, threads = body.config, torch.get_num_threads()
    inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    weights = backend._C.DecoderWeights(
        config.n_layer,
        config.n_embd,
        config.n_head,
        inner,
        config.n_positions,
        config.vocab_size,
        config.layer_norm_epsilon,
        _ACTIVATIONS[config.activation_function],
        _FORMATS[dtype],
    )
    kept: list[Tensor] = []  # temporary copies, until the module has read them

    def vector(parameter: Tensor) -> int:
        kept.append(parameter.detach().float().contiguous())
        return kept[-1].data_ptr()

    def matrix(parameter: Tensor, transposed: bool = False) -> tuple[int, bool, int, int]:
        tensor = parameter.detach()
        kept.append(tensor.float() if tensor.dtype == torch.float16 else tensor)
        by_input, by_output = kept[-1].stride()[::-1] if transposed else kept[-1].stride()
        return kept[-1].data_ptr(), kept[-1].dtype == torch.bfloat16, by_input, by_output

    weights.set_tables(
        vector(body.wte.weight),
        vector(body.wpe.weight),
        vector(body.ln_f.weight),
        (0, False, 0, 0) if head is None else matrix(head, transposed=True),
        threads,
    )
    for i, block in enumerate(cast("list[Any]", body.h)):
        kept.clear()
        linear = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        pairs = [part for layer in linear for part in (matrix(layer.weight), vector(layer.bias))]
        weights.set_layer(i, vector(block.ln_1.weight), vector(block.ln_2.weight), *pairs, block.attn.scale, threads)
    return weights


def cache_bytes(
    model: ImageGPTForCausalImageModeling, dtype: str | None = None, primer: int = 0, copies: int = 1
) -> int:
    """Bytes of key/value cache that one whole image takes, on average where several share a primer.

    Args:
        model: The model.
        dtype: As in ``make_decoder``.
        primer: Positions that are read before the fork.
        copies: Images made of each primer.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    config = model.config
    native = why_not_cpu(model, dtype) is None
    positions = config.n_positions - (primer - -(-primer // copies) if native else 0)
    a_position = 2 * config.n_embd * _cache_dtype(model).itemsize
    if native and dtype == "int8":
        a_position = 2 * config.n_embd + 12 * config.n_head  # two scales and a sum for each head
    return config.n_layer * positions * a_position


def _cache_dtype(model: ImageGPTForCausalImageModeling) -> torch.dtype:
    """One that holds the keys without loss: that of the weights that make them, and what autocast makes of it."""
    attention: Any = model.transformer.h[0].attn
    dtype, kind = attention.c_attn.weight.dtype, model.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.promote_types(dtype, torch.get_autocast_dtype(kind))
    return dtype


def _check_capacity(capacity: int, n_positions: int) -> None:
    if not 1 <= capacity <= n_positions:
        raise ValueError(f"decoder: capacity is {capacity}; want 1..{n_positions}, the model's n_positions")


def _check_fork(n: int, position: int, forked: bool) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"decoder: fork is given n={n!r}; want a positive integer")
    if forked:
        raise ValueError("decoder: it was forked before; a decoder forks once")
    if position == 0:
        raise ValueError("decoder: nothing has been read that a fork could share; call prefill first")


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError unless the dtype is one that a decoder may be asked for."""
    if dtype not in DTYPES:
        raise ValueError(f"decoder: dtype is {dtype!r}; want None, which is the model's, or 'int8'")


def make_decoder(
    model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int, dtype: str | None = None
) -> Decoder:
    """The fastest decoder there is for the model: ``CpuDecoder`` where ``why_not_cpu`` finds nothing against it.

    Args:
        model, batch_size, capacity: See ``TorchDecoder``.
        dtype: ``None`` for the model's; ``"int8"`` as ``CpuDecoder`` has it.

    Raises:
        BackendUnavailableError: ``dtype`` is given and nothing offers it for this model.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.
    """
    reason = why_not_cpu(model, dtype)
    if reason is None:
        return CpuDecoder(model, batch_size, capacity, dtype)
    if dtype is not None:
        raise backend.BackendUnavailableError(f"decoder: dtype {dtype!r} is not available: {reason}")
    return TorchDecoder(model, batch_size, capacity)
