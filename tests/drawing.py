"""Which draws the definition of ``sample`` leaves open, since they hang on the last bits of the exponential.

Scores are exact: every implementation computes the same float32, so top-k and min-p are, too. Weights are not: two
good exponentials differ by a unit in the last place. A draw is open when such a difference may decide it, in float64:
when ``uniform`` times the total lies that close to a boundary of the cumulative weights, or the end of top-p's run
does, or the two weights at the end of the run are that close to each other. Everything else has to agree, and few draws
may be open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_fast import reference

# Relative error of a float32 exponential that is off by one unit, twice: one of each implementation.
EPS = 2.0**-22


def open_draws(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """(N,) bool: rows whose token may differ."""
    if temperature == 0.0:
        return torch.zeros(len(logits), dtype=torch.bool)
    scores = logits.to(torch.float32)
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    weights = scores.double().exp()
    unsure = torch.zeros(len(logits), dtype=torch.bool)
    if top_p is not None and top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        total = ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = before < top_p * total
        unsure |= _near(before, top_p * total).any(dim=-1)
        last = ordered.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
        near = (ordered - last).abs() <= 4 * EPS * last
        spread = scores.gather(-1, order)
        same = torch.where(near, spread, -torch.inf).amax(-1) == torch.where(near, spread, torch.inf).amin(-1)
        unsure |= (near & kept).any(-1) & (near & ~kept).any(-1) & ~same
        weights = weights * torch.zeros_like(kept).scatter(-1, order, kept)
    if min_p:
        weights = weights.masked_fill(scores < reference.least_score(min_p), 0.0)
    cumulative = weights.cumsum(dim=-1)
    # The number 0 takes the first weight that is not 0, and below the normal numbers that is a matter of rounding.
    unsure |= (uniform == 0.0) & ((weights > 0.0) & (weights < 2.0**-125)).any(dim=-1)
    return unsure | _near(cumulative, uniform.double()[:, None] * cumulative[:, -1:]).any(dim=-1)


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Which sums of weights may compare in another way than they do in float64. Nothing is always nothing."""
    return ((a - b).abs() <= 2 * EPS * (a + b)) & (a + b > 0.0)


def assert_draws(ours: Tensor, logits: Tensor, uniform: Tensor, *settings: float | int | None) -> None:
    """``ours`` are the definition's tokens, but in rows that are open, which are few."""
    expected, unsure = reference.sample(logits, uniform, *settings), open_draws(logits, uniform, *settings)
    wrong = (ours != expected) & ~unsure
    assert not wrong.any(), (ours[wrong], expected[wrong], uniform[wrong], settings)
    assert int(unsure.sum()) <= 1 + len(logits) // 100, f"{int(unsure.sum())} of {len(logits)} draws are open"
