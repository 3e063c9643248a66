"""Key/value caches of a causal forward pass, behind one interface: ``update`` and ``get_seq_length``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What the model asks of a cache; transformers' ``DynamicCache`` satisfies it too."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T_new, D) keys and values of a layer; returns all of its (B, H, T, D) so far."""
        ...

    def get_seq_length(self) -> int:
        """Positions seen so far by the first layer."""
        ...


class DynamicCache:
    """Grows by concatenation; differentiable, and free when a single forward fills it."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``Cache.update``."""
        if layer_idx == len(self._layers):
            self._layers.append((key, value))
        elif layer_idx < len(self._layers):
            old_key, old_value = self._layers[layer_idx]
            self._layers[layer_idx] = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        else:
            raise ValueError(f"cache: layer {layer_idx} arrives before layer {len(self._layers)}")
        return self._layers[layer_idx]

    def get_seq_length(self) -> int:
        """See ``Cache.get_seq_length``."""
        return self._layers[0][0].shape[2] if self._layers else 0


class StaticCache:
    """Preallocated (B, H, T_max, D) buffers, written in place: no allocation per token.

    Args:
        n_layer, batch_size, n_head, max_length, head_dim: Its shape.
        dtype, device: Of the keys and values.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_head: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (n_layer, batch_size, n_head, max_length, head_dim)
        self.max_length = max_length
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._lengths = [0] * n_layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``Cache.update``; the returned tensors are views of the filled part.

        Raises:
            ValueError: The positions do not fit into ``max_length``, or the batch is another one.
        """
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if key.shape[0] != keys.shape[0]:
            raise ValueError(f"StaticCache: made for batch {keys.shape[0]}, got {key.shape[0]}")
        start = self._lengths[layer_idx]
        end = start + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"StaticCache: {end} positions do not fit into max_length={self.max_length}")
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        self._lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        """See ``Cache.get_seq_length``."""
        return self._lengths[0]
