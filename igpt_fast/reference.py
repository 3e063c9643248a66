"""The specification: one plain-PyTorch function per op.

Each function is the definition that the C++ and CUDA twins are tested against (evaluated in float64) and
the fallback where no twin applies. They aim at being read; ``igpt_fast.ops`` adds checks and dispatch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, softmax and losses keep their statistics in fp32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension; iGPT's norm, not mean-centred.

    The statistics and the product are in fp32 and rounded once, so an fp16 input of magnitude 300 does not
    overflow as it does in transformers.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    wide = x.to(_statistics_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``. Source: openai/image-gpt src/model.py ``gelu``."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``. Source: Hendrycks & Gimpel, 2016."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def gelu_erf(x: Tensor) -> Tensor:
    """``0.5 x (1 + erf(x / sqrt(2)))``. Source: Hendrycks & Gimpel, 2016."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def visible_keys(t_q: int, t_k: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which key each query may see: (T_q, T_k), or (B, 1, T_q, T_k) with a ``key_mask`` of (B, T_k).

    The queries are the last ``t_q`` of ``t_k`` positions, as in a prefill behind a cache.
    """
    causal = torch.ones(t_q, t_k, dtype=torch.bool, device=device).tril(t_k - t_q)
    return causal if key_mask is None else causal & key_mask[:, None, None, :]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + causal mask) v``, and the softmax itself (after dropout, as transformers has it).

    q: (B, H, T_q, D); k, v: (B, H, T_k, D); key_mask: (B, T_k) bool, True where the key may be seen.
    A query that sees no key at all (inside left padding) gives zero. The softmax is in fp32; ``upcast``
    computes the scores in fp32 as well.

    Source: openai/image-gpt src/model.py ``attn``; transformers ``ImageGPTAttention``.
    """
    wide = _statistics_dtype(q.dtype)
    visible = visible_keys(q.shape[-2], k.shape[-2], key_mask, q.device)
    if upcast:
        with torch.autocast(q.device.type, enabled=False):
            scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    else:
        scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    scores = scores.to(wide).masked_fill(~visible, torch.finfo(wide).min)
    weights = (torch.softmax(scores, dim=-1) * visible).to(v.dtype)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return weights @ v, weights


def quantize(x: Tensor, clusters: Tensor) -> Tensor:
    """Index of the nearest cluster: ``argmin_k sum_c (x_c - clusters_kc)^2``, the lowest index on ties.

    x: (..., 3) uint8, a value v standing for ``v / 127.5 - 1`` evaluated in float64, or a float dtype, evaluated
    in it. clusters: (K, 3) float32. Returns (...,) int64. Runs over the clusters, so that no (N, K)
    intermediate exists. transformers expands ``a^2 - 2ab + b^2`` instead, which rounds differently near ties.

    Source: openai/image-gpt src/utils.py ``color_quantize``.
    """
    if x.dtype == torch.uint8:
        x = x.double() / 127.5 - 1.0
    best = torch.full(x.shape[:-1], torch.inf, dtype=x.dtype, device=x.device)
    index = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    for k, cluster in enumerate(clusters.to(x.dtype)):
        r, g, b = (x - cluster).square().unbind(-1)
        distance = (r + g) + b
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        index = torch.where(nearer, k, index)
    return index


def dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    """Colours of the tokens as uint8: ``rint(127.5 (clusters[token] + 1))`` clipped to 0..255.

    tokens: (...) integer; clusters: (K, 3) float in [-1, 1]. Returns (..., 3) uint8.

    Source: the sampling code of openai/image-gpt src/run.py and of transformers' documentation.
    """
    palette = torch.round(127.5 * (clusters.to(torch.float32) + 1.0)).clamp(0, 255).to(torch.uint8)
    return palette[tokens.long()]
