"""The forward pass of a whole network in one call of the compiled module, and where it is offered.

``ImageGPTModel.forward`` asks ``run`` first; where that gives ``None``, the PyTorch layers run. ``why_not`` is the
rule: the network must be what this package makes of its configuration, in bf16 on the CPU, with nothing that only torch
sees: gradients, hooks, autocast, transforms, tracing, compiling.

The weights are packed at the first such call, a copy of their size, and again when they have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from igpt_fast import backend
from igpt_fast.decoders import (
    HOOKS,
    MODULES,
    blocks_of,
    packed_weights,
    weights_of,
    why_not_settings,
    why_not_shape,
)
from igpt_fast.ops.dispatch import is_plain
from igpt_fast.packed import forget, kept

if TYPE_CHECKING:
    from igpt_fast.model import ImageGPTModel


class States(NamedTuple):
    """What a forward pass gives, bf16: ``last`` (B, T, n_embd); ``hidden``, (n_layer, B, T, n_embd), and ``keys`` and
    ``values``, (n_layer, B, H, T, D), where they were asked for.
    """

    last: Tensor
    hidden: Tensor | None
    keys: Tensor | None
    values: Tensor | None


class _Made(NamedTuple):
    mark: tuple[Any, ...]
    weights: list[Tensor]  # held, so that no other tensor can come to lie where they do
    packed: Any
    forward: Any


_made: WeakKeyDictionary[ImageGPTModel, _Made] = WeakKeyDictionary()


def run(model: ImageGPTModel, tokens: Tensor | None, hidden: bool = False, cache: bool = False) -> States | None:
    """The states of (B, T) int64 tokens, or ``None`` where ``why_not`` has a reason.

    Raises:
        IndexError: A token is not in the vocabulary.
    """
    # First, and a constant for a compiler: nothing below is for it.
    if torch.compiler.is_compiling():
        return None
    if why_not(model, tokens) is not None:
        if model.dtype != torch.bfloat16 or model.device.type != "cpu":
            _made.pop(model, None)
            forget(model, None)
        return None
    assert tokens is not None
    config, tokens = model.config, tokens.reshape(-1, tokens.shape[-1]).contiguous()
    batch, length = tokens.shape
    last = torch.empty(batch, length, config.n_embd, dtype=torch.bfloat16)
    states = last.new_empty(config.n_layer, *last.shape) if hidden else None
    heads = (config.n_layer, batch, config.n_head, length, config.head_dim)
    keys, values = (last.new_empty(heads), last.new_empty(heads)) if cache else (None, None)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (last, states, keys, values))
    _forward(model).run(tokens.data_ptr(), batch, length, *addresses, torch.get_num_threads())
    return States(last, states, keys, values)


def why_not(model: ImageGPTModel, tokens: Tensor | None) -> str | None:
    """Why the compiled module does not run a network on these tokens now; ``None`` when it does."""
    if reason := backend.no_native_forward():
        return reason
    if tokens is None or not is_plain(tokens) or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
        return "the input is not an int64 tensor on the CPU, or torch looks at what becomes of it"
    if tokens.ndim == 0 or tokens.numel() == 0 or tokens.shape[-1] > model.config.n_positions:
        return f"the input is {tuple(tokens.shape)}; want (B, T), T from 1 to n_positions={model.config.n_positions}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if tokens.shape[-1] < 8 and tokens.numel() > 8 * tokens.shape[-1]:
        return "the input is many short sequences, which would be padded to 32 positions each"
    if reason := why_not_shape(model.config) or _why_not_modules(model):
        return reason
    weights = weights_of(model)
    return why_not_settings(model, weights) or _why_not_weights(weights)


def _why_not_modules(model: ImageGPTModel) -> str | None:
    """Whether something has been put into the network that only PyTorch runs. Its own hooks run around it."""
    if model.training:
        return "the network is in training mode"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks of all modules"
    modules: list[nn.Module] = [model]  # not nn.Module.modules(), which takes a millisecond for 24 layers
    for module in modules:
        modules += [child for child in module._modules.values() if child is not None]
        if module is model:
            continue
        if type(module) not in MODULES:
            return f"there is a {type(module).__module__}.{type(module).__qualname__}"
        state = module.__dict__
        if "forward" in state or any(state[hooks] for hooks in HOOKS):
            return f"a {type(module).__name__} has a hook or a forward of its own"
        if module.training and type(module) is nn.Dropout and module.p > 0.0:
            return "dropout is on"
    return None


def _why_not_weights(weights: list[Any]) -> str | None:
    # Others stand in for parameters under torch.func.functional_call and in DataParallel's replicas.
    if any(type(weight) is not nn.Parameter or weight.dtype != torch.bfloat16 for weight in weights):
        return "the weights are not all bfloat16 parameters"
    if not is_plain(*weights) or any(weight.device.type != "cpu" for weight in weights):
        return "the weights want a gradient, or are not plain tensors on the CPU"
    return None


def _forward(model: ImageGPTModel) -> Any:
    """The compiled module's forward pass on the weights as they are now.

    Whether they have changed is seen by each one's memory and version and, since what goes through ``parameter.data``
    leaves these alone, by some of its numbers: reading all of them takes some milliseconds.
    """
    assert backend._C is not None
    weights = weights_of(model)
    places = [(weight.data_ptr(), weight.numel()) for weight in weights]
    mark = (
        [(weight._version, weight.stride()) for weight in weights],
        places,
        backend._C.sample_halves(places) if all(weight.is_contiguous() for weight in weights) else None,
        [(block.attn.n_head, block.attn.scale) for block in blocks_of(model)],
        (model.config.layer_norm_epsilon, model.config.activation_function, backend._C.cpu_isa()),
    )
    made = _made.get(model)
    # A decoder may have packed them again, with its head.
    if made is None or made.mark != mark or made.packed is not kept(model, None):
        _made.pop(model, None)  # before a new copy is made
        del made
        packed = packed_weights(model, None, None)
        made = _made[model] = _Made(mark, [weight.detach() for weight in weights], packed, backend._C.Forward(packed))
    return made.forward
