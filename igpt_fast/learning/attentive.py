"""The attentive probe: a learned query looks at all positions of a layer, where the others have their mean alone.

It begins as the logistic regression of the means: a query of zeros attends to all positions alike. What it learns
beyond that has to show on a part of train, or it stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt_fast.learning.classifiers import Reading, fitted, one_thread, regression, splits, standard
from igpt_fast.learning.extraction import feature_batches

EPOCHS, STEPS = 10, 500  # at least, both
LR, WEIGHT_DECAY = 1e-3, 1e-2
CHECKS = 10  # of what has been learned, on the part of train
_KEPT = 1 << 28  # bytes of un-pooled features that are kept, not made again

Progress = Callable[[int, int], None]


class AttentivePooling(nn.Module):
    """One query for each head attends to the positions; their mixture goes to a linear classifier.

    Args:
        heads: Of the attention; they divide the width of features.
        mean, scale: (width,), by which features are standardised: those of images' means, as for the other probes.
            Single positions stray much further, and by their deviation the mixture would be next to nothing.
        weight, bias: (classes, width) and (classes,), of the logistic regression that it begins as.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, heads: int, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        classes, width = weight.shape
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(heads, width // heads))
        self.keys = nn.Linear(width, width, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, classes)
        with torch.no_grad():
            self.values.weight.copy_(torch.eye(width))
            self.score.weight.copy_(weight)
            self.score.bias.copy_(bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, classes) of (B, T, width)."""
        x = (states - self.mean) * self.scale  # (B, T, C)
        k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.keys, self.values))
        q = self.query[None, :, None].expand(len(x), -1, 1, -1)  # (B, H, 1, D)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, D)
        return self.score(mixed.flatten(1))


class _States:
    """The un-pooled features of images, a batch at a time; T times the size of pooled ones, they are kept where that is
    little and else made again each time."""

    def __init__(self, model: Any, layer: int, tokens: Tensor, how: dict[str, Any]) -> None:
        self._model, self._layer, self._tokens, self._how = model, layer, tokens, how
        self._kept: Tensor | None = None
        if 4 * tokens.numel() * model.config.n_embd <= _KEPT:
            self._kept = torch.cat([states.clone() for _, states in self._made(torch.arange(len(tokens)))])

    def __call__(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Which images, and their (B, T, n_embd) on the model's device."""
        if self._kept is None:
            return self._made(rows)
        return ((part, self._kept[part.to(self._kept.device)]) for part in rows.split(self._how["batch_size"]))

    def _made(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part, states in feature_batches(self._model, self._tokens[rows], [self._layer], **self._how):
            yield rows[part], states[:, 0].clone()


def attentive(
    model: Any,
    layer: int,
    train: tuple[Tensor, np.ndarray],
    test: tuple[Tensor, np.ndarray],
    pooled: np.ndarray,
    *,
    sos: bool = True,
    masks: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reading:
    """Trains and tests one, AdamW with a cosine to zero: 10 epochs, or 500 steps where these are fewer.

    How many of these steps are worth it is chosen on the first of ``splits``, by training on the rest of train; so many
    are then made on all of it. None may be: then it is the logistic regression.

    It costs up to twice ``EPOCHS`` passes of the network's first ``layer`` blocks over train, or twice ``STEPS``
    batches where these are more, and one over test, where features are too many to be kept.

    Args:
        model: The network.
        layer: The paper's number.
        train, test: (N, T) tokens and (N,) labels in 0..C-1.
        pooled: (N, n_embd) float32, the means over positions of train.
        sos, masks, batch_size: As of ``feature_batches``.
        seed: Of the weights, of the order, and of the part of train.
        progress: Called with the number of steps done and of all.

    Returns:
        Its setting is the number of steps; convergence is nothing that is looked at.
    """
    how: dict[str, Any] = {"sos": sos, "masks": masks, "pool": None, "batch_size": batch_size}
    states, labels = _States(model, layer, train[0], how), train[1]
    mean, scale = standard(pooled)
    features, parts = (pooled - mean) * scale, splits(labels, seed)
    everything = np.arange(len(labels))
    with one_thread():
        start, about = regression(features, labels, seed)
        part = fitted(about.setting, features[parts[0][0]], labels[parts[0][0]])[0] if parts else None

    def begun(regressed: Any) -> AttentivePooling:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            scales = torch.from_numpy(mean), torch.from_numpy(scale)
            head = AttentivePooling(model.config.n_head, *scales, *_scores(regressed))
        return head.to(model.device)

    total = max(STEPS, EPOCHS * -(-len(labels) // batch_size))
    every = -(-total // CHECKS)
    steps, best, told = total, None, progress or _silent
    if part is not None:
        head, checked = begun(part), parts[0][1]
        best, steps = _right(head, states, labels, checked), 0
        for done in _trained(head, states, labels, parts[0][0], total, seed, batch_size):
            told(done, 2 * total)
            if done % every == 0 or done == total:
                accuracy = _right(head, states, labels, checked)
                if accuracy > best:
                    best, steps = accuracy, done
    head = begun(start)
    for done in _trained(head, states, labels, everything, total, seed, batch_size) if steps else ():
        told(total + done, 2 * total)
        if done == steps:
            break
    told(2 * total, 2 * total)
    accuracy = _right(head, _States(model, layer, test[0], how), test[1], np.arange(len(test[1])))
    return Reading(accuracy, best, steps, None)


def _silent(done: int, total: int) -> None:
    pass


def _scores(regressed: Any) -> tuple[Tensor, Tensor]:
    """(C, F) and (C,) of a logistic regression; of two classes it has the difference alone."""
    weight, bias = (torch.from_numpy(np.asarray(item, np.float32)) for item in (regressed.coef_, regressed.intercept_))
    return (torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2) if len(weight) == 1 else (weight, bias)


def _trained(
    head: nn.Module, states: _States, labels: np.ndarray, rows: np.ndarray, total: int, seed: int, batch_size: int
) -> Iterator[int]:
    """Trains on these rows; yields the number of the step that has been made, up to ``total``."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generator, wanted = torch.Generator().manual_seed(seed), torch.from_numpy(labels)
    done = 0
    while True:
        order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]
        for part, batch in states(order):
            loss = F.cross_entropy(head(batch), wanted[part].to(batch.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            yield done
            if done == total:
                return


@torch.no_grad()
def _right(head: nn.Module, states: _States, labels: np.ndarray, rows: np.ndarray) -> float:
    """The share of these rows that is classified right."""
    wanted = torch.from_numpy(labels)
    found = [head(batch).argmax(dim=1).cpu() == wanted[part] for part, batch in states(torch.from_numpy(rows))]
    return float(torch.cat(found).double().mean())
