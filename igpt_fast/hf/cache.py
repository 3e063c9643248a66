"""What transformers' own ``generate`` is given for a cache where a decoder of ours reads the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from igpt_fast.engines.choice import keep, make_decoder
from igpt_fast.engines.decoder import Decoder
from igpt_fast.model import ImageGPTForCausalImageModeling

# What an instance of DynamicCache has; whoever looks there wants keys and values.
_PARTS = tuple(vars(DynamicCache()))


class DecoderCache(DynamicCache):
    """A ``DynamicCache`` whose keys and values lie in a decoder. Whatever asks for them (an update from outside, a
    crop, another order of images, a copy, a pickle) makes an ordinary ``DynamicCache`` of it again, by a forward pass
    over the tokens that it has read, with the weights as they are then.
    """

    _ordinary: dict[str, Any]  # what it had as a DynamicCache, empty
    _twin: ImageGPTForCausalImageModeling
    _capacity: int
    _decoder: Decoder | None  # made from the others by the next read where there is none
    _tokens: list[Tensor]  # (B, T) each
    _length: int

    @classmethod
    def take(cls, cache: DynamicCache, twin: ImageGPTForCausalImageModeling, batch_size: int, capacity: int) -> None:
        """Makes one of an empty ``DynamicCache``, the object itself.

        Args:
            cache: The object.
            twin: What decodes: see ``model_twin``.
            batch_size, capacity: As of ``Decoder``.
        """
        decoder = make_decoder(twin, batch_size, capacity)
        parts = {name: cache.__dict__.pop(name) for name in _PARTS}
        cache.__dict__.update(_ordinary=parts, _twin=twin, _capacity=capacity, _decoder=decoder, _tokens=[], _length=0)
        cache.__class__ = cls

    def restart(self, twin: ImageGPTForCausalImageModeling, batch_size: int, capacity: int) -> Decoder:
        """Goes on with another capacity, and with the weights as they are now; ``batch_size`` counts where nothing has
        been read.
        """
        self._twin, self._capacity = twin, capacity
        decoder = make_decoder(twin, self._tokens[0].shape[0] if self._tokens else batch_size, capacity)
        if self._tokens:
            decoder.prefill(torch.cat(self._tokens, dim=1))
        self._decoder = decoder
        return decoder

    def takes(self, model: Any, tokens: Tensor) -> bool:
        """Whether ``read`` can read (B, T) tokens next for a model, which may be another than that of the cache."""
        if self._twin.lm_head is not model.lm_head or tokens.ndim != 2 or tokens.shape[1] == 0:
            return False
        if self._length + tokens.shape[1] > self._capacity:
            return False
        batch = self._decoder.batch_size if self._decoder else (self._tokens or [tokens])[0].shape[0]
        return tokens.shape[0] == batch and tokens.dtype == torch.int64 and tokens.device == self._twin.device

    def read(self, tokens: Tensor) -> Tensor:
        """Reads (B, T) tokens; the (B, T, K) logits that follow them, of the very first tokens those of the last."""
        decoder = self._decoder or self.restart(self._twin, tokens.shape[0], self._capacity)
        self._decoder = None  # one that fails has perhaps read some of them
        if self._length == 0:
            logits = decoder.prefill(tokens)[:, None]
        else:
            logits = torch.stack([decoder.step(column) for column in tokens.unbind(1)], dim=1)
        self._decoder = decoder
        self._tokens.append(tokens)
        self._length += tokens.shape[1]
        return logits

    def rest(self) -> None:
        """Leaves the decoder to the next images; whoever has this cache still goes on with another."""
        if self._decoder is not None:
            keep(self._decoder)
            self._decoder = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that have been read."""
        return self._length

    @property
    def is_compileable(self) -> bool:
        """As of every ``DynamicCache``."""
        return False

    def become_ordinary(self) -> None:
        """Makes a ``DynamicCache`` of the object itself."""
        pairs: Any = ()
        if self._tokens:
            tokens, network = torch.cat(self._tokens, dim=1), self._twin.transformer
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                pairs = network(tokens, use_cache=True, return_dict=True).past_key_values
        parts = self._ordinary
        for name in ("_ordinary", "_twin", "_capacity", "_decoder", "_tokens", "_length"):
            del self.__dict__[name]
        self.__dict__.update(parts)
        self.__class__ = DynamicCache  # type: ignore[assignment]
        for layer, (keys, values) in enumerate(pairs):
            self.update(keys, values, layer)

    def __getattr__(self, name: str) -> Any:
        if name not in _PARTS or "_decoder" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.become_ordinary()
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.become_ordinary()
        return self.__reduce_ex__(protocol)  # DynamicCache's
