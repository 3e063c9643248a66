"""Exact speculation: one image's pixels are guessed ahead, read in one step, and drawn as if they had come one by one.

A draft is kept as far as it is what the model draws there with the very number that is the pixel's own, so that the
image is the one that would have been drawn without, bit for bit. A guess costs a row of a step, less than a step.

Where a pixel's neighbours (left, above, above left and right) have stood together before in this image, the guess is
what the pixel's number draws from the distribution that the model had there; where they have not, the same by two of
them; else what the last step has drawn there, after a draft that was wrong before it; else the pixel above. Every kind
of guess keeps its own rate of hits; a draft ends where the chance that it is right to its end falls below
``LEAST_CHANCE``. The guess behind it is compared with what is drawn all the same: where nothing can be foreseen, hardly
a row is wasted (that and the guessing took 5 to 8 % more time of the processor in noise), and where something can
again, it shows.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import ops
from igpt_fast.draws import Sampling
from igpt_fast.engines.decoder import Decoder

MOST_ROWS = 16  # of a step
LEAST_CHANCE = 0.3  # about what a further row costs, as a share of a step and all that is around it
MEMORY = 60  # tries of a kind, after which older ones count half


class Drafts:
    """Guesses of an image's next pixels.

    Args:
        pixels: Those that stand before the first drawn one.
        known: Of each position, the pixel that is given there, or -1; these are certain.
        numbers: (T,) float64, what the pixels are drawn with.
        width: Pixels of a row.
    """

    def __init__(self, pixels: list[int], known: list[int], numbers: np.ndarray, width: int) -> None:
        self._pixels, self._given, self._known = pixels, len(pixels), known
        self.numbers, self._width = numbers, width
        self._seen: dict[Hashable, Any] = {}  # neighbours -> the cumulative weights there, or the token
        self._last: dict[int, int] = {}  # position -> what the last step has drawn there after a wrong draft
        self._hits: dict[Hashable, list[float]] = {}  # kind of guess -> hits, tries
        self._kinds: list[Hashable] = []  # of the draft, and of the guess that is not in it
        self._aside: int | None = None

    def ahead(self) -> list[int]:
        """The draft of the pixels that follow; all but the last of the image, which nothing has to read."""
        draft: list[int] = []
        t, chance, pixels = len(self._pixels) - self._given, 1.0, self._pixels
        self._kinds, self._aside = [], None
        while len(draft) < MOST_ROWS - 1 and t + len(draft) < len(self._known) - 1:
            token, kind = self._guess(t + len(draft))
            hits, tries = self._hits.setdefault(kind, [1.0, 2.0])
            chance *= 1.0 if kind == "known" else hits / tries
            self._kinds.append(kind)
            if chance < LEAST_CHANCE:
                self._aside = token
                break
            draft.append(token)
            pixels.append(token)
        del pixels[len(pixels) - len(draft) :]
        return draft

    def learn(self, draft: list[int], drawn: list[int], weights: np.ndarray | None) -> int:
        """Takes what was drawn after a draft, and with which (W, K) weights; returns how many of it stand."""
        t, kept = len(self._pixels) - self._given, 1
        for kind, guess, token in zip(self._kinds, [*draft, self._aside], drawn, strict=False):
            self._count(kind, guess == token)
            if guess != token or kept > len(draft):
                break
            kept += 1
        self._last = {t + i: drawn[i] for i in range(kept, len(drawn))}
        for i in range(kept):
            here: Any = drawn[i] if weights is None else weights[i].copy()  # not a view, which keeps all W
            for key in self._neighbours(len(self._pixels)):
                self._seen[key] = here
            self._pixels.append(drawn[i])
        return kept

    def _count(self, kind: Hashable, hit: bool) -> None:
        counts = self._hits[kind]
        if counts[1] > MEMORY:
            counts[:] = counts[0] / 2, counts[1] / 2
        counts[:] = counts[0] + hit, counts[1] + 1

    def _neighbours(self, at: int) -> tuple[Hashable, Hashable]:
        pixels, width, column = self._pixels, self._width, at % self._width
        left = pixels[at - 1] if column else -1
        if at < width:
            return (left, -1, -1, -1), (left, -1)
        above, right = pixels[at - width], pixels[at - width + 1] if column < width - 1 else -1
        return (left, above, right, pixels[at - width - 1] if column else -1), (left, above)

    def _guess(self, t: int) -> tuple[int, Hashable]:
        """A token, and the kind of the guess."""
        if self._known[t] >= 0:
            return self._known[t], "known"
        at, last = len(self._pixels), self._last.get(t)
        above = self._pixels[at - self._width] if at >= self._width else 0
        for key in self._neighbours(at):
            if (seen := self._seen.get(key)) is not None:
                token, margin = (seen, 0) if isinstance(seen, int) else _drawn(seen, self.numbers[t])
                return token, (len(key), last is None, last == token, above == token, margin)  # type: ignore[arg-type]
        token = above if last is None else last
        return token, (0, last is None, above == token)


def invert(cumulative: np.ndarray, number: float) -> int:
    """The token of a row of ``ops.draw_scored``'s weights."""
    total = cumulative[-1]
    if total != total:  # nothing can be drawn
        return 0
    return min(int(cumulative.searchsorted(number * total, side="right")), len(cumulative) - 1)


def _drawn(cumulative: np.ndarray, number: float) -> tuple[int, int]:
    """The token, and how far the number is from where it would be another's: 0 far, 3 near."""
    total = cumulative[-1]
    at, token = number * total, invert(cumulative, number)
    margin = min(cumulative[token] - at, at - cumulative[token - 1] if token else total)
    return token, 0 if margin > 0.1 * total else 1 if margin > 0.03 * total else 2 if margin > 0.01 * total else 3


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
    count, colours = numbers.shape[1], logits.shape[1]
    given = [-1] * count if known is None else known[0].tolist()
    drafts = Drafts(context[0, 1:].tolist(), given, numbers[0].double().numpy(), width)
    draft: list[int] = []
    t = 0
    while True:
        rows = slice(t, t + len(logits))
        fixed = None if known is None else known[0, rows]
        found, scores, weights = ops.draw_scored(logits, numbers[0, rows], sampling, fixed, weighted=True)
        kept = drafts.learn(draft, found.tolist(), None if weights is None else weights.numpy())
        if kept < len(logits):
            decoder.rewind(len(logits) - kept)
        tokens[0, t : t + kept], logprobs[0, t : t + kept] = found[:kept], scores[:kept]
        yield kept
        t += kept
        if t == count:
            return
        draft = drafts.ahead()
        last = found[kept - 1 : kept]
        if draft:
            logits = decoder.step_rows(torch.cat([last, torch.tensor(draft, device="cpu")]))[:, :colours]
        else:
            logits = decoder.step(last)[:, :colours]
