"""The forward pass of a whole network in one call of the compiled module, and where it is offered.

``ImageGPTModel.forward`` asks ``run`` first; where that gives ``None``, the PyTorch layers run. ``why_not`` is the
rule: the network must be what this package makes of its configuration, in float32, bfloat16 or float16 (packed in
float32) on the CPU, with nothing that only torch sees: gradients, hooks, autocast, transforms, tracing, compiling.

``dtype="int8"``, which features and likelihoods can ask for, multiplies weights of 8 bits, with a scale for each
output, as the decoder's, by activations of 8 bits, with a scale for each position; attention, norms and the residual
are as in the other passes.

The weights are packed at the first such call, a copy of their size (of float16 twice that) that stays as long as the
model, and again when they have changed, in whatever way: every call reads them all (``packed``), which takes it a few
percent longer.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from igpt_fast import backend
from igpt_fast.engines.cpu.weights import no_native_decoder, packed_weights, why_not_shape
from igpt_fast.engines.network import Body, Weights, why_not_modules, why_not_settings
from igpt_fast.ops.dispatch import address, is_plain


class Taken(NamedTuple):
    """What is taken of a forward pass on its way, and how far that goes.

    Attributes:
        layers: How many layers lie behind each state; ascending, 0 to ``run``.
        run: The layers to run.
        normed: Whether the norm that comes next is applied: the next layer's ``ln_1``, or ``ln_f``.
        bands: Means over so many equal parts of the T positions; 0: the states as they are.
        last: Whether ``States.last`` is wanted.
    """

    layers: list[int]
    run: int
    normed: bool = False
    bands: int = 0
    last: bool = True


class States(NamedTuple):
    """What a forward pass gives, where it was asked for: ``last`` (B, T, n_embd) behind ``ln_f``, of the layers that
    have run; ``taken``, (states, B, T, n_embd), or float32 (states, B, bands, n_embd); ``keys`` and ``values``,
    (n_layer, B, H, T, D). All but means are of the model's dtype.
    """

    last: Tensor | None
    taken: Tensor | None
    keys: Tensor | None
    values: Tensor | None


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Packed weights -> the forward pass on them, with the activations that it keeps for the next.
_passes: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def run(
    model: Body,
    tokens: Tensor | None,
    taken: Taken | None = None,
    cache: bool = False,
    primer: bool = False,
    dtype: str | None = None,
) -> States | None:
    """The states of (B, T) int64 tokens, or ``None`` where ``why_not`` has a reason.

    Args:
        taken: What else than the last states of the whole network; where it stops early there is no ``cache``.
        primer: For a decoder: what is short is no reason, so that the numbers do not depend on how many sequences there
            are; and of float16, of which all is computed in float32, that is not rounded.
        dtype: ``"int8"``, in which the module alone computes; ``None``: the model's.

    Raises:
        BackendUnavailableError: ``dtype`` is given, and ``why_not`` has a reason.
        IndexError: A token is not in the vocabulary.
        ValueError: An unknown ``dtype``.
    """
    if dtype not in (None, "int8"):
        raise ValueError(f"forward: dtype is {dtype!r}; want None or 'int8'")
    # First, and a constant for a compiler: nothing below is for it.
    found = "torch compiles what calls it" if torch.compiler.is_compiling() else _read(model, tokens, primer, dtype)
    if isinstance(found, str):
        if dtype is not None:
            raise backend.BackendUnavailableError(f"forward: dtype {dtype!r} is not available: {found}")
        return None
    assert tokens is not None
    config, tokens = model.config, tokens.reshape(-1, tokens.shape[-1]).contiguous()
    batch, length = tokens.shape
    taken = taken or Taken([], config.n_layer)
    # The module writes to these addresses: not of the default dtype, nor on the default device.
    own = found.wte.dtype
    wide = torch.float32 if own == torch.float16 or dtype else own
    empty: Any = functools.partial(torch.empty, dtype=wide, device="cpu")
    single: Any = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
    last = empty(batch, length, config.n_embd) if taken.last else None
    states = empty(len(taken.layers), batch, length, config.n_embd) if taken.layers and not taken.bands else None
    means = single(len(taken.layers), batch, taken.bands, config.n_embd) if taken.bands else None
    heads = (config.n_layer, batch, config.n_head, length, config.head_dim)
    keys, values = (empty(heads), empty(heads)) if cache else (None, None)
    written = {"last": last, "states": states, "means": means, "keys": keys, "values": values}
    places = {name: address(tensor) for name, tensor in written.items()}
    threads = torch.get_num_threads()
    assert backend._C is not None
    weights = packed_weights(model, None, dtype, found)
    if weights not in _passes:
        _passes[weights] = backend._C.Forward(weights)
    asked = {"layers": taken.run, "taken": taken.layers, "normed": taken.normed, "bands": max(1, taken.bands)}
    _passes[weights].run(tokens=tokens.data_ptr(), batch=batch, length=length, **asked, **places, threads=threads)
    made = States(last, means if states is None else states, keys, values)
    if wide == own or primer:
        return made
    narrow = States(*(None if tensor is None else tensor.to(own) for tensor in made))
    return narrow if means is None else narrow._replace(taken=means)


def _why_not_short(tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Measured, at 6 layers of 512 in float32: torch's layers lead below 8 positions, and of several sequences below
    24. In the others they lead of more than 8 sequences below 8.
    """
    length, count = tokens.shape[-1], tokens.numel() // tokens.shape[-1]
    least = (8 if count == 1 else 24) if dtype == torch.float32 else (1 if count <= 8 else 8)
    if length >= least:
        return None
    return f"the input is {count} of {length} positions, padded to 32 each; the layers are faster below {least}"


def why_not(model: Body, tokens: Tensor | None, primer: bool = False, dtype: str | None = None) -> str | None:
    """Why the compiled module does not run a network on these tokens now; ``None`` when it does. ``primer``: however
    few they are.
    """
    found = _read(model, tokens, primer, dtype)
    return found if isinstance(found, str) else None


def _read(model: Body, tokens: Tensor | None, primer: bool, dtype: str | None) -> Weights | str:
    """The parameters that the compiled module's pass over these tokens is made of, or why it makes none."""
    if reason := no_native_decoder():
        return reason
    if tokens is None or not is_plain(tokens) or tokens.dtype != torch.int64 or not tokens.is_cpu:
        return "the input is not an int64 tensor on the CPU, or torch looks at what becomes of it"
    if tokens.ndim == 0 or tokens.numel() == 0 or tokens.shape[-1] > model.config.n_positions:
        return f"the input is {tuple(tokens.shape)}; want (B, T), T from 1 to n_positions={model.config.n_positions}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if model.training:
        return "the network is in training mode"
    if reason := why_not_shape(model.config) or why_not_modules(model, around=False):
        return reason
    found = Weights.of(model)
    if reason := why_not_settings(model, found):
        return reason
    weights = found.each()
    own = weights[0].dtype
    if any(weight.dtype != own for weight in weights) or own not in _DTYPES:
        return "the weights are not all float32, all bfloat16 or all float16"
    if not primer and dtype is None and (reason := _why_not_short(tokens, own)):
        return reason
    if not is_plain(*weights) or not all(weight.is_cpu for weight in weights):
        return "the weights want a gradient, or are not plain tensors on the CPU"
    return found
