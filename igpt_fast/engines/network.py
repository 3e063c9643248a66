"""What an engine asks of a network: whether it is what this package makes of its configuration, and then its parts.

For decoders and forward passes that do not run the modules but read their weights. The classes of the modules are
not known here: they declare themselves (``plain``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.ops.activation import KERNELS

Kind = TypeVar("Kind", bound=type)
METHODS = ("__call__", "_call_impl", "forward", "_embed")  # what a module computes, and what calls it
# The classes of modules that are computed as this package computes them, and their methods as they were declared;
# anything else may mean anything.
MODULES: dict[type, list[Any]] = {}

_LEAST_SCALE = 2.0**-126  # a normal float32: smaller ones are flushed to zero


class Body(Protocol):
    """A network without its head: modules and parameters are named as in transformers' state dicts."""

    config: ImageGPTConfig
    wte: nn.Embedding
    wpe: nn.Embedding
    h: nn.ModuleList
    ln_f: Any
    training: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


class Model(Protocol):
    """A network and its head."""

    config: ImageGPTConfig
    transformer: Any  # a Body
    lm_head: nn.Linear
    training: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def plain(kind: Kind) -> Kind:
    """Declares a class of modules: an engine may read the weights of its instances in place of calling them. A subclass
    is another class, and so is one whose methods have been replaced since.
    """
    MODULES[kind] = [getattr(kind, method, None) for method in METHODS]
    return kind


for _kind in (nn.Embedding, nn.Linear, nn.Dropout, nn.ModuleList):
    plain(_kind)


def why_not_settings(model: Body, weights: list[Any]) -> str | None:
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


def blocks_of(model: Body) -> list[Any]:
    return list(model.h)


def weights_of(model: Body) -> list[Any]:
    """The parameters of a network whose modules are this package's, in the order of its computation."""
    found: list[Any] = [model.wte.weight, model.wpe.weight, model.ln_f.weight]
    for block in blocks_of(model):
        found += [block.ln_1.weight, block.ln_2.weight]
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            found += [linear.weight, linear.bias]
    return found


def why_not_modules(root: Any, around: bool = True) -> str | None:
    """Whether something stands in a network, or between it and who calls it, that only PyTorch runs: modules, methods
    or parameters of another kind, hooks, modes. That torch compiles a module counts not, for it changes no value.

    Args:
        root: The model, or a part of it.
        around: Whether what has been put around the root itself counts: not where it is being called.
    """
    if nn.modules.module._has_any_global_hook():
        return "there are hooks of all modules"
    if torch._C._len_torch_dispatch_stack():
        return "a mode of torch's looks at every operation"
    known: set[type] = set()
    modules: list[nn.Module] = [root]  # not modules(), which takes a millisecond for 24 layers
    for module in modules:
        modules += [child for child in module._modules.values() if child is not None]
        kind, state, outside = type(module), module.__dict__, around or module is not root
        if kind not in known:
            if kind not in MODULES:
                return f"{_name(root, module)} is a {kind.__module__}.{kind.__qualname__}"
            if outside and MODULES[kind] != [getattr(kind, method, None) for method in METHODS]:
                return f"the methods of {kind.__qualname__} are not its own"
            known.add(kind)
        if not outside and "_embed" in state:
            return f"{_name(root, module)} embeds in a way of its own"
        hooked = state["_forward_hooks"] or state["_forward_pre_hooks"] or not state.keys().isdisjoint(METHODS)
        if outside and hooked:
            return f"{_name(root, module)} has a hook or a forward of its own"
        if not around and module.training and kind is nn.Dropout and module.p > 0.0:
            return f"the dropout {_name(root, module)} is on"
        for part, parameter in state["_parameters"].items():
            # Others stand in for parameters under torch.func.functional_call and in DataParallel's replicas.
            if parameter is not None and (type(parameter) is not nn.Parameter or parameter.layout != torch.strided):
                return f"{part} of {_name(root, module)} is a {type(parameter).__name__}"
    return None


def _name(root: nn.Module, module: nn.Module) -> str:
    return next(name for name, part in root.named_modules() if part is module) or "the model"


class Layer(NamedTuple):
    """A layer's parameters, in the order of ``weights_of``, and the scale of its scores."""

    ln_1: Tensor
    ln_2: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    scale: float


class Network:
    """The parameters of a model that ``why_not_cuda`` has nothing against, as a step reads them: not copies."""

    def __init__(self, model: Model) -> None:
        body = model.transformer
        found = [weight.detach() for weight in weights_of(body)]
        self.wte, self.wpe, self.ln_f = found[:3]
        self.layers = [
            Layer._make([*found[3 + 10 * i : 13 + 10 * i], block.attn.scale]) for i, block in enumerate(blocks_of(body))
        ]
        self.head = model.lm_head.weight.detach().T
        self.eps, self.activation = body.config.layer_norm_epsilon, body.config.activation_function
        self.kernel = KERNELS[self.activation]
        self.heads, self.head_dim = body.config.n_head, body.config.head_dim
        self.dtype, self.device = self.wte.dtype, self.wte.device

    def key(self) -> tuple[Any, ...]:
        """What a captured graph has of it: where the weights are, and settings."""
        tensors = [self.wte, self.wpe, self.ln_f, self.head]
        tensors += [part for layer in self.layers for part in layer[:-1]]
        places = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        scales = tuple(layer.scale for layer in self.layers)
        return places, scales, self.eps, self.activation, self.heads, self.dtype
