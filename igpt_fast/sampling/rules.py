"""How tokens are drawn: guidance, and the random streams; temperature and filters are ``draws.Sampling``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.draws import Sampling as Sampling
from igpt_fast.draws import check_scale, check_seed


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: tokens are drawn from what a context changes, amplified.

    With the log-probabilities of the next token after the context, c, and after another one, u, the logits that are
    drawn from are ``u + scale * (c - u)``; temperature and filters follow.

    Args:
        scale: In 0..1000; 1 is no guidance, 0 the other context alone.
        context: (B, T_0) int64, on the model's device, as long as the guided ones: without class, as a rule.

    Source: "Classifier-Free Diffusion Guidance" (Ho & Salimans, 2022), where w = scale - 1; for tokens, "Stay on topic
    with Classifier-Free Guidance" (Sanchez et al., 2023) and transformers' guidance_scale.
    """

    scale: float
    context: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale("scale", self.scale))


@dataclass(frozen=True, eq=False)
class RandomStreams:
    """(B n, count) uniform numbers that are made when they are asked for, here or by a decoder on its device. A token's
    number is that of its index in the image; the context begins at its first pixel, behind SOS or a class.
    """

    seed: int | None  # in 0..2^64-1; None: zeros, for draws that take the likeliest
    numbers: Tensor  # (B n,) int64: of each image's stream
    first: int  # index of the first token that is drawn
    count: int

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)

    def __getitem__(self, rows: slice) -> RandomStreams:
        return replace(self, numbers=self.numbers[rows])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.numbers), self.count

    def made(self, device: torch.device) -> Tensor:
        """All of them."""
        if self.seed is None:
            return torch.zeros(self.shape, dtype=torch.float32, device=device)
        return stream_uniforms(self.seed, self.numbers, self.first, self.count, device)


def stream_uniforms(seed: int, streams: Tensor, first: int, count: int, device: torch.device) -> Tensor:
    """(N, count) uniform numbers of the images' own streams; see ``reference.uniform``."""
    return reference.uniform(check_seed(seed), streams.to("cpu", torch.int64), first, count).to(device)
