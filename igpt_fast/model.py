"""iGPT as ``torch.nn`` modules: classes, arguments, outputs and state-dict keys of transformers' ImageGPT.

The network is thin: every computation that has a faster twin goes through ``igpt_fast.ops``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_fast import ops
from igpt_fast.cache import Cache, DynamicCache
from igpt_fast.checkpoint import PretrainedMixin
from igpt_fast.config import ImageGPTConfig
from igpt_fast.generation import GenerationMixin
from igpt_fast.outputs import BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput


class ImageGPTLayerNorm(nn.Module):
    """iGPT's norm: root mean square, not mean-centred, weight only. See ``ops.rms_norm``."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as in GPT-2's checkpoints."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class ImageGPTAttention(nn.Module):
    """Causal self-attention with packed query, key and value projections."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.layer_idx = layer_idx
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1
        self.upcast = config.reorder_and_upcast_attn
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, cache: Cache | None, key_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        b, t, d = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            before = k.shape[2]
            seen = cache.get_seq_length() - (before if self.layer_idx else 0)
            k, v = cache.update(k, v, self.layer_idx)
            if k.shape[2] != seen + before:
                raise ValueError(
                    f"past_key_values: {type(cache).__name__} returned {k.shape[2]} positions after {seen} + {before};"
                    " use igpt_fast.StaticCache or igpt_fast.DynamicCache"
                )
        out, weights = ops.causal_attention(
            q,
            k,
            v,
            scale=self.scale,
            key_mask=key_mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            upcast=self.upcast,
            need_weights=need_weights,
        )
        out = self.c_proj(out.transpose(1, 2).reshape(b, t, d))
        return self.resid_dropout(out), weights


class ImageGPTMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.activation = config.activation_function
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(ops.activation(self.c_fc(x), self.activation)))


class ImageGPTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ImageGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = ImageGPTAttention(config, layer_idx)
        self.ln_2 = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = ImageGPTMLP(config)

    def forward(
        self, x: Tensor, cache: Cache | None, key_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attn(self.ln_1(x), cache, key_mask, need_weights)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), weights


class ImageGPTPreTrainedModel(PretrainedMixin, nn.Module):
    """What the three model classes share: configuration, initial weights, checkpoints."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        if not isinstance(config, ImageGPTConfig):
            raise TypeError(f"{type(self).__name__}: config must be an ImageGPTConfig, got {type(config).__name__}")
        self.config = config

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, initializer_range); residual projections divided by sqrt(2 n_layer). Source: GPT-2, iGPT."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
                module.weight.normal_(0.0, std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, ImageGPTLayerNorm):
                nn.init.ones_(module.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))

    @property
    def base_model(self) -> ImageGPTModel:
        """The network without its head."""
        return self if isinstance(self, ImageGPTModel) else self.transformer  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding ``wte``."""
        return self.base_model.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces ``wte``."""
        self.base_model.wte = value

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = False

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The network up to and including the final norm.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(ImageGPTBlock(config, i) for i in range(config.n_layer))
        self.ln_f = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Runs the network.

        Args:
            input_ids: (B, T) int64 colour tokens and SOS; or ``inputs_embeds``: (B, T, n_embd).
            past_key_values: Cache of the positions before; it is extended in place.
            attention_mask: (B, T_past + T), 1 or True where a position may be attended to.
            token_type_ids: (B, T) int64, looked up in ``wte`` and added.
            position_ids: (B, T) or (1, T) int64; counted on from the cache when not given, whatever the
                ``attention_mask``, as in transformers.
            encoder_hidden_states, encoder_attention_mask: Not supported; anything but ``None`` raises.
            use_cache: Return a cache; the configuration's ``use_cache`` when ``None``.
            output_attentions: Return the softmax of each layer, (B, H, T, T_k).
            output_hidden_states: Return ``n_layer + 1`` hidden states, the last one after ``ln_f``.
            return_dict: ``False`` returns a tuple.

        Returns:
            ``BaseModelOutput`` or a tuple of its fields that are set.

        Raises:
            ValueError: Neither or both inputs, a sequence longer than ``n_positions``, a bad shape, or an
                argument that is not supported.
        """
        config = self.config
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("cross-attention is not supported: encoder_hidden_states and _mask must be None")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        if self.gradient_checkpointing and self.training and use_cache:
            use_cache = False  # as transformers: recomputation would append to the cache twice
        if isinstance(past_key_values, tuple | list):
            raise TypeError("past_key_values must be a cache object such as igpt_fast.DynamicCache, not a tuple")
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()

        if inputs_embeds is None:
            assert input_ids is not None
            input_ids = input_ids.view(-1, input_ids.shape[-1])
            inputs_embeds = self.wte(input_ids)
        b, t = inputs_embeds.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            if past + t > config.n_positions:
                raise ValueError(f"{past + t} positions exceed n_positions={config.n_positions}")
            position_ids = torch.arange(past, past + t, device=inputs_embeds.device)[None]
        key_mask = _key_mask(attention_mask, b, past + t)

        hidden = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids.view(-1, t))
        hidden = self.drop(hidden)

        all_hidden: list[Tensor] = []
        all_attentions: list[Tensor] = []
        for block in self.h:
            all_hidden.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden, weights = checkpoint(block, hidden, cache, key_mask, output_attentions, use_reentrant=False)
            else:
                hidden, weights = block(hidden, cache, key_mask, output_attentions)
            all_attentions.append(weights)
        hidden = self.ln_f(hidden)

        output = BaseModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class ImageGPTForCausalImageModeling(GenerationMixin, ImageGPTPreTrainedModel):
    """``ImageGPTModel`` and a head that predicts the next colour.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.transformer = ImageGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size - 1, bias=False)
        nn.init.normal_(self.lm_head.weight, 0.0, config.initializer_range)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalImageModelingOutput | tuple[Any, ...]:
        """Logits of the next colour, and the loss of ``labels``.

        Args:
            labels: (B, T) int64; position ``t`` of the logits is scored against ``labels[:, t + 1]``, as in
                transformers; -100 is ignored.

        For the other arguments see ``ImageGPTModel.forward``.

        Returns:
            ``CausalImageModelingOutput`` or a tuple of its fields that are set.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        base = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(base.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())
        output = CausalImageModelingOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return output if return_dict else output.to_tuple()


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """``ImageGPTModel``, the mean over the positions, and a linear classifier without bias.

    Args:
        config: The hyper-parameters; ``num_labels`` outputs.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ImageGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, 0.0, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassificationOutput | tuple[Any, ...]:
        """Logits of the classes, and the loss of ``labels``.

        Args:
            labels: (B,) int64 classes, (B, num_labels) multi-hot floats, or (B,) / (B, num_labels) targets
                of a regression; which one is ``config.problem_type``, or follows from ``num_labels`` and
                the dtype and is then kept in the configuration, as in transformers.

        For the other arguments see ``ImageGPTModel.forward``.

        Returns:
            ``ImageClassificationOutput`` or a tuple of its fields that are set.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        base = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(base.last_hidden_state.mean(dim=1))
        output = ImageClassificationOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "regression":
            return (
                F.mse_loss(logits.squeeze(), labels.squeeze()) if self.num_labels == 1 else F.mse_loss(logits, labels)
            )
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)


def _key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, T_k) bool, or None when nothing is hidden."""
    if attention_mask is None:
        return None
    if attention_mask.numel() != batch * length:
        raise ValueError(
            f"attention_mask: expected (B, T_past + T) = ({batch}, {length}), got {tuple(attention_mask.shape)}"
        )
    return attention_mask.view(batch, length).bool()
