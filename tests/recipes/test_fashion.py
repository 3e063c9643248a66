"""The script of Fashion-MNIST, on files of its format made up here: patterns that differ from class to class."""

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_fast.learning import classifiers
from igpt_fast.learning.settings import FinetuneConfig
from igpt_fast.recipes import fashion

N_TRAIN, N_TEST = 120, 40


def idx(array: np.ndarray) -> bytes:
    """IDX: two zeros, the type (8: bytes), the number of dimensions, their lengths, the bytes."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    patterns = rng.integers(0, 2, (10, 28, 28)) * 200
    for part, count in ((fashion.TRAIN, N_TRAIN), (fashion.TEST, N_TEST)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (patterns[labels] + rng.integers(0, 55, (count, 28, 28))).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            (folder / name).write_bytes(gzip.compress(idx(array)))
            monkeypatch.setitem(fashion.SHA256, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(fashion, "TEST_IMAGES", 30)
    monkeypatch.setattr(fashion, "LABELS", 100)
    monkeypatch.setattr(fashion, "SHIFTED_LABELS", 100)
    monkeypatch.setattr(fashion, "CONCAT", 2)
    monkeypatch.setattr(classifiers, "GRID", (0.1,))  # a value of C, and not seven in five folds each
    monkeypatch.setattr(fashion, "NETWORK", {"n_layer": 2, "n_embd": 8, "n_head": 1})
    return folder


def test_build(source: Path) -> None:
    data = fashion.build(source)
    assert data.tokens.shape == (N_TRAIN + 30, 196)
    assert data.n_clusters == 16
    assert data.heldout.tolist() == [False] * N_TRAIN + [True] * 30
    assert data.labels is not None
    assert data.labels[:12].tolist() == [*range(10), 0, 1]
    images, _ = fashion.read_part(source, fashion.TEST)
    image = images[3].astype(float)
    assert int(data.tokens[N_TRAIN + 3, 14 + 2]) == round(image[2:4, 4:6].mean() / 17)


def test_shrink_has_all_greys_and_the_palette_is_theirs(source: Path) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 4).reshape(-1, 2, 2)
    images = np.tile(ramp[:, :1, :1], (1, 28, 28))
    tokens = fashion.shrink(images)
    assert (tokens == tokens[:, :1]).all()
    assert sorted(set(tokens[:, 0].tolist())) == list(range(16))
    greys = (fashion.build(source).clusters[tokens[:, 0], 0] + 1) * 127.5
    assert np.abs(greys - np.arange(256)).max() <= 8.5


def test_shifted() -> None:
    tokens = torch.arange(1, 197).expand(200, 196).clone()
    moved = fashion.shifted(tokens, 2, seed=0).view(200, 14, 14)
    seen = set()
    for image in moved:
        row, column = divmod(int(image[7, 7]) - 1, 14)  # what has come to the middle
        down, right = 7 - row, 7 - column
        want = torch.zeros(18, 18, dtype=torch.int64)
        want[2 + down : 16 + down, 2 + right : 16 + right] = tokens[0].view(14, 14)
        assert torch.equal(image, want[2:16, 2:16])
        seen.add((down, right))
    assert len(seen) == 25
    assert torch.equal(fashion.shifted(tokens, 0, seed=0), tokens)


def test_whole(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three stages, then the second alone on what the first has left; test images are not trained on."""
    out = tmp_path / "run"
    fashion.main(["--path", str(source), "--out", str(out), "--steps", "2"])
    results = json.loads((out / "results.json").read_text())
    assert results["pretrain"]["images"] == N_TRAIN + 30
    assert results["pretrain"]["heldout_images"] == 30
    kinds = {(row["kind"], row["shots"]) for row in results["probe"]["rows"]}
    assert kinds >= {(kind, shots) for kind in ("raw", "model", "random") for shots in (None, 10)}
    assert len(results["probe"]["margins"]) == 3
    assert "cpu_minutes" in results["cost of probe"]
    assert results["probe"]["rows"] != results["shifted"]["rows"]
    assert (out / "probe.png").exists()
    assert (out / "shifted.png").exists()
    assert "raw pixels" in capsys.readouterr().out
    model = (out / "pretrain/model/model.safetensors").read_bytes()
    fashion.main(["--out", str(out), "--stages", "probe"])
    assert json.loads((out / "results.json").read_text())["probe"]["rows"] == results["probe"]["rows"]
    assert (out / "pretrain/model/model.safetensors").read_bytes() == model


def test_finetune(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm, of so few images of each class; the pretrained network is left as it was. Accuracies are at the
    command's own rate, and what is forgotten is told apart at one rate."""
    assert fashion.FINETUNE["lr"] == FinetuneConfig().lr
    rates: list[tuple[float, float]] = []
    whole = fashion.finetune.finetune

    def noted(start: Any, images: Any, folder: Any, config: FinetuneConfig) -> dict[str, Any]:
        rates.append((config.lr, config.gen_weight))
        return whole(start, images, folder, config)

    monkeypatch.setattr(fashion.finetune, "finetune", noted)
    monkeypatch.setattr(fashion, "FINETUNE", {"shots": 2, "validation": 0.0, "steps": 1, "batch_size": 4, "lr": 0.1})
    monkeypatch.setattr(fashion, "FINETUNE_TEST", 20)
    monkeypatch.setattr(fashion, "SEEDS", 2)
    out = tmp_path / "run"
    fashion.main(["--path", str(source), "--out", str(out), "--stages", "pretrain,finetune", "--steps", "1"])
    found = json.loads((out / "results.json").read_text())["finetune"]
    assert found["runs"].keys() == fashion.ARMS.keys()
    pretrained = found["runs"]["pretrained, joint"]
    assert [len(pretrained[name]) for name in ("accuracy", "nats", "nats_before")] == [2, 2, 2]
    assert pretrained["nats_before"][0] == pretrained["nats_before"][1]
    assert {round(value * 20) / 20 for value in pretrained["accuracy"]} == set(pretrained["accuracy"])  # of 20 images
    changed = pretrained["nats"][0] + pretrained["nats"][1] - 2 * pretrained["nats_before"][0]
    assert found["margins"]["nats after - before, pretrained, joint"] == pytest.approx(changed / 2)
    assert rates[::2] == rates[1::2] == [(0.1, 1.0), (0.1, 1.0), (2e-3, 1.0), (2e-3, 0.0)]


def test_masked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bidirectional network begins as wide as it is narrow; it and its random twin are read in three ways."""
    monkeypatch.setattr(fashion, "MASKED_NETWORK", {"n_layer": 1, "n_embd": 16, "n_head": 1})
    monkeypatch.setattr(fashion, "MASKED_LABELS", 40)
    deviations: list[float] = []
    twin = fashion.random_twin
    monkeypatch.setattr(
        fashion, "random_twin", lambda one, seed: deviations.append(one.config.initializer_range) or twin(one, seed)
    )
    out = tmp_path / "run"
    fashion.main(["--path", str(source), "--out", str(out), "--stages", "masked", "--steps", "1"])
    found = json.loads((out / "results.json").read_text())["masked"]
    assert set(found["accuracy by layer"]) == {
        f"{kind}, {name}" for kind in ("trained", *fashion.RANDOM) for name in fashion.READINGS
    }
    assert deviations == [0.25, 0.02]
    assert all(len(layers) == 1 for layers in found["accuracy by layer"].values())
    config = json.loads((out / "masked/model/config.json").read_text())
    assert config["bidirectional"]
    assert config["initializer_range"] == 0.25


def test_masked_margins() -> None:
    layers = {"unmasked": [0.5, 0.3], "one mask": [0.4, 0.6], "vote of five": [0.5, 0.7]}
    accuracy = {f"trained, {name}": values for name, values in layers.items()}
    accuracy |= {f"random weights, {name}": [0.1, 0.2] for name in layers}
    accuracy |= {f"random weights, deviation 0.02, {name}": [0.1, 0.3] for name in layers}
    assert fashion.masked_margins(accuracy) == pytest.approx(
        {
            "vote of five - one mask, mean of the layers": 0.1,
            "random weights, best layer": 0.2,
            "random weights, deviation 0.02, best layer": 0.3,
            "trained - better random weights, best layer, unmasked": 0.2,
            "trained - better random weights, best layer, one mask": 0.3,
            "trained - better random weights, best layer, vote of five": 0.4,
        }
    )


@pytest.mark.parametrize(
    ("missing", "stages"), [("sklearn", "probe"), ("sklearn", "masked"), ("matplotlib", "pretrain,shifted")]
)
def test_what_a_stage_needs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, stages: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"igpt_fast\[train\]"):
        fashion.main(["--path", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--stages", stages])
    assert not (tmp_path / "run").exists()


def test_figures_are_written_before_curves_are_drawn(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(fashion.ProbeResult, "plot", full)
    out = tmp_path / "run"
    with pytest.raises(OSError, match="no space left"):
        fashion.main(["--path", str(source), "--out", str(out), "--stages", "pretrain,probe", "--steps", "1"])
    assert json.loads((out / "results.json").read_text())["probe"]["rows"]


def test_unknown_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fashion.main(["--out", str(tmp_path / "run"), "--stages", "probe,dance"])
    assert "unknown dance" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_file_is_refused(source: Path) -> None:
    path = source / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(N_TRAIN, np.uint8))))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: SHA-256 is .*expected"):
        fashion.build(source)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not gzip at all", "Not a gzipped file"),
        (gzip.compress(idx(np.zeros((3, 28, 28), np.uint8)))[:-12], "end-of-stream"),
        (gzip.compress(b"\0\0\x08"), "begins with 000008"),
        (gzip.compress(b"\0\0\x0d\x03" + bytes(12)), "begins with 00000d03"),  # of floats
        (gzip.compress(idx(np.zeros((3, 28, 29), np.uint8))), r"holds \(3, 28, 29\)"),
        (gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "claims 0 bytes"),
        (gzip.compress(idx(np.zeros((1, 28, 28), np.uint8))[:-1]), "783 bytes"),
        (gzip.compress(idx(np.zeros((1, 28, 28), np.uint8)) + b"x"), "785 bytes"),
        (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 4 + b"\0\0\0\x1c" * 2), "claims 3367254359280 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes have in them when they were packed
)
def test_damaged_idx(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: not a usable IDX file: .*{reason}"):
        fashion.read_idx(path, (None, 28, 28))


def test_an_idx_that_unpacks_to_more_than_it_says_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8)) + bytes(64 << 20)))
    with pytest.raises(ValueError, match="holds 6 bytes or more, its header says 5"):
        fashion.read_idx(path, (None,))
