"""How well a model predicts images it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_fast.learning.data import TokenData
from igpt_fast.learning.objectives.next_pixel import image_nats
from igpt_fast.model import ImageGPTForCausalImageModeling


@torch.no_grad()
def evaluate(
    model: ImageGPTForCausalImageModeling, tokens: Tensor, batch_size: int = 64, labels: Tensor | None = None
) -> float:
    """Mean nats per token of images (N, T), which may be on another device than the model.

    Over the model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable. Given
    ``labels`` (N,), see ``image_nats``.

    Raises:
        ValueError: No images.
    """
    if tokens.numel() == 0:
        raise ValueError("evaluate: no images")
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        given = () if labels is None else (labels[part].to(model.device),)
        total += float(image_nats(model, tokens[part].to(model.device), *given).double().sum())
    model.train(training)
    return total / tokens.numel()


def heldout_nats(model: ImageGPTForCausalImageModeling, data: TokenData) -> dict[str, float]:
    """``evaluate`` on the held-out images, without their classes and, if they have some, with them; empty if there
    are no images."""
    tokens, labels = data.heldout_tokens, data.heldout_labels
    if not len(tokens):
        return {}
    given = {} if labels is None else {"heldout_class_nats": evaluate(model, tokens, labels=labels)}
    return {"heldout_nats": evaluate(model, tokens), **given}
