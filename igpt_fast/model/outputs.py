"""What the models return: results readable by attribute, by key and by position, as in transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from igpt_fast import kin
from igpt_fast.engines.cache import Cache, register


@kin.stands_for("transformers.utils.generic", "ModelOutput")
@dataclass(eq=False)
class ModelOutput(OrderedDict[str, Any]):
    """A dict of the fields that are set, readable by attribute and by position too; ``None`` has no key.

    A dict, as in transformers, since torch's and the trainers' own walks over results (``DataParallel``, FSDP,
    accelerate) rebuild dicts from their items and know no other class with names.
    """

    def __post_init__(self) -> None:
        """A dict, or pairs of names and values, in place of the first field gives all of them."""
        names = [field.name for field in fields(self)]
        first = self.__dict__.get(names[0]) if names else None
        if first is None or isinstance(first, Tensor) or len(self) > 1:
            return
        if not isinstance(first, dict | list | tuple | Iterator):
            return
        pairs = list(first.items() if isinstance(first, dict) else first)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            return
        setattr(self, names[0], None)
        for name, value in pairs:
            self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.__dataclass_fields__:
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in self.__dataclass_fields__:
            return
        if value is not None:
            super().__setitem__(name, value)  # which torch 2.8 compiles, where it does not call OrderedDict's by name
        elif name in self:
            OrderedDict.__delitem__(self, name)  # transformers' class, where it is a base, deletes nothing

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{type(self).__name__}: set {key!r} to None instead of deleting it")

    def _fixed(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{type(self).__name__}: fields can be set, one by one, and not taken out")

    pop = popitem = clear = update = setdefault = _fixed

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are set, in order; what ``return_dict=False`` returns."""
        return tuple(self.values())


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """Result of ``ImageGPTModel``; hidden states are (B, T, n_embd), attentions (B, H, T, T_k), cross_attentions
    (B, H, T, S).
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class CausalImageModelingOutput(ModelOutput):
    """Result of ``ImageGPTForCausalImageModeling``; logits are (B, T, vocab_size - 1), the loss is fp32 or fp64."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class ImageClassificationOutput(ModelOutput):
    """Result of ``ImageGPTForImageClassification``; logits are (B, num_labels), the loss is fp32 or fp64."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


for _output in (BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput):
    register(_output)
