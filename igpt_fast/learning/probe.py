"""How much of what an image shows can be read off a network's features, layer by layer, and what it must beat.

The protocol of the paper with its gaps filled in: features are the mean over positions of layer l behind the norm that
comes next, SOS fed; each is standardised over train (images, no labels); a logistic regression by L-BFGS reads the
classes. What it depends on is chosen on a part of train, never on test. Beside the network always stand the raw pixels,
and the same architecture with random weights: what is not better than these has not been learned.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 2.3; DINOv2's ``eval/log_regression.py``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from igpt_fast.checks import whole_number
from igpt_fast.files import listed
from igpt_fast.image import dequantize, quantize
from igpt_fast.learning.attentive import attentive as attentive_probe
from igpt_fast.learning.classifiers import (
    MAX_ITER,
    Reading,
    logistic,
    need_sklearn,
    neighbours,
    standardised,
)
from igpt_fast.learning.extraction import (
    check_bands,
    check_concat,
    check_layers,
    check_masks,
    check_tokens,
    extract,
    random_twin,
)
from igpt_fast.learning.probe_result import ProbeResult, ProbeRow

SHOTS = (1, 10, 100)

Images = tuple[Any, Any]  # images and their labels
Progress = Callable[[str, int, int], None]


class _Set(NamedTuple):
    """Images of train or test: (N, T) tokens, (N, P) float32 raw pixels, (N,) int64 classes."""

    tokens: Tensor
    pixels: np.ndarray
    labels: np.ndarray


_Sets = tuple[_Set, _Set]


class _Plan(NamedTuple):
    """What is measured, and of which features."""

    layers: list[int]
    shots: tuple[int, ...]
    tries: int
    knn: bool
    concat: int
    attentive: bool
    sos: bool
    bands: int
    masks: int
    batch_size: int
    seed: int


def probe(
    train: Images,
    test: Images,
    model: Any,
    clusters: Any,
    *,
    layers: str | int | Sequence[int] | None = None,
    shots: Sequence[int] | None = None,
    tries: int = 5,
    knn: bool = False,
    concat: int = 0,
    attentive: bool = False,
    sos: bool = True,
    bands: int = 1,
    masks: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> ProbeResult:
    """Probes a network; the rows of raw pixels and of random weights are always there.

    The features of all layers come from one pass over the images and serve all that follows. They stay in memory:
    4 bytes for each of ``(N_train + N_test) * layers * bands * n_embd``.

    Args:
        train: Images and labels. Images: (N, T) integer tokens, or (N, H, W, 3) uint8 pixels of the model's size.
            Labels: (N,) integers or strings.
        test: Images that count, of the same classes.
        model: ``ImageGPTModel``, or one of the models that have it.
        clusters: (K, 3), the colours of the model's tokens: raw pixels are those of the images, or of their tokens.
        layers: The paper's numbers, 1..L, and 0 for the embeddings; ``None`` or ``"all"``: 1..L.
        shots: Images of each class that a few-shot probe learns from, drawn by ``seed``, the same ones for all
            features; ``None``: 1, 10 and 100, as far as every class has more.
        tries: Draws of each, of which the mean and the standard deviation are told.
        knn: Nearest neighbours as well; see ``classifiers.neighbours``.
        concat: So many layers that follow each other as one feature, around the one that does best on a part of
            train; 0: none.
        attentive: A learned query that attends to all positions, in place of their mean, of the layer that does best on
            a part of train; see ``attentive`` for how it learns, and what it costs.
        sos: Feed SOS, as the model was trained; see ``extraction.fed``.
        bands: Horizontal bands whose means stand side by side.
        masks: Of a bidirectional model: how many masks each image is seen under, and their mean is the feature, which
            is a vote; 5 if not given. See ``extraction.check_masks``.
        batch_size: Images that are computed together.
        seed: Of draws, parts of train and random weights.
        progress: Called with what is done, how much of it, and of how much.

    Raises:
        FloatingPointError: A feature is not finite.
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: Images, labels or a setting that make no sense; classes that train and test do not share,
            a single one, or one with fewer images than ``shots``; a layer that is to be chosen where every class has a
            single image; test that is train.

    Warns:
        UserWarning: Logistic regressions that have not converged; their rows say so too.
    """
    need_sklearn("probe")
    numbers = check_layers(layers, model.config.n_layer)
    concat, bands = check_concat(concat, numbers), check_bands(bands, model.config)
    tries, batch_size = whole_number("tries", tries, 1, 1000), whole_number("batch_size", batch_size)
    seed = whole_number("seed", seed, 0, (1 << 32) - 1)
    masks = check_masks(masks, model.config)
    names, sets = _sets(train, test, model.config, clusters)
    few = _shots(shots, sets[0].labels, names)
    if ((attentive and len(numbers) > 1) or 0 < concat < len(numbers)) and np.bincount(sets[0].labels).max() == 1:
        what = "concat and attentive take the layer that does best on a part of train"
        raise ValueError(f"{what}, and every class has a single image; give one layer")
    plan = _Plan(numbers, few, tries, knn, concat, attentive, sos, bands, masks, batch_size, seed)
    rows: list[ProbeRow] = []
    for kind in ("model", "random"):
        network = model if kind == "model" else random_twin(model, seed)
        rows += _network(kind, network, sets, plan, progress or _silent)
    rows = [*_rows("raw", None, sets[0].pixels, sets[1].pixels, sets, plan), *rows]
    _warn(rows)
    sos = sos and not model.config.bidirectional
    known = _known(sets)
    return ProbeResult(tuple(rows), tuple(map(str, names)), model.config.n_layer, sos, bands, tries, seed, masks, known)


def _network(kind: str, model: Any, sets: _Sets, plan: _Plan, say: Progress) -> list[ProbeRow]:
    """All that is measured of a network."""
    found = []
    for name, item in zip(("train", "test"), sets, strict=True):
        told = functools.partial(say, f"{kind}: features of {name}")
        how: dict[str, Any] = {"sos": plan.sos, "bands": plan.bands, "batch_size": plan.batch_size}
        how["masks"] = plan.masks
        found.append(extract(model, item.tokens, plan.layers, progress=told, **how))
    rows: list[ProbeRow] = []
    for i, layer in enumerate(plan.layers):
        say(f"{kind}: layers", i, len(plan.layers))
        rows += _rows(kind, layer, found[0][:, i], found[1][:, i], sets, plan)
    if plan.concat:
        part = _window(rows, plan.layers, plan.concat)
        train, test = (item[:, part].reshape(len(item), -1) for item in found)
        rows += _rows(kind, tuple(plan.layers[part]), train, test, sets, plan)
    say(f"{kind}: layers", len(plan.layers), len(plan.layers))
    if plan.attentive:
        layer = _best_layer(rows)
        given = ((sets[0].tokens, sets[0].labels), (sets[1].tokens, sets[1].labels))
        bands = found[0][:, plan.layers.index(layer)].reshape(len(found[0]), plan.bands, -1)
        reading = attentive_probe(
            model,
            layer,
            *given,
            bands.mean(axis=1),
            sos=plan.sos,
            masks=plan.masks,
            batch_size=plan.batch_size,
            seed=plan.seed,
            progress=functools.partial(say, f"{kind}: attentive probe of layer {layer}"),
        )
        rows.append(_row(kind, layer, "attentive", reading, sets))
    return rows


def _silent(what: str, done: int, total: int) -> None:
    pass


def _sets(train: Images, test: Images, config: Any, clusters: Any) -> tuple[np.ndarray, _Sets]:
    """The classes, and both sets, checked."""
    given = [_labels(name, *item) for name, item in (("train", train), ("test", test))]
    names = np.unique(given[0])
    if len(names) < 2:
        raise ValueError(f"train has a single class, {listed(map(str, names))}; there is nothing to tell apart")
    if given[0].dtype.kind != given[1].dtype.kind and "U" in given[0].dtype.kind + given[1].dtype.kind:
        raise ValueError("the labels of one of train and test are strings, those of the other integers")
    if more := set(given[1].tolist()) - set(names.tolist()):
        raise ValueError(f"test has images of classes that train has not: {listed(map(str, more))}")
    if fewer := set(names.tolist()) - set(given[1].tolist()):
        raise ValueError(f"test has no image of classes that train has: {listed(map(str, fewer))}")
    images = [_images(name, item[0], config, clusters) for name, item in (("train", train), ("test", test))]
    if all(np.array_equal(*pair) for pair in (*zip(*images, strict=True), given)):
        raise ValueError("the images of test are those of train: there is nothing to find out")
    grey = all(bool((pixels == pixels[..., :1]).all()) for _, pixels in images)
    sets = [
        _Set(tokens, _flat(pixels[..., :1] if grey else pixels), np.searchsorted(names, labels))
        for (tokens, pixels), labels in zip(images, given, strict=True)
    ]
    return names, (sets[0], sets[1])


def _known(sets: _Sets) -> int:
    """How many images of test are images of train, by their tokens."""
    train, test = ([hash(row.tobytes()) for row in item.tokens.numpy().astype(np.int32)] for item in sets)
    seen = set(train)
    return sum(image in seen for image in test)


def _flat(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).astype(np.float32)


def _labels(name: str, images: Any, labels: Any) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iuU" or len(array) != len(images):
        what = f"{array.shape} {array.dtype} for {len(images)} images"
        raise ValueError(f"labels of {name} must be (N,) integers or strings, got {what}")
    if not len(array):
        raise ValueError(f"{name} has no images")
    return array


def _images(name: str, images: Any, config: Any, clusters: Any) -> tuple[Tensor, np.ndarray]:
    """(N, T) tokens and (N, T, 3) uint8 pixels."""
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    pixels = None
    if isinstance(images, np.ndarray) and images.ndim == 4:
        if images.dtype != np.uint8 or images.shape[3] != 3:
            raise ValueError(f"images of {name}: want (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        pixels = images.reshape(len(images), -1, 3)
        images = quantize(pixels, clusters)
    try:
        tokens = check_tokens(images, config)
        return tokens, dequantize(tokens.numpy(), clusters) if pixels is None else pixels
    except (TypeError, ValueError) as error:
        raise type(error)(f"images of {name}: {error}") from error


def _shots(shots: Sequence[int] | None, labels: np.ndarray, names: np.ndarray) -> tuple[int, ...]:
    """The numbers of images a class, ascending; checked against those that there are."""
    counts = np.bincount(labels)
    least = int(counts.argmin())
    if shots is None:
        return tuple(n for n in SHOTS if n < counts[least])
    asked = sorted({whole_number("shots", n, 1) for n in shots})
    if asked and asked[-1] > counts[least]:
        held = f"class {str(names[least])!r} has {counts[least]} in train"
        raise ValueError(f"shots are {asked[-1]} images a class, and {held}")
    return tuple(asked)


def _rows(
    kind: str, layer: int | tuple[int, ...] | None, train: np.ndarray, test: np.ndarray, sets: _Sets, plan: _Plan
) -> Iterator[ProbeRow]:
    """All that is measured of one kind of features, (N, F) float32 of train and of test."""
    train, test = standardised(train, test)
    labels, test_labels = sets[0].labels, sets[1].labels
    yield _row(kind, layer, "logistic", logistic(train, labels, test, test_labels, plan.seed), sets)
    if plan.knn:
        yield _row(kind, layer, "knn", neighbours(train, labels, test, test_labels, plan.seed), sets)
    for n in plan.shots:
        readings = []
        for attempt in range(plan.tries):
            drawn = draw(labels, n, plan.seed, attempt)
            readings.append(logistic(train[drawn], labels[drawn], test, test_labels, plan.seed))
        yield _few(kind, layer, n, readings, sets)


def draw(labels: np.ndarray, n: int, seed: int, attempt: int) -> np.ndarray:
    """Which images a few-shot probe learns from: n of each class, by chance."""
    rng = np.random.default_rng((seed, n, attempt))
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:n] for label in np.unique(labels)])


def _row(kind: str, layer: Any, method: str, reading: Reading, sets: _Sets) -> ProbeRow:
    c = reading.setting if method == "logistic" else None
    k = int(reading.setting) if method == "knn" else None
    counts = len(sets[0].labels), len(sets[1].labels)
    return ProbeRow(
        kind, layer, method, None, reading.accuracy, None, c, k, reading.validation, reading.converged, *counts
    )


def _few(kind: str, layer: Any, n: int, readings: list[Reading], sets: _Sets) -> ProbeRow:
    """Mean and standard deviation (of the tries, N - 1; ``None`` of a single one)."""
    right = np.array([reading.accuracy for reading in readings])
    std = float(right.std(ddof=1)) if len(right) > 1 else None
    c = float(np.median([reading.setting for reading in readings]))
    known = [reading.validation for reading in readings if reading.validation is not None]
    validation = float(np.mean(known)) if known else None
    converged = all(reading.converged is not False for reading in readings)
    counts = n * len(np.unique(sets[0].labels)), len(sets[1].labels)
    return ProbeRow(kind, layer, "logistic", n, float(right.mean()), std, c, None, validation, converged, *counts)


def _best_layer(rows: Sequence[ProbeRow]) -> int:
    """The single layer whose logistic regression does best on the part of train."""
    full = [row for row in rows if row.method == "logistic" and row.shots is None and isinstance(row.layer, int)]
    best = max(full, key=lambda row: -1.0 if row.validation is None else row.validation)
    assert isinstance(best.layer, int)
    return best.layer


def _window(rows: Sequence[ProbeRow], numbers: Sequence[int], width: int) -> slice:
    """``width`` of the layers around the best one."""
    start = min(max(0, list(numbers).index(_best_layer(rows)) - width // 2), len(numbers) - width)
    return slice(start, start + width)


def _warn(rows: Sequence[ProbeRow]) -> None:
    if failed := [row for row in rows if row.converged is False]:
        which = listed((f"{row.kind} {row.layer_text}".strip() for row in failed), 4)
        what = f"{len(failed)} of {len(rows)} rows stand on a logistic regression that has not converged"
        warnings.warn(f"probe: {what} in {MAX_ITER} iterations: {which}", stacklevel=3)
