"""iGPT's norm, with an optional residual addition before it."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.ops.dispatch import DTYPES, address, check_floating, cuda_kernels, dense, is_plain, register, use_kernel


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """iGPT's norm: ``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, not mean-centred.

    Args:
        x: (..., n_embd), floating point. The statistics are in fp32.
        weight: (n_embd,).
        eps: Added to the mean square.
        residual: Of shape and dtype of ``x``: added to it first, and the sum, rounded to the dtype, is normalised.

    Returns:
        Shape and dtype of ``x``. With ``residual`` a pair: the norm and the sum.

    Raises:
        TypeError: Not floating-point tensors, or a ``residual`` of another dtype.
        ValueError: ``weight`` or ``residual`` does not fit ``x``, two devices, or a negative ``eps``.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    _check_norm("rms_norm", x, weight, eps, residual)
    others = () if residual is None else (residual,)
    if _covered(x, weight) and use_kernel("rms_norm", x, weight, *others):
        if residual is None:
            return _rms_norm(x, weight, eps) if is_plain(x, weight) else torch.ops.igpt_fast.rms_norm(x, weight, eps)
        return torch.ops.igpt_fast.add_rms_norm(x, residual, weight, eps)
    if residual is None:
        return reference.rms_norm(x, weight, eps)
    total = x + residual
    return reference.rms_norm(total, weight, eps), total


def _covered(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes it; the rule is in ``backend.OPS`` in words."""
    return x.dtype == weight.dtype and x.dtype in DTYPES and x.shape[-1] % 8 == 0 and 8 <= x.shape[-1] <= 8192


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    tensors = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    check_floating(op, **tensors)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (); want at least one dimension")
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps}; want 0 or above")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; want {tuple(x.shape[-1:])}, x's last one")
    if residual is None:
        return
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual is {residual.dtype}; want {x.dtype}, x's")
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; want {tuple(x.shape)}, x's")


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Launches the forward."""
    kernels = cuda_kernels("rms_norm", x)
    x, weight, residual = dense(x), dense(weight), None if residual is None else dense(residual)
    out, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    tensors = map(address, (x, residual, weight, total, out))
    kernels.module.rms_norm_fwd_cuda(*tensors, _rows(x), x.shape[-1], eps, DTYPES[x.dtype], *kernels.place)
    return out, total


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, None, weight, eps)[0]


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = _forward(x, residual, weight, eps)
    assert total is not None
    return out, total


def _rms_norm_bwd(dout: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launches the backward: the gradients of what was normalised, and of the weight."""
    kernels = cuda_kernels("rms_norm", x)
    dout, x, weight, dsum = dense(dout), dense(x), dense(weight), None if dsum is None else dense(dsum)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    parts = kernels.module.rms_norm_bwd_parts(_rows(x))
    partial = torch.empty((parts, x.shape[-1]), dtype=torch.float32, device=x.device)
    tensors = map(address, (dout, dsum, x, weight, dx, dweight, partial))
    kernels.module.rms_norm_bwd_cuda(*tensors, _rows(x), x.shape[-1], parts, eps, DTYPES[x.dtype], *kernels.place)
    return dx, dweight


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm(x, weight, eps), _fake_rms_norm(x, weight, eps)


def _fake_rms_norm_bwd(
    dout: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm(x, weight, eps), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what was normalised: x, or the sum."""
    *_, weight, ctx.eps = inputs
    ctx.save_for_backward(inputs[0] if isinstance(output, Tensor) else output[1], weight)


def _differentiate(ctx: Any, dout: Tensor, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = torch.ops.igpt_fast.rms_norm_bwd(dout, dsum, x, weight, ctx.eps)
    return dx, dweight, None


def _differentiate_add(ctx: Any, dout: Tensor, dsum: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, _ = _differentiate(ctx, dout, dsum)
    return dx, dx, dweight, None


register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    _fake_rms_norm,
    backward=(_save, _differentiate),
)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    _fake_add_rms_norm,
    backward=(_save, _differentiate_add),
)
register(
    "rms_norm_bwd(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_bwd,
    _fake_rms_norm_bwd,
)
