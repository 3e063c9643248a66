"""The objective of iGPT: the next pixel, in nats."""

from __future__ import annotations

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
