"""What a step of a training run is given: learning rate, batch and classes, all functions of the step alone."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from igpt_fast.learning.settings import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``lr``, then a cosine to zero at ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def batch_at(step: int, tokens: Tensor, side: int, config: TrainConfig) -> Tensor:
    """The augmented batch of a step, (B, T) int64: a pass over all images before any comes again."""
    batch = tokens[_chosen_at(step, len(tokens), config)].long().view(-1, side, side)
    generator = torch.Generator().manual_seed(_mix(config.seed, 2, step))
    if config.flip:
        flipped = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None], batch.flip(-1), batch)
    if config.shift:
        # A shift of -shift .. shift along each axis; the border repeats.
        offsets = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1), generator=generator)
        rows, columns = (torch.arange(side) + offsets).clamp(0, side - 1)
        batch = batch[torch.arange(len(batch))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch.reshape(len(batch), -1)


def labels_at(step: int, labels: Tensor, config: TrainConfig) -> Tensor:
    """The classes (B,) of the batch of a step, -1 for the images that are learned without."""
    batch = labels[_chosen_at(step, len(labels), config)]
    generator = torch.Generator().manual_seed(_mix(config.seed, 4, step))
    return batch.masked_fill(torch.rand(len(batch), generator=generator) < config.label_dropout, -1)


def _chosen_at(step: int, n: int, config: TrainConfig) -> list[int]:
    """Which of n images are the batch of a step."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    return [int(_permutation(n, config.seed, p // n)[p % n]) for p in positions]


def _mix(seed: int, stream: int, step: int) -> int:
    """A seed per (run, stream, step)."""
    return ((seed * 1_000_003 + stream) * 1_000_000_007 + step) % (1 << 64)


@functools.lru_cache(maxsize=2)  # a batch may span two passes
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """As an array: its elements are had in a tenth of the time that those of a tensor take."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, 1, epoch))).numpy()
