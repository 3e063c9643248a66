"""Objectives that go on from a model that there is: a copy of it, as the run's configuration wants it."""

from __future__ import annotations

import copy
import zlib
from typing import TypeVar

import torch

from igpt_fast.config import ImageGPTConfig
from igpt_fast.model import ImageGPTPreTrainedModel

M = TypeVar("M", bound=ImageGPTPreTrainedModel)


def copy_of(start: M, config: ImageGPTConfig) -> M:
    """A model of the weights of ``start`` in float32, on the CPU, which drops as ``config`` says.

    Raises:
        ValueError: The configuration has other sizes than the model.
    """
    for name in ("n_positions", "vocab_size", "n_classes", "n_layer", "n_embd", "n_head"):
        ours, wanted = getattr(start.config, name), getattr(config, name)
        if ours != wanted:
            raise ValueError(f"the model to start from has {name} {ours}, and the run {wanted}")
    own = copy.deepcopy(start.config)
    own.update({name: getattr(config, name) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")})
    with torch.device("cpu"):
        model = type(start)(own).float()
    model.load_state_dict(start.state_dict())
    return model


def checksum(model: ImageGPTPreTrainedModel) -> int:
    """32 bits of all weights, by which a continuation knows what it started from."""
    total = 0
    for value in model.state_dict().values():
        total = zlib.crc32(value.detach().cpu().float().contiguous().numpy().data, total)
    return total
