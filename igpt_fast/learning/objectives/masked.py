"""The objective of BERT as iGPT has it: masked pixels, from all others, in nats.

Every position is masked with probability 0.15, and its own colour is what is predicted there. There is no start of a
sequence and no class.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), sections 2.2 and 4.6; openai/image-gpt src/model.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from igpt_fast.checks import finite_number, whole_number
from igpt_fast.config import ImageGPTConfig
from igpt_fast.learning.objectives.protocol import Data
from igpt_fast.likelihood.masked import hide, masked_nats
from igpt_fast.likelihood.nats import evaluating, float64_sum
from igpt_fast.likelihood.transfer import sent
from igpt_fast.model import ImageGPTForCausalImageModeling

PROBABILITY = 0.15  # of the paper
# From this width on weights begin as the paper's. With a deviation of 0.02 the attention of narrower networks is next
# to uniform at first, and the loss falls more slowly: docs/recipes.md has by how much.
_PAPERS_WIDTH = 512
VOTES = 5  # masks of an image whose features are read, of the paper


@dataclass(frozen=True)
class Masked:
    """See ``Objective``.

    The loss of an image is the mean over its masked pixels; that of one in which nothing is masked is 0 (OpenAI's code
    divides by their number there, and has NaN).

    Args:
        mask_probability: Of every pixel, on its own.

    Raises:
        ValueError: ``mask_probability`` is not in (0, 1].
    """

    mask_probability: float = PROBABILITY
    name: ClassVar[str] = "masked"
    figure: ClassVar[str] = "masked_nats"

    def __post_init__(self) -> None:
        finite_number("mask_probability", self.mask_probability, 0, 1, without=(0,))

    def settings(self, data: Data) -> dict[str, Any]:
        return {"vocab_size": data.vocabulary + 1, "bidirectional": True}

    def model(self, config: ImageGPTConfig) -> ImageGPTForCausalImageModeling:
        config = copy.deepcopy(config)
        if config.n_embd < _PAPERS_WIDTH:
            config.initializer_range = max(config.initializer_range, config.n_embd**-0.5)
        model = ImageGPTForCausalImageModeling(config)
        torch.nn.init.zeros_(model.lm_head.weight)  # the paper starts from uniform predictions
        return model

    def identity(self) -> dict[str, int | float]:
        return dict(vars(self))

    def inputs(self, tokens: Tensor, labels: Tensor | None, generator: Generator) -> tuple[Tensor, ...]:
        return tokens, sent(torch.rand(tokens.shape, generator=generator) < self.mask_probability, tokens.device)

    def losses(self, model: ImageGPTForCausalImageModeling, *inputs: Tensor) -> Tensor:
        tokens, mask = inputs
        return masked_nats(model, tokens, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    @torch.no_grad()
    def evaluate(self, model: ImageGPTForCausalImageModeling, data: Data) -> dict[str, float]:
        """Nats of a masked pixel; the masks are those of ``fixed_masks``. None where nothing was masked."""
        total: float | Tensor = 0.0  # on the device, which is waited for in the end
        count = 0
        with evaluating(model):
            for batch, _ in data.heldout_batches():
                mask = fixed_masks(batch, 1, probability=self.mask_probability)[0]
                nats = masked_nats(model, sent(batch, model.device), sent(mask, model.device))
                total = total + float64_sum(nats)
                count += int(mask.sum())
        return {"heldout_masked_nats": float(total) / count} if count else {}


def fixed_masks(tokens: Tensor, count: int, seed: int = 0, probability: float = PROBABILITY) -> Tensor:
    """``count`` masks for each image, (count, B, T) bool on the device of the tokens.

    An image's masks are a function of its pixels and the seed alone, whatever batch, order or process it is in.

    Args:
        tokens: (B, T) integers.
        count: How many masks; the first of five are those of fewer.
        seed: Another one, other masks.
        probability: That a pixel is masked.
    """
    whole_number("masks", count, 0)
    t = tokens.shape[1]
    keys = _hashed(np.array([whole_number("seed", seed, 0, (1 << 64) - 1)], dtype=np.uint64))  # (1,)
    weights = _hashed(keys + np.arange(t, dtype=np.uint64)) | np.uint64(1)  # (T,)
    image = _hashed((tokens.cpu().numpy().astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64))  # (B,)
    place = _hashed(~keys + np.arange(count * t, dtype=np.uint64)).reshape(count, 1, t)
    drawn = _hashed(image[:, None] ^ place) >> np.uint64(11)  # (count, B, T), below 2^53
    return torch.from_numpy(drawn < probability * 2.0**53).to(tokens.device)


def _hashed(values: np.ndarray) -> np.ndarray:
    """Uint64 to uint64 that look random. Source: SplitMix64 (Steele, Lea, Flood, 2014)."""
    values = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def vote(
    read: Callable[[Tensor], Tensor], config: ImageGPTConfig, tokens: Tensor, masks: int = VOTES, seed: int = 0
) -> Tensor:
    """The mean of what is read of images under several masks: the features, or the logits, of a bidirectional model.

    It was trained on masked images, and what it makes of whole ones is another thing. For a linear reader the mean of
    the features is the mean of the logits.

    Args:
        read: (B, T) tokens to a tensor.
        config: The model's.
        tokens: (B, T) int64, colours.
        masks: How many; 0 reads the images unmasked.
        seed: Of ``fixed_masks``.
    """
    if not config.bidirectional:
        raise ValueError("masks: the model's attention is causal; want a bidirectional one (a BERT)")
    if masks == 0:
        return read(tokens)
    total: Tensor | None = None
    for mask in fixed_masks(tokens, masks, seed):
        part = read(hide(config, tokens, mask))
        total = part if total is None else total + part
    assert total is not None
    return total / masks
