"""Our models on the parameters of transformers' modules, for the engines, which know ours alone.

A twin holds the parameters of an accelerated model, the very objects, and none of its modules. It is kept weakly beside
the model, and made anew when another parameter stands in one's place; copies, pickles and state dicts know nothing of
it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from igpt_fast.checkpoint.pretrained import Uninitialised
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.choice import choose
from igpt_fast.engines.network import Weights, why_not_modules, why_not_settings
from igpt_fast.hf.bridge import twin_of
from igpt_fast.model import ImageGPTForCausalImageModeling, ImageGPTModel

# transformers' network, or the model with its head -> ours.
_networks: WeakKeyDictionary[nn.Module, ImageGPTModel] = WeakKeyDictionary()
_models: WeakKeyDictionary[nn.Module, ImageGPTForCausalImageModeling] = WeakKeyDictionary()


def network_twin(body: Any) -> ImageGPTModel | str:
    """Ours of an accelerated ``ImageGPTModel`` whose modules ``why_not_modules`` has nothing against, in eval mode; or
    why there is none.
    """
    try:
        weights, twin = Weights.of(body), _networks.get(body)
        if twin is None or [*map(id, Weights.of(twin).each())] != [*map(id, weights.each())]:
            config = ImageGPTConfig.of(body.config, "accelerate")
            config.activation_function = body.h[0].mlp.activation
            twin = _networks[body] = twin_of(ImageGPTModel, config, body, "accelerate", same=True).eval()
        # What transformers' modules compute is what they were told when they were made, whatever a configuration says.
        told: Any = SimpleNamespace(config=twin.config, wte=body.wte, wpe=body.wpe, h=body.h, ln_f=body.ln_f)
        if any(theirs.attn.scale != ours.attn.scale for theirs, ours in zip(body.h, twin.h, strict=True)):
            return "the scale of the scores is not the configuration's"
        return why_not_settings(told, weights) or twin
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return f"it is not the network that its configuration says: {error}"


def model_twin(model: Any) -> ImageGPTForCausalImageModeling | str:
    """Ours of an accelerated ``ImageGPTForCausalImageModeling`` that a native decoder serves now; or why none does."""
    if model.training:
        return "the model is in training mode"
    if model._compiled_call_impl is not None:
        return "torch compiles what a call of the model does"
    if reason := why_not_modules(model):
        return reason
    network = network_twin(model.transformer)
    if isinstance(network, str):
        return network
    twin = _models.get(model)
    if twin is None or twin.transformer is not network or twin.lm_head is not model.lm_head:
        with torch.device("meta"), Uninitialised():
            twin = ImageGPTForCausalImageModeling(ImageGPTConfig(n_layer=1)).eval()
        twin.config, twin.transformer, twin.lm_head = network.config, network, model.lm_head
        _models[model] = twin
    return choose(twin).reason or twin


def forget(model: nn.Module) -> None:
    """Lets the twin of a model go."""
    _networks.pop(model, None)
    _models.pop(model, None)
