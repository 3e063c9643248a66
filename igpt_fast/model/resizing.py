"""A model's tables for images of another size, and for other colours, so that it goes on from what it knows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def resize_positions(table: nn.Embedding, old: tuple[int, int] | None, new: tuple[int, int]) -> None:
    """See ``ImageGPTPreTrainedModel.resize_positions``; in place."""
    weight = table.weight
    count, width = weight.shape
    if old is None:
        edge = math.isqrt(count)
        if edge * edge != count:
            raise ValueError(
                f"resize_positions: {count} positions are no square; say what they are: old=(height, width)"
            )
        old = edge, edge
    if min(*old, *new) < 1 or old[0] * old[1] != count:
        raise ValueError(f"resize_positions: from {old} to {new}, in pixels, of a model of {count} positions")
    if old == new:
        return
    grid = weight.float().view(1, *old, width).permute(0, 3, 1, 2)  # (1, n_embd, H, W)
    grid = F.interpolate(grid, new, mode="bicubic").permute(0, 2, 3, 1)
    table.weight = nn.Parameter(grid.reshape(-1, width).to(weight.dtype).contiguous(), weight.requires_grad)
    table.num_embeddings = new[0] * new[1]


def nearest(new: Tensor, old: Tensor) -> Tensor:
    """(K,) the index of the old colour that is nearest to each new one; colours are (K, 3)."""
    return torch.cdist(new.cpu().double(), old.cpu().double()).argmin(dim=1)


@torch.no_grad()
def recolour(table: nn.Embedding, head: nn.Linear, origin: Tensor, n_classes: int, keep_classes: bool) -> None:
    """Gives the tokens other meanings, in place: colours that were others, classes, SOS.

    Args:
        table: (V, n_embd): the old colours, the old classes, SOS.
        head: (V - 1, n_embd).
        origin: (K,) int64: of each new colour, the old one whose rows it takes.
        n_classes: New classes; each begins as SOS, which is an image of any class.
        keep_classes: The classes stay what they are.
    """
    origin, sos = origin.to(table.weight.device), table.weight[-1:]
    for module, extra in ((table, 1), (head, 0)):
        weight = module.weight
        if keep_classes:
            classes = weight[len(weight) - extra - n_classes : len(weight) - extra]
        else:
            begin = sos if extra else torch.zeros_like(weight[:1])
            classes = begin.expand(n_classes, -1)
        rows = torch.cat([weight[origin], classes, weight[len(weight) - extra :]])
        module.weight = nn.Parameter(rows, weight.requires_grad)
    table.num_embeddings = len(head.weight) + 1
    head.out_features = len(head.weight)
