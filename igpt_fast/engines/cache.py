"""Key/value caches of a causal forward pass, behind one interface: ``update`` and ``get_seq_length``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree


class Cache(Protocol):
    """What the model asks of a cache; transformers' ``DynamicCache`` satisfies it too."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T_new, D) keys and values of a layer; returns all of its (B, H, T, D) so far."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far by a layer."""
        ...


class DynamicCache:
    """Grows by concatenation; differentiable, and free when a single forward fills it.

    No dataclass: FSDP copies those on their way into a module, and what a layer adds to the copy would be lost.

    Args:
        keys, values: Of each layer, (B, H, T, D). An iterator of (key, value) pairs in place of ``keys`` gives both:
            how ``DataParallel`` puts the caches of its replicas together.
    """

    def __init__(
        self, keys: list[Tensor] | Iterator[tuple[Tensor, Tensor]] | None = None, values: list[Tensor] | None = None
    ) -> None:
        if isinstance(keys, Iterator):
            pairs = list(keys)
            keys, values = [key for key, _ in pairs], [value for _, value in pairs]
        self.keys: list[Tensor] = [] if keys is None else keys
        self.values: list[Tensor] = [] if values is None else values

    def __repr__(self) -> str:
        return f"DynamicCache({self.get_seq_length()} positions, {len(self.keys)} layers)"

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """See ``Cache.update``.

        Raises:
            TypeError: Another dtype than before.
            ValueError: Layers out of order, or another batch, number of heads or head_dim than before.
        """
        if layer_idx > len(self.keys):
            raise ValueError(f"DynamicCache: layer {layer_idx} arrives before layer {len(self.keys)}")
        _check_pair("DynamicCache", key, value)
        if layer_idx == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            old = self.keys[layer_idx]
            _check_fits("DynamicCache", key, (old.shape[0], old.shape[1], old.shape[3]))
            if old.dtype != key.dtype:
                raise TypeError(f"DynamicCache: holds {old.dtype}, got {key.dtype}")
            self.keys[layer_idx] = torch.cat([old, key], dim=2)
            self.values[layer_idx] = torch.cat([self.values[layer_idx], value], dim=2)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See ``Cache.get_seq_length``."""
        return self.keys[layer_idx].shape[2] if layer_idx < len(self.keys) else 0

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.keys, self.values, strict=True))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the images ``indices``, (B_new,) int64, in this order, or those that a (B,) bool mask picks."""
        self.keys = [key[indices.to(key.device)] for key in self.keys]
        self.values = [value[indices.to(value.device)] for value in self.values]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """``batch_select_indices`` as beam search calls it."""
        self.batch_select_indices(beam_idx)


class StaticCache:
    """Preallocated (B, H, T_max, D) buffers, written in place: no allocation per token, no gradient.

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
        """See ``Cache.update``; the returned tensors are views of the filled part, in the dtype of ``key``.

        Raises:
            TypeError: The cache's dtype cannot hold the keys without loss.
            ValueError: The positions do not fit into ``max_length``; another batch, number of heads, head_dim or
                layer than the cache was made for; or keys that want a gradient.
        """
        if not 0 <= layer_idx < len(self._lengths):
            raise ValueError(f"StaticCache: made for {len(self._lengths)} layers, got layer {layer_idx}")
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        _check_pair("StaticCache", key, value)
        _check_fits("StaticCache", key, (keys.shape[0], keys.shape[1], keys.shape[3]))
        if keys.dtype != key.dtype and torch.promote_types(keys.dtype, key.dtype) != keys.dtype:
            raise TypeError(f"StaticCache: made for {keys.dtype}, got {key.dtype}")
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("StaticCache: not differentiable; use torch.no_grad() or a DynamicCache")
        start = self._lengths[layer_idx]
        end = start + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"StaticCache: {end} positions do not fit into max_length={self.max_length}")
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        self._lengths[layer_idx] = end
        # The dtypes differ under autocast, where a float32 model makes bf16 keys: lossless both ways.
        return keys[:, :, :end].to(key.dtype), values[:, :, :end].to(value.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See ``Cache.get_seq_length``."""
        return self._lengths[layer_idx] if layer_idx < len(self._lengths) else 0

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The keys and values of all layers, (n_layer, B, H, T_max, D) each, what is not filled included."""
        return self._keys, self._values

    def repeat_interleave(self, n: int) -> StaticCache:
        """A cache with n copies of each image, those of the first one first."""
        layers, batch, heads, length, dim = self._keys.shape
        device = self._keys.device
        copies = StaticCache(layers, batch * n, heads, length, dim, dtype=self._keys.dtype, device=device)
        copies._lengths = list(self._lengths)
        for layer, end in enumerate(self._lengths):
            copies._keys[layer, :, :, :end] = self._keys[layer, :, :, :end].repeat_interleave(n, dim=0)
            copies._values[layer, :, :, :end] = self._values[layer, :, :, :end].repeat_interleave(n, dim=0)
        return copies

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts image ``beam_idx[i]`` in place i, for each of the (B,) int64; in place, as the buffers are fixed.

        Raises:
            ValueError: Another batch than the cache was made for.
        """
        if beam_idx.shape != self._keys.shape[1:2]:
            raise ValueError(f"StaticCache: made for batch {self._keys.shape[1]}, got {tuple(beam_idx.shape)} indices")
        beam_idx = beam_idx.to(self._keys.device)
        for buffers in (self._keys, self._values):
            for layer, length in zip(buffers, self._lengths, strict=True):
                layer[:, :, :length] = layer[:, :, :length].index_select(0, beam_idx)


def _check_pair(name: str, key: Tensor, value: Tensor) -> None:
    if key.ndim != 4 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"{name}: key and value are {tuple(key.shape)} {key.dtype} and {tuple(value.shape)} {value.dtype};"
            " want (B, H, T, D) twice, of one dtype"
        )


def _check_fits(name: str, key: Tensor, want: tuple[int, int, int]) -> None:
    got = (key.shape[0], key.shape[1], key.shape[3])
    if got != want:
        raise ValueError(f"{name}: made for (batch, heads, head_dim) = {want}, got {got}")


def register(kind: type) -> None:
    """Lets torch.export, torch.func and DistributedDataParallel see the tensors inside of a dataclass."""
    with warnings.catch_warnings():
        # Up to torch 2.6 its function calls another that it warns of, which nobody outside of torch can change.
        warnings.simplefilter("ignore", FutureWarning)
        torch.export.register_dataclass(kind, serialized_type_name=f"igpt_fast.{kind.__name__}")


def register_cache(kind: type, *names: str) -> None:
    """``register`` for a class that is made from these attributes and no dataclass."""
    # As register_dataclass has it: the path of a tensor is that of the attribute, and no context.
    _pytree.register_pytree_node(
        kind,
        lambda cache: ([getattr(cache, name) for name in names], None),
        lambda parts, _: kind(*parts),
        serialized_type_name=f"igpt_fast.{kind.__name__}",
        flatten_with_keys_fn=lambda cache: (
            [(_pytree.GetAttrKey(name), getattr(cache, name)) for name in names],
            None,
        ),
    )


register_cache(DynamicCache, "keys", "values")
