"""Features of images: equal to what the network gives by hand, and a transformer by scikit-learn's own checks."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from small_models import small

from igpt_fast import ImageGPTImageProcessor
from igpt_fast.learning.extraction import check_layers, extract, fed, random_twin
from igpt_fast.learning.features import ImageGPTFeatures

COLOURS = 8
CLUSTERS = np.linspace(-1, 1, 3 * COLOURS, dtype=np.float32).reshape(COLOURS, 3)
PROCESSOR = ImageGPTImageProcessor(CLUSTERS, size={"height": 4, "width": 4})


def model(**fields: Any) -> Any:
    return small(**{"vocab_size": COLOURS + 1, "n_positions": 16, "n_embd": 16, "n_layer": 3, **fields})


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, COLOURS, (n, 16))


# ---- Extraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sos", [True, False])
@torch.no_grad()
def test_features_are_the_means_of_normed_states(sos: bool) -> None:
    network, images = model(), tokens(7)
    found = extract(network, images, [0, 2, 3], sos=sos, batch_size=3)
    given = torch.from_numpy(images)
    if sos:
        given = torch.cat([torch.full((7, 1), COLOURS), given[:, :-1]], 1)
    states = network(given, output_hidden_states=True).hidden_states
    body = network.transformer
    wanted = [body.h[0].ln_1(states[0]), body.h[2].ln_1(states[2]), states[3]]  # which has ln_f
    np.testing.assert_allclose(found, torch.stack([item.mean(1) for item in wanted], 1), rtol=1e-5, atol=1e-5)
    assert (found.shape, found.dtype) == ((7, 3, 16), np.float32)


def test_batches_bands_and_positions() -> None:
    network, images = model(), tokens(5)
    whole = extract(network, images, batch_size=5)
    np.testing.assert_allclose(extract(network, images, "1,2,3", batch_size=2), whole, rtol=1e-5, atol=1e-6)
    bands = extract(network, images, bands=4)
    assert bands.shape == (5, 3, 64)
    np.testing.assert_allclose(bands.reshape(5, 3, 4, 16).mean(2), whole, rtol=1e-5, atol=1e-6)
    every = extract(network, images, [2], pool=None)
    assert every.shape == (5, 1, 16, 16)
    np.testing.assert_allclose(every.mean(2), whole[:, [1]], rtol=1e-5, atol=1e-6)


def test_the_network_stays_as_it_was() -> None:
    network = model(resid_pdrop=0.5, embd_pdrop=0.5).train()
    found = [extract(network, tokens(3)) for _ in range(2)]
    np.testing.assert_array_equal(*found)  # no dropout
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_bidirectional_network_is_fed_no_sos() -> None:
    images = torch.from_numpy(tokens(2))
    assert torch.equal(fed(model(bidirectional=True).config, images), images)
    assert fed(model().config, images)[:, 0].tolist() == [COLOURS] * 2
    assert torch.equal(fed(model().config, images)[:, 1:], images[:, :-1])


def test_progress_and_narrow_tokens() -> None:
    seen: list[tuple[int, int]] = []
    wide = extract(model(), tokens(5), batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    for kind in (np.uint8, np.int16, np.uint16, np.uint32):
        np.testing.assert_array_equal(extract(model(), tokens(5).astype(kind), batch_size=2), wide)


def test_a_random_twin_has_initial_weights_of_its_seed() -> None:
    network = model(dtype=torch.bfloat16)
    before = torch.get_rng_state()
    first, again, other = (random_twin(network, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.bfloat16
    assert not first.training
    assert torch.equal(first.wte.weight, again.wte.weight)
    assert not torch.equal(first.wte.weight, other.wte.weight)
    assert first.wte.weight.detach().float().std().item() == pytest.approx(network.config.initializer_range, rel=0.2)


@pytest.mark.parametrize(
    ("layers", "wanted"), [("all", [1, 2, 3]), (None, [1, 2, 3]), ("0,2", [0, 2]), (2, [2]), ((3, 1), [1, 3])]
)
def test_layers(layers: Any, wanted: list[int]) -> None:
    assert check_layers(layers, 3) == wanted


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (tokens(2).tolist(), "is a list"),
        (tokens(2)[0], r"must be \(N, T\) integers"),
        (tokens(2)[:0], "N and T at least 1"),
        (tokens(2) + 0.5, "must be .* float64"),
        (tokens(2) - 1, r"token -1 is not in 0\.\.7"),
        (tokens(2) + COLOURS, r"token \d+ is not in 0\.\.7"),
    ],
)
def test_what_are_no_tokens(images: Any, reason: str) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        extract(model(), images)


# ---- The transformer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    return path


def test_scikit_learns_own_checks(tmp_path: Path) -> None:
    """Of a model that is named: where it is given, scikit-learn compares it by a hash that no copy of a module keeps.

    Not applicable: what needs SCIPY_ARRAY_API in the environment.
    """
    small(spread=0.3, vocab_size=513, n_positions=80, n_embd=8, n_layer=1).save_pretrained(tmp_path)
    results = check_estimator(ImageGPTFeatures(str(tmp_path), 1), on_fail="raise", on_skip=None)
    assert len(results) > 40
    assert {item["check_name"] for item in results if item["status"] != "passed"} <= {"check_array_api_input"}


def test_in_a_pipeline(folder: Path) -> None:
    images = tokens(60)
    labels = np.arange(60) % 2
    images[:, :8] = np.where(labels[:, None] == 1, images[:, :8] // 2, images[:, :8])
    for source in (folder, str(folder), model()):
        pipeline = make_pipeline(ImageGPTFeatures(source, 2), StandardScaler(), LogisticRegression())
        assert pipeline.fit(images[:40], labels[:40]).score(images[40:], labels[40:]) > 0.8
        names = pipeline[:-1].get_feature_names_out()
        assert (len(names), names[15]) == (16, "imagegptfeatures15")
    np.testing.assert_allclose(pipeline[0].transform(images), extract(model(), images, 2)[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="X has 9 features, but ImageGPTFeatures is expecting 16"):
        pipeline[0].transform(images[:, :9])


def test_pictures_of_every_kind_are_their_tokens(folder: Path, tmp_path: Path) -> None:
    given = tokens(3)
    pictures = PROCESSOR.decode(given)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    wanted = ImageGPTFeatures(folder, 2).fit_transform(given)
    mixed = [pictures[0], str(paths[1]), paths[2]]
    for images in (pictures, arrays, torch.from_numpy(arrays), paths, mixed):
        np.testing.assert_array_equal(ImageGPTFeatures(folder, 2).fit_transform(images), wanted)
    with_processor = ImageGPTFeatures(model(), 2, processor=PROCESSOR).fit_transform(pictures)
    np.testing.assert_allclose(with_processor, wanted, rtol=1e-5, atol=1e-6)
    wide = Image.new("RGB", (12, 4))
    wide.paste(pictures[0], (4, 0))
    alone = ImageGPTFeatures(folder, 2).fit_transform([wide])  # of one short sequence the compiled pass serves
    np.testing.assert_allclose(alone, wanted[:1], rtol=1e-5, atol=1e-6)


def test_parameters_clones_and_pickles() -> None:
    network = model()
    transformer = ImageGPTFeatures(network, 2, sos=False, bands=4)
    assert transformer.get_params()["model"] is network
    copied = clone(transformer).set_params(layer=1)
    assert copied.model is network  # shared
    assert (copied.layer, copied.sos, copied.bands, transformer.layer) == (1, False, 4, 2)
    fitted = transformer.fit(tokens(3))
    for other in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(other.transform(tokens(3)), fitted.transform(tokens(3)))
    assert not hasattr(clone(fitted), "model_")
    assert len(fitted.get_feature_names_out()) == 64


@pytest.mark.parametrize(
    ("changed", "images", "reason"),
    [
        ({"layer": 4}, tokens(2), r"layer is 4; want an integer in 0\.\.3"),
        ({"bands": 3}, tokens(2), "bands is 3; want a number that divides the 16"),
        ({"model": 5}, tokens(2), "model is a int; want a model"),
        ({"model": "no/such/folder"}, tokens(2), "no such folder"),
        ({}, tokens(2) + 0.5, "tokens must be integers; pictures are"),
        ({}, np.zeros((2, 4, 4, 3), np.uint8), "pictures need a processor"),
    ],
)
def test_wrong_parameters(changed: dict[str, Any], images: Any, reason: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=reason):
        ImageGPTFeatures(**{"model": model(), "layer": 1, **changed}).fit_transform(images)


def test_without_scikit_learn_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import igpt_fast.learning.probe, igpt_fast.learning.features"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: ImageGPTFeatures needs scikit-learn: pip install "igpt_fast[train]"' in done.stderr
