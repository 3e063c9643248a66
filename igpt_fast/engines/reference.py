"""The PyTorch model on a static key/value cache: right everywhere, and the measure for the faster decoders.

It calls the model itself, so that hooks, wrappers, subclasses and modes do what they do in any other call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast.engines.cache import StaticCache
from igpt_fast.engines.decoder import check_capacity, check_fork
from igpt_fast.engines.network import Model


class ReferenceDecoder:
    """The PyTorch model on a static cache.

    Args:
        model: The model; in eval mode.
        batch_size: Images decoded together.
        capacity: Positions that will be read at most, ``n_positions`` or fewer.
        reason: Why it is none of the faster decoders.

    Raises:
        ValueError: ``capacity`` exceeds ``n_positions``.
    """

    name = "reference"

    def __init__(self, model: Model, batch_size: int, capacity: int, reason: str | None = None) -> None:
        config = model.config
        check_capacity(capacity, config.n_positions)
        self.model, self.reason = model, reason
        self.batch_size = batch_size
        self.capacity = capacity
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._forked = False
        self._cache = StaticCache(
            config.n_layer,
            batch_size,
            config.n_head,
            capacity,
            config.head_dim,
            dtype=cache_dtype(model),
            device=model.device,
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``."""
        return self.model(tokens, past_key_values=self._cache, use_cache=True, return_dict=True).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        return self.prefill(tokens[:, None])

    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. Every image takes a copy of its primer's keys and values."""
        check_fork(n, self._cache.get_seq_length(), self._forked)
        self._forked = True
        self.batch_size *= n
        if n > 1:
            self._cache = self._cache.repeat_interleave(n)


def cache_dtype(model: Model) -> torch.dtype:
    """One that holds the keys without loss: that of the weights that make them, and what autocast makes of it."""
    attention: Any = model.transformer.h[0].attn
    dtype, kind = attention.c_attn.weight.dtype, model.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.promote_types(dtype, torch.get_autocast_dtype(kind))
    return dtype
