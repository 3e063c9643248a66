"""What an engine asks of a network: whether it is what this package makes of its configuration, and then its parts.

For decoders and forward passes that do not run the modules but read their weights. The classes of the modules are
not known here: they declare themselves (``plain``).
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast import ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.ops.activation import KERNELS
from igpt_fast.ops.dispatch import LEAST_SCALE, observed, product, widened

Kind = TypeVar("Kind", bound=type)
BIDIRECTIONAL = "attention is bidirectional"  # why no engine runs a network
INNER = ("_tokens", "_embed", "_computed")  # methods that a module's own ``forward`` calls
METHODS = ("__call__", "_call_impl", "forward", *INNER)  # what a module computes, and what calls it
# The classes of modules that are computed as this package computes them, and their methods as they were declared;
# anything else may mean anything.
MODULES: dict[type, list[Any]] = {}
# Of all modules; torch 2.6 has no function that asks for them. What says more about a hook has its key in one of these.
_HOOKS_OF_ALL = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))


class _Called(Protocol):
    """What is asked of a network and of a model alike."""

    config: ImageGPTConfig
    training: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


class Body(_Called, Protocol):
    """A network without its head: modules and parameters are named as in transformers' state dicts."""

    wte: nn.Embedding
    wpe: nn.Embedding
    h: Any  # the layers, in a ModuleList
    ln_f: Any


class Model(_Called, Protocol):
    """A network and its head."""

    transformer: Any  # a Body
    lm_head: nn.Linear

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def plain(kind: Kind) -> Kind:
    """Declares a class of modules: an engine may read the weights of its instances in place of calling them. A subclass
    is another class, and so is one whose methods have been replaced since.
    """
    MODULES[kind] = _methods(kind)
    return kind


def _methods(kind: type) -> list[Any]:
    return [getattr(kind, method, None) for method in METHODS]


def _own_methods(kind: type) -> list[Any]:
    """Without those of bases that the class has from transformers (see ``kin``), which change no value."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith("transformers.")]
    found = [next((base for base in bases if method in vars(base)), None) for method in METHODS]
    return [None if base is None else getattr(base, method) for base, method in zip(found, METHODS, strict=True)]


for _kind in (nn.Embedding, nn.Linear, nn.Dropout, nn.ModuleList):
    plain(_kind)


# Something of each parameter of a layer, as a rule the parameter.
Layer = namedtuple("Layer", "ln_1 ln_2 qkv_weight qkv_bias out_weight out_bias fc_weight fc_bias proj_weight proj_bias")


# Every forward pass asks for all of them, and nn.Module's own look-up takes six times as long.
def _part(module: Any, name: str) -> Any:
    """A module in a module, which may stand in for one that torch knows."""
    found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def _parameter(module: Any, name: str) -> Any:
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


class Weights(NamedTuple):
    """The parameters of a network whose modules are this package's."""

    wte: Tensor
    wpe: Tensor
    ln_f: Tensor
    layers: list[Layer]

    @classmethod
    def of(cls, body: Body) -> Weights:
        """Those that a network has now."""
        layers = []
        for block in body.h:
            attn, mlp = _part(block, "attn"), _part(block, "mlp")
            linear = (_part(attn, "c_attn"), _part(attn, "c_proj"), _part(mlp, "c_fc"), _part(mlp, "c_proj"))
            pairs = (_parameter(layer, name) for layer in linear for name in ("weight", "bias"))
            norms = (_parameter(_part(block, name), "weight") for name in ("ln_1", "ln_2"))
            layers.append(Layer(*norms, *pairs))
        return cls(body.wte.weight, body.wpe.weight, body.ln_f.weight, layers)

    def each(self) -> list[Tensor]:
        """All of them."""
        return [self.wte, self.wpe, self.ln_f, *itertools.chain.from_iterable(self.layers)]


def whole(logits: Tensor, head: nn.Module) -> Tensor:
    """The (..., K) logits of all K outputs, where tensor parallelism of ``head`` gives each process its own, or a
    DTensor; else as they are.
    """
    weight: Any = getattr(head, "weight", None)  # (K, n_embd), of which a wrapper may have none
    if not hasattr(logits, "full_tensor") and hasattr(weight, "full_tensor") and logits.shape[-1] != weight.shape[0]:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        last = logits.ndim - 1
        placements = [Shard(last) if place.is_shard(0) else Replicate() for place in weight.placements]
        shape = torch.Size((*logits.shape[:-1], weight.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        logits = DTensor.from_local(logits.contiguous(), weight.device_mesh, placements, shape=shape, stride=stride)
    return logits.full_tensor() if hasattr(logits, "full_tensor") else logits


def logits_of(head: nn.Linear, states: Tensor) -> Tensor:
    """``head(states)``, in float32 as this package's other products (``dispatch.product``) where nothing but torch's
    linear layer is there.
    """
    if widened(states) is None:
        return head(states)
    if torch.compiler.is_compiling():  # which sees a part of what may be in between
        bare = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
    else:
        bare = why_not_modules(head) is None
    return product(F.linear, states, head.weight, head.bias) if bare else head(states)


def why_not_settings(body: Body, weights: Weights) -> str | None:
    """Whether modules and weights are not those of the configuration, which the packed copy is made from."""
    config, blocks = body.config, list(body.h)
    attentions = [_part(block, "attn") for block in blocks]
    if config.bidirectional or any(attn.bidirectional for attn in attentions):
        return BIDIRECTIONAL
    n, inner = config.n_embd, config.inner
    layer = Layer((n,), (n,), (n, 3 * n), (3 * n,), (n, n), (n,), (n, inner), (inner,), (inner, n), (n,))
    shapes = [(config.vocab_size, n), (config.n_positions, n), (n,), *config.n_layer * layer]
    # Whether packed copies are those of the weights as they are is asked of the parameters.
    each = weights.each()
    if any(type(weight) is not nn.Parameter for weight in each):
        return "a weight is no parameter"
    if [weight.shape for weight in each] != shapes:
        return "a weight has another shape than the configuration says"
    activation, eps = ops.check_activation(config.activation_function), config.layer_norm_epsilon
    norms = [body.ln_f, *(_part(block, name) for block in blocks for name in ("ln_1", "ln_2"))]
    if any(norm.eps != eps for norm in norms) or any(_part(block, "mlp").activation != activation for block in blocks):
        return "a norm or an activation is not the configuration's"
    if any(attn.n_head != config.n_head for attn in attentions):
        return "the heads are not the configuration's"
    if any(not LEAST_SCALE <= attn.scale < math.inf for attn in attentions):
        return "the scale of the scores is not a normal, positive float32"
    if body.wte.max_norm is not None or body.wpe.max_norm is not None:
        return "an embedding has a max_norm"
    return None


def why_not_head(model: Model) -> str | None:
    """Whether a model's head is not that of the configuration, or its network not (``why_not_settings``)."""
    config, head = model.config, model.lm_head
    if head.bias is not None:
        return "lm_head has a bias"
    if type(head.weight) is not nn.Parameter:
        return "the weight of lm_head is no parameter"
    if head.weight.shape != (want := (config.vocab_size - 1, config.n_embd)):
        return f"lm_head is {tuple(head.weight.shape)}; the configuration says {want}"
    return why_not_settings(model.transformer, Weights.of(model.transformer))


def why_not_modules(root: Any, around: bool = True) -> str | None:
    """Whether something stands in a network, or between it and who calls it, that only PyTorch runs: modules, methods
    or parameters of another kind, hooks, modes. That torch compiles a module counts not, for it changes no value.

    Args:
        root: The model, or a part of it.
        around: Whether what has been put around the root itself counts: not where it is being called.
    """
    if any(getattr(nn.modules.module, name) for name in _HOOKS_OF_ALL):
        return "there are hooks of all modules"
    if observed():
        return "a mode of torch's looks at every operation"
    known: set[type] = set()
    modules: list[Any] = [root]  # not modules(), which takes a millisecond for 24 layers
    for module in modules:
        kind, state, outside = type(module), module.__dict__, around or module is not root
        if inside := state["_modules"]:
            modules += [child for child in inside.values() if child is not None]
        if kind not in known:
            if kind not in MODULES:
                return f"{_name(root, module)} is a {kind.__module__}.{kind.__qualname__}"
            own = len(METHODS) if outside else len(INNER)  # the last ones
            if MODULES[kind][-own:] != _methods(kind)[-own:] and MODULES[kind][-own:] != _own_methods(kind)[-own:]:
                return f"the methods of {kind.__qualname__} are not its own"
            known.add(kind)
        if not outside and not state.keys().isdisjoint(INNER):
            return f"{_name(root, module)} embeds in a way of its own"
        hooked = state["_forward_hooks"] or state["_forward_pre_hooks"] or not state.keys().isdisjoint(METHODS)
        if outside and hooked:
            return f"{_name(root, module)} has a hook or a forward of its own"
        if module.training and not root.training and kind is nn.Dropout and module.p > 0.0:
            return f"the dropout {_name(root, module)} is on"
        for part, parameter in state["_parameters"].items():
            # Others stand in for parameters under torch.func.functional_call and in DataParallel's replicas.
            if parameter is not None and (type(parameter) is not nn.Parameter or parameter.layout != torch.strided):
                return f"{part} of {_name(root, module)} is a {type(parameter).__name__}"
    return None


def _name(root: nn.Module, module: nn.Module) -> str:
    return next(name for name, part in root.named_modules() if part is module) or "the model"


class Network:
    """The parameters of a model that ``why_not_cuda`` has nothing against, as a step reads them: not copies."""

    def __init__(self, model: Model) -> None:
        body, weights = model.transformer, Weights.of(model.transformer)
        self.wte, self.wpe, self.ln_f = (weight.detach() for weight in weights[:3])
        self.layers = [Layer(*(weight.detach() for weight in layer)) for layer in weights.layers]
        self.scales = [block.attn.scale for block in body.h]
        self.head = model.lm_head.weight.detach().T
        self.eps, self.activation = body.config.layer_norm_epsilon, body.config.activation_function
        self.kernel = KERNELS[self.activation]
        self.heads, self.head_dim = body.config.n_head, body.config.head_dim
        self.dtype, self.device = self.wte.dtype, self.wte.device

    def key(self) -> tuple[Any, ...]:
        """What a captured graph has of it: where the weights are, and settings."""
        tensors = [self.head, *Weights(self.wte, self.wpe, self.ln_f, self.layers).each()]
        places = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        return places, tuple(self.scales), self.eps, self.activation, self.heads, self.dtype
