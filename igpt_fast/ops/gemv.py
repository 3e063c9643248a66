"""A linear layer for few rows, with what comes before and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import OPS, Op
from igpt_fast.ops import dispatch

OPS["gemv"] = Op(
    native=("cuda",),
    covers="1 to 64 rows without gradient; bf16, fp16, all of one dtype; n_in and n_out multiples of 8; "
    "a weight with a contiguous dimension",
    otherwise="torch linear",
)

MAX_ROWS = 64


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(rms_norm(x) @ weight + bias) + residual``, every part but the product optional.

    One kernel where ``x`` has 1 to 64 rows, as in decoding: it reads the weight once, ``n_in n_out`` elements, which
    bound it, and does ``2 rows n_in n_out`` floating-point operations. It computes all of it in float32, the norm too,
    and rounds once, where the expression of torch's ops that runs elsewhere rounds after each of them.

    Args:
        x: (..., n_in), floating point.
        weight: (n_in, n_out), of the dtype of ``x``: contiguous, as transformers' Conv1D has it, or the transpose of a
            contiguous one, as ``linear.weight.T``; the kernel takes slices of either as they are.
        bias: (n_out,), of the dtype of ``x``.
        norm_weight: (n_in,): ``x`` goes through ``rms_norm`` with it first.
        eps: Of the norm.
        activation: ``"quick_gelu"``, ``"gelu_tanh"``, ``"gelu_erf"`` or ``None``.
        residual: (..., n_out): added at the end.

    Returns:
        (..., n_out), dtype of ``x``. Differentiable: with a gradient to be recorded, torch's ops run.

    Raises:
        TypeError: Not floating-point tensors, or a weight or bias of another dtype outside autocast.
        ValueError: Shapes that do not fit, two devices, a negative ``eps``, or another activation.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``conv1d``, ``norm``, ``gelu``.
    """
    _check(x, weight, eps, activation, bias=bias, norm_weight=norm_weight, residual=residual)
    tensors = [tensor for tensor in (x, weight, bias, norm_weight, residual) if tensor is not None]
    if _covered(x, weight, tensors) and dispatch.use_kernel("gemv", *tensors):
        run = _gemv if dispatch.is_plain(*tensors) else torch.ops.igpt_fast.gemv
        return run(x, weight, bias, norm_weight, residual, activation, eps)
    return reference.gemv(x, weight, bias, norm_weight, eps, activation, residual)


def _covered(x: Tensor, weight: Tensor, tensors: list[Tensor]) -> bool:
    """Whether the kernel takes it; the rule is in ``OPS`` in words."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or any(tensor.dtype != x.dtype for tensor in tensors):
        return False
    n_in, n_out = weight.shape
    if n_in % 8 or n_out % 8 or min(n_in, n_out) < 8:
        return False
    return 1 <= x.numel() // n_in <= MAX_ROWS and _layout(weight) is not None


def _layout(weight: Tensor) -> tuple[bool, int] | None:
    """Whether the weight is transposed, and how far apart its rows, or columns, are; ``None`` for other strides."""
    n_in, n_out = weight.shape
    first, second = weight.stride()
    if second == 1 and first % 8 == 0 and first >= n_out:
        return False, first
    if first == 1 and second % 8 == 0 and second >= n_in:
        return True, second
    return None


def _check(x: Tensor, weight: Tensor, eps: float, activation: str | None, **optional: Tensor | None) -> None:
    dispatch.check_floating("gemv", x=x, weight=weight, **{name: t for name, t in optional.items() if t is not None})
    for name, tensor in (("weight", weight), ("bias", optional["bias"])):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"gemv: {name} is {tensor.dtype}; want {x.dtype}, x's")
    if weight.ndim != 2:
        raise ValueError(f"gemv: weight has shape {tuple(weight.shape)}; want (n_in, n_out)")
    n_in, n_out = weight.shape
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"gemv: x has shape {tuple(x.shape)}; want (..., {n_in})")
    wanted = {"bias": (n_out,), "norm_weight": (n_in,), "residual": (*x.shape[:-1], n_out)}
    for name, tensor in optional.items():
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"gemv: {name} has shape {tuple(tensor.shape)}; want {wanted[name]}")
    if not eps >= 0.0:
        raise ValueError(f"gemv: eps is {eps}; want 0 or above")
    if activation not in dispatch.ACTIVATION_NUMBERS:
        names = ", ".join(repr(name) for name in dispatch.ACTIVATION_NUMBERS)
        raise ValueError(f"gemv: activation is {activation!r}; want one of {names}")


def _gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, residual: Tensor | None, *settings: Any
) -> Tensor:
    """Launches the kernel."""
    kernels = dispatch.native_kernels("gemv", x)
    (activation, eps), given = settings, (weight, bias, norm_weight)
    if weight.data_ptr() % 16:
        weight = weight.clone()
    layout = _layout(weight)
    assert layout is not None
    (transposed, distance), (n_in, n_out) = layout, weight.shape
    x, bias = dispatch.dense(x), dispatch.dense(bias)
    norm_weight, residual = dispatch.dense(norm_weight), dispatch.dense(residual)
    # The kernel reads these before it waits: copies that the launch before has made it would miss.
    as_given = all(tensor is before for tensor, before in zip((weight, bias, norm_weight), given, strict=True))
    dependent = kernels.dependent if as_given else 0
    out = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype, device=x.device)
    kernels.module.gemv_cuda(
        x=x.data_ptr(),
        weight=(weight.data_ptr(), distance),
        bias=dispatch.address(bias),
        norm_weight=dispatch.address(norm_weight),
        residual=dispatch.address(residual),
        out=out.data_ptr(),
        rows=x.numel() // n_in,
        n_in=n_in,
        n_out=n_out,
        transposed=transposed,
        eps=eps,
        activation=dispatch.ACTIVATION_NUMBERS[activation],
        dtype=dispatch.DTYPES[x.dtype],
        dependent=dependent,
        place=kernels.place,
    )
    return out


def _check_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
) -> None:
    _check(x, weight, eps, activation, bias=bias, norm_weight=norm_weight, residual=residual)
    tensors = [tensor for tensor in (x, weight, bias, norm_weight, residual) if tensor is not None]
    with torch.no_grad():
        dispatch.check_covered("gemv", _covered(x, weight, tensors), x)


dispatch.register(
    "gemv(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? residual, str? activation, float eps)"
    " -> Tensor",
    _gemv,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[1])),
    check=_check_launch,
)
