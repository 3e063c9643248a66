"""The objective of iGPT: the next pixel, in nats.

The input is ``[SOS, x_0 .. x_{T-2}]`` and position ``t`` predicts ``x_t``, so that every pixel counts. With classes,
the token of the image's own stands in place of SOS, most of the time; it is no target, and the loss is that of the
colours alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from igpt_fast.config import ImageGPTConfig
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.likelihood.nats import image_nats, mean_nats
from igpt_fast.likelihood.transfer import sent
from igpt_fast.model import ImageGPTForCausalImageModeling


@dataclass(frozen=True)
class NextPixel:
    """See ``Objective``.

    Args:
        label_dropout: With classes: probability that an image is learned without its class.
    """

    label_dropout: float = 0.1
    name: ClassVar[str] = "next_pixel"
    figure: ClassVar[str] = "nats"

    def settings(self, data: Data) -> dict[str, Any]:
        classes = {"n_classes": data.n_classes, "id2label": dict(enumerate(data.class_names)) or None}
        return {"vocab_size": data.vocabulary + data.n_classes + 1, **classes}

    def model(self, config: ImageGPTConfig) -> ImageGPTForCausalImageModeling:
        model = ImageGPTForCausalImageModeling(config)
        torch.nn.init.zeros_(model.lm_head.weight)  # the paper starts from uniform predictions
        return model

    def identity(self) -> dict[str, int | float]:
        return dict(vars(self))

    def inputs(self, tokens: Tensor, labels: Tensor | None, generator: Generator) -> tuple[Tensor, ...]:
        if labels is None:
            return (tokens,)
        dropped = torch.rand(len(labels), generator=generator) < self.label_dropout
        return tokens, labels.masked_fill(sent(dropped, labels.device), -1)

    def losses(self, model: ImageGPTForCausalImageModeling, *inputs: Tensor) -> Tensor:
        tokens, *labels = inputs
        return image_nats(model, tokens, labels[0] if labels else None).mean(dim=1)

    def evaluate(self, model: ImageGPTForCausalImageModeling, data: Data) -> dict[str, float]:
        if not data.n_heldout:
            return {}
        figures = {"heldout_class_nats": mean_nats(model, data.heldout_batches(), True)} if data.n_classes else {}
        return {"heldout_nats": mean_nats(model, data.heldout_batches()), **figures}
