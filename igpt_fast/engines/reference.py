"""The PyTorch model on a static key/value cache: right everywhere, and the measure for the faster decoders.

It calls the model itself, so that hooks, wrappers, subclasses and modes do what they do in any other call.
"""

from __future__ import annotations

from torch import Tensor

from igpt_fast.engines.cache import StaticCache
from igpt_fast.engines.decoder import Decoder, cache_dtype, check_dtype, check_fork
from igpt_fast.engines.network import BIDIRECTIONAL, Model, logits_of, whole, why_not_modules


class ReferenceDecoder(Decoder):
    """The PyTorch model on a static cache, in the model's dtype. Arguments and errors as of ``Decoder``."""

    name = "reference"

    def start(self, model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> None:
        """See ``Decoder.start``."""
        check_dtype(dtype)
        reason = None if dtype is None else f"it decodes in the model's dtype, not in {dtype!r}"
        if model.config.bidirectional:
            reason = f"{BIDIRECTIONAL}; no position is done before the last one"
        self._start(model, batch_size, capacity, dtype, reason)
        config = model.config
        shape = config.n_layer, batch_size, config.n_head, capacity, config.head_dim
        self._cache = StaticCache(*shape, dtype=cache_dtype(model), device=model.device)

    def prefill(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.prefill``. Where nothing stands in between, the head reads the last position alone."""
        self._next = None
        arguments = {"past_key_values": self._cache, "use_cache": True, "return_dict": True}
        if tokens.shape[1] > 1 and why_not_modules(self.model) is None:
            hidden = self.model.transformer(tokens, **arguments).last_hidden_state[:, -1]
            return logits_of(self.model.lm_head, hidden)
        logits = self.model(tokens, **arguments).logits[:, -1].clone()  # those of a primer's other positions may go
        return whole(logits, self.model.lm_head)

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        return self.prefill(tokens[:, None])

    def fork(self, n: int) -> None:
        """See ``Decoder.fork``. Every image takes a copy of its primer's keys and values."""
        check_fork(n, self._cache.get_seq_length(), self._forked)
        self._forked, self._next = True, None
        self.batch_size *= n
        if n > 1:
            self._cache = self._cache.repeat_interleave(n)
