"""iGPT as ``torch.nn`` modules: classes, arguments, outputs and state-dict keys of transformers' ImageGPT.

The network is thin: every computation that has a faster twin goes through ``igpt_fast.ops``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast import kin, ops
from igpt_fast.checkpoint.pretrained import PretrainedMixin
from igpt_fast.config import ImageGPTConfig
from igpt_fast.engines.cache import Cache, DynamicCache
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.encoder_cache import EncoderDecoderCache, encoder_mask
from igpt_fast.engines.network import logits_of, plain, whole
from igpt_fast.model.generate import GenerationMixin
from igpt_fast.model.intermediates import IntermediatesMixin
from igpt_fast.model.layers import Conv1D, ImageGPTBlock, ImageGPTLayerNorm
from igpt_fast.model.outputs import BaseModelOutput, CausalImageModelingOutput
from igpt_fast.model.resizing import resize_positions
from igpt_fast.model.trainable import TrainableMixin


@kin.stands_for("transformers.modeling_utils", "PreTrainedModel")
class ImageGPTPreTrainedModel(PretrainedMixin, TrainableMixin, IntermediatesMixin, nn.Module):
    """What the three model classes share: configuration, initial weights, checkpoints.

    A ``PreTrainedModel`` once transformers is loaded (see ``kin``), with its methods where this has none.
    """

    config_class = ImageGPTConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    input_modalities = ("image",)
    # What transformers' __init__ and post_init keep on an instance.
    kernel_config = None
    loss_type: str | None = None
    all_tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 # replaced, never changed
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = frozenset[str]()
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = frozenset[str]()
    _keys_to_ignore_on_save = frozenset[str]()
    _no_split_modules: set[str] | list[str] = ["ImageGPTBlock"]  # noqa: RUF012
    _skip_keys_device_placement: set[str] | list[str] = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: ImageGPTConfig) -> None:
        kin.meet()
        nn.Module.__init__(self)
        self.config = ImageGPTConfig.of(config, type(self).__name__)

    def named_modules(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Module]]:
        """As every module's; transformers' tools, which all come here, meet their kin."""
        if not torch.compiler.is_compiling():
            kin.meet()
        return super().named_modules(*args, **keywords)

    @property
    def device(self) -> torch.device:
        """Device of the parameters; where accelerate keeps these elsewhere, of what they are computed with."""
        device = next(self.parameters()).device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            found = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((place for place in found if place is not None), device))
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def post_init(self) -> None:
        """The initial weights, which the models' own constructors have made: for subclasses that call it, none else."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, initializer_range); residual projections divided by sqrt(2 n_layer). Source: GPT-2, iGPT."""
        std = self.config.initializer_range
        for module in self.modules():
            self._init_weights(module)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            module.weight.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if getattr(module, "padding_idx", None) is not None:
                nn.init.zeros_(module.weight[module.padding_idx])  # type: ignore[index]
        elif isinstance(module, ImageGPTLayerNorm):
            nn.init.ones_(module.weight)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces ``wte``."""
        self.base_model.wte = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head that predicts colours, if there is one."""
        return None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The token embedding, after rows have been added or taken away in front of the last one, which is SOS.

        Unlike transformers', which appends rows and would make the last of these the start of a sequence. The head,
        which has an output less, follows. New rows stand for tokens of no meaning yet: colours, or classes after
        ``config.n_classes`` has been set.

        Args:
            new_num_tokens: The new ``config.vocab_size``, SOS included; ``None`` changes nothing.
            pad_to_multiple_of: Rounds that up.
            mean_resizing: New rows are the mean of the old ones and a little noise, in place of the noise alone.

        Raises:
            ValueError: Fewer than two tokens, or than the classes leave.
        """
        old = self.config.vocab_size
        size = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size != old:
            self.config.update({"vocab_size": size})
            std = self.config.initializer_range
            table, head = self.base_model.wte, self.get_output_embeddings()
            table.weight = _resized(table.weight, size - 1, 1, std, mean_resizing)
            table.num_embeddings = size
            table.padding_idx = None if table.padding_idx is None else size - 1
            if head is not None:
                head.weight = _resized(head.weight, size - 1, 0, std, mean_resizing)
                head.out_features = size - 1
        return self.get_input_embeddings()

    def resize_positions(self, height: int, width: int, old: tuple[int, int] | None = None) -> nn.Embedding:
        """The table of positions, made to fit images of another size by bicubic interpolation in two dimensions.

        Position ``t`` is that of the pixel which it predicts, ``t``; its input is the pixel before, or SOS. So the grid
        is the image's own.

        Args:
            height, width: Of the new images, in pixels.
            old: Height and width of the images so far; of a square, if not given.

        Raises:
            ValueError: A size below 1, or one that the model's positions do not have.
        """
        positions = self.base_model.wpe
        resize_positions(positions, old, (height, width))
        self.config.update({"n_positions": height * width})
        return positions

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
        self.embed_dim = config.n_embd
        # Colours, classes, SOS; of a bidirectional model SOS is the mask, whose embedding is zero and learns nothing.
        mask = config.sos_token_id if config.bidirectional else None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, mask)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(ImageGPTBlock(config, i) for i in range(config.n_layer))
        self.ln_f = ImageGPTLayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.init_weights()
        if getattr(config, "gradient_checkpointing", False):  # of a file that transformers 3 has written
            self.gradient_checkpointing_enable()

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
            encoder_hidden_states: (B, S, n_embd), what the cross-attention of a configuration with
                ``add_cross_attention`` attends to; those that the cache holds when ``None``.
            encoder_attention_mask: (B, S), 1 or True where it may.
            use_cache: Return a cache; the configuration's ``use_cache`` when ``None``. Never made while gradient
                checkpointing is at work, nor where attention is bidirectional.
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
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        others = (past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, encoder_hidden_states)
        if not output_attentions and all(argument is None for argument in others):
            with_cache = bool(self.config.use_cache if use_cache is None else use_cache)
            layers = self.config.n_layer
            taken = forwards.Taken(list(range(layers)), layers) if output_hidden_states else None
            states = forwards.run(self, input_ids, taken, with_cache)
            if states is not None:
                output = _output_of(states, input_ids.shape)  # type: ignore[union-attr]
                return output if return_dict else output.to_tuple()
        cache = self._cache(past_key_values, use_cache, encoder_hidden_states is not None)
        past = torch.sym_int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None and (last := torch.sym_int(cache.get_seq_length(len(self.h) - 1))) != past:
            raise ValueError(f"past_key_values: holds {past} positions of the first layer and {last} of the last one")
        tokens = self._tokens(input_ids, inputs_embeds)  # (B, T, n_embd)
        key_mask = mask_of_keys(attention_mask, tokens.shape[0], past + tokens.shape[1])  # (B, T_past + T)
        across_mask = encoder_mask(encoder_attention_mask, encoder_hidden_states, cache, tokens)  # (B, S)
        hidden = self._embed(tokens, past, position_ids, token_type_ids)  # (B, T, n_embd)

        all_hidden: list[Tensor] = []
        all_attentions: list[Tensor] = []
        all_across: list[Tensor] = []
        for block in self.h:
            all_hidden.append(hidden)
            arguments = (hidden, cache, key_mask, encoder_hidden_states, across_mask, False, output_attentions, past)
            hidden, weights, *across = block(*arguments)  # (B, T, n_embd), (B, H, T, T_past + T) or None
            all_attentions.append(weights)
            all_across += across
        hidden = self.ln_f(hidden)  # (B, T, n_embd)
        if input_ids is not None:
            hidden = hidden.view(*input_ids.shape, hidden.shape[-1])  # (T,) ids give (T, n_embd)

        shown = (*all_hidden, hidden) if output_hidden_states else None
        softmax = tuple(all_attentions) if output_attentions else None
        softmax_across = tuple(all_across) if output_attentions and all_across else None
        output = BaseModelOutput(hidden, cache, shown, softmax, softmax_across)
        return output if return_dict else output.to_tuple()

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None, encoder: bool) -> Cache | None:
        """The cache to extend, a new one, or ``None``."""
        if self.config.bidirectional:
            if past_key_values is not None or use_cache:
                raise ValueError("past_key_values, use_cache: bidirectional attention has no cache; later pixels count")
            return None
        if self.gradient_checkpointing and self.training:
            # The recomputation would append to the cache a second time.
            if past_key_values is not None:
                raise ValueError("past_key_values cannot be combined with gradient checkpointing in training")
            if use_cache:
                warnings.warn("use_cache=True has no effect with gradient checkpointing in training", stacklevel=3)
            return None
        if past_key_values is None:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            return (EncoderDecoderCache() if encoder else DynamicCache()) if use_cache else None
        if not (hasattr(past_key_values, "update") and hasattr(past_key_values, "get_seq_length")):
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
        logits = logits_of(self.lm_head, base.last_hidden_state)  # (B, T, vocab_size - 1)
        loss = None
        if labels is not None:
            self.config.check_causal("labels")  # the loss of what every position has seen says nothing
            if labels.shape != logits.shape[:-1]:
                raise ValueError(f"labels: expected (B, T) = {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
            # The labels are moved, not the logits cut: what nobody predicts, the last position, is ignored.
            loss = ops.cross_entropy(whole(logits, self.lm_head), F.pad(labels[..., 1:], (0, 1), value=-100))  # ()
        rest = (base.past_key_values, base.hidden_states, base.attentions, base.cross_attentions)
        output = CausalImageModelingOutput(loss, logits, *rest)
        return output if return_dict else output.to_tuple()


def _output_of(states: forwards.States, shape: torch.Size) -> BaseModelOutput:
    """The output of a forward pass by the compiled module, for tokens of a shape."""
    last, hidden, keys, values = states
    assert last is not None
    last = last.view(*shape, last.shape[-1])  # (B, T, n_embd)
    cache = DynamicCache(list(keys), list(values)) if keys is not None and values is not None else None
    # Each in memory of its own: one that is kept does not keep the others.
    return BaseModelOutput(last, cache, None if hidden is None else (*(state.clone() for state in hidden), last))


def mask_of_keys(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, T_k) bool, or None when nothing is hidden."""
    if attention_mask is None:
        return None
    if attention_mask.numel() != batch * length:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected (B, T_past + T) = ({batch}, {length}), got {shape}")
    return attention_mask.view(batch, length).bool()  # (B, T_k)


@torch.no_grad()
def _resized(old: Tensor, rows: int, last: int, std: float, mean: bool) -> nn.Parameter:
    """A parameter with ``rows`` rows in front of its ``last`` ones, of its own as far as they go."""
    kept = old[: min(rows, old.shape[0] - last)]
    new = torch.empty(rows - kept.shape[0], old.shape[1], dtype=old.dtype, device=old.device).normal_(0.0, std)
    new = new + kept.mean(dim=0) if mean else new
    return nn.Parameter(torch.cat([kept, new, old[old.shape[0] - last :]]), old.requires_grad)
