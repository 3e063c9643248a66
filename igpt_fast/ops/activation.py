"""Activations: element by element, with an optional bias before."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import reference
from igpt_fast.ops.dispatch import check_floating

# transformers' ACT2FN but for "prelu" and "xielu", which have parameters of their own.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": reference.quick_gelu,
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "gelu_accurate": reference.gelu_tanh,
    "gelu_fast": reference.gelu_tanh,
    "gelu_new": reference.gelu_tanh,
    "gelu_python": reference.gelu_erf,
    "gelu_python_tanh": reference.gelu_tanh,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": reference.laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(x: Tensor, name: str) -> Tensor:
    """The activation a configuration names, element by element.

    Args:
        x: Any shape, floating point.
        name: A key of ``ACTIVATIONS``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: An unknown name.

    Source: transformers ``ACT2FN``; ``quick_gelu`` is openai/image-gpt's ``gelu``.
    """
    check_floating("activation", x=x)
    return ACTIVATIONS[check_activation(name)](x)


def check_activation(name: str) -> str:
    """The name of an activation.

    Raises:
        ValueError: It is not a key of ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        own = " (it has parameters of its own)" if name in ("prelu", "xielu") else ""
        raise ValueError(f"activation: name is {name!r}{own}; want one of {', '.join(ACTIVATIONS)}")
    return name
