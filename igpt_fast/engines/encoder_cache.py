"""The cache of a network that also attends to an encoder: as transformers' ``EncoderDecoderCache``, which it may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from igpt_fast.engines.cache import DynamicCache, register_cache


class EncoderDecoderCache:
    """Keys and values of the positions before, which grow, and of the encoder's states, which are made once.

    Args:
        self_attention_cache, cross_attention_cache: A cache for each. An iterator of what iterating yields in place of
            the first gives both: how ``DataParallel`` puts the caches of its replicas together.
    """

    def __init__(self, self_attention_cache: Any = None, cross_attention_cache: Any = None) -> None:
        if isinstance(self_attention_cache, Iterator):
            layers = list(self_attention_cache)
            self_attention_cache = DynamicCache(layer[:2] for layer in layers)
            cross_attention_cache = DynamicCache(layer[2:] for layer in layers if layer[2:])
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

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Of each layer the keys and values, and the encoder's where they are there."""
        across = list(self.cross_attention_cache)
        for layer, (key, value, *_) in enumerate(self.self_attention_cache):
            yield key, value, *(across[layer][:2] if across else ())

    def batch_select_indices(self, indices: Tensor) -> None:
        """See ``DynamicCache.batch_select_indices``."""
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See ``DynamicCache.reorder_cache``."""
        self.self_attention_cache.reorder_cache(beam_idx)
        self.cross_attention_cache.reorder_cache(beam_idx)


register_cache(EncoderDecoderCache, "self_attention_cache", "cross_attention_cache")


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


def encoder_mask(mask: Tensor | None, states: Tensor | None, cache: Any, tokens: Tensor) -> Tensor | None:
    """(B, S) bool, or None when nothing is hidden, of the encoder's states or those that a cache holds.

    Raises:
        ValueError: The states or the mask do not fit to each other or to (B, T, n_embd) embedded tokens, or the mask is
            there alone.
    """
    batch, _, width = tokens.shape
    if states is not None and (states.ndim != 3 or states.shape[0] != batch or states.shape[2] != width):
        got = tuple(states.shape)
        raise ValueError(f"encoder_hidden_states: expected (B, S, n_embd) = ({batch}, S, {width}), got {got}")
    if mask is None:
        return None
    kept = encoder_states(cache, 0)
    if kept is not None:
        want = batch, kept[0].shape[2]
    elif states is not None:
        want = batch, states.shape[1]
    else:
        raise ValueError("encoder_attention_mask: given without encoder_hidden_states")
    if mask.shape != want:
        raise ValueError(f"encoder_attention_mask: expected (B, S) = {want}, got {tuple(mask.shape)}")
    return mask.bool()  # (B, S)
