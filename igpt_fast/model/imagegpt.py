"""iGPT as ``torch.nn`` modules: classes, arguments, outputs and state-dict keys of transformers' ImageGPT.

The network is thin: every computation that has a faster twin goes through ``igpt_fast.ops``.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from igpt_fast import backend, ops
from igpt_fast.checkpoint.pretrained import PretrainedMixin
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.cache import Cache, DynamicCache
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.network import plain
from igpt_fast.model.generate import GenerationMixin
from igpt_fast.model.layers import Conv1D, ImageGPTBlock, ImageGPTLayerNorm
from igpt_fast.model.outputs import BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput
from igpt_fast.model.trainable import TrainableMixin


class ImageGPTPreTrainedModel(PretrainedMixin, TrainableMixin, nn.Module):
    """What the three model classes share: configuration, initial weights, checkpoints."""

    config_class = ImageGPTConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.config = ImageGPTConfig.of(config, type(self).__name__)

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

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces ``wte``."""
        self.base_model.wte = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head that predicts colours, if there is one."""
        return None

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """The token embedding, if ``new_num_tokens`` is its size or ``None``.

        Raises:
            NotImplementedError: Any other size. SOS is the last row of ``wte`` and not in the head, so a change of
                the palette means new rows in front of it: build a model from a new configuration instead.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise NotImplementedError(
                f"resize_token_embeddings: vocab_size is {self.config.vocab_size}, asked for {new_num_tokens};"
                " the SOS token is the last row, so build a model from a new configuration instead"
            )
        return self.get_input_embeddings()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Nothing: SOS is in ``wte`` and not in the head, so the two cannot be tied."""

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has ``generate``."""
        return issubclass(cls, GenerationMixin)


@plain
class ImageGPTModel(ImageGPTPreTrainedModel):
    """The network up to and including the final norm."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        config = self.config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # colours, classes, SOS
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(ImageGPTBlock(config, i) for i in range(config.n_layer))
        self.ln_f = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.checkpoint_every_n_layers = 1
        self.checkpoint_kwargs: dict[str, Any] = {"use_reentrant": False}
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
            input_ids: (B, T) int64 colour tokens and SOS; (T,) is one image.
            past_key_values: Cache of the positions before; it is extended in place.
            attention_mask: (B, T_past + T), 1 or True where a position may be attended to. What stands elsewhere
                reaches no visible position.
            token_type_ids: (B, T) int64, looked up in ``wte`` and added.
            position_ids: (B, T), (1, T) or (T,) int64; counted on from the cache when not given, whatever the
                ``attention_mask``, as in transformers.
            inputs_embeds: (B, T, n_embd), instead of ``input_ids``.
            encoder_hidden_states, encoder_attention_mask: Not supported; anything but ``None`` raises.
            use_cache: Return a cache; the configuration's ``use_cache`` when ``None``. Never made while gradient
                checkpointing is at work.
            output_attentions: Return the softmax of each layer, (B, H, T, T_k), after dropout.
            output_hidden_states: Return ``n_layer + 1`` hidden states, the last one after ``ln_f``.
            return_dict: ``False`` returns a tuple.

        Returns:
            ``BaseModelOutput`` or a tuple of its fields that are set.

        Raises:
            TypeError: ``past_key_values`` is not a cache object.
            ValueError: Neither or both inputs, a sequence longer than ``n_positions``, a bad shape, or an
                argument that is not supported.
        """
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise ValueError("cross-attention is not supported: encoder_hidden_states and _mask must be None")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        others = (past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if not output_attentions and all(argument is None for argument in others):
            with_cache = bool(self.config.use_cache if use_cache is None else use_cache)
            states = forwards.run(self, input_ids, bool(output_hidden_states), with_cache)
            if states is not None:
                output = _output_of(states, input_ids.shape)  # type: ignore[union-attr]
                return output if return_dict else output.to_tuple()
        cache = self._cache(past_key_values, use_cache)
        past = int(cache.get_seq_length()) if cache is not None else 0
        tokens = self._tokens(input_ids, inputs_embeds)  # (B, T, n_embd)
        key_mask = _key_mask(attention_mask, tokens.shape[0], past + tokens.shape[1])  # (B, T_past + T)
        hidden = self._embed(tokens, past, position_ids, token_type_ids)  # (B, T, n_embd)

        all_hidden: list[Tensor] = []
        all_attentions: list[Tensor] = []
        for i, block in enumerate(self.h):
            all_hidden.append(hidden)
            arguments = (hidden, cache, past, key_mask, output_attentions)
            if self.gradient_checkpointing and self.training and i % self.checkpoint_every_n_layers == 0:
                # A compiled function keeps its choice by itself.
                again = block if torch.compiler.is_compiling() else backend.keep_choice(block)
                hidden, weights = checkpoint(again, *arguments, **self.checkpoint_kwargs)
            else:
                hidden, weights = block(*arguments)  # (B, T, n_embd), (B, H, T, T_past + T) or None
            all_attentions.append(weights)
        hidden = self.ln_f(hidden)  # (B, T, n_embd)
        if input_ids is not None:
            hidden = hidden.view(*input_ids.shape, hidden.shape[-1])  # (T,) ids give (T, n_embd)

        shown = (*all_hidden, hidden) if output_hidden_states else None
        output = BaseModelOutput(hidden, cache, shown, tuple(all_attentions) if output_attentions else None)
        return output if return_dict else output.to_tuple()

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to extend, a new one, or ``None``."""
        if self.gradient_checkpointing and self.training:
            # The recomputation would append to the cache a second time.
            if past_key_values is not None:
                raise ValueError("past_key_values cannot be combined with gradient checkpointing in training")
            if use_cache:
                warnings.warn("use_cache=True has no effect with gradient checkpointing in training", stacklevel=3)
            return None
        if past_key_values is None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return DynamicCache() if use_cache else None
        usable = hasattr(past_key_values, "update") and hasattr(past_key_values, "get_seq_length")
        if not usable or hasattr(past_key_values, "cross_attention_cache"):
            got = type(past_key_values).__name__
            raise TypeError(f"past_key_values must be a cache such as igpt_fast.DynamicCache, got {got}")
        return past_key_values

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, T, n_embd) token embeddings."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give exactly one of input_ids and inputs_embeds")
            if input_ids.ndim == 0:
                raise ValueError("input_ids: expected (B, T), got a scalar")
            return self.wte(input_ids.view(-1, input_ids.shape[-1]))  # (B, T, n_embd)
        if input_ids is not None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.n_embd:
            shape = tuple(inputs_embeds.shape)
            raise ValueError(f"inputs_embeds: expected (B, T, n_embd={self.config.n_embd}), got {shape}")
        return inputs_embeds

    def _embed(self, tokens: Tensor, past: int, position_ids: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """Adds the embeddings of the positions and of the token types; dropout."""
        b, t, _ = tokens.shape
        if position_ids is None:
            if past + t > self.config.n_positions:
                raise ValueError(f"{past + t} positions exceed n_positions={self.config.n_positions}")
            position_ids = torch.arange(past, past + t, device=tokens.device)[None]  # (1, T)
        elif position_ids.shape not in ((t,), (1, t), (b, t)):  # broadcasting would take (B, 1) for the same position
            raise ValueError(f"position_ids: expected (B, T) = {(b, t)} or (1, T), got {tuple(position_ids.shape)}")
        hidden = tokens + self.wpe(position_ids)  # (B, T, n_embd)
        if token_type_ids is not None:
            if token_type_ids.numel() != b * t:
                raise ValueError(f"token_type_ids: expected (B, T) = {(b, t)}, got {tuple(token_type_ids.shape)}")
            hidden = hidden + self.wte(token_type_ids.view(-1, t))  # (B, T, n_embd)
        return self.drop(hidden)


@plain
class ImageGPTForCausalImageModeling(GenerationMixin, ImageGPTPreTrainedModel):
    """``ImageGPTModel`` and a head that predicts the next colour."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        config = self.config
        self.transformer = ImageGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size - 1, bias=False)
        nn.init.normal_(self.lm_head.weight, 0.0, config.initializer_range)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings

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
                transformers; -100 is ignored. The loss, in nats per token, is computed in fp32.

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
        logits = self.lm_head(base.last_hidden_state)  # (B, T, vocab_size - 1)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                raise ValueError(f"labels: expected (B, T) = {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
            # The labels are moved, not the logits cut: what nobody predicts, the last position, is ignored.
            loss = ops.cross_entropy(logits, F.pad(labels[..., 1:], (0, 1), value=-100))  # ()
        output = CausalImageModelingOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """``ImageGPTModel``, the mean over the positions, and a linear classifier without bias.

    The mean is over all T positions, as in transformers, hidden ones of an ``attention_mask`` included.

    Args:
        config: The hyper-parameters; ``num_labels`` outputs.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config)
        config = self.config
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
        logits = self.score(base.last_hidden_state.mean(dim=1))  # (B, num_labels)
        loss = None if labels is None else self._loss(logits, labels)  # ()
        output = ImageClassificationOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.problem_type is None:
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                config.problem_type = "single_label_classification"
            else:
                config.problem_type = "multi_label_classification"
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32  # losses are computed in fp32 at least
        logits, labels = logits.to(wide), labels.to(logits.device)  # (B, num_labels)
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        # Compared by size, since a broadcast would score every output against every target.
        if labels.shape != logits.shape and not (self.num_labels == 1 and labels.numel() == logits.numel()):
            wanted = f"{tuple(logits.shape)} for {config.problem_type}"
            raise ValueError(f"labels: expected {wanted}, got {tuple(labels.shape)}")
        labels = labels.view_as(logits).to(logits.dtype)  # (B, num_labels)
        if config.problem_type == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


def _output_of(states: forwards.States, shape: torch.Size) -> BaseModelOutput:
    """The output of a forward pass by the compiled module, for tokens of a shape."""
    last, hidden, keys, values = states
    last = last.view(*shape, last.shape[-1])  # (B, T, n_embd)
    cache = DynamicCache(list(keys), list(values)) if keys is not None and values is not None else None
    # Each in memory of its own: one that is kept does not keep the others.
    return BaseModelOutput(last, cache, None if hidden is None else (*(state.clone() for state in hidden), last))


def _key_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, T_k) bool, or None when nothing is hidden."""
    if attention_mask is None:
        return None
    if attention_mask.numel() != batch * length:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected (B, T_past + T) = ({batch}, {length}), got {shape}")
    return attention_mask.view(batch, length).bool()  # (B, T_k)
