"""The pieces of an iGPT: norm, linear layer, attention, MLP, block; named as in transformers' state dicts."""

from __future__ import annotations

import functools
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_fast import backend, kin, ops
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.cache import Cache
from igpt_fast.engines.encoder_cache import encoder_states, keep_encoder_states
from igpt_fast.engines.network import plain
from igpt_fast.ops.dispatch import autocast_dtype, product


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
        if torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
            x = x.to(residual.dtype)  # (..., n_embd), which the op takes where it is no wider
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, dtype=dtype)  # (..., n_embd) twice


@kin.stands_for("transformers.pytorch_utils", "Conv1D")
@plain
class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as in GPT-2's checkpoints."""

    def __init__(self, nf: int, nx: int) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx  # outputs, inputs
        self.weight = nn.Parameter(torch.empty(nx, nf))  # (n_in, n_out)
        self.bias = nn.Parameter(torch.zeros(nf))  # (n_out,)

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx})"

    def forward(self, x: Tensor) -> Tensor:
        return product(ops.linear, x, self.weight, self.bias)  # (B, T, n_out)


@plain
class ImageGPTAttention(nn.Module):
    """Self-attention, causal or bidirectional, with packed projections; or cross-attention over an encoder's states."""

    def __init__(self, config: ImageGPTConfig, is_cross_attention: bool = False, layer_idx: int = 0) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.upcast = config.reorder_and_upcast_attn
        self.config = config
        self.c_attn = Conv1D((2 if is_cross_attention else 3) * config.n_embd, config.n_embd)
        if is_cross_attention:
            self.q_attn = Conv1D(config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        # Called where it has a hook or is another module than this; the op applies it otherwise.
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    @property
    def bidirectional(self) -> bool:
        """Of the model's configuration, which says it for its caches and decoders too."""
        return self.config.bidirectional

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        past: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, n_embd), and the softmax, (B, H, T, T_k), where ``output_attentions`` asks for it.

        Args:
            hidden_states: (B, T, n_embd), normed.
            layer_past: Cache of the positions before, which is extended.
            attention_mask: (B, T_k) bool, True where a key may be seen; or what transformers adds to the scores,
                broadcast to (B, H, T, T_k), floating point or bool.
            encoder_hidden_states: (B, S, n_embd), for cross-attention; its keys and values are made once for a cache.
            encoder_attention_mask: As ``attention_mask``, of the S positions.
            use_cache: For transformers' sake; ``layer_past`` says it.
            output_attentions: Return the softmax, after dropout.
            past: Positions before these ones, which the cache says where it is ``None``; a block that runs again for
                the backward finds its own positions in the cache.
        """
        if encoder_hidden_states is not None or self.is_cross_attention:
            return self._cross(hidden_states, layer_past, encoder_hidden_states, encoder_attention_mask)
        b, t, d = hidden_states.shape  # B, T, n_embd
        qkv = self.c_attn(hidden_states).view(b, t, 3, self.n_head, d // self.n_head)  # (B, T, 3, H, D)
        dropout_p = getattr(self.attn_dropout, "p", 0.0) if self.attn_dropout.training else 0.0
        written_out = _is_watched(self.attn_dropout) or (attention_mask is not None and attention_mask.ndim == 4)
        if layer_past is None and not (output_attentions or written_out or self.bidirectional):
            packed = ops.causal_attention_packed(
                qkv, self.scale, attention_mask, dropout_p, self.upcast
            )  # (B, T, H, D)
            return self.resid_dropout(self.c_proj(packed.reshape(b, t, d))), None  # (B, T, H, D) to (B, T, n_embd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        weights: Tensor | None
        if layer_past is not None:
            cache = getattr(layer_past, "self_attention_cache", layer_past)
            past = torch.sym_int(cache.get_seq_length(self.layer_idx)) if past is None else past
            if not _recomputed(cache, past, self.layer_idx):
                k, v = cache.update(k, v, self.layer_idx)  # (B, H, T_past + T, D)
            if k.shape[2] != past + t:
                # transformers' StaticCache hands out its whole buffer, unwritten positions included.
                raise ValueError(
                    f"past_key_values: {type(cache).__name__} returned {k.shape[2]} positions after {past} + {t};"
                    " use igpt_fast.StaticCache or igpt_fast.DynamicCache"
                )
        if written_out:
            causal = not self.bidirectional
            out, weights = product(self._written_out, q, k, v, mask=attention_mask, causal=causal)
        else:  # (B, H, T, D) and, where they are wanted, (B, H, T, T_past + T)
            attend = ops.full_attention if self.bidirectional else ops.causal_attention
            out, weights = attend(q, k, v, self.scale, attention_mask, dropout_p, self.upcast, output_attentions)
        out = self.c_proj(out.transpose(1, 2).reshape(b, t, d))  # heads side by side: (B, T, n_embd)
        return self.resid_dropout(out), weights

    def _cross(
        self, hidden_states: Tensor, cache: Any, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of (B, T, n_embd) over (B, S, n_embd), whose keys and values a cache keeps."""
        if not self.is_cross_attention:
            raise ValueError("ImageGPTAttention: encoder_hidden_states are for one with is_cross_attention=True")
        b, t, d = hidden_states.shape  # B, T, n_embd
        q = self.q_attn(hidden_states).view(b, t, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        kept = encoder_states(cache, self.layer_idx)
        if kept is None:
            if encoder_hidden_states is None:
                raise ValueError("ImageGPTAttention: cross-attention wants encoder_hidden_states")
            kv = self.c_attn(encoder_hidden_states).view(b, -1, 2, self.n_head, d // self.n_head)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, S, D) each
            kept = (k, v)
            keep_encoder_states(cache, k, v, self.layer_idx)
        k, v = kept
        out, weights = product(self._written_out, q, k, v, mask=mask, causal=False)  # (B, H, T, D), (B, H, T, S)
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).reshape(b, t, d))), weights

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        """The attention as PyTorch expressions around the dropout module, whatever the mask: (B, H, T, D), softmax."""
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.upcast:
            with torch.autocast(q.device.type, enabled=False):
                scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * self.scale  # (B, H, T, T_k)
        else:
            scores = (q @ k.transpose(-1, -2)).to(wide) * self.scale  # (B, H, T, T_k)
        t, t_k = scores.shape[-2:]
        hidden = torch.ones(t, t_k, dtype=torch.bool, device=q.device).triu(t_k - t + 1) if causal else None
        if mask is not None and mask.dtype == torch.bool:
            unseen = ~(mask[:, None, None, :] if mask.ndim == 2 else mask)
            hidden = unseen if hidden is None else hidden | unseen
        elif mask is not None:
            scores = scores + mask.to(wide)
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(wide).min)
        weights = self.attn_dropout(torch.softmax(scores, dim=-1).to(v.dtype))  # (B, H, T, T_k)
        return weights @ v, weights


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants a module called that nobody needs to call."""
    return type(module) not in (nn.Dropout, nn.Identity) or bool(module._forward_hooks or module._forward_pre_hooks)


def _recomputed(cache: Cache, past: int, layer_idx: int) -> bool:
    """Whether the cache has a layer's new positions already: its block runs again, for the backward.

    Raises:
        ValueError: There are positions before them as well, which what the layer did first had from the cache.
    """
    if not torch.is_grad_enabled() or cache.get_seq_length(layer_idx) <= past:
        return False
    if past > 0:
        raise ValueError("past_key_values cannot be combined with blocks that are recomputed in the backward")
    return True


@plain
class ImageGPTMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner)
        self.activation = ops.check_activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = ops.activation(self.c_fc(hidden_states), self.activation)  # (B, T, n_inner)
        return self.dropout(self.c_proj(inner))  # (B, T, n_embd)


@kin.stands_for("transformers.modeling_layers", "GradientCheckpointingLayer")
@plain
class ImageGPTBlock(nn.Module):
    """Pre-norm transformer block."""

    # Whether it is computed again in the backward pass, in place of being kept, and how; see ``trainable``.
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, config: ImageGPTConfig, layer_idx: int = 0) -> None:
        nn.Module.__init__(self)
        self.ln_1 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = ImageGPTAttention(config, layer_idx=layer_idx)
        self.ln_2 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        if config.add_cross_attention:
            self.crossattention = ImageGPTAttention(config, is_cross_attention=True, layer_idx=layer_idx)
            self.ln_cross_attn = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = ImageGPTMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        past: int | None = None,
    ) -> tuple[Tensor | None, ...]:
        """(B, T, n_embd), the softmax of the attention or ``None``, and that of the cross-attention where there is one.

        Arguments: see ``ImageGPTAttention.forward``.
        """
        arguments = (
            *(hidden_states, layer_past, attention_mask, encoder_hidden_states, encoder_attention_mask),
            *(output_attentions, past),
        )
        if self.gradient_checkpointing and self.training:
            # A compiled function keeps its choice by itself.
            again = self._computed if torch.compiler.is_compiling() else backend.keep_choice(self._computed)
            return self._gradient_checkpointing_func(again, *arguments)
        return self._computed(*arguments)

    def _computed(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        output_attentions: bool,
        past: int | None,
    ) -> tuple[Tensor | None, ...]:
        x, dtype = hidden_states, autocast_dtype(hidden_states)  # as the linear layers would convert it
        normed = self.ln_1(x, dtype=dtype)  # (B, T, n_embd)
        attended, weights = self.attn(
            normed, layer_past, attention_mask, output_attentions=output_attentions, past=past
        )
        across: tuple[Tensor, ...] = ()
        if encoder_hidden_states is not None or encoder_states(layer_past, self.attn.layer_idx) is not None:
            if "crossattention" not in self._modules:
                raise ValueError("encoder_hidden_states are for a configuration with add_cross_attention=True")
            normed, x = self.ln_cross_attn(attended, residual=x, dtype=dtype)  # (B, T, n_embd) each
            others = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
            attended, *across = self.crossattention(normed, layer_past, **others)
        normed, x = self.ln_2(attended, residual=x, dtype=dtype)  # of x + attended, and that: (B, T, n_embd) each
        return x + self.mlp(normed), weights, *across  # (B, T, n_embd)
