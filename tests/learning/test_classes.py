"""Models that learn the classes of their images: from folders and files of labels to pictures of a class."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from igpt_fast import Generation, ImageGPTForCausalImageModeling, Pipeline
from igpt_fast.cli.main import main
from igpt_fast.learning import train as recipe
from igpt_fast.learning.data import TokenData, load_tokens, save_tokens
from igpt_fast.learning.evaluate import evaluate
from igpt_fast.learning.folders import held_out, tokens_from_images
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.run import run
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.stepping import inputs_at
from igpt_fast.learning.train import train
from igpt_fast.likelihood.nats import image_nats

pytestmark = pytest.mark.xdist_group("classes")  # one training for all

NAMES = ("columns", "corner", "plain", "rows")
SIDE, COLOURS = 6, 4
CONFIG = TrainConfig(
    n_layer=2,
    n_embd=48,
    n_head=2,
    steps=400,
    batch_size=32,
    lr=4e-3,
    warmup_steps=20,
    flip=False,
    shift=0,
    dropout=0.0,
    bf16=False,
    eval_every=400,
    save_every=400,
)


def patterns(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, SIDE * SIDE) images in two colours, one in a hundred pixels wrong, and their classes by ``NAMES``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(NAMES)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    masks = torch.stack([x % 2 == 0, (x < 3) & (y < 3), x < 0, y % 2 == 0])
    pairs = torch.rand((n, COLOURS), generator=generator).argsort(1)[:, :2]
    images = torch.where(masks[labels], pairs[:, :1, None], pairs[:, 1:, None])
    wrong = torch.rand(images.shape, generator=generator) < 0.01
    images = torch.where(wrong, torch.randint(0, COLOURS, images.shape, generator=generator), images)
    return images.flatten(1), labels


def dataset(n: int = 480) -> TokenData:
    tokens, labels = patterns(n, seed=1)
    clusters = np.linspace(-1, 1, 3 * COLOURS, dtype=np.float32).reshape(COLOURS, 3)
    return TokenData(tokens, clusters, torch.arange(n) % 10 >= 8, labels=labels, class_names=NAMES)


def features(tokens: Tensor) -> Tensor:
    """(N, 3): the share of neighbours that are alike along a row and along a column, and that of the corner's edge."""
    grid = tokens.view(-1, SIDE, SIDE)
    along = (grid[:, :, 1:] == grid[:, :, :-1]).float().mean((1, 2))
    down = (grid[:, 1:] == grid[:, :-1]).float().mean((1, 2))
    return torch.stack([along, down, (grid[:, :3, 2] != grid[:, :3, 3]).float().mean(1)], 1)


def recognised(tokens: Tensor) -> Tensor:
    """(N,) the class whose images have the nearest features."""
    known, labels = patterns(400, seed=2)
    means = torch.stack([features(known[labels == c]).mean(0) for c in range(len(NAMES))])
    return torch.cdist(features(tokens), means).argmin(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The directory of a run of some seconds, and its summary."""
    out = tmp_path_factory.mktemp("classes") / "run"
    return out, run(dataset(), out, CONFIG)


def drawn(trained: tuple[Path, dict], scale: float, n: int = 160) -> Generation:
    pipeline = Pipeline.from_pretrained(trained[0] / "model", device="cpu")
    return pipeline.sample(n, seed=3, labels=[i % len(NAMES) for i in range(n)], cfg_scale=scale, batch_size=n)


def test_the_classes_are_learned(trained: tuple[Path, dict]) -> None:
    out, summary = trained
    # A class is worth log(4) nats an image; where the first pixels tell it anyway, it is known only sooner.
    gain = (summary["heldout_nats"] - summary["heldout_class_nats"]) * SIDE * SIDE
    assert 0.5 * math.log(4) < gain < 2.0 * math.log(4)
    assert summary["classes"] == 4
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert [last[name] for name in ("heldout_nats", "heldout_class_nats")] == [
        summary[name] for name in ("heldout_nats", "heldout_class_nats")
    ]
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["n_classes"]) == (COLOURS + 4 + 1, 4)
    assert config["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    loaded = ImageGPTForCausalImageModeling.from_pretrained(out / "model")
    data = dataset()
    assert evaluate(loaded, data.heldout_tokens) == pytest.approx(summary["heldout_nats"], abs=1e-6)
    right = evaluate(loaded, data.heldout_tokens, labels=data.heldout_labels)
    assert right == pytest.approx(summary["heldout_class_nats"], abs=1e-6)
    assert evaluate(loaded, data.heldout_tokens, labels=(data.heldout_labels + 1) % 4) > right + 0.08  # type: ignore
    with Image.open(out / "samples.png") as picture:
        picture.load()


def test_samples_are_of_the_class_asked_for(trained: tuple[Path, dict]) -> None:
    known, labels = patterns(400, seed=4)
    assert (recognised(known) == labels).float().mean() > 0.97  # the judge knows the classes
    plain, guided = drawn(trained, 1.0), drawn(trained, 3.0)
    assert plain.labels is not None
    right = [(recognised(one.tokens) == plain.labels).float().mean().item() for one in (plain, guided)]
    assert right[0] > 0.75
    assert right[1] > right[0] + 0.02
    without = Pipeline.from_pretrained(trained[0] / "model", device="cpu").sample(160, seed=3, batch_size=160)
    assert (recognised(without.tokens) == plain.labels).float().mean() < 0.45  # by chance: 0.25


def test_guidance_sharpens(trained: tuple[Path, dict]) -> None:
    """The images say more clearly of which class they are: log p(image | class) - log p(image) in the mean."""
    model = ImageGPTForCausalImageModeling.from_pretrained(trained[0] / "model")
    gains = []
    for scale in (0.0, 1.0, 3.0):
        result = drawn(trained, scale)
        with torch.no_grad():
            gain = image_nats(model, result.tokens) - image_nats(model, result.tokens, result.labels)
        gains.append(gain.sum(1).mean().item())
    assert gains[0] < gains[1] - 1.0
    assert gains[1] < gains[2] - 0.3


def test_transformers_draws_colours_only(trained: tuple[Path, dict]) -> None:
    """Its logits of the classes, which were never trained, are 0; of a colour they are mostly less."""
    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(trained[0] / "model")
    begin = torch.tensor([[COLOURS + 3]])
    drawn = model.generate(begin, do_sample=True, num_return_sequences=20, max_length=20, top_k=0)
    assert int(drawn[:, 1:].max()) < COLOURS
    drawn = model.generate(begin, do_sample=True, num_return_sequences=20, max_length=20, top_k=0, suppress_tokens=[9])
    assert int(drawn[:, 1:].max()) >= COLOURS


def small() -> TokenData:
    return dataset(30)


TINY = dataclasses.replace(CONFIG, n_layer=1, n_embd=16, steps=12, batch_size=4, dropout=0.1, save_every=5)


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    straight = train(small(), tmp_path / "straight", TINY)
    train(small(), tmp_path / "cut", TINY, stop_after=7)
    torch.rand(7)
    cut = train(small(), tmp_path / "cut", TINY, resume=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"label_dropout was 0\.1, is 0\.3"):
        train(small(), tmp_path / "cut", dataclasses.replace(TINY, label_dropout=0.3), resume=True)
    plain = dataclasses.replace(small(), labels=None, class_names=())
    with pytest.raises(ValueError, match="the data differ"):
        train(plain, tmp_path / "cut", TINY, resume=True)


def test_a_run_without_classes_does_not_know_of_them(tmp_path: Path) -> None:
    """Its state can be gone on with by other versions, whatever the setting."""
    plain = dataclasses.replace(small(), labels=None, class_names=())
    summary = run(plain, tmp_path, dataclasses.replace(TINY, steps=2))
    assert not {"classes", "heldout_class_nats"} & summary.keys()
    assert "n_classes" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert "label_dropout" not in torch.load(tmp_path / "train.pt", weights_only=True)["identity"]["config"]
    run(plain, tmp_path, dataclasses.replace(TINY, steps=2, label_dropout=0.5), resume=True)


def test_labels_go_with_their_images_and_are_dropped_at_the_rate() -> None:
    labels = torch.arange(50)
    config = dataclasses.replace(CONFIG, batch_size=25, flip=True, shift=1)
    tokens = labels[:, None].repeat(1, 4)  # images that no flip or shift changes
    data = TokenData(tokens, np.zeros((50, 3), np.float32), torch.zeros(50, dtype=torch.bool), labels=labels)
    batches = [inputs_at(step, data, config, NextPixel(0.2)) for step in range(200)]
    dropped = torch.cat([batch for _, batch in batches]) < 0
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.02)
    for step, (images, batch) in enumerate(batches[:20]):
        assert torch.equal(batch[batch >= 0], images[batch >= 0, 0])
        assert torch.equal(batch, inputs_at(step, data, config, NextPixel(0.2))[1])
    assert any(not torch.equal(batches[0][1] < 0, batch < 0) for _, batch in batches[1:])
    assert int(inputs_at(0, data, config, NextPixel(0.0))[1].min()) >= 0


def test_image_nats_begins_with_the_class_and_scores_colours_alone() -> None:
    model = recipe.new_model(small(), TINY, NextPixel()).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    tokens, labels = patterns(3, seed=0)[0], torch.tensor([2, -1, 0])
    begin = torch.tensor([[COLOURS + 2], [COLOURS + 4], [COLOURS]])
    logits = model(torch.cat([begin, tokens[:, :-1]], 1)).logits
    assert logits.shape[-1] == COLOURS + 4
    expected = -torch.log_softmax(logits[..., :COLOURS], -1).gather(-1, tokens[..., None])[..., 0]
    nats = image_nats(model, tokens, labels)
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(nats[1:2], image_nats(model, tokens[1:2]))
    head = model.lm_head.weight
    gradient, wanted = (torch.autograd.grad(loss.sum(), head, retain_graph=True)[0] for loss in (nats, expected))
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[COLOURS:].any()


def test_token_files_keep_labels_and_names(tmp_path: Path) -> None:
    data = small()
    save_tokens(data, tmp_path / "a.npz")
    again = load_tokens(tmp_path / "a.npz", classes=True)
    assert torch.equal(again.labels, data.labels)  # type: ignore[arg-type]
    assert list(again.class_names) == list(NAMES)
    assert again.fingerprint() == data.fingerprint()
    plain = load_tokens(tmp_path / "a.npz")
    assert (plain.labels, plain.n_classes, plain.train_labels) == (None, 0, None)
    assert plain.fingerprint() != data.fingerprint()
    renamed = dataclasses.replace(data, class_names=NAMES[::-1])
    other = dataclasses.replace(data, labels=(data.labels + 1) % 4)  # type: ignore[operator]
    assert len({one.fingerprint() for one in (data, renamed, other)}) == 3


def _write(path: Path, **changed: np.ndarray | None) -> None:
    data = small()
    arrays = {
        "tokens": data.tokens.numpy().astype(np.uint8),
        "clusters": data.clusters,
        "heldout": data.heldout.numpy(),
        "labels": data.labels.numpy().astype(np.uint8),  # type: ignore[union-attr]
        **changed,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]


def test_labels_without_names(tmp_path: Path) -> None:
    _write(tmp_path / "a.npz")
    assert load_tokens(tmp_path / "a.npz", classes=True).class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("labels", None, "has no array 'labels'"),
        ("labels", np.zeros(29, np.int64), r"labels must be \(N,\) integers"),
        ("labels", np.zeros((30, 1), np.int64), r"labels must be \(N,\) integers"),
        ("labels", np.zeros(30, np.float32), r"labels must be \(N,\) integers"),
        ("labels", np.full(30, 1 << 63, np.uint64), r"labels must be \(N,\) integers"),
        ("labels", np.full(30, -1), r"label -1 is no class: the labels name none"),
        ("labels", np.full(30, 1 << 60), r"label 1152921504606846976 is not in 0\.\.29"),
        ("labels", np.arange(30) % 2 * 2, "class '1' has no image to train on"),
        ("class_names", np.array(["a", "b"]), r"label 3 is not in 0\.\.1"),
        ("class_names", np.array(["a", "b", "c", "d", "e"]), "class 'e' has no image to train on"),
        ("class_names", np.array(["a", "b", "a", "d"]), "same name"),
        ("class_names", np.array(["a", "b", "", "d"]), "is called ''"),
        ("class_names", np.array(["a", "b", "\x1b[2J", "d"]), "is called '.x1b"),
        ("class_names", np.array(["a", "b", "c" * 201, "d"]), "is called 'c"),
        ("class_names", np.array([["a", "b", "c", "d"]]), r"class_names must be \(C,\) strings"),
        ("class_names", np.arange(4), r"class_names must be \(C,\) strings"),
        ("class_names", np.array([b"a", b"b", b"c", b"d"]), "numbers"),
        ("class_names", np.array(["a", None, "c", "d"]), "numbers"),
        ("class_names", np.full(4, 0x7FFFFFFF, np.uint32).view("U1"), "."),
    ],
)
def test_bad_labels(tmp_path: Path, name: str, value: np.ndarray | None, reason: str) -> None:
    _write(tmp_path / "bad.npz", **{name: value})
    with pytest.raises(ValueError, match=rf"bad\.npz: not a token file: .*{reason}"):
        load_tokens(tmp_path / "bad.npz", classes=True)


def pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)).save(folder / name)


def test_sub_directories_are_classes(tmp_path: Path) -> None:
    pictures(tmp_path, "b/1.png", "a/x/2.png", "b/0.png", "c d/0.png", ".hidden/0.png")
    (tmp_path / "empty").mkdir()
    data = tokens_from_images(tmp_path, 2, 3, holdout=0.0, classes=True)
    assert (data.labels.tolist(), data.class_names) == ([0, 1, 1, 2], ["a", "b", "c d"])  # type: ignore[union-attr]
    plain = tokens_from_images(tmp_path, 2, 3, holdout=0.0)
    assert plain.labels is None
    assert torch.equal(plain.tokens, data.tokens)
    pictures(tmp_path, "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png: lies in no class"):
        tokens_from_images(tmp_path, 2, 3, holdout=0.0, classes=True)


def test_a_class_needs_an_image_to_train_on(tmp_path: Path) -> None:
    names = [f"a/{i}.png" for i in range(40)]
    held = next(f"b/{i}.png" for i in range(1000) if held_out(f"b/{i}.png", 0.2))
    pictures(tmp_path, *names, held)
    with pytest.raises(ValueError, match="class 'b' has no image to train on"):
        tokens_from_images(tmp_path, 2, 3, holdout=0.2, classes=True)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "data", *(f"{name}/{i}.png" for name in "ab" for i in range(6)))
    out = tmp_path / "run"
    command = ["train", str(tmp_path / "data"), "--classes", "--out", str(out), "--side", "3", "-k", "4", "--json"]
    settings = ["--steps", "2", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--label-dropout", "0.2"]
    assert main([*command, *settings, "--holdout", "0.2", "--device", "cpu"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["classes"] == 2
    assert summary["heldout_class_nats"] == pytest.approx(math.log(4), abs=0.3)
    pipeline = Pipeline.from_pretrained(out / "model", device="cpu")
    assert pipeline.model.config.id2label == {0: "a", 1: "b"}
    assert pipeline.sample(2, seed=0, labels=[0, 1]).tokens.shape == (2, 9)
    tokens = tmp_path / "tokens.npz"
    save_tokens(dataclasses.replace(small(), labels=None, class_names=[]), tokens)
    assert main([*command[:1], str(tokens), "--classes", "--out", str(tmp_path / "other")]) == 2
    assert "tokens.npz has no labels; train without" in capsys.readouterr().err
