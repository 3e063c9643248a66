"""Objectives that go on from a model that there is: a copy of it, as the run's configuration wants it."""

from __future__ import annotations

import copy
import os
import zlib
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from igpt_fast.config import ImageGPTConfig
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.model import ImageGPTForCausalImageModeling, ImageGPTPreTrainedModel
from igpt_fast.model.resizing import nearest, recolour

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


@dataclass(frozen=True, eq=False)
class Continued(NextPixel):
    """The next pixel, by a model that has learned before. See ``Objective``.

    Args:
        start: What a run begins with; of the data's size, colours and classes, see ``adapted``.
    """

    start: Any = None

    def __post_init__(self) -> None:
        self.start.config.check_causal("Continued")

    def model(self, config: ImageGPTConfig) -> ImageGPTForCausalImageModeling:
        return copy_of(self.start, config)

    def identity(self) -> dict[str, int | float]:
        own = {"label_dropout": self.label_dropout}
        return {**own, "checksum of the model to start from": checksum(self.start)}


def load(name_or_path: str | os.PathLike[str]) -> ImageGPTForCausalImageModeling:
    """A model that predicts the next pixel, in float32.

    Raises:
        FileNotFoundError, ValueError: As ``from_pretrained``; or the model is bidirectional.
    """
    model = ImageGPTForCausalImageModeling.from_pretrained(name_or_path, dtype="float32")
    model.config.check_causal(str(name_or_path))
    return model


def adapted(
    model: ImageGPTForCausalImageModeling,
    colours: Tensor,
    size: tuple[int, int],
    data: Data,
    data_colours: Tensor,
) -> ImageGPTForCausalImageModeling:
    """The model, changed in place to fit the data: a new colour begins as the nearest old one, positions are
    interpolated, and a new class begins as SOS, an image of any.

    Args:
        model: A model of these (K, 3) ``colours``, for images of this (height, width).
        colours, size: See there.
        data: What it shall learn.
        data_colours: (K, 3).

    Raises:
        ValueError: The colours or the size are not the model's.
    """
    config = model.config
    if len(colours) != config.n_colours:
        raise ValueError(f"the model has {config.n_colours} colours, its processor {len(colours)}")
    model.resize_positions(data.height, data.width, size)
    names = dict(enumerate(data.class_names))
    same_colours = colours.shape == data_colours.shape and bool(torch.equal(colours, data_colours))
    same_classes = data.n_classes == config.n_classes and (not names or names == config.id2label)
    if not (same_colours and same_classes):
        origin = torch.arange(len(colours)) if same_colours else nearest(data_colours, colours)
        recolour(model.transformer.wte, model.lm_head, origin, data.n_classes, same_classes)
        config.update({"vocab_size": len(data_colours) + data.n_classes + 1, "n_classes": data.n_classes})
    if names:
        config.update({"id2label": names})
    return model
