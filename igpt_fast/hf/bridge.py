"""The bridge to transformers: its ImageGPT with our parameters, and ours with its, neither a second copy.

For what only transformers has (beam search, contrastive search, its trainers and exporters). Needs the extra ``hf``;
transformers is imported by the first call.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from igpt_fast import kin
from igpt_fast.checkpoint.pretrained import Uninitialised
from igpt_fast.config import ImageGPTConfig
from igpt_fast.model import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
    ImageGPTPreTrainedModel,
)

__all__ = ["from_transformers", "to_transformers"]

_CLASSES = (ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel)


def to_transformers(model: ImageGPTPreTrainedModel) -> Any:
    """transformers' model of the same class name, on the storage of our parameters.

    A change of a parameter in place (a step of training) shows in both models; gradients, ``requires_grad`` from then
    on, and what moves or converts one of them (``to``, ``half``) do not reach the other. Devices, dtypes and the mode
    (training or not) are those of ``model``, the configuration is a copy.

    Of a classifier with ``classify_with_sos``, a warning says that transformers' must be fed SOS by hand.

    Of a model with classes, transformers' ``generate`` is told not to draw the tokens of the classes
    (``generation_config.suppress_tokens``); ``config.n_classes`` is there, and means nothing to transformers.

    Args:
        model: An ``ImageGPTModel``, ``ImageGPTForCausalImageModeling`` or ``ImageGPTForImageClassification``.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
        TypeError: Another model.
        ValueError: The model has other parameters than its class (an adapter, say, or quantized layers), or its
            attention is bidirectional, which transformers does not have.
    """
    transformers = kin.library("transformers", "igpt_fast.hf.bridge")
    name = _class_name(model, _CLASSES, "to_transformers")
    model.config.check_causal("to_transformers")
    if model.config.classify_with_sos and name == "ImageGPTForImageClassification":
        begin = model.config.sos_token_id
        warnings.warn(
            f"to_transformers: tuned with SOS in front, which theirs does not add; feed it {begin}", stacklevel=2
        )
    config = transformers.ImageGPTConfig.from_dict({**model.config.to_dict(), "problem_type": None})
    config.problem_type = model.config.problem_type  # whatever it is: its check is for files
    theirs = twin_of(getattr(transformers, name), config, model, "to_transformers")
    _fill_masks(theirs)
    if model.config.n_classes and theirs.can_generate():
        colours, sos = model.config.n_colours, model.config.sos_token_id
        theirs.generation_config.suppress_tokens = list(range(colours, sos))
    return theirs


def from_transformers(model: nn.Module) -> Any:
    """Our model of the same class name, on the storage of the parameters of transformers' one.

    As ``to_transformers``, the other way round.

    Args:
        model: transformers' ``ImageGPTModel``, ``ImageGPTForCausalImageModeling`` or
            ``ImageGPTForImageClassification``.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
        TypeError: Another model.
        ValueError: The model has other parameters than its class, or a configuration that ours refuses: tied
            embeddings, cross-attention.
    """
    transformers = kin.library("transformers", "igpt_fast.hf.bridge")
    theirs = tuple(getattr(transformers, cls.__name__) for cls in _CLASSES)
    name = _class_name(model, theirs, "from_transformers")
    config = ImageGPTConfig.of(model.config, "from_transformers")
    ours = next(cls for cls in _CLASSES if cls.__name__ == name)
    return twin_of(ours, config, model, "from_transformers")


def _class_name(model: object, classes: tuple[type, ...], caller: str) -> str:
    """The name of the class, of those that both sides have, that the model is of."""
    for cls in classes:
        if isinstance(model, cls):
            return cls.__name__
    kind, where = type(model), classes[0].__module__.rpartition(".")[0]
    names = ", ".join(cls.__name__ for cls in classes)
    raise TypeError(f"{caller}: model is a {kind.__module__}.{kind.__qualname__}; want one of {where}'s {names}")


def twin_of(cls: type[nn.Module], config: Any, model: Any, caller: str, same: bool = False) -> Any:
    """A ``cls`` on the parameters of ``model``, in its mode; ``same``: the very objects, not others on their storage.
    Buffers of its own stay on the meta device.
    """
    config.dtype = model.dtype
    with torch.device("meta"), Uninitialised():
        twin = cls(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    wanted = {name: tuple(value.shape) for name, value in twin.named_parameters(remove_duplicate=False)}
    if differing := sorted({name for name, _ in shapes.items() ^ wanted.items()}):
        which = f"{differing[0]} and {len(differing) - 1} more"
        raise ValueError(f"{caller}: {which} are not the parameters that the configuration says")
    for name, value in parameters.items():
        place, _, own = name.rpartition(".")
        shared = value if same else nn.Parameter(value.detach(), value.requires_grad)
        twin.get_submodule(place).register_parameter(own, shared)
    return twin.train(model.training)


def _fill_masks(theirs: nn.Module) -> None:
    """transformers' causal masks, which are no part of a checkpoint; the layers of a device share the memory of one."""
    masks: dict[torch.device, torch.Tensor] = {}
    for module in theirs.modules():
        for name, buffer in module.named_buffers(recurse=False):
            device = next(module.parameters()).device
            if name == "masked_bias":  # of transformers 4, whose forward does without
                module._buffers[name] = torch.tensor(-1e4, device=device)
                continue
            if name != "bias" or buffer.ndim != 4:
                raise RuntimeError(f"transformers' {type(module).__name__} has an unknown buffer {name!r}")
            if device not in masks:
                masks[device] = torch.ones(buffer.shape, dtype=buffer.dtype, device=device).tril_()
            module._buffers[name] = masks[device].detach()  # a buffer of its own, on the same memory
