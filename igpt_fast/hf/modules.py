"""transformers' ImageGPT, computed by this package: a class for each of its modules that has something to compute.

``accelerate`` gives these classes to the modules of a model and ``restore`` takes them away; an instance has nothing
that it had not before. They carry the names of transformers' classes, which go into configurations, and hand on to
them what they do not serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as NetworkOutput
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as ModelOutput
from transformers.models.imagegpt import modeling_imagegpt as theirs
from transformers.pytorch_utils import Conv1D as TheirConv1D
from transformers.utils.import_utils import is_torchdynamo_exporting

from igpt_fast import ops
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.network import plain, why_not_modules
from igpt_fast.hf.cache import DecoderCache
from igpt_fast.hf.twins import model_twin, network_twin
from igpt_fast.model import ImageGPTModel as OurNetwork
from igpt_fast.model.layers import Conv1D as OurConv1D
from igpt_fast.ops.activation import KERNELS
from igpt_fast.ops.dispatch import product

# The class of an activation -> the name of what it computes.
ACTIVATIONS: dict[type, str] = {type(ACT2FN[name]): name for name in reversed(KERNELS)}


def left_to_transformers(x: Tensor) -> bool:
    """Whether transformers computes what becomes of ``x``: under autocast, and where a graph is written down that is to
    run without this package.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return True
    return is_torchdynamo_exporting() or torch.jit.is_tracing()


def signed_as(original: Any) -> Callable[[Any], Any]:
    """``functools.wraps``: a method has the signature of transformers', which Trainer and ``generate`` look at."""
    return functools.wraps(original)


def bare(module: nn.Module) -> bool:
    """Whether a module does no more than its class says."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


@plain
class ImageGPTLayerNorm(theirs.ImageGPTLayerNorm):
    """By ``ops.rms_norm``."""

    @signed_as(theirs.ImageGPTLayerNorm.forward)
    def forward(self, tensor: Tensor) -> Tensor:
        if left_to_transformers(tensor):
            return super().forward(tensor)
        return ops.rms_norm(tensor, self.weight, self.eps)  # (..., n_embd)


@plain
class ImageGPTAttention(theirs.ImageGPTAttention):
    """By ``ops.causal_attention``; the weights are not there to be returned."""

    bidirectional = False

    @property
    def n_head(self) -> int:
        """Number of heads, by our name."""
        return self.num_heads

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        layer: Any = self.layer_idx
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @signed_as(theirs.ImageGPTAttention.forward)
    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        others = attention_mask is not None or encoder_hidden_states is not None or output_attentions
        dropout = self.attn_dropout
        if (
            others
            or isinstance(layer_past, EncoderDecoderCache)
            or (type(dropout) is not nn.Dropout or not bare(dropout))
            or left_to_transformers(hidden_states)
        ):
            more = (encoder_hidden_states, encoder_attention_mask, use_cache, output_attentions)
            return super().forward(hidden_states, layer_past, attention_mask, *more, **kwargs)
        qkv = self.c_attn(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, T, 3, H, D)
        dropout_p = dropout.p if dropout.training else 0.0
        upcast = self.reorder_and_upcast_attn
        if layer_past is None:
            out = ops.causal_attention_packed(qkv, self.scale, None, dropout_p, upcast)  # (B, T, H, D)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
            k, v = layer_past.update(k, v, self.layer_idx)  # (B, H, T_past + T, D)
            out = ops.causal_attention(q, k, v, self.scale, None, dropout_p, upcast)[0].transpose(1, 2)
        return self.resid_dropout(self.c_proj(out.flatten(2))), None  # (B, T, n_embd)


@plain
class Conv1D(TheirConv1D):
    """As our own: its products in float32 where the processor multiplies no bfloat16."""

    @signed_as(TheirConv1D.forward)
    def forward(self, x: Tensor) -> Tensor:
        return OurConv1D.forward(self, x)  # type: ignore[arg-type]


@plain
class Linear(nn.Linear):
    """The head of a model in bfloat16 or float16, likewise; in float32 it keeps the class that quantizers look for."""

    @signed_as(nn.Linear.forward)
    def forward(self, input: Tensor) -> Tensor:
        if patched(nn.Linear):
            return super().forward(input)
        return product(F.linear, input, self.weight, self.bias)


@plain
class ImageGPTMLP(theirs.ImageGPTMLP):
    """By ``ops.activation``."""

    @property
    def activation(self) -> str | None:
        """The name of the activation, where it is one that has a kernel, and nothing is around it."""
        return ACTIVATIONS.get(type(self.act)) if bare(self.act) else None

    @signed_as(theirs.ImageGPTMLP.forward)
    def forward(self, hidden_states: Tensor) -> Tensor:
        name = self.activation
        if name is None or left_to_transformers(hidden_states):
            return super().forward(hidden_states)
        inner = ops.activation(self.c_fc(hidden_states), name)  # (B, T, n_inner)
        return self.dropout(self.c_proj(inner))  # (B, T, n_embd)


@plain
class ImageGPTModel(theirs.ImageGPTModel):
    """In one call of the compiled module where that offers it, by its modules elsewhere."""

    @signed_as(theirs.ImageGPTModel.forward)
    def forward(self, input_ids: Tensor | None = None, past_key_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(past_key_values, StaticCache):
            raise ValueError(
                "ImageGPTModel: past_key_values is a StaticCache, with which transformers' ImageGPT gives wrong"
                " results; want a DynamicCache, which generate makes unless cache_implementation asks for another"
            )
        if past_key_values is None and not args and not torch.compiler.is_compiling():
            output = _whole_forward(self, input_ids, **kwargs)
            if output is not None:
                return output
        return super().forward(input_ids, past_key_values, *args, **kwargs)


def _whole_forward(
    network: ImageGPTModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **others: Any,
) -> Any:
    """What ``ImageGPTModel.forward`` returns, where the compiled module makes it; else ``None``."""

    def told(value: bool | None, name: str) -> bool:
        return bool(getattr(network.config, name) if value is None else value)

    if told(output_attentions, "output_attentions") or any(value is not None for value in others.values()):
        return None
    if input_ids is None or left_to_transformers(input_ids):
        return None
    twin = forward_twin(network, input_ids, around=False)
    if isinstance(twin, str) or not whole(input_ids, attention_mask, position_ids):
        return None
    hidden, cached = told(output_hidden_states, "output_hidden_states"), told(use_cache, "use_cache")
    output = twin(input_ids, use_cache=cached, output_hidden_states=hidden, return_dict=True)
    made = NetworkOutput(
        last_hidden_state=output.last_hidden_state,
        past_key_values=DynamicCache(output.past_key_values, config=network.config) if cached else None,
        hidden_states=output.hidden_states,
    )
    return made if told(return_dict, "return_dict") else made.to_tuple()


def forward_twin(network: ImageGPTModel, tokens: Tensor, around: bool = True) -> OurNetwork | str:
    """Ours, where the compiled module makes its forward pass of these tokens; or why it does not."""
    if reason := forwards.no_native_decoder():
        return reason
    if network.training:
        return "the network is in training mode"
    if reason := why_not_modules(network, around):
        return reason
    twin = network_twin(network)
    return twin if isinstance(twin, str) else forwards.why_not(twin, tokens) or twin


def whole(tokens: Tensor, mask: Tensor | None, positions: Tensor | None, past: int = 0) -> bool:
    """Whether a mask hides none of (B, T) tokens and of what they follow, and their positions follow on each other."""
    batch, length = tokens.shape[:-1], tokens.shape[-1]
    if mask is not None and (mask.shape != (*batch, past + length) or not bool((mask == 1).all())):
        return False
    if positions is None:
        return True
    want = torch.arange(past, past + length, device=positions.device)
    return positions.shape[-1] == length and bool((positions == want).all())


@plain
class ImageGPTForCausalImageModeling(theirs.ImageGPTForCausalImageModeling):
    """transformers' ``generate`` on a decoder of ours."""

    @signed_as(theirs.ImageGPTForCausalImageModeling.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(past_key_values, DecoderCache):
            tokens: Any = input_ids
            if not args and _reads(self, past_key_values, tokens, attention_mask, **kwargs):
                return ModelOutput(logits=past_key_values.read(tokens), past_key_values=past_key_values)
            past_key_values.become_ordinary()
        return super().forward(input_ids, past_key_values, attention_mask, *args, **kwargs)

    @signed_as(theirs.ImageGPTForCausalImageModeling._sample)
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loop of greedy and random choice, which looks at the logits of the last position alone."""
        cache = kwargs.get("past_key_values")
        if not synced_gpus and _decodes(self, input_ids, generation_config, **kwargs):
            _decode_with(cache, self, input_ids, generation_config.max_length - 1)  # the last token is not read
            if type(cache) is DecoderCache and cache.get_seq_length() == 0:
                kwargs.update(attention_mask=None, position_ids=None)  # nothing is hidden: no need to lengthen them
        elif isinstance(cache, DecoderCache):
            cache.become_ordinary()
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        loop: Any = super()._sample  # type: ignore[misc] # whose ``self`` is a protocol
        result = loop(*arguments, **kwargs)
        if type(cache) is DecoderCache and not generation_config.return_dict_in_generate:
            cache.rest()
        return result


def _reads(
    model: Any,
    cache: DecoderCache,
    tokens: Tensor | None,
    attention_mask: Any = None,
    position_ids: Any = None,
    **kwargs: Any,
) -> bool:
    """Whether the cache's decoder makes what a call of the model asks for."""
    config = model.config
    if _asked(kwargs) - {"return_dict"} or not kwargs.get("return_dict", config.return_dict):
        return False
    if model.training or torch.is_grad_enabled() or config.output_attentions or config.output_hidden_states:
        return False
    if tokens is None or not cache.takes(model, tokens) or left_to_transformers(tokens):
        return False
    return whole(tokens, attention_mask, position_ids, cache.get_seq_length())


def _decodes(
    model: Any,
    tokens: Tensor,
    settings: Any,
    past_key_values: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    **kwargs: Any,
) -> bool:
    """Whether a decoder could serve the whole loop that ``settings`` describe."""
    if _asked(kwargs) or left_to_transformers(tokens) or not whole(tokens, attention_mask, position_ids):
        return False
    if settings.output_attentions or settings.output_hidden_states or settings.is_assistant:
        return False
    if settings.prefill_chunk_size is not None or torch.compiler.is_compiling() or tokens.device != model.device:
        return False
    if isinstance(past_key_values, DecoderCache):
        return True
    return type(past_key_values) is DynamicCache and past_key_values.get_seq_length() == 0


def _asked(kwargs: dict[str, Any]) -> set[str]:
    """Arguments that ask for something, but for a cache."""
    return {name for name, value in kwargs.items() if value is not None and value is not False} - {"use_cache"}


def _decode_with(cache: Any, model: Any, tokens: Tensor, positions: int) -> None:
    """Lets a decoder serve so many positions of the model, with the cache, where it can; else ordinary it is."""
    capacity = min(positions, model.config.n_positions)
    twin = model_twin(model) if tokens.shape[1] <= capacity else "the context is too long"
    earlier = isinstance(cache, DecoderCache)
    if not isinstance(twin, str):
        start = cache.restart if earlier else functools.partial(DecoderCache.take, cache)
        start(twin, tokens.shape[0], capacity)
    elif earlier:
        cache.become_ordinary()


SERVED: dict[type, type] = {
    getattr(theirs, kind.__name__): kind
    for kind in (ImageGPTLayerNorm, ImageGPTAttention, ImageGPTMLP, ImageGPTModel, ImageGPTForCausalImageModeling)
}


def patched(kind: type) -> bool:
    """Whether somebody has replaced what a class of transformers computes."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return bool(forward.__module__ != kind.__module__)


SERVED |= {TheirConv1D: Conv1D, nn.Linear: Linear}  # of these the heads of models in low precision alone


for _kind in (theirs.ImageGPTBlock, TheirConv1D, *ACTIVATIONS):
    if not patched(_kind):
        plain(_kind)
