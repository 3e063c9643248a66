"""What the models return: results readable by attribute, by key and by position, as in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from igpt_fast.cache import Cache


@dataclass(eq=False)
class ModelOutput:
    """A result readable by attribute, by key and by position; fields that are ``None`` have no position."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def keys(self) -> list[str]:
        """Names of the fields that are set."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> tuple[Any, ...]:
        """Their values."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> list[tuple[str, Any]]:
        """Names and values."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, key: str, default: Any = None) -> Any:
        """``self[key]`` if set, else ``default``."""
        return getattr(self, key) if key in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The set fields in order; what ``return_dict=False`` returns."""
        return self.values()


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """Result of ``ImageGPTModel``; hidden states are (B, T, n_embd), attentions (B, H, T, T_k).

    ``cross_attentions`` is there for transformers' sake and always ``None``.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: None = None


@dataclass(eq=False)
class CausalImageModelingOutput(ModelOutput):
    """Result of ``ImageGPTForCausalImageModeling``; logits are (B, T, vocab_size - 1), the loss is fp32 or fp64.

    ``cross_attentions`` is there for transformers' sake and always ``None``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: None = None


@dataclass(eq=False)
class ImageClassificationOutput(ModelOutput):
    """Result of ``ImageGPTForImageClassification``; logits are (B, num_labels), the loss is fp32 or fp64."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# So that torch.export, torch.func and DistributedDataParallel see the tensors inside.
for _output in (BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput):
    torch.export.register_dataclass(_output, serialized_type_name=f"igpt_fast.{_output.__name__}")
