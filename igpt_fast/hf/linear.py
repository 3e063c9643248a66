"""The linear layers of a model as ``torch.nn.Linear``, which is what quantizers look for."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from igpt_fast.model.layers import Conv1D

M = TypeVar("M", bound=nn.Module)


def linear_layers(model: M) -> M:
    """The model, its ``Conv1D`` layers replaced by ``nn.Linear`` on the same memory, transposed.

    torchao's ``quantize_`` and others look for ``nn.Linear`` and would change the head alone. What the model computes
    stays as it is; engines that read the weights decline it from then on, so it pays for what is quantized, not for
    itself. Its parameters have other shapes than a checkpoint's: save the model before, not after.

    Args:
        model: Changed in place.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(module.weight.detach().T, module.weight.requires_grad)
                linear.bias = module.bias
                setattr(parent, name, linear.train(module.training))
    return model
