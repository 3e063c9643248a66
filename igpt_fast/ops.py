"""The public ops: checks, dispatch to the fastest implementation that applies, and their registration with torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import reference

# Activations by their config name; the right-hand sides agree with reference.py (tests/ops/test_activation.py).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": reference.quick_gelu,
    "gelu": F.gelu,
    "gelu_new": reference.gelu_tanh,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """iGPT's norm: ``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, not mean-centred.

    Args:
        x: (..., n_embd), floating point. The statistics are in fp32.
        weight: (n_embd,).
        eps: Added to the mean square.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: ``weight`` does not fit ``x``.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}; want {tuple(x.shape[-1:])}, x's last one")
    return reference.rms_norm(x, weight, eps)


def activation(x: Tensor, name: str) -> Tensor:
    """The activation a configuration names, element by element.

    Args:
        x: Any shape, floating point.
        name: A key of ``ACTIVATIONS``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: An unknown name.

    Source: transformers ``ACT2FN``; ``quick_gelu`` is openai/image-gpt's ``gelu``.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: unknown name {name!r}; want one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name](x)


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
        key_mask: (B, T_k) bool, True where a key may be seen. A query that sees none gives zero.
        dropout_p: Dropout probability of the softmax.
        upcast: Compute the scores in fp32 too, not only the softmax.
        need_weights: Return the softmax as well (written out, so slower).

    Returns:
        (B, H, T_q, D), and the (B, H, T_q, T_k) softmax or ``None``.

    Raises:
        ValueError: Shapes that do not fit.

    Source: openai/image-gpt src/model.py ``attn``; transformers ``ImageGPTAttention``.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"causal_attention: q, k, v have shapes {shapes}; want (B, H, T_q, D) and twice (B, H, T_k, D)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    t_q, t_k = q.shape[-2], k.shape[-2]
    if t_k < t_q:
        raise ValueError(f"causal_attention: {t_q} queries but {t_k} keys; want at least as many keys")
    if key_mask is not None and key_mask.shape != (q.shape[0], t_k):
        raise ValueError(f"causal_attention: key_mask has shape {tuple(key_mask.shape)}; want {(q.shape[0], t_k)}")
    if need_weights or upcast:
        return reference.causal_attention(q, k, v, scale, key_mask, dropout_p, upcast)
    if key_mask is None and (t_q == t_k or t_q == 1):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=t_q > 1, scale=scale)
        return out, None
    visible = reference.visible_keys(t_q, t_k, key_mask, q.device)
    some = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, dropout_p=dropout_p, scale=scale)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device)), None
