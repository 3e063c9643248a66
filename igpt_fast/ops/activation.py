"""Activations: element by element, with an optional bias added before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import LEAST_CPU, OPS, Op
from igpt_fast.ops import dispatch

OPS |= dict.fromkeys(
    ("quick_gelu", "gelu_tanh", "gelu_erf"),
    Op(
        native=("cpu", "cuda"),
        covers="fp32, bf16, fp16; x and bias of one dtype; a last dimension that is a multiple of 8",
        covers_cpu="fp32, bf16; x and bias of one dtype",
        least_cpu=LEAST_CPU,
        fuses=True,
    ),
)
OPS["activation"] = Op(
    native=("cpu", "cuda"),
    covers="the names that mean quick_gelu, gelu_tanh or gelu_erf, as those cover it",
    covers_cpu="the names that mean quick_gelu, gelu_tanh or gelu_erf, as those cover it; torch gelu for 'gelu' "
    "without a bias",
    least_cpu=LEAST_CPU,
    fuses=True,
)

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
    "laplace": reference.laplace,
    "linear": lambda x: x,
    "relu2": lambda x: F.relu(x).square(),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    **{name: getattr(F, name) for name in ("hardswish", "leaky_relu", "mish", "relu", "relu6", "silu")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh")},
}

# The op with a kernel that a name means.
KERNELS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu_erf",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DEFINITIONS = {"quick_gelu": reference.quick_gelu, "gelu_tanh": reference.gelu_tanh, "gelu_erf": reference.gelu_erf}


def quick_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z * sigmoid(1.702 z)`` of ``z = x + bias``, element by element.

    The kernel moves 2 tensors of the size of ``x`` forward and 3 backward; about 10 (20) FLOPs an element.

    Args:
        x: (..., n), floating point; any shape without ``bias``.
        bias: (n,), floating point, or ``None``.

    Returns:
        Shape and dtype of ``x``. The kernel rounds once, the sum with ``bias`` included.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: ``bias`` does not fit ``x``, or two devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``gelu``.
    """
    _check("quick_gelu", x, bias)
    return _apply("quick_gelu", x, bias, reference.quick_gelu)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`` of ``z = x + bias``; all else as ``quick_gelu``.

    Source: "Gaussian Error Linear Units" (Hendrycks & Gimpel, 2016).
    """
    _check("gelu_tanh", x, bias)
    return _apply("gelu_tanh", x, bias, reference.gelu_tanh)


def gelu_erf(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``0.5 z (1 + erf(z / sqrt(2)))`` of ``z = x + bias``; all else as ``quick_gelu``.

    Source: "Gaussian Error Linear Units" (Hendrycks & Gimpel, 2016).
    """
    _check("gelu_erf", x, bias)
    return _apply("gelu_erf", x, bias, reference.gelu_erf)


def activation(x: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
    """The activation a configuration names, element by element.

    Args:
        x: Any shape, floating point; (..., n) with ``bias``.
        name: A key of ``ACTIVATIONS``. Those that mean ``quick_gelu``, ``gelu_tanh`` or ``gelu_erf`` run its kernel.
        bias: (n,), floating point: added before; or ``None``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: An unknown name, ``bias`` does not fit ``x``, or two devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: transformers ``ACT2FN``; ``quick_gelu`` is openai/image-gpt's ``gelu``.
    """
    _check("activation", x, bias)
    function = ACTIVATIONS[check_activation(name)]

    def otherwise(x: Tensor, bias: Tensor | None) -> Tensor:
        return function(x) if bias is None else function(x + bias).to(x.dtype)

    if name not in KERNELS:
        return otherwise(x, bias)
    return _apply(KERNELS[name], x, bias, otherwise, fast_on_cpu=name == "gelu" and bias is None)


def check_activation(name: str) -> str:
    """The name of an activation.

    Raises:
        ValueError: It is not a key of ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        own = " (it has parameters of its own)" if name in ("prelu", "xielu") else ""
        raise ValueError(f"activation: name is {name!r}{own}; want one of {', '.join(ACTIVATIONS)}")
    return name


def _check(op: str, x: Tensor, bias: Tensor | None) -> None:
    dispatch.check_floating(op, x=x, **({} if bias is None else {"bias": bias}))
    if bias is None:
        return
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (); want at least one dimension, with bias")
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; want {tuple(x.shape[-1:])}, x's last one")


def _apply(
    op: str,
    x: Tensor,
    bias: Tensor | None,
    otherwise: Callable[[Tensor, Tensor | None], Tensor],
    fast_on_cpu: bool = False,
) -> Tensor:
    """Runs the kernel of ``op`` where it may, else ``otherwise``, which on the CPU may be as fast."""
    tensors = (x,) if bias is None else (x, bias)
    kind = dispatch.kernel_kind(op, *tensors)
    if not _covered(kind, x, bias) or (kind == "cpu" and fast_on_cpu):
        return otherwise(x, bias)
    if dispatch.is_plain(*tensors):
        return _forward(op, x, bias)
    return getattr(torch.ops.igpt_fast, op)(x, bias)


def _covered(kind: str | None, x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels of a kind take it; the rule is in ``OPS`` in words."""
    if kind is None or (bias is not None and bias.dtype != x.dtype):
        return False
    if kind == "cpu":
        return x.dtype in dispatch.CPU_DTYPES and x.ndim > 0 and x.shape[-1] > 0
    return x.dtype in dispatch.DTYPES and x.ndim > 0 and 8 <= x.shape[-1] < 2**31 and x.shape[-1] % 8 == 0


def _forward(op: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """Launches the forward."""
    kernels = dispatch.native_kernels(op, x)
    x, bias, n = dispatch.dense(x), dispatch.dense(bias), x.shape[-1]
    out = torch.empty_like(x)
    if kernels.kind == "cuda" or x.numel():
        kernels.function("activation_fwd")(
            x=x.data_ptr(),
            bias=dispatch.address(bias),
            out=out.data_ptr(),
            rows=x.numel() // n,
            n=n,
            activation=dispatch.ACTIVATION_NUMBERS[op],
            dtype=dispatch.DTYPES[x.dtype],
            place=kernels.place,
        )
    return out


def _backward(op: str, dout: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launches the backward: the gradients of x and of bias, which is empty where there is none."""
    kernels = dispatch.native_kernels(op, x)
    dout, x, bias = dispatch.dense(dout), dispatch.dense(x), dispatch.dense(bias)
    dx, n = torch.empty_like(x), x.shape[-1]
    rows, dbias = x.numel() // n, x.new_empty(0 if bias is None else n)
    parts = 0 if bias is None or kernels.kind == "cpu" else kernels.module.activation_bwd_parts(rows, n)
    partial = x.new_empty((parts, n), dtype=torch.float32) if parts else None
    if kernels.kind == "cuda" or rows or bias is not None:
        tensors = {"dout": dout, "x": x, "bias": bias, "dx": dx, "dbias": dbias, "partial": partial}
        numbers = {"activation": dispatch.ACTIVATION_NUMBERS[op], "dtype": dispatch.DTYPES[x.dtype]}
        kernels.launch("activation_bwd", tensors, rows=rows, n=n, parts=parts, **numbers)
    return dx, dbias


def _check_launch(op: str, x: Tensor, bias: Tensor | None, dout: Tensor | None = None) -> None:
    dispatch.check_covered(op, _covered(dispatch.native_kind(x), x, bias), x)
    dispatch.check_operand(op, "bias", bias, x, x.dtype, x.shape[-1:])
    dispatch.check_operand(op, "dout", dout, x, x.dtype, x.shape)


def _fake_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _differentiate(op: str, ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        dx, dbias = dispatch.differentiate(DEFINITIONS[op], (x, bias), dout)
    else:
        dx, dbias = getattr(torch.ops.igpt_fast, f"{op}_bwd")(dout, x, bias)
    return dx, None if bias is None else dbias


for _op in DEFINITIONS:
    dispatch.register(
        f"{_op}(Tensor x, Tensor? bias) -> Tensor",
        partial(_forward, _op),
        _fake_forward,
        backward=(lambda ctx, inputs, output: ctx.save_for_backward(*inputs), partial(_differentiate, _op)),
        check=partial(_check_launch, _op),
    )
    dispatch.register(
        f"{_op}_bwd(Tensor dout, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
        partial(_backward, _op),
        lambda dout, x, bias: (_fake_forward(x, bias), x.new_empty(0 if bias is None else x.shape[-1])),
        check=lambda dout, x, bias, op=_op: _check_launch(op, x, bias, dout),
    )
