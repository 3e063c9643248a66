"""transformers' ImageGPT made fast in place: the same object, computed by this package's ops and engines.

What there is of transformers goes on working: its ``generate`` with beams, processors, scores and stopping criteria,
``save_pretrained``, Trainer, PEFT, pipelines, ``copy.deepcopy``, pickles, ``torch.compile`` and ``torch.export``. What
this package does not serve transformers computes, as before: ``accelerated`` says what, and why. Needs the extra
``hf``; transformers is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from igpt_fast import kin
from igpt_fast.engines.choice import choose
from igpt_fast.hf.twins import forget, model_twin

Module = TypeVar("Module", bound=nn.Module)


class Served(NamedTuple):
    """A part of a model, and who computes it.

    Attributes:
        part: A module's name; ``generate``: what transformers' ``generate`` chooses token by token, greedily or at
            random; ``forward``: a forward pass in eval mode without gradients. With the model's name before it where
            that is inside another module.
        by: "ops": the module by this package's ops. "cpu", "cuda": as a whole, by the engine of that name. "modules":
            each module as its own row says. "transformers".
        reason: Why it is nothing faster.
    """

    part: str
    by: str
    reason: str | None


def accelerate(model: Module) -> Module:
    """Lets this package compute a model of transformers, in place.

    The modules of the model get other classes, which are subclasses of their own; nothing else changes, neither in the
    model nor outside of it. Norms, attention and activations run on this package's ops, forward and backward, and with
    them training; a forward pass in eval mode, and ``generate`` of one image or several, greedily or with sampling, on
    its engines where these serve the model: see ``accelerated``. Where the processor does not multiply bfloat16 or
    float16 (``igpt env``), products of ``Conv1D`` are made in float32, under autocast too, and those of the head where
    its weights are of such numbers. Masks that hide something, attention weights, cross-attention, what else runs under
    autocast, and what is exported or traced are left to transformers, as are modules that are hooked, patched or
    replaced; a second call sees to what has been put in or patched since. An engine keeps a packed copy of the weights
    on the CPU while the model lives.

    Numbers agree with transformers' up to rounding. A ``StaticCache``, with which transformers' ImageGPT silently gives
    wrong results, raises ValueError.

    Args:
        model: transformers' ``ImageGPTModel``, ``ImageGPTForCausalImageModeling`` or
            ``ImageGPTForImageClassification``, or a module that holds one, of PEFT, say.

    Returns:
        ``model``, the same object.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
        TypeError: There is no ImageGPT of transformers in ``model``.
    """
    modules = _modules("accelerate", model)
    for module, kind in _served(modules, model):
        module.__class__ = kind if _why_left(modules, kind, module) else modules.SERVED[kind]
    return model


def restore(model: Module) -> Module:
    """Takes ``accelerate`` back: every module has the class that it had, and its numbers. Returns ``model``.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
        TypeError: There is no ImageGPT of transformers in ``model``.
    """
    modules = _modules("restore", model)
    for module, kind in _served(modules, model):
        module.__class__ = kind
        forget(module)
    return model


def accelerated(model: nn.Module) -> list[Served]:
    """Who computes the parts of a model of transformers as it is now, a row each, and why it is nothing faster.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
        TypeError: There is no ImageGPT of transformers in ``model``.
    """
    modules = _modules("accelerated", model)
    return [row for name, module in model.named_modules() for row in _rows(modules, name, module)]


def _modules(caller: str, model: Any) -> Any:
    """``igpt_fast.hf.modules``, which imports transformers, once there is something for it in ``model``."""
    kin.library("transformers", "igpt_fast.hf.accelerate")
    from igpt_fast.hf import modules

    network = modules.theirs.ImageGPTModel
    if not isinstance(model, nn.Module) or not any(isinstance(module, network) for module in model.modules()):
        kind = type(model)
        raise TypeError(
            f"{caller}: model is a {kind.__module__}.{kind.__qualname__}, with no ImageGPT of transformers in it; want"
            " its ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, or a module around one"
        )
    return modules


def _served(modules: Any, model: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """The modules that have, or could have, a class of ours, and transformers' class of each."""
    kinds = modules.SERVED.items()
    kinds = {**{ours: theirs for theirs, ours in kinds}, **{theirs: theirs for theirs, _ in kinds}}
    drawing = modules.theirs.ImageGPTForCausalImageModeling
    heads = [getattr(module, "lm_head", None) for module in model.modules() if isinstance(module, drawing)]
    for module in model.modules():
        head = type(module) is not nn.Linear or (module.weight.itemsize == 2 and any(module is head for head in heads))
        if type(module) in kinds and head:
            yield module, kinds[type(module)]


def _why_left(modules: Any, kind: type, module: Any) -> str | None:
    """Why ``accelerate`` leaves a module, of this class of transformers, as it is."""
    theirs = modules.theirs
    if kind not in modules.SERVED:
        return f"it is a {kind.__module__}.{kind.__qualname__}"
    if modules.patched(kind):
        return f"the forward of transformers' {kind.__name__} has been replaced"
    if kind is theirs.ImageGPTAttention:
        if module.is_cross_attention:
            return "it is cross-attention"
        mask = module.bias[0, 0]  # (n_positions, n_positions)
        if not mask.is_meta and not torch.equal(mask, torch.ones_like(mask).tril_()):
            return "its mask is not the causal one"
    return None


def _why_not(modules: Any, module: Any) -> str | None:
    """Why transformers computes a module now."""
    if type(module) not in modules.SERVED.values():
        return _why_left(modules, type(module), module) or "it is not accelerated"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if isinstance(module, modules.theirs.ImageGPTMLP) and module.activation is None:
        return f"its activation, a {type(module.act).__qualname__}, has no kernel, or something is around it"
    return None


def _rows(modules: Any, name: str, module: Any) -> Iterator[Served]:
    theirs = modules.theirs
    inside = f"{name}." if name else ""
    if isinstance(module, theirs.ImageGPTForCausalImageModeling):
        yield Served(f"{inside}generate", *_generate(modules, module))
    elif isinstance(module, theirs.ImageGPTModel):
        yield Served(f"{inside}forward", *_forward(modules, module))
    elif isinstance(module, theirs.ImageGPTLayerNorm | theirs.ImageGPTAttention | theirs.ImageGPTMLP):
        reason = _why_not(modules, module)
        yield Served(name, "transformers" if reason else "ops", reason)


def _generate(modules: Any, model: Any) -> tuple[str, str | None]:
    twin = _why_not(modules, model) or model_twin(model)
    return ("modules", twin) if isinstance(twin, str) else (choose(twin).engine.name, None)


@torch.no_grad()
def _forward(modules: Any, network: Any) -> tuple[str, str | None]:
    twin = _why_not(modules, network)
    if twin is None:
        tokens = torch.zeros(1, min(8, network.config.n_positions), dtype=torch.int64, device=network.device)
        twin = modules.forward_twin(network, tokens)
    return ("modules", twin) if isinstance(twin, str) else ("cpu", None)
