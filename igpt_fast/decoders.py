"""Decoders: a model that reads tokens one position at a time, behind one interface.

``prefill`` reads a primer in one go, ``step`` one more token of every image; both return the logits of the next
position. ``TorchDecoder`` runs the PyTorch model on a static key/value cache; it is right everywhere and the
measure for the faster ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from igpt_fast.cache import StaticCache

if TYPE_CHECKING:
    from igpt_fast.model import ImageGPTForCausalImageModeling


class Decoder(Protocol):
    """What generation asks of a decoder. It holds the state of ``batch_size`` images."""

    batch_size: int
    capacity: int

    def prefill(self, tokens: Tensor) -> Tensor:
        """Reads (B, T) int64 tokens, SOS first; returns the (B, vocab_size - 1) logits of the next position."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Reads (B,) int64 tokens; returns the (B, vocab_size - 1) logits of the next position."""
        ...


class TorchDecoder:
    """The PyTorch model on a static cache.

    Args:
        model: The model; in eval mode.
        batch_size: Images decoded together.
        capacity: Positions that will be read at most, ``n_positions`` or fewer.

    Raises:
        ValueError: ``capacity`` exceeds ``n_positions``.
    """

    def __init__(self, model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int) -> None:
        config = model.config
        if not 1 <= capacity <= config.n_positions:
            raise ValueError(f"decoder: capacity is {capacity}; want 1..{config.n_positions}, the model's n_positions")
        self.model = model
        self.batch_size = batch_size
        self.capacity = capacity
        self._cache = StaticCache(
            config.n_layer,
            batch_size,
            config.n_head,
            capacity,
            config.head_dim,
            dtype=_cache_dtype(model),
            device=model.device,
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        hidden = self.model.transformer(tokens, past_key_values=self._cache, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        return self.prefill(tokens[:, None])


def cache_bytes(model: ImageGPTForCausalImageModeling) -> int:
    """Bytes of key/value cache that one whole image takes."""
    config = model.config
    return 2 * config.n_layer * config.n_positions * config.n_embd * _cache_dtype(model).itemsize


def _cache_dtype(model: ImageGPTForCausalImageModeling) -> torch.dtype:
    """One that holds the keys without loss: that of the weights that make them, and what autocast makes of it."""
    attention: Any = model.transformer.h[0].attn
    dtype, kind = attention.c_attn.weight.dtype, model.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.promote_types(dtype, torch.get_autocast_dtype(kind))
    return dtype


def make_decoder(model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int) -> Decoder:
    """The fastest decoder there is for the model's device and dtype. ``show_config()`` names it."""
    return TorchDecoder(model, batch_size, capacity)
