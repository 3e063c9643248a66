"""``igpt probe`` as a user meets it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTImageProcessor
from igpt_fast.cli.main import main
from igpt_fast.files import BUNDLED
from igpt_fast.learning import attentive
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.learning.shards import ShardData
from igpt_fast.learning.tokenizers import CodeTokenizer

COLOURS = 6
CLUSTERS = np.linspace(-1, 1, 3 * COLOURS, dtype=np.float32).reshape(COLOURS, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small(vocab_size=COLOURS + 1, n_positions=16, n_embd=16, spread=0.3).save_pretrained(path)
    ImageGPTImageProcessor(CLUSTERS, size={"height": 4, "width": 4}).save_pretrained(path)
    return path


def dataset(n: int = 80, seed: int = 0, names: tuple[str, ...] = ("ant", "bee"), holdout: int = 5) -> TokenData:
    """Half of the pixels have the colour of the image's class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // 2 % len(names)
    tokens = np.where(rng.random((n, 16)) < 0.5, labels[:, None], rng.integers(0, COLOURS, (n, 16)))
    held = torch.arange(n) % holdout == 0
    return TokenData(torch.from_numpy(tokens), CLUSTERS, held, labels=torch.from_numpy(labels), class_names=names)


def run(*args: object) -> int:
    return main(["probe", *map(str, args), "--device", "cpu"])


def folder_of(data: TokenData, folder: Path) -> None:
    for i, picture in enumerate(ImageGPTImageProcessor(CLUSTERS, size={"height": 4, "width": 4}).decode(data.tokens)):
        path = folder / data.class_names[int(data.labels[i])] / f"{i}.png"  # type: ignore[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def test_a_token_file(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentive, "STEPS", 20)
    save_tokens(dataset(), tmp_path / "d.npz")
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    more = ("--shots", "5", "--tries", "2", "--knn", "--concat", "2", "--attentive", "--out", out, "--plot", plot)
    assert run(tmp_path / "d.npz", "--model", model, *more) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:]] == ["raw", *["the"] * 3, *["random"] * 3, "2"]
    assert "2 classes, 64 images of train, 16 of test" in captured.out
    data = json.loads(out.read_text())
    best = max(row["accuracy"] for row in data["rows"] if row["kind"] == "model")
    assert best > 0.85
    assert {row["method"] for row in data["rows"]} == {"logistic", "knn", "attentive"}
    with Image.open(plot) as picture:
        assert picture.size[0] > 300
    assert run(tmp_path / "d.npz", "--model", model, *more) == 1
    assert "p.json: exists already; pass --force" in capsys.readouterr().err
    assert run(tmp_path / "d.npz", "--model", model, "--shots", "none", "--layers", "1", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["layer"], row["shots"]) for row in rows] == [
        ("raw", None, None), ("model", 1, None), ("random", 1, None)
    ]  # fmt: skip


def test_directories_and_test_sets(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes meet by their names; the pictures are the tokens' own, so a file and a directory agree."""
    folder_of(dataset(), tmp_path / "train")
    folder_of(dataset(40, seed=1), tmp_path / "test")
    save_tokens(dataset(40, seed=1), tmp_path / "test.npz")
    found = []
    for test in (tmp_path / "test", tmp_path / "test.npz"):
        assert run(tmp_path / "train", "--test", test, "--model", model, "--shots", "none", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["classes"] == ["ant", "bee"]
    counts = {(row["n_train"], row["n_test"]) for row in found[0]["rows"]}
    assert counts == {(80, 40)}
    assert found[0] == found[1]
    assert run(tmp_path / "train", "--model", model, "--shots", "none", "--holdout", "0.3", "--json") == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["n_train"] + row["n_test"] == 80
    assert 10 < row["n_test"] < 40


def test_emoji_are_not_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emoji = BUNDLED.parent / "emoji16.npz"
    (tmp_path / "copy.npz").write_bytes(emoji.read_bytes())
    for args in ((), (emoji,), (tmp_path / "copy.npz",)):
        assert run(*args) == 2
        assert "the bundled emoji are not probed: their held-out part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("no/such",), 1, "no/such: no such file or directory"),
        (("{data}", "--test", "no/such"), 1, "no/such: no such file or directory"),
        (("{plain}",), 2, "plain.npz: has no labels: there is nothing to probe it for"),
        (("{data}", "--test", "{plain}"), 2, "plain.npz: has no labels"),
        (("{data}", "--test", "{others}"), 1, "test has images of classes that train has not: cat"),
        (("{others}", "--test", "{data}"), 1, "test has no image of classes that train has: cat"),
        (("{single}",), 1, "train has a single class, ant"),
        (("{data}", "--test", "{data}"), 2, "--test {data}: is what is trained on"),
        (("{data}", "--test", "{again}"), 1, "the images of test are those of train"),
        (("{data}", "--concat", "1"), 2, "--concat is 1; want 2 layers or more"),
        (("{data}", "--layers", "1", "--concat", "2"), 2, "--concat is 2; want an integer in 0..1"),
        (("{data}", "--bands", "5"), 2, "--bands is 5; want a number that divides the 16"),
        (("{codes}",), 1, "codes.npz: its tokens are no colours, and a probe stands beside raw pixels"),
        (("{data}", "--shots", "33"), 1, "shots are 33 images a class, and class 'ant' has 32"),
        (("{data}", "--shots", "0"), 2, "--shots is '0'"),
        (("{data}", "--shots", "1,x"), 2, "--shots is '1,x'; want none, or numbers"),
        (("{data}", "--tries", "0"), 2, "--tries is 0"),
        (("{data}", "--layers", "3"), 2, "--layers is 3; want an integer in 0..2"),
        (("{data}", "--concat", "4"), 2, "--concat is 4"),
        (("{data}", "--holdout", "0.5"), 2, "--holdout: only of a directory"),
        (("{data}", "--holdout", "1"), 2, "--holdout is 1.0"),
        (("{data}", "--dtype", "int8"), 2, "--dtype is 'int8'"),
        (("{data}", "--out", "p.txt"), 2, "must end in .json"),
        (("{data}", "--plot", "p.gif"), 2, "must end in .png, .svg, .pdf"),
        (("{data}", "--skip-unreadable"), 2, "--skip-unreadable: only for a directory"),
        (("{empty}",), 1, "empty: no images in it"),
        (("{loose}",), 1, "0.png: lies in no class"),
    ],
)
def test_mistakes(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, reason: str
) -> None:
    paths = {name: tmp_path / f"{name}.npz" for name in ("data", "plain", "others", "single", "codes", "again")}
    paths |= {name: tmp_path / name for name in ("empty", "loose")}
    whole = dataset()
    if "{again}" in args:
        whole.heldout[:] = False
        save_tokens(whole, paths["again"])
    save_tokens(whole, paths["data"])
    save_tokens(TokenData(dataset().tokens, CLUSTERS, dataset().heldout), paths["plain"])
    save_tokens(dataset(names=("ant", "bee", "cat")), paths["others"])
    save_tokens(dataset(names=("ant",)), paths["single"])
    save_tokens(dataclasses.replace(dataset(), clusters=None, tokenizer=CodeTokenizer(COLOURS, 4, 4)), paths["codes"])
    paths["empty"].mkdir()
    paths["loose"].mkdir()
    Image.new("RGB", (4, 4)).save(paths["loose"] / "0.png")
    assert run(*(word.format(**paths) for word in args), "--model", model) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("igpt probe: ")
    assert reason.format(**paths) in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_shards(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a directory of pictures give what its token file gives."""
    folder_of(dataset(), tmp_path / "p")
    assert (
        main(["tokenize", str(tmp_path / "p"), "--model", str(model), "--classes", "--out", str(tmp_path / "s")]) == 0
    )
    shards = ShardData(tmp_path / "s", classes=True)
    tokens, labels = shards.at(torch.arange(80))
    save_tokens(
        TokenData(tokens, CLUSTERS, shards.heldout, labels=labels, class_names=shards.class_names), tmp_path / "d.npz"
    )
    capsys.readouterr()
    found = []
    for data in ("s", "d.npz"):
        assert run(tmp_path / data, "--model", model, "--shots", "none", "--layers", "1", "--json") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert run(tmp_path / "s", "--model", model, "--holdout", "0.5") == 2
    for data in ("s", "d.npz"):
        out = str(tmp_path / f"{data}.f.npz")
        command = ["features", str(tmp_path / data), "--model", str(model), "--out", out, "--device", "cpu"]
        assert main(command) == 0
    with np.load(tmp_path / "s.f.npz") as one, np.load(tmp_path / "d.npz.f.npz") as other:
        assert all(np.array_equal(one[name], other[name]) for name in ("layer_1", "labels", "heldout", "class_names"))


def test_a_model_of_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no colours, and no file of them."""
    small(vocab_size=COLOURS + 1, n_positions=16, n_embd=16).save_pretrained(tmp_path / "model")
    codes = dataclasses.replace(dataset(), clusters=None, tokenizer=CodeTokenizer(COLOURS, 4, 4))
    save_tokens(codes, tmp_path / "d.npz")
    assert run(tmp_path / "d.npz", "--model", tmp_path / "model") == 1
    assert "d.npz: its tokens are no colours, and a probe stands beside raw pixels" in capsys.readouterr().err


def test_nothing_to_test_on(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset()
    data.heldout[:] = False
    save_tokens(data, tmp_path / "d.npz")
    assert run(tmp_path / "d.npz", "--model", model) == 1
    assert "d.npz: holds nothing out to test on; give --test" in capsys.readouterr().err
