"""The attentive probe: a learned query looks at all positions of a layer, where the others have their mean alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast.learning.classifiers import Reading
from igpt_fast.learning.extraction import feature_batches

EPOCHS = 10
LR, WEIGHT_DECAY = 3e-3, 1e-2
_MEASURED = 512  # images that the scale of the features is taken from


class AttentivePooling(nn.Module):
    """One query for each head attends to the positions; their mixture goes to a linear classifier.

    Args:
        width: n_embd.
        heads: Of the attention; they divide ``width``.
        classes: Outputs.
        mean, deviation: (width,), by which features are standardised: those of images' means, as for the other probes.
            Single positions stray much further, and by their deviation the mixture would be next to nothing.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, heads: int, classes: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, width // heads) * 0.02)
        self.keys = nn.Linear(width, width, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, classes)

    def forward(self, states: Tensor) -> Tensor:
        """(B, classes) of (B, T, width)."""
        x = (states - self.mean) / self.deviation  # (B, T, C)
        k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.keys, self.values))
        q = self.query[None, :, None].expand(len(x), -1, 1, -1)  # (B, H, 1, D)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, D)
        return self.score(mixed.flatten(1))


def attentive(
    model: Any,
    layer: int,
    train: tuple[Tensor, np.ndarray],
    test: tuple[Tensor, np.ndarray],
    *,
    sos: bool = True,
    masks: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Trains and tests one, AdamW with a cosine to zero; nothing is chosen, so no part of train is held back.

    It costs ``EPOCHS`` passes of the network's first ``layer`` blocks over train, and one over test: un-pooled features
    are T times the size of pooled ones, so they are made again each time and never kept.

    Args:
        model: The network.
        layer: The paper's number.
        train, test: (N, T) tokens and (N,) labels in 0..C-1.
        sos, masks, batch_size: As of ``feature_batches``.
        seed: Of the weights and of the order.
        progress: Called with the number of images done and of all.
    """
    how: dict[str, Any] = {"sos": sos, "masks": masks, "pool": None, "batch_size": batch_size}
    labels, device = torch.from_numpy(train[1]), model.device
    total, done = EPOCHS * len(train[0]) + len(test[0]), 0
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(EPOCHS)]
    head = _new(model, layer, train[0][orders[0][:_MEASURED]], int(labels.max()) + 1, seed, how)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for order in orders:
        for part, states in feature_batches(model, train[0][order], [layer], **how):
            loss = F.cross_entropy(head(states[:, 0].clone()), labels[order][part].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += len(states)
            if progress is not None:
                progress(done, total)
    right = 0
    with torch.no_grad():
        for part, states in feature_batches(model, test[0], [layer], **how):
            votes = head(states[:, 0]).argmax(dim=1).cpu()
            right += int((votes == torch.from_numpy(test[1])[part]).sum())
            if progress is not None:
                progress(done + part.stop, total)
    return Reading(right / len(test[0]), None, 0.0, True)


def _new(model: Any, layer: int, images: Tensor, classes: int, seed: int, how: dict[str, Any]) -> AttentivePooling:
    """Weights by the seed; the scale of the features is that of some images of train."""
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64, device=model.device)
    for _, states in feature_batches(model, images, [layer], **how):
        flat = states[:, 0].double().mean(1)  # (B, C)
        count, total, squares = count + len(flat), total + flat.sum(0), squares + flat.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = AttentivePooling(config.n_embd, config.n_head, classes, mean.float().cpu(), deviation.float().cpu())
    return head.to(model.device)
