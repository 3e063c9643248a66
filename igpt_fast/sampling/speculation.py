"""Exact speculation: one image's pixels are guessed ahead, read in one step, and drawn as if they had come one by one.

A draft is kept as far as it is what the model draws there with the very number that is the pixel's own, so that the
image is the one that would have been drawn without, bit for bit. How pixels are guessed is the engine's matter
(``csrc/cpu/drafts.h``).
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from igpt_fast.draws import Sampling
from igpt_fast.engines.decoder import Decoder


def speculating(
    tokens: Tensor,
    logprobs: Tensor,
    decoder: Decoder,
    logits: Tensor,
    context: Tensor,
    numbers: Tensor,
    sampling: Sampling,
    known: Tensor | None,
    width: int,
) -> Generator[int, None, None]:
    """Draws one image; yields after every step of the network how many pixels it gave.

    Args:
        tokens, logprobs: (1, T), which are filled.
        decoder: Has read the context.
        logits: (1, K) that follow it.
        context: (1, T_0) int64.
        numbers: (1, T) float32.
        sampling: How tokens are drawn.
        known: (1, T) as of ``decode``.
        width: Pixels of a row, by which drafts are made.
    """
    drafts = decoder.drafts(context, numbers, known, sampling, width)
    t, count = 0, numbers.shape[1]
    while True:
        found, scores = drafts.learn(logits)
        kept = len(found)
        tokens[0, t : t + kept], logprobs[0, t : t + kept] = found, scores
        if kept < len(logits):
            decoder.rewind(len(logits) - kept)
        yield kept
        t += kept
        if t == count:
            return
        ahead = drafts.following()
        logits = decoder.step_rows(ahead) if len(ahead) > 1 else decoder.step(ahead)
