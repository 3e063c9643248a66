"""The cache of a network that also attends to an encoder: as transformers' ``EncoderDecoderCache``, which it may be."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from igpt_fast.engines.cache import DynamicCache


class EncoderDecoderCache:
    """Keys and values of the positions before, which grow, and of the encoder's states, which are made once.

    Args:
        self_attention_cache, cross_attention_cache: A cache for each.
    """

    def __init__(self, self_attention_cache: Any = None, cross_attention_cache: Any = None) -> None:
        self.self_attention_cache = DynamicCache() if self_attention_cache is None else self_attention_cache
        self.cross_attention_cache = DynamicCache() if cross_attention_cache is None else cross_attention_cache
        # Layer -> whether the encoder's keys and values are there.
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache)), True)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``Cache.update``, of the positions before."""
        return self.self_attention_cache.update(key, value, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See ``Cache.get_seq_length``, of the positions before."""
        return self.self_attention_cache.get_seq_length(layer_idx)

    def __len__(self) -> int:
        return len(self.self_attention_cache)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See ``DynamicCache.reorder_cache``."""
        self.self_attention_cache.reorder_cache(beam_idx)
        self.cross_attention_cache.reorder_cache(beam_idx)


def encoder_states(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor] | None:
    """The encoder's keys and values, (B, H, S, D) each, that a cache holds for a layer; ``None`` if it holds none."""
    across = getattr(cache, "cross_attention_cache", None)
    if across is None or not cache.is_updated.get(layer_idx):
        return None
    key, value, *_ = list(across)[layer_idx]
    return key, value


def keep_encoder_states(cache: Any, key: Tensor, value: Tensor, layer_idx: int) -> None:
    """Puts the encoder's keys and values of a layer into a cache that has a place for them."""
    if hasattr(cache, "cross_attention_cache"):
        cache.cross_attention_cache.update(key, value, layer_idx)
        cache.is_updated[layer_idx] = True
