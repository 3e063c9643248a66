"""The pieces of an iGPT: norm, linear layer, attention, MLP, block; named as in transformers' state dicts."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast import ops, reference
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.cache import Cache
from igpt_fast.engines.network import plain
from igpt_fast.ops.dispatch import LEAST_SCALE, autocast_dtype


@plain
class ImageGPTLayerNorm(nn.Module):
    """iGPT's norm: root mean square, not mean-centred, weight only. See ``ops.rms_norm``."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))  # (n_embd,)

    @overload
    def forward(self, x: Tensor, residual: None = None, dtype: torch.dtype | None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, residual: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x``, in ``dtype``; with ``residual``, of the sum, and the sum in the residual's dtype."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps, dtype=dtype)  # (..., n_embd)
        x = x.to(residual.dtype)  # (..., n_embd), what is added to the residual
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, dtype=dtype)  # (..., n_embd) twice


@plain
class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as in GPT-2's checkpoints."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # (n_in, n_out)
        self.bias = nn.Parameter(torch.zeros(n_out))  # (n_out,)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)  # (B T, n_out)
        return y.view(*x.shape[:-1], self.weight.shape[1])  # (B, T, n_out)


@plain
class ImageGPTAttention(nn.Module):
    """Self-attention, causal or bidirectional, with packed query, key and value projections."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.layer_idx = layer_idx
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.upcast = config.reorder_and_upcast_attn
        self.bidirectional = config.bidirectional
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        # Never called, the op applies it; a module so that code which sets every nn.Dropout's p reaches it.
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, cache: Cache | None, past: int, key_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        b, t, d = x.shape  # B, T, n_embd
        qkv = self.c_attn(x).view(b, t, 3, self.n_head, d // self.n_head)  # (B, T, 3, H, D)
        dropout_p = self.attn_dropout.p if self.attn_dropout.training else 0.0
        if cache is None and not need_weights and not self.bidirectional:
            out = ops.causal_attention_packed(qkv, self.scale, key_mask, dropout_p, self.upcast)  # (B, T, H, D)
            return self.resid_dropout(self.c_proj(out.reshape(b, t, d))), None  # (B, T, n_embd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H, T_past + T, D)
            if k.shape[2] != past + t:
                # transformers' StaticCache hands out its whole buffer, unwritten positions included.
                raise ValueError(
                    f"past_key_values: {type(cache).__name__} returned {k.shape[2]} positions after {past} + {t};"
                    " use igpt_fast.StaticCache or igpt_fast.DynamicCache"
                )
        # (B, H, T, D) and, where they are wanted, (B, H, T, T_past + T)
        attend = _full_attention if self.bidirectional else ops.causal_attention
        out, weights = attend(q, k, v, self.scale, key_mask, dropout_p, self.upcast, need_weights)
        out = self.c_proj(out.transpose(1, 2).reshape(b, t, d))  # heads side by side: (B, T, n_embd)
        return self.resid_dropout(out), weights


def _full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_mask: Tensor | None,
    dropout_p: float,
    upcast: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """``ops.causal_attention`` without the causal mask: by torch's attention, or the definition where that has none."""
    if need_weights or upcast or not scale >= LEAST_SCALE or q.numel() == 0 or dropout_p == 1.0:
        out, weights = reference.full_attention(q, k, v, scale, key_mask, dropout_p, upcast)
        return out, weights if need_weights else None
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale), None  # (B, H, T, D)
    k, v = reference.mask_keys(k, v, key_mask)
    some = key_mask.any(dim=-1)[:, None, None, None]  # of none torch's makes NaN
    visible = key_mask[:, None, None, :] | ~some  # (B, 1, 1, T_k)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(~some, 0.0), None


@plain
class ImageGPTMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner)
        self.activation = ops.check_activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        inner = ops.activation(self.c_fc(x), self.activation)  # (B, T, n_inner)
        return self.dropout(self.c_proj(inner))  # (B, T, n_embd)


@plain
class ImageGPTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = ImageGPTAttention(config, layer_idx)
        self.ln_2 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = ImageGPTMLP(config)

    def forward(
        self, x: Tensor, cache: Cache | None, past: int, key_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = autocast_dtype(x)  # as the linear layers would convert it
        normed = self.ln_1(x, dtype=dtype)  # (B, T, n_embd)
        attended, weights = self.attn(normed, cache, past, key_mask, need_weights)  # (B, T, n_embd), (B, H, T, T_k)
        normed, x = self.ln_2(attended, residual=x, dtype=dtype)  # of x + attended, and that: (B, T, n_embd) each
        return x + self.mlp(normed), weights  # (B, T, n_embd)
