"""Causal attention over whole sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import reference
from igpt_fast.ops.dispatch import check_floating


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T + causal mask) v``; the queries are the last T_q of T_k positions.

    Args:
        q: (B, H, T_q, D), floating point.
        k, v: (B, H, T_k, D), T_k >= T_q, of the dtype of ``q``.
        scale: ``1 / sqrt(D)`` when ``None``.
        key_mask: (B, T_k) bool, True where a key may be seen. A query that sees none gives zero; what stands in
            a masked key, be it NaN, reaches nothing.
        dropout_p: Dropout probability of the softmax.
        upcast: Compute the scores in fp32 too, not only the softmax.
        need_weights: Return the softmax as well (written out, so slower).

    Returns:
        (B, H, T_q, D), and the (B, H, T_q, T_k) softmax or ``None``.

    Raises:
        TypeError: Not floating-point tensors, unlike dtypes, or a ``key_mask`` that is not bool.
        ValueError: Shapes that do not fit, two devices, or a ``dropout_p`` outside [0, 1].

    Source: openai/image-gpt src/model.py ``attn``; transformers ``ImageGPTAttention``.
    """
    _check_attention(q, k, v, key_mask, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    t_q, t_k = q.shape[-2], k.shape[-2]
    if need_weights or upcast:
        return reference.causal_attention(q, k, v, scale, key_mask, dropout_p, upcast)
    if key_mask is None and (t_q == t_k or t_q == 1):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=bool(t_q == t_k), scale=scale)
        return out, None
    k, v = reference.mask_keys(k, v, key_mask)
    visible = reference.visible_keys(t_q, t_k, key_mask, q.device)
    some = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, dropout_p=dropout_p, scale=scale)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device)), None


def _check_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dropout_p: float) -> None:
    op = "causal_attention"
    check_floating(op, q=q, k=k, v=v)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; want one dtype")
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"{op}: q, k, v have shapes {shapes}; want (B, H, T_q, D) and twice (B, H, T_k, D)")
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[2]} positions, q {q.shape[2]}; want at least as many")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; want a number in [0, 1]")
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"{op}: key_mask is {got}; want a bool tensor")
    want = (q.shape[0], k.shape[2])
    if key_mask.shape != want:
        raise ValueError(f"{op}: key_mask has shape {tuple(key_mask.shape)}; want (B, T_k) = {want}")
    if key_mask.device != q.device:
        raise ValueError(f"{op}: key_mask is on {key_mask.device}, q on {q.device}; want one device")
