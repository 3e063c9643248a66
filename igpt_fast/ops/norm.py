"""iGPT's norm and the mean-centred one, each with an optional residual addition before it."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import LEAST_CPU, OPS, Kernels, Op
from igpt_fast.ops import dispatch

OPS["rms_norm"] = Op(
    native=("cpu", "cuda"),
    covers="fp32, bf16, fp16, each tensor its own; n_embd a multiple of 8 to 8192",
    covers_cpu="fp32, bf16, each tensor its own",
    least_cpu=LEAST_CPU // 2,
    fuses=True,
)
OPS["layer_norm"] = Op(
    native=("cpu", "cuda"),
    covers="fp32, bf16, fp16; all of one dtype; n_embd a multiple of 8 to 8192",
    covers_cpu="fp32, bf16; weight and bias of either; in fp32 as fast as torch's layer_norm, and more exact",
    least_cpu=LEAST_CPU // 2,
    fuses=True,
)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None, dtype: torch.dtype | None = None
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """iGPT's norm: ``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, not mean-centred.

    The kernel moves 2 (4 with ``residual``) tensors of the size of ``x`` forward, and 3 (4) backward; it converts
    between fp32 and 16 bits as it goes.

    Args:
        x: (..., n_embd), floating point. The statistics are in fp32.
        weight: (n_embd,).
        eps: Added to the mean square.
        residual: Of the shape of ``x``, and of its dtype or a wider one, as is fp32 beside bf16: added to it first,
            and the sum, rounded to the residual's dtype, is normalised.
        dtype: Of the norm, that of what is normalised when ``None``: the same bits, and gradients', as by a conversion
            afterwards, which a kernel saves where it is from fp32 to 16 bits (the CPU's: bf16).

    Returns:
        Shape of ``x``, in ``dtype``. With ``residual`` a pair: the norm and the sum, which has the residual's dtype.

    Raises:
        TypeError: Not floating-point tensors, or a ``residual`` that is not as wide as ``x``.
        ValueError: ``weight`` or ``residual`` does not fit ``x``, two devices, or a negative ``eps``.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    return _norm("rms_norm", x, weight, None, eps, residual, dtype)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean-centred norm: ``(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias`` over the last dimension.

    Bytes moved: as ``rms_norm``.

    Args:
        x: (..., n_embd), floating point. The statistics are in fp32.
        weight: (n_embd,).
        bias: (n_embd,), or ``None``.
        eps: Added to the variance.
        residual: As ``rms_norm``'s.

    Returns:
        Shape and dtype of ``x``; with ``residual`` a pair, the norm and the sum, of the residual's dtype.

    Raises:
        TypeError: Not floating-point tensors, or a ``residual`` that is not as wide as ``x``.
        ValueError: ``weight``, ``bias`` or ``residual`` does not fit ``x``, two devices, or a negative ``eps``.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: "Layer Normalization" (Ba, Kiros & Hinton, 2016).
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, None)


def _norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Either op, of which rms_norm has no bias, and layer_norm no dtype."""
    _check_norm(op, x, weight, bias, eps, residual)
    dtype = (x if residual is None else residual).dtype if dtype is None else dtype
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if not _covered(op, dispatch.kernel_kind(op, *tensors), x, weight, bias, residual):
        total = x if residual is None else x + residual
        parameters = (weight,) if op == "rms_norm" else (weight, bias)
        out = getattr(reference, op)(total, *parameters, eps).to(dtype)
    elif dispatch.is_plain(*tensors):
        out, total = _forward(op, x, residual, weight, bias, eps, dtype)
    else:
        settings = (weight, eps, dtype) if op == "rms_norm" else (weight, bias, eps)
        if residual is None:
            out = getattr(torch.ops.igpt_fast, op)(x, *settings)
        else:
            out, total = getattr(torch.ops.igpt_fast, f"add_{op}")(x, residual, *settings)
    return out if residual is None else (out, total)


def _covered(
    op: str, kind: str | None, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> bool:
    """Whether the kernels of a kind take it; the rule is in ``OPS`` in words."""
    if kind is None or (bias is not None and bias.dtype != weight.dtype):
        return False
    dtypes = [x.dtype, weight.dtype, x.dtype if residual is None else residual.dtype]
    if kind == "cpu":
        return all(dtype in dispatch.CPU_DTYPES for dtype in dtypes) and x.shape[-1] > 0
    own = op == "rms_norm" or all(dtype == x.dtype for dtype in dtypes)
    fits = x.shape[-1] % 8 == 0 and 8 <= x.shape[-1] <= 8192
    return own and fits and all(dtype in dispatch.DTYPES for dtype in dtypes)


def _check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> None:
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    dispatch.check_floating(op, **{name: tensor for name, tensor in given.items() if tensor is not None})
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (); want at least one dimension")
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps}; want 0 or above")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; want {tuple(x.shape[-1:])}, x's last one")
    if residual is None:
        return
    if torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
        raise TypeError(f"{op}: residual is {residual.dtype}; want {x.dtype}, x's, or a wider one")
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; want {tuple(x.shape)}, x's")


def _forward(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches the forward: the norm, in ``dtype``, and what was normalised."""
    kernels = dispatch.native_kernels(op, x)
    x, weight, n = dispatch.dense(x), dispatch.dense(weight), x.shape[-1]
    residual, bias = dispatch.dense(residual), dispatch.dense(bias)
    stream = x if residual is None else residual
    out = torch.empty_like(x, dtype=_written(op, kernels, stream, dtype))
    total = None if residual is None else torch.empty_like(residual)
    if kernels.kind == "cuda" or x.numel():
        kernels.function("norm_fwd")(
            x=x.data_ptr(),
            residual=dispatch.address(residual),
            weight=weight.data_ptr(),
            bias=dispatch.address(bias),
            sum=dispatch.address(total),
            out=out.data_ptr(),
            rows=x.numel() // n,
            n_embd=n,
            eps=eps,
            centred=op == "layer_norm",
            dtype=dispatch.DTYPES[stream.dtype],
            x_dtype=dispatch.DTYPES[x.dtype],
            weight_dtype=dispatch.DTYPES[weight.dtype],
            out_dtype=dispatch.DTYPES[out.dtype],
            place=kernels.place,
        )
    return out.to(dtype), x if total is None else total


def _backward(
    op: str,
    dout: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    branch: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Launches the backward: the gradients of what was normalised, in the dtype ``branch`` as well if one is given, of
    the weight and, of layer_norm, of a bias.
    """
    kernels, centred, n = dispatch.native_kernels(op, x), op == "layer_norm", x.shape[-1]
    dout, dsum = dispatch.dense(dout.to(_written(op, kernels, x, dout.dtype))), dispatch.dense(dsum)
    x, weight, rows = dispatch.dense(x), dispatch.dense(weight), x.numel() // n
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if centred else None
    parts = 0 if kernels.kind == "cpu" else kernels.module.norm_bwd_parts(rows)
    partial = x.new_empty((1 + centred, parts, n), dtype=torch.float32) if parts else None
    tensors = {"dout": dout, "dsum": dsum, "x": x, "weight": weight, "partial": partial}
    written = x.dtype if branch is None else _written(op, kernels, x, branch)
    dbranch = None if written == x.dtype else torch.empty_like(x, dtype=written)
    tensors |= {"dx": dx, "dbranch": dbranch, "dweight": dweight, "dbias": dbias}
    shape = {"rows": rows, "n_embd": n, "centred": centred, "parts": parts, "eps": eps}
    dtypes = {"dtype": x.dtype, "x_dtype": written, "weight_dtype": weight.dtype, "out_dtype": dout.dtype}
    kernels.launch("norm_bwd", tensors, **shape, **{name: dispatch.DTYPES[dtype] for name, dtype in dtypes.items()})
    branches = () if branch is None else (dx.to(branch) if dbranch is None else dbranch,)
    return dx, *branches, dweight, *(() if dbias is None else (dbias,))


def _written(op: str, kernels: Kernels, stream: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes, and reads the gradient of, where ``dtype`` is wanted: of fp32 it may make 16 bits."""
    narrow = dtype == torch.bfloat16 or (dtype == torch.float16 and kernels.kind == "cuda")
    converts = kernels.kind == "cpu" or op == "rms_norm"
    return dtype if converts and narrow and stream.dtype == torch.float32 else stream.dtype


def _check_launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dout: Tensor | None = None,
    dsum: Tensor | None = None,
    branch: torch.dtype | None = None,
) -> None:
    covered = x.ndim > 0 and _covered(op, dispatch.native_kind(x), x, weight, bias, residual)
    dispatch.check_covered(op, covered, x)
    shape, last = x.shape, x.shape[-1:]
    dispatch.check_operand(op, "weight", weight, x, None, last)
    if bias is not None:
        dispatch.check_operand(op, "bias", bias, x, None, last)
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        dispatch.check_operand(op, "residual", residual, x, wide, shape)
    if dout is not None:
        dispatch.check_operand(op, "dout", dout, x, None, shape)  # it is converted
    if dsum is not None:
        dispatch.check_operand(op, "dsum", dsum, x, x.dtype, shape)
    if branch is not None and (x.dtype, branch) not in ((torch.float32, t) for t in (torch.bfloat16, torch.float16)):
        raise TypeError(f"{op}: branch is {branch} beside {x.dtype}; want 16 bits beside torch.float32")


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what was normalised, x or the sum, the weight and, of layer_norm, the bias."""
    x, ctx.added = (inputs[0], 1) if isinstance(output, Tensor) else (output[1], 2)
    ctx.branch = inputs[0].dtype
    weights = [value for value in inputs[ctx.added :] if value is None or isinstance(value, Tensor)]
    ctx.eps = inputs[ctx.added + len(weights)]
    ctx.save_for_backward(x, *weights)
    ctx.set_materialize_grads(False)  # no tensor of zeros for an output that was not used


def _differentiate(op: str, ctx: Any, dout: Tensor | None, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Of x and of what was added to it, of the weight and, of layer_norm, of the bias."""
    x, weight, *bias = ctx.saved_tensors
    parameters: list[Tensor | None] = []
    branch: Tensor | None = None
    if dout is None:
        dx = dsum
    elif torch.is_grad_enabled():
        inputs = x, weight, *bias, ctx.eps
        dx, *parameters = dispatch.differentiate(getattr(reference, op), inputs, dout.to(x.dtype))
        dx = dsum if dx is None else dx if dsum is None else dx + dsum
    elif ctx.branch != x.dtype and op == "rms_norm":
        dx, branch, *parameters = torch.ops.igpt_fast.add_rms_norm_bwd(dout, dsum, x, weight, ctx.eps, ctx.branch)
    else:
        dx, *parameters = getattr(torch.ops.igpt_fast, f"{op}_bwd")(dout, dsum, x, weight, ctx.eps)
        parameters = parameters[:1] if bias == [None] else parameters
    if branch is None and dx is not None:
        branch = dx.to(ctx.branch)
    found = [branch, *[dx] * (ctx.added - 1), *parameters]
    return *found, *[None] * (len(ctx.needs_input_grad) - len(found))


dispatch.register(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    lambda x, weight, eps, dtype: _forward("rms_norm", x, None, weight, None, eps, dtype)[0],
    lambda x, weight, eps, dtype: _like(x, dtype),
    backward=(_save, partial(_differentiate, "rms_norm")),
    check=lambda x, weight, *_: _check_launch("rms_norm", x, weight),
)
dispatch.register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps, dtype: _forward("rms_norm", x, residual, weight, None, eps, dtype),
    lambda x, residual, weight, eps, dtype: (_like(x, dtype), _like(residual)),
    backward=(_save, partial(_differentiate, "rms_norm")),
    check=lambda x, residual, weight, *_: _check_launch("rms_norm", x, weight, residual=residual),
)
dispatch.register(
    "rms_norm_bwd(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    partial(_backward, "rms_norm"),
    lambda dout, dsum, x, weight, eps: (_like(x), _like(weight)),
    check=lambda dout, dsum, x, weight, _: _check_launch("rms_norm", x, weight, dout=dout, dsum=dsum),
)
dispatch.register(
    "add_rms_norm_bwd(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, float eps, ScalarType branch)"
    " -> (Tensor, Tensor, Tensor)",
    partial(_backward, "rms_norm"),
    lambda dout, dsum, x, weight, eps, branch: (_like(x), _like(x, branch), _like(weight)),
    check=lambda dout, dsum, x, weight, _, branch: _check_launch(
        "rms_norm", x, weight, dout=dout, dsum=dsum, branch=branch
    ),
)
dispatch.register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: _forward("layer_norm", x, None, weight, bias, eps, x.dtype)[0],
    lambda x, weight, bias, eps: _like(x),
    backward=(_save, partial(_differentiate, "layer_norm")),
    check=lambda x, weight, bias, _: _check_launch("layer_norm", x, weight, bias),
)
dispatch.register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: _forward("layer_norm", x, residual, weight, bias, eps, residual.dtype),
    lambda x, residual, weight, bias, eps: (_like(residual), _like(residual)),
    backward=(_save, partial(_differentiate, "layer_norm")),
    check=lambda x, residual, weight, bias, _: _check_launch("layer_norm", x, weight, bias, residual),
)
dispatch.register(
    "layer_norm_bwd(Tensor dout, Tensor? dsum, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    partial(_backward, "layer_norm"),
    lambda dout, dsum, x, weight, eps: (_like(x), _like(weight), _like(weight)),
    check=lambda dout, dsum, x, weight, _: _check_launch("layer_norm", x, weight, dout=dout, dsum=dsum),
)
