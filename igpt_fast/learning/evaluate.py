"""How well a model predicts images it was not trained on, and what it must beat: histograms and two neighbours."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from igpt_fast.learning.data import TokenData
from igpt_fast.likelihood.nats import mean_nats
from igpt_fast.model import ImageGPTForCausalImageModeling

_STRENGTH = 16.0  # of the smoothing in lookup_table_nats: as many pixels as a context counts before it is seen


def evaluate(
    model: ImageGPTForCausalImageModeling, tokens: Tensor, batch_size: int = 64, labels: Tensor | None = None
) -> float:
    """Mean nats per token of images (N, T), which may be on another device than the model.

    Over the model's palette: numbers of models with other clusters, and 8-bit bits/dim, are not comparable. Given
    ``labels`` (N,), see ``image_nats``.

    Raises:
        ValueError: No images.
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(tokens), batch_size)]
    batches = ((tokens[part], None if labels is None else labels[part]) for part in parts)
    return mean_nats(model, batches, labels is not None)


def lookup_table_nats(data: TokenData, *, border: int | None = None) -> float:
    """What a table of p(colour | left neighbour, upper neighbour) reaches on the held-out part, nats per token.

    Counts of the training part, smoothed by falling back: the pair's counts are topped up with 16 virtual pixels
    spread as the mean of the two one-neighbour tables has it, those with 16 spread like the colours overall, and
    those with one pixel of each colour.

    Args:
        data: The data set.
        border: The colour that a pixel at the edge sees outside; ``None``: the outside is a symbol of its own,
            which makes the better table.

    Returns:
        NaN when nothing is held out.
    """
    k = data.n_clusters
    left, up, colour = _neighbours(data.train_tokens, data, k if border is None else border)
    left_, up_, colour_ = _neighbours(data.heldout_tokens, data, k if border is None else border)
    overall = (np.bincount(colour, minlength=k) + 1.0) / (len(colour) + k)

    def table(context: np.ndarray, context_: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """The probability of each held-out colour in its context."""
        seen = _counts(context * k + colour, context_ * k + colour_)
        return (seen + _STRENGTH * prior) / (_counts(context, context_) + _STRENGTH)

    base = overall[colour_]
    single = (table(left, left_, base) + table(up, up_, base)) / 2.0
    pair = table(left * (k + 1) + up, left_ * (k + 1) + up_, single)
    return float(-np.log(pair).mean()) if len(pair) else math.nan


def histogram_nats(data: TokenData) -> float:
    """What a histogram of the colours at each position reaches on the held-out part, nats per token.

    Counts of the training part plus one half. NaN when nothing is held out.
    """
    train, test = data.train_tokens.numpy(), data.heldout_tokens.numpy()
    k, t = data.n_clusters, train.shape[1]
    positions = np.arange(t) * k
    counts = np.bincount((positions + train).ravel(), minlength=t * k) + 0.5
    probability = counts[(positions + test).ravel()] / (len(train) + 0.5 * k)
    return float(-np.log(probability).mean()) if len(probability) else math.nan


def _neighbours(tokens: Tensor, data: TokenData, outside: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left neighbour, upper neighbour and colour of every pixel, flat."""
    grid = tokens.numpy().reshape(-1, data.height, data.width).astype(np.int64)  # the outside may not fit their type
    padded = np.pad(grid, ((0, 0), (1, 0), (1, 0)), constant_values=outside)
    return padded[:, 1:, :-1].ravel(), padded[:, :-1, 1:].ravel(), grid.ravel()


def _counts(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """How often each query stands among the keys. By sorting: a table of K^3 cells would not fit."""
    values, counts = np.unique(keys, return_counts=True)
    at = np.searchsorted(values, queries).clip(max=len(values) - 1)
    return np.where(values[at] == queries, counts[at], 0)
