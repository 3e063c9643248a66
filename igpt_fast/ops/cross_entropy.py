"""The loss: cross-entropy over the last dimension, in nats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import LEAST_CPU, OPS, Op
from igpt_fast.ops import dispatch

OPS["cross_entropy"] = Op(
    native=("cpu", "cuda"),
    covers="fp32, bf16, fp16; K to 65536",
    covers_cpu="fp32, bf16",
    least_cpu=4 * LEAST_CPU,  # torch's is three ops at most
    fuses=True,
)

_TWO = torch.Size((2,))  # numbers a row that the forward keeps
REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``-log softmax(logits)[label]`` in nats over the last dimension; torch's, of logits in fp32.

    The kernel reads the logits once forward, and reads them and writes their gradient backward; it keeps 8 bytes a row.

    Args:
        logits: (..., K), floating point, K >= 1; computed in fp32 (fp64 in fp64). An entry may be ``-inf``.
        labels: (...) int64. A label that is neither in 0..K-1 nor ``ignore_index`` is an error: on the CPU an
            ``IndexError`` (the reference on a CUDA device: an assertion there); the CUDA kernel, which cannot raise,
            gives a loss of NaN for its row, and so for a mean or sum, and a gradient of zero.
        ignore_index: Rows with this label give 0 and count for nothing.
        reduction: ``"mean"`` over the rows that count (NaN of none), ``"sum"`` or ``"none"``.

    Returns:
        fp32 (fp64 for fp64): (), or the shape of ``labels`` for ``"none"``. On a CUDA device the kernel's count never
        passes through the host.

    Raises:
        TypeError: ``logits`` are not floating point, ``labels`` not int64, or ``ignore_index`` no integer.
        ValueError: The shapes do not fit, two devices, or another ``reduction``.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: torch.nn.functional.cross_entropy.
    """
    _check(logits, labels, ignore_index, reduction)
    if not _covered(dispatch.kernel_kind("cross_entropy", logits, labels), logits):
        return reference.cross_entropy(logits, labels, ignore_index, reduction)
    if dispatch.is_plain(logits, labels):
        return _forward(logits, labels, ignore_index, reduction)[0]
    return torch.ops.igpt_fast.cross_entropy(logits, labels, ignore_index, reduction)[0]


def _check(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    dispatch.check_floating("cross_entropy", logits=logits)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"cross_entropy: labels is {got}; want a tensor of int64")
    if labels.device != logits.device:
        raise ValueError(f"cross_entropy: labels is on {labels.device}, logits on {logits.device}; want one device")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits.shape)}; want (..., K) with K >= 1")
    if labels.shape != logits.shape[:-1]:
        want = tuple(logits.shape[:-1])
        raise ValueError(f"cross_entropy: labels has shape {tuple(labels.shape)}; want {want}, logits' but the last")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"cross_entropy: ignore_index is {ignore_index!r}; want an integer")
    if reduction not in REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction is {reduction!r}; want one of {', '.join(REDUCTIONS)}")


def _covered(kind: str | None, logits: Tensor) -> bool:
    """Whether the kernel of a kind takes it; the rule is in ``OPS`` in words."""
    if kind == "cpu":
        return logits.dtype in dispatch.CPU_DTYPES
    return kind is not None and logits.dtype in dispatch.DTYPES and logits.shape[-1] <= 65536


def _forward(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward: the loss, how many rows count (empty for "none"), and each row's part for the backward."""
    kernels = dispatch.native_kernels("cross_entropy", logits)
    logits, labels = dispatch.dense(logits), labels.contiguous()
    rows, k, each = labels.numel(), logits.shape[-1], reduction == "none"
    loss, count, statistics = _fake_forward(logits, labels, ignore_index, reduction)
    cpu = kernels.kind == "cpu"
    if cpu and each and rows == 0:
        return loss, count, statistics
    losses = loss if each else loss.new_empty(rows) if cpu else None  # a GPU sums them up as they come
    parts = 0 if cpu else kernels.module.cross_entropy_parts(rows)
    partial = loss.new_empty((parts, 2)) if parts else None
    kernels.function("cross_entropy_fwd")(
        logits=logits.data_ptr(),
        labels=labels.data_ptr(),
        losses=dispatch.address(losses),
        loss=0 if each else loss.data_ptr(),
        count=0 if each else count.data_ptr(),
        statistics=statistics.data_ptr(),
        rows=rows,
        k=k,
        ignore_index=ignore_index,
        mean=reduction == "mean",
        partial=dispatch.address(partial),
        parts=parts,
        dtype=dispatch.DTYPES[logits.dtype],
        place=kernels.place,
    )
    return loss, count, statistics


def _backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, statistics: Tensor, count: Tensor | None, ignore_index: int
) -> Tensor:
    """Launches the backward: the gradient of logits. ``count`` divides it, where the loss was a mean."""
    kernels = dispatch.native_kernels("cross_entropy", logits)
    dloss, logits, labels = dispatch.dense(dloss), dispatch.dense(logits), labels.contiguous()
    statistics = dispatch.dense(statistics)
    dlogits = torch.empty_like(logits)
    tensors = {"dloss": dloss, "logits": logits, "labels": labels, "statistics": statistics, "count": count}
    sizes = {"rows": labels.numel(), "k": logits.shape[-1], "dtype": dispatch.DTYPES[logits.dtype]}
    settings = {"for_each": dloss.shape == labels.shape, "ignore_index": ignore_index}
    kernels.launch("cross_entropy_bwd", tensors | {"dlogits": dlogits}, **sizes, **settings)
    return dlogits


def _check_launch(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    op = "cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; want one of {', '.join(REDUCTIONS)}")
    covered = logits.ndim > 0 and logits.shape[-1] > 0
    dispatch.check_covered(op, covered and _covered(dispatch.native_kind(logits), logits), logits)
    dispatch.check_operand(op, "labels", labels, logits, torch.int64, logits.shape[:-1])


def _check_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, statistics: Tensor, count: Tensor | None, ignore_index: int
) -> None:
    _check_launch(logits, labels, ignore_index, "mean")
    op, shape = "cross_entropy_bwd", labels.shape
    dispatch.check_operand(op, "dloss", dloss, logits, torch.float32, shape if dloss.ndim else ())
    dispatch.check_operand(op, "statistics", statistics, logits, torch.float32, shape + _TWO)
    dispatch.check_operand(op, "count", count, logits, torch.float32, (1,))


def _fake_forward(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    each = reduction == "none"
    loss = logits.new_empty(labels.shape if each else (), dtype=torch.float32)
    count = logits.new_empty((0,) if each else (1,), dtype=torch.float32)
    return loss, count, logits.new_empty((*labels.shape, 2), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index, ctx.reduction = inputs
    _, count, statistics = output
    ctx.mark_non_differentiable(count, statistics)
    ctx.set_materialize_grads(False)  # no tensors of zeros for those two
    ctx.save_for_backward(logits, labels, statistics, count)


def _differentiate(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    if dloss is None:
        return None, None, None, None
    logits, labels, statistics, count = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = logits, labels, ctx.ignore_index, ctx.reduction
        return dispatch.differentiate(reference.cross_entropy, inputs, dloss)[0], None, None, None
    divisor = count if ctx.reduction == "mean" else None
    dlogits = torch.ops.igpt_fast.cross_entropy_bwd(dloss, logits, labels, statistics, divisor, ctx.ignore_index)
    return dlogits, None, None, None


dispatch.register(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, str reduction) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=(_save, _differentiate),
    check=_check_launch,
)
dispatch.register(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor statistics, Tensor? count, int ignore_index)"
    " -> Tensor",
    _backward,
    lambda dloss, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    check=_check_backward,
)
