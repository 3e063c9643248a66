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
    return reference.rms_norm(x, weight, eps)


def activation(x: Tensor, name: str) -> Tensor:
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    t_q, t_k = q.shape[-2], k.shape[-2]
    if need_weights or upcast:
        return reference.causal_attention(q, k, v, scale, key_mask, dropout_p, upcast)
    if key_mask is None and (t_q == t_k or t_q == 1):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=t_q > 1, scale=scale)
        return out, None
    visible = reference.visible_keys(t_q, t_k, key_mask, q.device)
    some = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, dropout_p=dropout_p, scale=scale)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device)), None
