"""Probes: they find what is there, read nothing of test but to count, and always show what must be beaten."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from igpt_fast.learning import attentive as attentive_module
from igpt_fast.learning import classifiers
from igpt_fast.learning import probe as module
from igpt_fast.learning.classifiers import logistic, neighbours, splits, standardised
from igpt_fast.learning.probe import draw, probe
from igpt_fast.learning.probe_result import ProbeResult

COLOURS, CLASSES = 6, 3
CLUSTERS = np.linspace(-1, 1, 3 * COLOURS, dtype=np.float32).reshape(COLOURS, 3)


def images(n: int, seed: int, signal: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) tokens of noise, of which a share has the colour of the image's class, anywhere."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    own = rng.random((n, 16)) < signal
    return np.where(own, labels[:, None], rng.integers(0, COLOURS, (n, 16))), labels


def model(**fields: Any) -> Any:
    sizes = {"vocab_size": COLOURS + 1, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return small(spread=0.3, **{**sizes, **fields})


TRAIN, TEST = images(60, 0), images(120, 1)
ALL: dict[str, Any] = {"shots": (1, 10), "tries": 2, "knn": True, "concat": 2}


@pytest.fixture(scope="module")
def found() -> ProbeResult:
    return probe(TRAIN, TEST, model(), CLUSTERS, **ALL)


def test_finds_what_is_there(found: ProbeResult) -> None:
    assert found.best().accuracy > 0.85
    assert found.best(method="knn").accuracy > 0.8
    assert found.best(concat=True).accuracy > 0.85
    ten, one = found.best(shots=10), found.best(shots=1)
    assert found.best().accuracy > ten.accuracy > one.accuracy > 0.4
    assert ten.std is not None
    assert (ten.n_train, one.n_train, found.best().n_train, ten.n_test) == (30, 3, 60, 120)
    assert {(row.method, row.converged) for row in found.rows} == {("logistic", True), ("knn", None)}
    assert found.sos


def test_raw_pixels_and_random_weights_are_always_there(found: ProbeResult) -> None:
    methods = {("logistic", None), ("knn", None), ("logistic", 1), ("logistic", 10)}
    for kind, layers in (("raw", {None}), ("random", {1, 2, (1, 2)}), ("model", {1, 2, (1, 2)})):
        own = [row for row in found.rows if row.kind == kind]
        assert {row.layer for row in own} == layers
        for layer in layers:
            assert {(row.method, row.shots) for row in own if row.layer == layer} == methods
    least = probe(TRAIN, TEST, model(), CLUSTERS, layers=1, shots=())
    assert [(row.kind, row.layer) for row in least.rows] == [("raw", None), ("model", 1), ("random", 1)]


def test_shuffled_labels_of_test_give_chance_and_change_no_choice(found: ProbeResult) -> None:
    shuffled = np.random.default_rng(0).permutation(TEST[1])
    blind = probe(TRAIN, (TEST[0], shuffled), model(), CLUSTERS, **ALL)
    for right, row in zip(found.rows, blind.rows, strict=True):
        assert row.accuracy == pytest.approx(1 / CLASSES, abs=0.15), row
        changed = {"accuracy": 0.0, "std": None}
        assert dataclasses.replace(row, **changed) == dataclasses.replace(right, **changed)


def test_choices_do_not_see_the_images_of_test(found: ProbeResult) -> None:
    """Nor are features standardised by them."""
    other = probe(TRAIN, (images(120, 1, signal=0.0)[0], TEST[1]), model(), CLUSTERS, **ALL)
    chosen = [(row.C, row.k, row.validation) for row in other.rows]
    assert chosen == [(row.C, row.k, row.validation) for row in found.rows]
    assert other.best().accuracy < 0.6


def test_the_same_again_and_by_another_seed(found: ProbeResult) -> None:
    assert probe(TRAIN, TEST, model(), CLUSTERS, **ALL) == found
    other = probe(TRAIN, TEST, model(), CLUSTERS, layers=1, shots=(10,), tries=2, seed=1)
    changed = [row for row in other.rows if row not in found.rows]
    assert {(row.kind, row.shots) for row in changed} >= {("random", None), ("model", 10), ("raw", 10)}


def test_labels_may_be_strings_and_images_pixels() -> None:
    """The tokens of pixels are the nearest colours; raw pixels are those given."""
    names = np.array(["ant", "bee", "cat"])
    pixels = np.rint((CLUSTERS[TRAIN[0]] + 1) * 127.5).astype(np.uint8).reshape(-1, 4, 4, 3)
    given = probe((pixels, names[TRAIN[1]]), (TEST[0], names[TEST[1]]), model(), CLUSTERS, shots=())
    assert given.classes == ("ant", "bee", "cat")
    plain = probe(TRAIN, TEST, model(), CLUSTERS, shots=())
    assert given.rows == plain.rows
    torch_too = probe(
        tuple(map(torch.from_numpy, TRAIN)), tuple(map(torch.from_numpy, TEST)), model(), CLUSTERS, shots=()
    )
    assert torch_too == plain


def test_grey_pixels_are_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "logistic", lambda train, *rest: seen.append(train.shape) or logistic(train, *rest))
    grey = np.repeat(np.linspace(-1, 1, COLOURS, dtype=np.float32)[:, None], 3, axis=1)
    probe(TRAIN, TEST, model(), grey, layers=1, shots=())
    probe(TRAIN, TEST, model(), CLUSTERS, layers=1, shots=())
    assert [seen[2], seen[5]] == [(60, 16), (60, 48)]


def test_default_shots_are_those_that_every_class_has() -> None:
    result = probe(images(33, 0), TEST, model(), CLUSTERS, layers=1, tries=1)
    assert {row.shots for row in result.rows} == {None, 1, 10}
    assert {row.std for row in result.rows} == {None}


def accuracies(train: Any, test: Any, network: Any, **how: Any) -> tuple[float, float, Any]:
    """Of the logistic regression, of the attentive probe, and the row of this one, of the model."""
    result = probe(train, test, network, CLUSTERS, shots=(), attentive=True, **how)
    rows = {(row.kind, row.method): row for row in result.rows}
    assert {kind for kind, method in rows if method == "attentive"} == {"model", "random"}
    return rows["model", "logistic"].accuracy, rows["model", "attentive"].accuracy, rows["model", "attentive"]


def test_the_attentive_probe_sees_what_the_mean_hides() -> None:
    """The class is whether one pixel is bright, and all are noise: a mean over embeddings does not know which."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, COLOURS, (1000, 16))
    labels = (tokens[:, 5] >= COLOURS // 2).astype(int)
    network = model(n_embd=32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logistic_, attentive, row = accuracies(
        (tokens[:600], labels[:600]), (tokens[600:], labels[600:]), network, layers=0
    )
    assert logistic_ < 0.7
    assert attentive > 0.9
    assert row.layer == 0
    assert (row.validation or 0.0) > 0.85
    assert row.converged is None
    assert not network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_attentive_probe_is_no_worse_where_images_are_few() -> None:
    """Digits, ten of a class."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    tokens = (pixels / 3).astype(int)  # 0..5
    train, test = (tokens[:100], labels[:100]), (tokens[100:400], labels[100:400])
    network = model(n_positions=64, n_embd=32, n_layer=1)
    logistic_, attentive, _ = accuracies(train, test, network)
    assert logistic_ > 0.3
    assert attentive >= logistic_ - 0.05


@pytest.mark.parametrize("classes", [2, 3])
def test_the_attentive_probe_begins_as_the_logistic_regression(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where no step is worth it; features that are made again are those that were kept."""
    monkeypatch.setattr(attentive_module, "_trained", lambda *args: iter(()))
    tokens, labels = images(300, 0, 0.3)
    train, test = (tokens[:60], labels[:60] % classes), (tokens[60:], labels[60:] % classes)
    for kept in (1 << 28, 0):
        monkeypatch.setattr(attentive_module, "_KEPT", kept)
        logistic_, attentive, _ = accuracies(train, test, model(), layers=1)
        assert attentive == pytest.approx(logistic_, abs=1e-6)


def test_test_that_is_train() -> None:
    with pytest.raises(ValueError, match="the images of test are those of train"):
        probe(TRAIN, TRAIN, model(), CLUSTERS)
    half = tuple(np.concatenate([a[:9], b[:20]]) for a, b in zip(TRAIN, TEST, strict=True))
    result = probe(TRAIN, half, model(), CLUSTERS, layers=1, shots=())
    assert result.known == 9
    assert "9 of the images of test are images of train, too" in result.table()


def test_a_bidirectional_model_has_no_sos() -> None:
    network = model(bidirectional=True)
    assert not probe(TRAIN, TEST, network, CLUSTERS, layers=1, shots=(), masks=1).sos


# ---- What it is made of -------------------------------------------------------------------------------------


def test_splits_are_stratified_and_disjoint() -> None:
    for labels, parts in ((np.arange(1000) % 4, 1), (np.arange(40) % 4, 5), (np.arange(9) % 4, 2)):
        found = splits(labels, 0)
        assert len(found) == parts
        for fitted, checked in found:
            assert sorted([*fitted, *checked]) == list(range(len(labels)))
            assert set(labels[fitted]) == set(labels[checked]) == set(range(4))
    ((_, checked),) = splits(np.arange(1000) % 4, 0)
    assert np.bincount(np.arange(1000)[checked] % 4).tolist() == [25] * 4
    assert splits(np.arange(4), 0) == []  # nothing could be both fitted and checked


@pytest.mark.parametrize("n", [60, 600])
def test_a_class_of_one_image_leaves_the_choices_to_the_others(n: int) -> None:
    """It is fitted on, and never checked."""
    labels = np.array([2, *np.arange(n - 1) % 2])
    found = splits(labels, 0)
    assert len(found) == (5 if n == 60 else 1)
    for fitted, checked in found:
        assert sorted([*fitted, *checked]) == list(range(n))
        assert set(labels[fitted]) == {0, 1, 2}
        assert set(labels[checked]) == {0, 1}
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 8)).astype(np.float32)
    assert logistic(features, labels, features, labels).validation is not None
    assert neighbours(features, labels, features, labels).validation is not None


def test_values_of_c_that_do_as_well_are_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that do worse, one after another, end the search; and what is told is how the fits of the chosen one went."""
    right = dict(zip(classifiers.GRID, (5, 4, 5, 4, 9, 8, 7, 10), strict=False))
    tried = []

    class Model:
        def predict(self, features: np.ndarray) -> np.ndarray:
            return np.arange(10) >= right[tried[-1]]

    def fitted(model: Any, c: float, features: Any, labels: Any) -> tuple[Any, bool]:
        tried.append(c)
        return Model(), c != classifiers.GRID[4]

    monkeypatch.setattr(classifiers, "_fitted", fitted)
    labels = np.zeros(10, int)
    chosen = classifiers._choose_c(np.zeros((10, 1)), labels, [(np.arange(10), np.arange(10))])
    assert chosen == (classifiers.GRID[4], 0.9, False)
    assert len(tried) == 7


def test_draws_have_so_many_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    first, again, other = (draw(labels, 10, 0, attempt) for attempt in (0, 0, 1))
    assert np.bincount(labels[first]).tolist() == [10, 10, 10]
    assert len(set(first)) == 30
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_standardised_by_train_alone() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(5, 3, (200, 4)).astype(np.float32), rng.normal(0, 9, (50, 4)).astype(np.float32)
    train[:, 2] = 7.0
    scaled, other = standardised(train, test)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0, 1], atol=1e-6)
    assert not other[:, 2].any()
    mean, std = train[:, 0].astype(np.float64).mean(), train[:, 0].astype(np.float64).std()
    np.testing.assert_allclose(other[:, 0], (test[:, 0] - mean) / std, rtol=1e-5, atol=1e-5)
    assert scaled.dtype == other.dtype == np.float32


def test_a_constant_feature_is_nothing_to_the_attentive_probe() -> None:
    """Rounding alone would be its deviation, and a millionfold what others are."""
    features = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    features[:, 1] = 0.1 + np.float32(1e-8) * (np.arange(50) % 3)
    mean, scale = classifiers.standard(features)
    head = attentive_module.AttentivePooling(1, *map(torch.from_numpy, (mean, scale)), torch.eye(3), torch.zeros(3))
    assert head(torch.from_numpy(features)[:, None])[:, 1].tolist() == [0.0] * 50


def test_logistic_regression_is_scikit_learns_at_the_chosen_c() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = np.arange(700) % 4
    features = (rng.normal(size=(700, 20)) + np.eye(4, 20)[labels] * 1.5).astype(np.float32)
    reading = logistic(features[:600], labels[:600], features[600:], labels[600:])
    theirs = LogisticRegression(C=reading.setting, max_iter=1000).fit(features[:600].astype(float), labels[:600])
    assert reading.accuracy == pytest.approx(theirs.score(features[600:], labels[600:]), abs=0.011)
    assert reading.setting in classifiers.GRID
    assert reading.converged


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_neighbours_are_weighted_by_similarity(default: torch.dtype) -> None:
    """Against a plain loop."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    points = (rng.normal(size=(60, 5)) + np.eye(3, 5)[labels]).astype(np.float32)
    queries, wanted = rng.normal(size=(40, 5)).astype(np.float32), np.arange(40) % 3
    torch.set_default_dtype(default)
    try:
        reading = neighbours(points, labels, queries, wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    unit = [
        item / np.linalg.norm(item, axis=1, keepdims=True) for item in (points.astype(float), queries.astype(float))
    ]
    right = 0
    for query, label in zip(unit[1], wanted, strict=True):
        similarity = unit[0] @ query
        nearest = np.argsort(-similarity)[: int(reading.setting)]
        votes = np.zeros(3)
        np.add.at(votes, labels[nearest], np.exp(similarity[nearest] / 0.07))
        right += int(votes.argmax() == label)
    assert reading.accuracy == right / 40
    assert reading.setting in classifiers.NEIGHBOURS


def test_what_has_not_converged_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "MAX_ITER", 1)
    with pytest.warns(UserWarning, match=r"probe: 3 of 3 rows .* not converged .*: model 1, random 1, raw"):
        result = probe(TRAIN, TEST, model(), CLUSTERS, layers=1, shots=())
    assert not any(row.converged for row in result.rows)
    assert result.table().count("*") == 4


# ---- Results ------------------------------------------------------------------------------------------------


def test_result_as_json_and_table(found: ProbeResult) -> None:
    data = json.loads(found.to_json())
    assert data["classes"] == ["0", "1", "2"]
    assert len(data["rows"]) == len(found.rows)
    assert data["rows"][0]["kind"] == "raw"
    table = found.table().splitlines()
    assert table[0].split() == ["layer", "logistic", "knn", "1", "a", "class", "10", "a", "class"]
    assert [line.split()[:2] for line in table[1:3]] == [["raw", "pixels"], ["the", "model"]]
    assert f"{found.best('raw').accuracy:.3f}" in table[1]
    assert "1-2" in table[4]
    assert len(table) == 1 + 1 + 3 + 3 + 1
    with pytest.raises(ValueError, match="no row of kind 'model', method 'attentive'"):
        found.best(method="attentive")


def test_plot(found: ProbeResult, tmp_path: Path) -> None:
    found.plot(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    with pytest.raises(FileExistsError):
        found.plot(tmp_path / "a.png", overwrite=False)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        found.plot(tmp_path / "a.jpg")
    found.plot(tmp_path / "a.svg")
    assert "random weights" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_extras_that_are_missing_are_named(found: ProbeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install .*igpt_fast\[train\]"):
        found.plot(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install .*igpt_fast\[train\]"):
        probe(TRAIN, TEST, model(), CLUSTERS)


# ---- What makes no sense ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"train": (TRAIN[0], np.zeros(60, int))}, "train has a single class, 0"),
        ({"train": images(2, 0)}, "test has images of classes that train has not: 2"),
        ({"test": images(2, 0)}, "test has no image of classes that train has: 2"),
        ({"test": (TEST[0], np.full(120, "a"))}, "are strings, those of the other integers"),
        ({"train": (TRAIN[0], TRAIN[1][:5])}, r"labels of train must be \(N,\) integers or strings, got \(5,\)"),
        ({"test": (TEST[0], TEST[1].astype(float))}, "labels of test must be .* float64"),
        ({"test": (TEST[0][:0], TEST[1][:0])}, "test has no images"),
        ({"shots": (21,)}, "shots are 21 images a class, and class '0' has 20 in train"),
        ({"shots": (0,)}, "shots is 0"),
        ({"tries": 0}, "tries is 0"),
        ({"layers": (0, 3)}, r"layers is 3; want an integer in 0\.\.2"),
        ({"layers": ()}, "layers: none are given"),
        ({"layers": (1, 1)}, "layers: 1 twice"),
        ({"layers": "1-2"}, "layers is '1-2'; want 'all'"),
        ({"concat": 1}, "concat is 1; want 2 layers or more"),
        ({"concat": 3}, r"concat is 3; want an integer in 0\.\.2"),
        ({"train": (TRAIN[0] + 3, TRAIN[1])}, r"images of train: token \d is not in 0\.\.5"),
        ({"train": (TRAIN[0].astype(float), TRAIN[1])}, r"images of train: tokens must be \(N, T\) integers"),
        ({"train": (np.tile(TRAIN[0], 2), TRAIN[1])}, "images of train: tokens are 32 an image; the model takes 16"),
        ({"train": (TRAIN[0][:, :9], TRAIN[1])}, "images of train: tokens are 9 an image; the model takes 16"),
        ({"bands": 5}, "bands is 5; want a number that divides the 16 positions"),
        ({"train": images(3, 0), "attentive": True}, "every class has a single image; give one layer"),
        ({"train": (np.zeros((60, 4, 4, 1), np.uint8), TRAIN[1])}, r"want \(N, H, W, 3\) uint8"),
        ({"clusters": CLUSTERS[:5]}, r"token 5 is not in 0\.\.4"),
    ],
)
def test_clear_errors(changed: dict[str, Any], reason: str) -> None:
    given = {"train": TRAIN, "test": TEST, "model": model(), "clusters": CLUSTERS, "shots": (), **changed}
    with pytest.raises(ValueError, match=reason):
        probe(**given)


def test_features_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    network.base_model.h[1].mlp.c_proj.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"features of images 0\.\.59 are not finite"):
        probe(TRAIN, TEST, network, CLUSTERS)
