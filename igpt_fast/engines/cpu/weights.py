"""What the compiled module makes of a model's weights, made once and kept while model and weights stay as they are.

Kept beside the model, not in it: copies, pickles and state dicts know nothing of it, and it goes when the model goes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import backend
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.network import Body, Layer, Weights
from igpt_fast.locks import Lock
from igpt_fast.ops.activation import KERNELS
from igpt_fast.ops.dispatch import ACTIVATION_NUMBERS


class _Kept(NamedTuple):
    source: Hashable  # settings and parameters that it was made from
    others: Hashable  # and further tensors
    result: Any


# model -> purpose -> what was made
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Kept]] = WeakKeyDictionary()
_lock = Lock()


def packed(
    model: Any,
    purpose: Hashable,
    settings: Hashable,
    pack: Callable[[], Any],
    weights: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Any:
    """The result of ``pack()``, kept for the next call.

    Parameters are compared by what they hold: PyTorch counts changes in place, but not those through ``.data``, numpy
    or shared memory, and reading weights takes a tenth of the time of packing them.

    Args:
        model: Beside which the result is kept.
        purpose: One result is kept for each.
        settings: What else the result depends on, besides the parameters and the instruction set.
        pack: Makes it; called by one thread at a time.
        weights: The parameters, on the CPU.
        others: What is packed with the parameters. A result with more serves where there are none.
    """
    assert backend._C is not None
    with _lock:
        source = (settings, backend._C.cpu_isa(), _contents(weights))
        more = _contents(others)
        results = _kept.setdefault(model, {})
        old = results.pop(purpose, None)
        if old is None or old.source != source or (others and old.others != more):
            del old  # before the new one is there
            old = _Kept(source, more, pack())
        results[purpose] = old
        return old.result


def _contents(tensors: Sequence[Tensor]) -> Hashable:
    """A number of 64 bits for each tensor, and its layout."""
    assert backend._C is not None
    sums = backend._C.checksums([(tensor.data_ptr(), _span(tensor)) for tensor in tensors], torch.get_num_threads())
    layouts = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
    return tuple(zip(layouts, sums, strict=True))


def _span(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


# As csrc/cpu/format.h numbers them. Nothing multiplies float16: float32 holds it without loss.
_FORMATS = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 1, "int8": 2}


def why_not_shape(config: ImageGPTConfig) -> str | None:
    """Why the compiled module's kernels do not take a model's sizes; ``None`` when they do."""
    if config.activation_function not in KERNELS:
        return f"activation_function is {config.activation_function!r}; want {', '.join(KERNELS)}"
    if config.head_dim % 8 or config.head_dim > 256:
        return f"head_dim is {config.head_dim}; want a multiple of 8, 256 at most"
    for name, value, multiple in (("n_embd", config.n_embd, 16), ("n_inner", config.inner, 8)):
        if value % multiple or value > 65536:
            return f"{name} is {value}; want a multiple of {multiple}, 65536 at most"
    return None


def packed_weights(body: Body, head: Tensor | None, dtype: str | None, found: Weights | None = None) -> Any:
    """The compiled module's copy of the weights of a network that ``why_not_cpu`` has nothing against, and of a head.

    One that was made with a head serves where none is wanted, so decoders and the forward pass share it. ``found``: its
    parameters, where they have been asked for.
    """
    settings = (tuple(_settings(body.config).items()), *(block.attn.scale for block in body.h))
    found = Weights.of(body) if found is None else found
    others = [] if head is None else [head]
    return packed(body, dtype, settings, lambda: _pack(body, head, dtype or body.dtype), found.each(), others)


def _settings(config: ImageGPTConfig) -> dict[str, Any]:
    """All that a copy has of a configuration."""
    sizes = {"layers": config.n_layer, "embd": config.n_embd, "heads": config.n_head, "inner": config.inner}
    sizes |= {"positions": config.n_positions, "vocab": config.vocab_size}
    activation = ACTIVATION_NUMBERS[KERNELS[config.activation_function]]
    return {**sizes, "eps": config.layer_norm_epsilon, "activation": activation}


def _pack(body: Body, head: Tensor | None, dtype: str | torch.dtype) -> Any:
    """The compiled module's copy of a network's weights, and of a head's where there is one."""
    assert backend._C is not None
    threads, found = torch.get_num_threads(), Weights.of(body)
    weights = backend._C.DecoderWeights(**_settings(body.config), format=_FORMATS[dtype])
    kept: list[Tensor] = []  # temporary copies, until the module has read them

    def vector(parameter: Tensor) -> int:
        kept.append(parameter.detach().float().contiguous())
        return kept[-1].data_ptr()

    def matrix(parameter: Tensor, transposed: bool = False) -> tuple[int, bool, int, int]:
        tensor = parameter.detach()
        kept.append(tensor.float() if tensor.dtype == torch.float16 else tensor)
        by_input, by_output = kept[-1].stride()[::-1] if transposed else kept[-1].stride()
        return kept[-1].data_ptr(), kept[-1].dtype == torch.bfloat16, by_input, by_output

    tables = {"wte": vector(found.wte), "wpe": vector(found.wpe), "norm": vector(found.ln_f)}
    outputs = (0, False, 0, 0) if head is None else matrix(head, transposed=True)
    weights.set_tables(**tables, head=outputs, threads=threads)
    for i, (layer, block) in enumerate(zip(found.layers, body.h, strict=True)):
        kept.clear()
        parts = Layer(*(vector(part) if part.ndim == 1 else matrix(part) for part in layer))
        weights.set_layer(layer=i, **parts._asdict(), scale=block.attn.scale, threads=threads)
    return weights


def no_native_decoder() -> str | None:
    """Why the compiled module's decoder serves no model on the CPU; ``None`` when it does."""
    if reason := backend.unavailable("cpu"):
        return reason
    if backend.get_backend() not in ("auto", "cpu"):
        return f"the backend {backend.get_backend()!r} is chosen"
    return None if backend._emulated is None else "the emulated kernels serve the CPU"
