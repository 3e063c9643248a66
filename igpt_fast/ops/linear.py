"""A linear layer for many rows, as training has them, and its gradients: three products of matrices, one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast import backend, reference
from igpt_fast.backend import OPS, Op
from igpt_fast.ops import dispatch


def _is_faster() -> bool:
    """Whether the kernel is known to be faster than torch's product here.

    It was measured on processors of AMD's, for which MKL has other code than for Intel's. With AVX2 they are level.
    """
    return backend._C is not None and backend._C.by_amd and backend._C.cpu_isa().startswith("avx512")


OPS["linear"] = Op(
    native=("cpu",),
    covers_cpu="fp32 outside autocast and compiled functions",
    otherwise="torch addmm",
    least_cpu=1 << 18 if _is_faster() else backend.NEVER,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight + bias``.

    The kernel does ``2 rows n_in n_out`` FLOPs, which bound it, and twice that in the backward; it adds up in float32
    in one order, so that results depend neither on the number of threads nor on the run. It is as exact where
    ``torch.set_float32_matmul_precision`` would let torch be less so.

    Args:
        x: (..., n_in), floating point.
        weight: (n_in, n_out), as GPT-2's checkpoints have it, or the transpose of an ``nn.Linear``'s.
        bias: (n_out,), or ``None``.

    Returns:
        (..., n_out), dtype of ``x``, or autocast's. Differentiable any number of times.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: Shapes that do not fit, or two devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``conv1d``.
    """
    _check(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not (_covered(*tensors) and dispatch.kernel_kind("linear", *tensors) == "cpu"):
        return reference.linear(x, weight, bias)
    run = _matmul if dispatch.is_plain(*tensors) else torch.ops.igpt_fast.linear
    return run(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dispatch.check_floating("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.ndim != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}; want (n_in, n_out)")
    if x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}; want (..., {weight.shape[0]})")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}; want {tuple(weight.shape[1:])}")


def _covered(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel takes it; the rule is in ``OPS`` in words."""
    if not dispatch.eager() or not x.is_cpu or dispatch.autocast_dtype(x) != torch.float32:
        return False
    return x.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launches the kernel for (rows, n_in) and (n_in, n_out), of which one stride each is 1, or copies of them."""
    (rows, n_in), n_out = x.shape, weight.shape[1]
    if min(rows, n_in, n_out) == 0:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    kernels = dispatch.native_kernels("linear", x)
    x, weight = (t if 1 in t.stride() else t.contiguous() for t in (x, weight))
    out = x.new_empty((rows, n_out))
    bias = dispatch.dense(bias)
    kernels.function("matmul")(
        a=x.data_ptr(),
        a_row=x.stride(0),
        a_column=x.stride(1),
        b=weight.data_ptr(),
        b_row=weight.stride(0),
        b_column=weight.stride(1),
        bias=dispatch.address(bias),
        c=out.data_ptr(),
        m=rows,
        n=n_out,
        k=n_in,
        place=kernels.place,
    )
    return out


def _check_launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dispatch.check_covered("linear", x.is_cpu and x.dtype == torch.float32 and x.ndim == 2, x)
    dispatch.check_operand("linear", "weight", weight, x, torch.float32, (x.shape[1], *weight.shape[1:2]))
    dispatch.check_operand("linear", "bias", bias, x, torch.float32, weight.shape[1:])


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By the same op, which can be differentiated again."""
    x, weight = ctx.saved_tensors
    by_x, by_weight, by_bias = ctx.needs_input_grad
    product = torch.ops.igpt_fast.linear
    dx = product(dout, weight.t(), None) if by_x else None
    dweight = product(x.t(), dout, None) if by_weight else None
    return dx, dweight, dout.sum(0) if by_bias else None


dispatch.register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _matmul,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[1])),
    backward=(lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]), _differentiate),
    check=_check_launch,
)
