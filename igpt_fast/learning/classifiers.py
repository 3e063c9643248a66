"""What reads the classes off features: logistic regression and nearest neighbours, settings chosen on a part of train.

Every choice is made from images of train and their classes; those of test are read once, to be counted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GRID = tuple(10.0**power for power in range(-4, 5))  # of C: DINOv2's 1e-6..1e5, thinned and cut
FIXED_C = 1.0  # of one image a class, which leaves none to choose on
NEIGHBOURS = (1, 5, 20, 100, 200)
TEMPERATURE = 0.07  # of the votes, as in DINOv2
MAX_ITER = 1000
CHECKED = 0.1  # of train, on which a setting is chosen
FOLDS = 5  # where that part would be a few images
_FEW = 500  # images up to which there are folds
_PATIENCE = 2  # values of C that do worse, one after another, after which no larger ones are tried
_CHUNK = 1 << 24  # similarities that are computed at once

Split = tuple[np.ndarray, np.ndarray]


class Reading(NamedTuple):
    """How well one classifier does.

    Args:
        accuracy: Of test, 0..1.
        validation: Of the part of train that its setting was chosen on; ``None`` without one.
        setting: C, or the number of neighbours.
        converged: Whether every fit that it stands on did: those of the setting, and the last; ``None`` where there is
            nothing that tells.
    """

    accuracy: float
    validation: float | None
    setting: float
    converged: bool | None


def need_sklearn(what: str) -> None:
    """Raises ImportError, which names the extra, where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{what} needs scikit-learn: pip install "igpt_fast[train]"') from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for numpy's and scikit-learn's products: the same bits on every machine's count of them, and products
    this small are a hundred times slower where several wait for each other on a busy one."""
    from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

    with threadpool_limits(limits=1):
        yield


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, F) float32 of mean 0 and deviation 1 over train; a feature that is the same everywhere becomes 0."""
    mean, scale = standard(train)
    return (train - mean) * scale, (test - mean) * scale


def standard(train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(F,) float32 each: what is taken off features, and what they are multiplied by then."""
    mean = train.mean(axis=0, dtype=np.float64)
    deviation = train.std(axis=0, dtype=np.float64)
    constant = deviation <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation)).astype(np.float32)
    return mean.astype(np.float32), scale


def splits(labels: np.ndarray, seed: int) -> list[Split]:
    """(fitted on, chosen on) parts of train, stratified: one with a tenth of it, or up to five folds where it has up to
    500 images. A single image of a class is always fitted on; no parts where every class has a single one."""
    counts = np.bincount(labels)
    several = counts > 1
    if not several.any():
        return []
    rng = np.random.default_rng((seed, 5))
    place = np.empty(len(labels), dtype=np.int64)  # of each image among those of its class, by chance
    for label in np.flatnonzero(counts):
        own = np.flatnonzero(labels == label)
        place[own] = rng.permutation(len(own))
    if len(labels) <= _FEW:
        folds = min(FOLDS, int(counts[several].min()))
        parts = [place % folds == fold for fold in range(folds)]
    else:
        parts = [place < np.maximum(1, np.rint(CHECKED * counts))[labels]]
    parts = [part & several[labels] for part in parts]
    return [(np.flatnonzero(~part), np.flatnonzero(part)) for part in parts]


def logistic(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int = 0
) -> Reading:
    """Multinomial logistic regression by L-BFGS, C chosen by ``splits``, then fitted to all of train.

    Values of C are tried in ascending order, each begun from the weights of the one before.

    Args:
        train, test: (N, F) float32, standardised.
        labels, test_labels: (N,) integers.
        seed: Of the splits.
    """
    with one_thread():
        model, reading = regression(train, labels, seed)
        accuracy = float((model.predict(test) == test_labels).mean())
    return reading._replace(accuracy=accuracy)


def regression(train: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Any, Reading]:
    """The model of ``logistic``, and what is known of it without test: its accuracy there is NaN."""
    parts = splits(labels, seed)
    c, validation, before = _choose_c(train, labels, parts) if parts else (FIXED_C, None, True)
    model, converged = fitted(c, train, labels)
    return model, Reading(float("nan"), validation, c, before and converged)


def fitted(c: float, train: np.ndarray, labels: np.ndarray) -> tuple[Any, bool]:
    """A logistic regression, and whether it has converged."""
    return _fitted(_regression(), c, train, labels)


def _choose_c(train: np.ndarray, labels: np.ndarray, parts: Sequence[Split]) -> tuple[float, float, bool]:
    """The smallest C of the highest accuracy on the parts, that accuracy, and whether its fits have converged."""
    models = [_regression() for _ in parts]
    sizes = [train[own] for own, _ in parts]
    best, worse = (GRID[0], -1.0, True), 0
    for c in GRID:
        right, converged = 0, True
        for i, (own, checked) in enumerate(parts):
            models[i], reached = _fitted(models[i], c, sizes[i], labels[own])
            right += int((models[i].predict(train[checked]) == labels[checked]).sum())
            converged = converged and reached
        accuracy = right / sum(len(checked) for _, checked in parts)
        worse = worse + 1 if accuracy < best[1] else 0
        if accuracy > best[1]:
            best = (c, accuracy, converged)
        elif worse == _PATIENCE:
            break
    return best


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=MAX_ITER, warm_start=True)


def _fitted(model: Any, c: float, features: np.ndarray, labels: np.ndarray) -> tuple[Any, bool]:
    """The model, and whether L-BFGS has converged: before its last iteration, and of its own."""
    from sklearn.exceptions import ConvergenceWarning

    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(features, labels)
    failed = any(issubclass(warning.category, ConvergenceWarning) for warning in told)
    return model, not failed and int(np.max(model.n_iter_)) < MAX_ITER


def neighbours(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int = 0
) -> Reading:
    """k nearest neighbours by cosine similarity s, whose votes weigh exp(s / 0.07), as in DINOv2.

    k is one of 1, 5, 20, 100 and 200, as far as there are so many images, chosen by ``splits``; then all of train
    votes.

    Args: As of ``logistic``.
    """
    parts = splits(labels, seed)
    points, queries = (torch.nn.functional.normalize(torch.from_numpy(item)) for item in (train, test))
    own = torch.from_numpy(labels)
    if not parts:
        return Reading(_share(_votes(points, own, queries, (1,))[0], test_labels), None, 1, None)
    counts = [k for k in NEIGHBOURS if k <= min(len(fitted) for fitted, _ in parts)]
    right = np.zeros(len(counts))
    for fitted, checked in parts:
        found = _votes(points[fitted], own[fitted], points[checked], counts)
        right += [int((votes == labels[checked]).sum()) for votes in found]
    best = int(right.argmax())
    votes = _votes(points, own, queries, (counts[best],))[0]
    validation = float(right[best] / sum(len(checked) for _, checked in parts))
    return Reading(_share(votes, test_labels), validation, counts[best], None)


def _share(votes: np.ndarray, labels: np.ndarray) -> float:
    return float((votes == labels).mean())


def _votes(points: Tensor, labels: Tensor, queries: Tensor, counts: Sequence[int]) -> list[np.ndarray]:
    """(N,) classes of the queries for each number of neighbours; of equal votes, the lowest class."""
    most, classes = max(counts), int(labels.max()) + 1
    found: list[list[Tensor]] = [[] for _ in counts]
    for part in queries.split(max(1, _CHUNK // len(points))):
        similarity, index = (part @ points.T).topk(most, dim=1)  # (B, most), the nearest first
        weights = ((similarity - 1.0) / TEMPERATURE).exp()
        own = labels[index]
        for i, k in enumerate(counts):
            votes = weights.new_zeros(len(part), classes).scatter_add_(1, own[:, :k], weights[:, :k])
            found[i].append(votes.argmax(dim=1))
    return [torch.cat(items).numpy() for items in found]
