"""What a step of a training run is given: learning rate, batch and classes, all functions of the step alone."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from igpt_fast.learning.settings import TrainConfig
from igpt_fast.likelihood.transfer import sent


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``lr``, then a cosine to zero at ``steps``."""
    warmup = config.warmup
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def chosen_at(step: int, n: int, config: TrainConfig) -> list[int]:
    """Which of n images are the batch of a step: a pass over all before any comes again."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    return [int(_permutation(n, config.seed, p // n)[p % n]) for p in positions]


def augmented(step: int, batch: Tensor, height: int, width: int, config: TrainConfig) -> Tensor:
    """The images (B, T) of a step, mirrored and shifted, where they are; the numbers are drawn on the host."""
    batch, device = batch.view(-1, height, width), batch.device
    generator = generator_at(2, step, config)
    if config.flip:
        flipped = sent(torch.rand(len(batch), generator=generator) < 0.5, device)
        batch = torch.where(flipped[:, None, None], batch.flip(-1), batch)
    if config.shift:
        # A shift of -shift .. shift along each axis; the border repeats.
        drawn = torch.randint(-config.shift, config.shift + 1, (2, len(batch), 1), generator=generator)
        down, right = sent(drawn, device)
        rows, columns = (
            (torch.arange(height, device=device) + down).clamp(0, height - 1),
            (torch.arange(width, device=device) + right).clamp(0, width - 1),
        )
        images = torch.arange(len(batch), device=device)
        batch = batch[images[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch.reshape(len(batch), -1)


def generator_at(stream: int, step: int, config: TrainConfig) -> torch.Generator:
    """What a step draws from; streams: 1 order of the images, 2 augmentation, 3 dropout, 4 the objective."""
    return torch.Generator().manual_seed(mix(config.seed, stream, step))


def mix(seed: int, stream: int, step: int) -> int:
    """A seed per (run, stream, step)."""
    return ((seed * 1_000_003 + stream) * 1_000_000_007 + step) % (1 << 64)


@functools.lru_cache(maxsize=2)  # a batch may span two passes
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """As an array: its elements are had in a tenth of the time that those of a tensor take."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, 1, epoch))).numpy()
