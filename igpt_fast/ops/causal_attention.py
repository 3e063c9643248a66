"""Causal attention over whole sequences: of separate queries, keys and values, or of all three in one tensor."""

from __future__ import annotations

import math
import platform
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import backend, reference
from igpt_fast.backend import OPS, Op
from igpt_fast.ops import dispatch

# On a CPU, in bf16 without tiles, fp32 four times as many: below, of 8 heads of 64 on one thread, what torch has is as
# fast.
LEAST_QUERIES = 32

# Where torch's BLAS multiplies bf16 (its wheels for AArch64), the backward of its attention rewrites what lies past the
# end of its results, and what reads as a NaN with other bits: pytorch/pytorch#156022, mended in torch 2.9.
_TORCH_OVERRUNS = torch.__version__.startswith("2.8.") and platform.machine() == "aarch64"

OPS["causal_attention"] = Op(
    native=("cpu", "cuda"),
    covers="bf16, fp16; head_dim 32, 64, 96, 128; scale 2^-126 or above; no dropout, weights or upcast",
    covers_cpu="fp32 from 128 queries on, bf16 from 32 on, by tiles from 1 on; head_dim 32, 64, 96, 128; scale 2^-126 "
    "or above; no dropout, weights or upcast",
    least_queries_cpu=LEAST_QUERIES,
    otherwise="torch scaled_dot_product_attention; the written-out softmax with output_attentions, upcast, "
    "another scale, or bf16 on AArch64 by torch 2.8, whose own writes past its results",
)
OPS["causal_attention_packed"] = Op(
    native=("cpu", "cuda"),
    covers="what causal_attention's does",
    covers_cpu="what causal_attention's does",
    least_queries_cpu=LEAST_QUERIES,
    otherwise="causal_attention of the three parts",
)

# No kernel: those of causal attention gain by the half that they leave out, and here is nothing to leave out.
OPS["full_attention"] = Op(
    otherwise="torch scaled_dot_product_attention, forward and backward, in bidirectional models (BERT); the "
    "written-out softmax with output_attentions, upcast, another scale, or bf16 on AArch64 by torch 2.8",
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    need_weights: bool = False,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T + causal mask) v``; the queries are the last T_q of T_k positions.

    The kernels take bf16 and, on a GPU, fp16 (fp32 under autocast, which casts as it does for torch's own attention),
    head dimensions of 32, 64, 96 and 128, a ``scale`` of 2^-126 or above, no dropout, no ``upcast``, and return no
    weights; on a CPU they take bf16 and fp32, of some queries at least. The rest is torch's attention, or the
    definition. A kernel reads q, k and v where they are, as long as their last dimension is contiguous and every row
    aligned to 16 bytes, and its output has the memory of a contiguous (B, T_q, H, D), so that the transposition that
    puts heads side by side is free. Its gradients are the same bits at every run.

    For a head it takes about 2 T_q T_k D FLOPs forward where T_q = T_k, 7 T_q T_k D backward (5 by the usual count),
    and moves q, k, v and out once.

    Args:
        q: (B, H, T_q, D), floating point.
        k, v: (B, H, T_k, D), T_k >= T_q, of the dtype of ``q``.
        scale: ``1 / sqrt(D)`` when ``None``.
        key_mask: (B, T_k) bool, True where a key may be seen. A query that sees none gives zero; what stands in
            a masked key, be it NaN, reaches nothing.
        dropout_p: Dropout probability of the softmax.
        upcast: Compute the scores in fp32 too, not only the softmax.
        need_weights: Return the softmax as well (written out, so slower).
        starts: (B,) int32, the first key of each batch row that may be seen (left padding): those before it are as
            if masked. The cheapest mask: tiles before it are skipped.

    Returns:
        (B, H, T_q, D), and the (B, H, T_q, T_k) softmax or ``None``.

    Raises:
        TypeError: Not floating-point tensors, unlike dtypes, a ``key_mask`` that is not bool, ``starts`` not int32.
        ValueError: Shapes that do not fit, two devices, or a ``dropout_p`` outside [0, 1].
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/model.py ``attn``; transformers ``ImageGPTAttention``. Kernels: FlashAttention-2
    (Dao, 2023; arXiv 2307.08691).
    """
    op = "causal_attention"
    _check_attention(op, q, k, v, dropout_p)
    _check_masks(op, q, k.shape[2], key_mask, starts)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = [mask for mask in (key_mask, starts) if mask is not None]
    if not need_weights and not upcast and _use_kernel(op, scale, dropout_p, q, k, v, *masks):
        q, k, v = (_autocast(x) for x in (q, k, v))
        if dispatch.is_plain(q, k, v, *masks):
            return _causal_attention(q, k, v, key_mask, starts, scale)[0], None
        return torch.ops.igpt_fast.causal_attention(q, k, v, key_mask, starts, scale)[0], None
    if starts is not None:
        key_mask = reference.shown_keys(starts, k.shape[2], key_mask)
    if need_weights or upcast:
        how = {"scale": scale, "key_mask": key_mask, "dropout_p": dropout_p, "upcast": upcast}
        return dispatch.product(reference.causal_attention, q, k, v, **how)
    return dispatch.product(_by_torch, q, k, v, scale=scale, key_mask=key_mask, dropout_p=dropout_p), None


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``causal_attention`` without the causal mask, which no kernel computes: every query sees all keys.

    Arguments and results: see there.
    """
    _check_attention("full_attention", q, k, v, dropout_p)
    _check_masks("full_attention", q, k.shape[2], key_mask, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if need_weights or upcast:
        how = {"scale": scale, "key_mask": key_mask, "dropout_p": dropout_p, "upcast": upcast}
        out, weights = dispatch.product(reference.full_attention, q, k, v, **how)
        return out, weights if need_weights else None
    how = {"scale": scale, "key_mask": key_mask, "dropout_p": dropout_p, "causal": False}
    return dispatch.product(_by_torch, q, k, v, **how), None


def causal_attention_packed(
    qkv: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    starts: Tensor | None = None,
) -> Tensor:
    """``causal_attention`` of the T positions of one projection that holds queries, keys and values.

    As ``causal_attention``, but the gradient comes out as one tensor of the layout of ``qkv``, which the kernel
    writes without a copy.

    Args:
        qkv: (B, T, 3, H, D), floating point: queries, keys, values.
        scale, key_mask, dropout_p, upcast, starts: See ``causal_attention``.

    Returns:
        (B, T, H, D), contiguous where the kernel made it.

    Raises:
        TypeError, ValueError, BackendUnavailableError: See ``causal_attention``.
    """
    op = "causal_attention_packed"
    dispatch.check_floating(op, qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; want (B, T, 3, H, D)")
    q, k, v = _heads_of(qkv)
    _check_attention(op, q, k, v, dropout_p)
    _check_masks(op, q, q.shape[2], key_mask, starts)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masks = [mask for mask in (key_mask, starts) if mask is not None]
    if not upcast and _use_kernel(op, scale, dropout_p, qkv, *masks):
        qkv = _autocast(qkv)
        if dispatch.is_plain(qkv, *masks):
            return _causal_attention_packed(qkv, key_mask, starts, scale)[0]
        return torch.ops.igpt_fast.causal_attention_packed(qkv, key_mask, starts, scale)[0]
    return causal_attention(q, k, v, scale, key_mask, dropout_p, upcast, starts=starts)[0].transpose(1, 2)


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, dropout_p: float, causal: bool = True
) -> Tensor:
    """The output by torch's attention, and by the definition where that has no numbers or not all derivatives."""
    define = reference.causal_attention if causal else reference.full_attention
    # Of a smaller scale torch's attention makes NaN; of nothing, up to 2.11, the end of the process; and where all is
    # dropped, cuDNN's, an error.
    one_derivative = scale >= dispatch.LEAST_SCALE and q.numel() != 0 and dropout_p < 1.0
    overruns = _TORCH_OVERRUNS and q.device.type == "cpu" and dispatch.autocast_dtype(q) == torch.bfloat16
    if not one_derivative or overruns or dispatch.derivatives_of_transforms(q, k, v):
        return define(q, k, v, scale, key_mask, dropout_p)[0]
    out = _torch_attention(q, k, v, scale, key_mask, dropout_p, causal)
    # Compiled functions have no second derivative, and the dropped weights are nobody's but torch's.
    if out.requires_grad and dropout_p == 0.0 and dispatch.eager():
        out = _Twice.apply(out, q, k, v, key_mask, scale, define)
    return out


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None, dropout_p: float, causal: bool
) -> Tensor:
    t_q, t_k = q.shape[-2], k.shape[-2]
    # A branch each: compiled for lengths of any size, a comparison is a bool to an ``if`` alone.
    if key_mask is None and causal and t_q == t_k:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    if key_mask is None and (not causal or t_q == 1):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    k, v = reference.mask_keys(k, v, key_mask)
    if causal or key_mask is None:
        visible = reference.visible_keys(t_q, t_k, key_mask, q.device)
    else:
        visible = key_mask[:, None, None, :]
    some = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, dropout_p=dropout_p, scale=scale)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device))


class _Twice(torch.autograd.Function):
    """The output of torch's attention, which can be differentiated once, with the definition's second derivative."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, define: Any
    ) -> Tensor:
        ctx.define = partial(define, scale=scale, key_mask=key_mask)
        ctx.save_for_backward(q, k, v)
        return out.detach()  # no view, which could not be written to

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return dout, *[None] * 6
        tensors = dispatch.differentiate(lambda *qkv: ctx.define(*qkv)[0], ctx.saved_tensors, dout)
        return None, *tensors, None, None, None


def _autocast(tensor: Tensor) -> Tensor:
    return tensor.to(dispatch.autocast_dtype(tensor))


def _use_kernel(op: str, scale: float, dropout_p: float, x: Tensor, *others: Tensor) -> bool:
    """Whether a kernel takes it; the rule is in ``OPS`` in words."""
    if not (x.shape[-1] in dispatch.HEAD_DIMS and dropout_p == 0.0 and dispatch.LEAST_SCALE <= scale < math.inf):
        return False
    dtype, kind = dispatch.autocast_dtype(x), dispatch.kernel_kind(op, x, *others)
    queries = x.shape[1 if op == "causal_attention_packed" else 2]
    return dtype in _dtypes(kind) and not (kind == "cpu" and dispatch.surely(queries < _least_queries(op, dtype)))


def _least_queries(op: str, dtype: torch.dtype) -> int:
    """How many a kernel on the CPU serves at least, of what it is given."""
    if dtype == torch.float32:
        return 4 * backend.OPS[op].least_queries_cpu
    assert backend._C is not None
    return 0 if backend._C.cpu_isa() == "amx" else backend.OPS[op].least_queries_cpu


_least_queries._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dtypes(kind: str | None) -> tuple[torch.dtype, ...]:
    """What kernels of a kind take."""
    own = {"cuda": torch.float16, "cpu": torch.float32}
    return () if kind is None else (torch.bfloat16, own[kind])


def _check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    dispatch.check_floating(op, q=q, k=k, v=v)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; want one dtype")
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"{op}: q, k, v have shapes {shapes}; want (B, H, T_q, D) and twice (B, H, T_k, D)")
    if op != "full_attention" and k.shape[2] < q.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[2]} positions, q {q.shape[2]}; want at least as many")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; want a number in [0, 1]")


def _check_masks(op: str, q: Tensor, t_k: int, key_mask: Tensor | None, starts: Tensor | None) -> None:
    for name, mask, dtype, text, shape in (
        ("key_mask", key_mask, torch.bool, "a bool tensor", (q.shape[0], t_k)),
        ("starts", starts, torch.int32, "an int32 tensor", (q.shape[0],)),
    ):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != dtype:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{op}: {name} is {got}; want {text}")
        if mask.shape != shape:
            want = "(B, T_k)" if name == "key_mask" else "(B,)"
            raise ValueError(f"{op}: {name} has shape {tuple(mask.shape)}; want {want} = {shape}")
        if mask.device != q.device:
            raise ValueError(f"{op}: {name} is on {mask.device}, q on {q.device}; want one device")


def _readable(x: Tensor) -> Tensor:
    """The tensor as the kernel reads it: rows contiguous and aligned to 16 bytes, other strides as they are."""
    per_vector = 16 // x.element_size()
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    whole = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % per_vector == 0 for step in steps)
    return x if whole else dispatch.dense(x)


def _heads_of(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a (B, H, T, D) tensor for the kernel.

    The stride of a dimension of size 1 may be any number, and the kernel forms addresses, which have to be aligned, of
    rows that it does not read.
    """
    batch, head, position = (step if size > 1 else 0 for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return x.data_ptr(), batch, head, position


def _hidden(key_mask: Tensor | None, starts: Tensor | None) -> tuple[list[Tensor], dict[str, int]]:
    """Tensors to keep while the launch is prepared, and what it takes of them."""
    kept, stride = [], 0
    if starts is not None:
        kept.append(starts := starts.contiguous())
    if key_mask is not None:
        key_mask = key_mask if key_mask.stride(-1) == 1 or key_mask.shape[-1] < 2 else key_mask.contiguous()
        kept.append(key_mask)
        stride = key_mask.stride(0)
    return kept, {"starts": dispatch.address(starts), "key_mask": dispatch.address(key_mask), "key_mask_stride": stride}


def _new_heads(like: Tensor, t: int) -> Tensor:
    """(B, H, t, D) with the memory of (B, t, H, D)."""
    b, h, _, d = like.shape
    return like.new_empty_strided((b, h, t, d), (t * h * d, d, h * d, 1))


def _launch(
    direction: str,
    read: dict[str, Tensor],
    written: dict[str, Tensor],
    lse: Tensor,
    key_mask: Tensor | None,
    starts: Tensor | None,
    scale: float,
) -> None:
    """Launches the forward, "fwd", or the backward, "bwd", on (B, H, T, D) tensors by their names."""
    q = read["q"]
    kernels, (b, h, t_q, d) = dispatch.native_kernels("causal_attention", q), q.shape
    function = kernels.function(f"causal_attention_{direction}")
    kept, hidden = _hidden(key_mask, starts)
    tensors = {name: _readable(x) for name, x in read.items()} | written
    sizes = {"batch": b, "heads": h, "t_q": t_q, "t_k": read["k"].shape[2], "head_dim": d, "scale": scale}
    arguments = {name: _place(x) for name, x in tensors.items()} | sizes | hidden | {"lse": lse.data_ptr()}
    arguments["dtype"] = dispatch.DTYPES[q.dtype]
    if kernels.kind == "cpu":
        function(**arguments, place=kernels.place)
    else:
        arguments |= {"device": kernels.device, "stream": kernels.stream}
        if direction == "fwd":
            function(**arguments, rows=-1 if kernels.launching.portable_attention else 0)
        else:
            terms = torch.empty((b, h, t_q, 2), dtype=torch.float32, device=q.device)
            function(**arguments, terms=terms.data_ptr(), portable=kernels.launching.portable_attention)
    del kept


def _launch_fwd(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *masks_and_scale: Any) -> Tensor:
    """Launches the forward into ``out``; gives lse."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _launch("fwd", {"q": q, "k": k, "v": v}, {"out": out}, lse, *masks_and_scale)
    return lse


def _launch_bwd(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    *masks_and_scale: Any,
) -> None:
    """Launches the backward into ``gradients``: of q, k and v."""
    read = dict(zip("qkv", inputs, strict=True)) | {"out": out, "dout": dout}
    _launch("bwd", read, dict(zip(("dq", "dk", "dv"), gradients, strict=True)), lse.contiguous(), *masks_and_scale)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, *masks_and_scale: Any) -> tuple[Tensor, Tensor]:
    out = _new_heads(q, q.shape[2])
    return out, _launch_fwd(q, k, v, out, *masks_and_scale)


def _causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masks_and_scale: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_causal_attention_bwd(dout, q, k)
    _launch_bwd(dout, (q, k, v), out, lse, gradients, *masks_and_scale)
    return gradients


def _causal_attention_packed(qkv: Tensor, *masks_and_scale: Any) -> tuple[Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    out = qkv.new_empty((b, t, h, d))
    return out, _launch_fwd(*_heads_of(_readable(qkv)), out.transpose(1, 2), *masks_and_scale)


def _causal_attention_packed_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *masks_and_scale: Any) -> Tensor:
    dqkv = _fake_causal_attention_packed_bwd(dout, qkv)
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    _launch_bwd(dout, _heads_of(_readable(qkv)), out, lse, _heads_of(dqkv), *masks_and_scale)
    return dqkv


def _fake_causal_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_causal_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q, q.shape[2]), _new_heads(k, k.shape[2]), _new_heads(k, k.shape[2])


def _fake_causal_attention_packed(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, _three, h, d = qkv.shape
    return qkv.new_empty((b, t, h, d)), qkv.new_empty((b, h, t), dtype=torch.float32)


def _fake_causal_attention_packed_bwd(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what was multiplied, the masks, the output and lse, which has no gradient of its own."""
    *tensors, key_mask, starts, ctx.scale = inputs
    ctx.launching = backend.get_launching()  # torch may run the backward in a thread of its own
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, key_mask, starts)


def _differentiate(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    *tensors, out, lse, key_mask, starts = ctx.saved_tensors
    if torch.is_grad_enabled():
        define = partial(reference.causal_attention, scale=ctx.scale, key_mask=key_mask, starts=starts)
        return *dispatch.differentiate(lambda *qkv: define(*qkv)[0], tuple(tensors), dout), None, None, None
    with backend.launching(ctx.launching):
        gradients = torch.ops.igpt_fast.causal_attention_bwd(dout, *tensors, out, lse, key_mask, starts, ctx.scale)
    return *gradients, None, None, None


def _differentiate_packed(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 4
    qkv, out, lse, key_mask, starts = ctx.saved_tensors
    if torch.is_grad_enabled():

        def defined(qkv: Tensor) -> Tensor:
            out, _ = reference.causal_attention(*_heads_of(qkv), ctx.scale, key_mask, starts=starts)
            return out.transpose(1, 2)

        return *dispatch.differentiate(defined, (qkv,), dout), None, None, None
    with backend.launching(ctx.launching):
        dqkv = torch.ops.igpt_fast.causal_attention_packed_bwd(dout, qkv, out, lse, key_mask, starts, ctx.scale)
    return dqkv, None, None, None


def _check_scores(op: str, x: Tensor, rank: int, t_k: int, *masks_and_scale: Any) -> None:
    """What forward and backward ask of the queries, or all three, of the masks and the scale."""
    key_mask, starts, scale = masks_and_scale
    covered = x.dtype in _dtypes(dispatch.native_kind(x)) and x.ndim == rank and x.shape[-1] in dispatch.HEAD_DIMS
    dispatch.check_covered(op, covered and dispatch.LEAST_SCALE <= scale < math.inf, x)
    _check_masks(op, x, t_k, key_mask, starts)


def _check_launch(q: Tensor, k: Tensor, v: Tensor, *masks_and_scale: Any) -> None:
    op, t_k = "causal_attention", k.shape[2] if k.ndim == 4 else 0
    _check_scores(op, q, 4, t_k, *masks_and_scale)
    b, h, t_q, d = q.shape
    dispatch.check_operand(op, "k", k, q, q.dtype, (b, h, max(t_k, t_q), d))
    dispatch.check_operand(op, "v", v, q, q.dtype, k.shape)


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *masks_and_scale: Any
) -> None:
    _check_launch(q, k, v, *masks_and_scale)
    op = "causal_attention_bwd"
    dispatch.check_operand(op, "dout", dout, q, q.dtype, q.shape)
    dispatch.check_operand(op, "out", out, q, q.dtype, q.shape)
    dispatch.check_operand(op, "lse", lse, q, torch.float32, q.shape[:3])


def _check_packed(qkv: Tensor, *masks_and_scale: Any) -> None:
    op, t = "causal_attention_packed", qkv.shape[1] if qkv.ndim == 5 else 0
    _check_scores(op, qkv, 5, t, *masks_and_scale)
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; want (B, T, 3, H, D)")


def _check_packed_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *masks_and_scale: Any) -> None:
    _check_packed(qkv, *masks_and_scale)
    op, (b, t, _, h, d) = "causal_attention_packed_bwd", qkv.shape
    dispatch.check_operand(op, "dout", dout, qkv, qkv.dtype, (b, t, h, d))
    dispatch.check_operand(op, "out", out, qkv, qkv.dtype, (b, t, h, d))
    dispatch.check_operand(op, "lse", lse, qkv, torch.float32, (b, h, t))


dispatch.register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? starts, float scale) -> (Tensor, Tensor)",
    _causal_attention,
    _fake_causal_attention,
    backward=(_save, _differentiate),
    check=_check_launch,
)
dispatch.register(
    "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, "
    "Tensor? starts, float scale) -> (Tensor, Tensor, Tensor)",
    _causal_attention_bwd,
    _fake_causal_attention_bwd,
    check=_check_backward,
)
dispatch.register(
    "causal_attention_packed(Tensor qkv, Tensor? key_mask, Tensor? starts, float scale) -> (Tensor, Tensor)",
    _causal_attention_packed,
    _fake_causal_attention_packed,
    backward=(_save, _differentiate_packed),
    check=_check_packed,
)
dispatch.register(
    "causal_attention_packed_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? key_mask, Tensor? starts, "
    "float scale) -> Tensor",
    _causal_attention_packed_bwd,
    _fake_causal_attention_packed_bwd,
    check=_check_packed_backward,
)
