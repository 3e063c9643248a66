"""The likelihood of whole images: each pixel among the colours, given those before it, in nats.

Over a model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable.
Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2; openai/image-gpt src/model.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.model import ImageGPTForCausalImageModeling


def image_nats(model: ImageGPTForCausalImageModeling, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each pixel among the colours in nats: (B, T) from (B, T) integers.

    ``labels``: (B,) int64, the classes that the images are known to be of, -1 for none; ``None``: none at all.
    """
    tokens, config = tokens.long(), model.config
    config.check_causal("image_nats")
    begin = torch.full_like(tokens[:, 0], config.sos_token_id)
    if labels is not None:
        begin = torch.where(labels < 0, begin, config.n_colours + labels)
    logits = model(torch.cat([begin[:, None], tokens[:, :-1]], dim=1), use_cache=False).logits
    if config.n_classes:
        logits = logits[..., : config.n_colours].contiguous()  # here, or the loss copies it, and its gradient again
    return ops.cross_entropy(logits, tokens, reduction="none")


@torch.no_grad()
def mean_nats(
    model: ImageGPTForCausalImageModeling, batches: Iterable[tuple[Tensor, Tensor | None]], classes: bool = False
) -> float:
    """Mean nats per pixel of batches of (tokens (B, T), labels (B,) or ``None``), which may be on another device.

    The model is in evaluation mode meanwhile. ``classes``: given the labels.

    Raises:
        ValueError: No images.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for tokens, labels in batches:
        given = (labels.to(model.device),) if classes and labels is not None else ()
        total += float(image_nats(model, tokens.to(model.device), *given).double().sum())
        count += tokens.numel()
    model.train(training)
    if not count:
        raise ValueError("mean_nats: no images")
    return total / count
