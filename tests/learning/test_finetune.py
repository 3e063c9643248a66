"""Fine-tuning: the joint loss, the choice of images, what is kept, and the classifier that adds SOS by itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTImageProcessor, hf
from igpt_fast.cli.main import main
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.learning.finetune import Part, finetune, load, random_weights
from igpt_fast.learning.objectives.classification import Classification, ImageGPTWithBothHeads, class_figures
from igpt_fast.learning.objectives.starting import Continued, adapted
from igpt_fast.learning.settings import FinetuneConfig, TrainConfig
from igpt_fast.learning.train import train
from igpt_fast.likelihood.nats import image_nats, mean_nats

COLOURS = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
TINY = FinetuneConfig(steps=6, batch_size=4, eval_every=2, save_every=4, flip=False, shift=0, validation=0.25)


def images(n: int = 48, classes: int = 3) -> TokenData:
    """4x4 pictures, mostly of the colour of their class; a quarter is held out."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    tokens = torch.where(torch.rand(n, 16, generator=generator) < 0.6, labels[:, None], 3 + labels[:, None])
    names = [f"kind {i}" for i in range(classes)]
    return TokenData(tokens, COLOURS, torch.arange(n) % 4 == 3, labels=labels, class_names=names)


def start(**fields: object) -> ImageGPTForCausalImageModeling:
    return small(**{"vocab_size": 7, "n_positions": 16, "n_embd": 32, **fields})


def test_a_run_and_what_loads_it(tmp_path: Path) -> None:
    data, model = images(), start()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dataclasses.replace(TINY, steps=40, eval_every=20, lr=3e-3)
    summary = finetune(model, data, tmp_path, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert summary["accuracy"] >= 0.9
    assert [summary[f"{part}_images"] for part in ("train", "validation", "heldout")] == [27, 9, 12]
    assert summary["nats"] < summary["nats_before"] == mean_nats(model, data.heldout_batches())
    tokens, labels = next(data.heldout_batches())
    # One class after another finds its own head, and the classifier puts SOS in front as training did.
    both = load(tmp_path / "model")
    served = ImageGPTForImageClassification.from_pretrained(tmp_path / "model")
    assert served.config.classify_with_sos
    assert served.config.id2label == dict(enumerate(data.class_names))
    seen = both.transformer(F.pad(tokens, (1, 0), value=6)[:, :-1]).last_hidden_state.mean(dim=1)
    assert torch.equal(served(tokens).logits, both.score(seen))
    assert float((served(tokens).logits.argmax(dim=1) == labels).double().mean()) == summary["accuracy"]
    drawing = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "model")
    assert mean_nats(drawing, data.heldout_batches()) == pytest.approx(summary["nats"], abs=1e-6)
    # And transformers' own, which has to be fed SOS.
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ImageGPTForImageClassification.from_pretrained(tmp_path / "model")
    logits = theirs(F.pad(tokens, (1, 0), value=6)[:, :-1]).logits
    torch.testing.assert_close(logits, served(tokens).logits, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="tuned with SOS in front, which theirs does not add; feed it 6"):
        hf.to_transformers(served)


def test_sos_at_serving() -> None:
    """A shorter image keeps all its pixels; embeddings and masks move with it; what cannot is refused."""
    model = start(head=ImageGPTForImageClassification, classify_with_sos=True)
    plain = ImageGPTForImageClassification(dataclasses.replace(model.config, classify_with_sos=False)).eval()
    plain.load_state_dict(model.state_dict())
    tokens = images().tokens[:2]
    for length in (1, 15, 16):
        own = tokens[:, :length]
        wanted = plain(F.pad(own, (1, 0), value=6)[:, :16]).logits
        assert torch.equal(model(own).logits, wanted)
        torch.testing.assert_close(model(inputs_embeds=model.transformer.wte(own)).logits, wanted)
        torch.testing.assert_close(model(own, attention_mask=torch.ones_like(own)).logits, wanted)
    assert not torch.equal(plain(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="17 positions exceed n_positions=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="position_ids are not supported where classify_with_sos"):
        model(tokens, position_ids=torch.arange(16))
    assert "classify_with_sos" not in plain.config.to_dict()


def test_the_joint_loss() -> None:
    """Of one pass, that of two; with no weight, of the classifier alone, whose drawing head stays."""
    data = images()
    tokens, labels = data.train_batch(range(8))
    both = ImageGPTWithBothHeads.of(start(), data.class_names).eval()
    with torch.no_grad():
        both.score.weight.normal_()
    hidden = both.transformer(F.pad(tokens, (1, 0), value=6)[:, :-1]).last_hidden_state
    alone = F.cross_entropy(both.score(hidden.mean(dim=1)), labels, reduction="none").detach()
    assert torch.equal(Classification(both, 0.0).losses(both, tokens, labels), alone)
    nats = image_nats(both, tokens).mean(dim=1).detach()
    torch.testing.assert_close(Classification(both, 0.5).losses(both, tokens, labels), alone + 0.5 * nats)
    figures = class_figures(both, [(tokens[:5], labels[:5]), (tokens[5:], labels[5:])])
    assert figures["nats"] == pytest.approx(float(nats.mean()), abs=1e-6)
    assert figures["class_loss"] == pytest.approx(float(alone.mean()), abs=1e-6)


@pytest.mark.parametrize(("gen_weight", "freeze_below"), [(0.0, 0), (1.0, 1), (0.0, 2)])
def test_what_stays_as_it_is(tmp_path: Path, gen_weight: float, freeze_below: int) -> None:
    model = start()
    config = dataclasses.replace(TINY, gen_weight=gen_weight, freeze_below=freeze_below, validation=0.0)
    summary = finetune(model, images(), tmp_path, config)
    tuned = load(tmp_path / "model").state_dict()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, tuned[name])}
    frozen = ["transformer.wte.", "transformer.wpe.", *(f"transformer.h.{i}." for i in range(freeze_below))]
    wanted = tuple(frozen[: 2 + freeze_below] if freeze_below else ()) + (() if gen_weight else ("lm_head.",))
    assert same == {name for name in tuned if name.startswith(wanted)}
    assert (summary["best_step"], summary["validation_accuracy"], summary["train_images"]) == (6, None, 36)


def test_resuming_and_the_best_step(tmp_path: Path) -> None:
    """Interrupted after step 4 and resumed, it is the run that was not; model/ is of the step that the log says."""
    data, model = images(), start()
    whole = finetune(model, data, tmp_path / "a", TINY)
    seen: list[int] = []

    def stop(record: dict) -> None:
        seen.append(record["step"])
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, tmp_path / "b", TINY, progress=stop)
    resumed = finetune(model, data, tmp_path / "b", TINY, resume=True, progress=stop)
    assert seen == [2, 4, 6]
    assert {**resumed, "model": whole["model"]} == whole
    assert finetune(model, data, tmp_path / "b", TINY, resume=True) == resumed
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    best = max(log, key=lambda record: (record["heldout_accuracy"], -record["heldout_class_loss"], -record["step"]))
    assert whole["best_step"] == best["step"]
    assert whole["validation_accuracy"] == best["heldout_accuracy"]
    part = Part(data, None, TINY.validation, 0)
    kept = class_figures(load(tmp_path / "b" / "model"), part.heldout_batches())
    assert kept["class_loss"] == pytest.approx(best["heldout_class_loss"], abs=1e-6)
    other = dataclasses.replace(TINY, gen_weight=0.5)
    with pytest.raises(ValueError, match=r"train\.pt: written by another run: gen_weight was 1\.0, is 0\.5"):
        finetune(model, data, tmp_path / "b", other, resume=True)
    with pytest.raises(ValueError, match="checksum of the model to start from was"):
        finetune(start(seed=1), data, tmp_path / "b", TINY, resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        finetune(model, data, tmp_path / "b", TINY)


def test_a_model_of_a_time_that_is_gone_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 6 with the state of step 4, and resumed where the same steps end up elsewhere, as on another
    device: model/ is still of step 6 as it was, and so are the figures that are reported of it.
    """
    data, model, ends = images(), start(), iter([0.5, 0.4, 1.0, 0.1])
    monkeypatch.setattr(
        Classification, "evaluate", lambda *_: {"heldout_accuracy": next(ends), "heldout_class_loss": 1.0}
    )

    def stop(record: dict) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, data, tmp_path, TINY, progress=stop)
    state = (tmp_path / "train.pt").read_bytes()
    first = finetune(model, data, tmp_path, TINY, resume=True)
    kept = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "train.pt").write_bytes(state)
    again = finetune(model, data, tmp_path, TINY, resume=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == kept
    assert (again["best_step"], again["validation_accuracy"]) == (6, 1.0)
    assert again == first
    (tmp_path / "best.json").write_text('{"step": 6, "heldout_accuracy": "1"}')
    with pytest.raises(ValueError, match=r"best\.json: .*heldout_accuracy"):
        finetune(model, data, tmp_path, TINY, resume=True)


def test_a_run_begins_afresh_with_no_best_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is killed while it writes the model has none, until it has written one."""
    data, ends = images(), iter([1.0, 1.0, 1.0, 0.5, 0.4, 0.3])
    monkeypatch.setattr(
        Classification, "evaluate", lambda *_: {"heldout_accuracy": next(ends), "heldout_class_loss": 1.0}
    )
    assert finetune(start(), data, tmp_path, TINY)["validation_accuracy"] == 1.0
    assert finetune(start(), data, tmp_path, TINY, overwrite=True)["validation_accuracy"] == 0.5
    monkeypatch.setattr(Classification, "evaluate", lambda *_: {"heldout_accuracy": 1.0, "heldout_class_loss": 1.0})

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("igpt_fast.learning.finetune.export", full)
    with pytest.raises(OSError, match="no space left"):
        finetune(start(), data, tmp_path, TINY, overwrite=True)
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("changed", ["lm_head.weight", "score.weight"])
def test_another_head_is_another_run(tmp_path: Path, changed: str) -> None:
    data = images()
    finetune(start(), data, tmp_path / "a", dataclasses.replace(TINY, steps=1))
    both = load(tmp_path / "a" / "model")
    finetune(both, data, tmp_path / "b", TINY)
    assert finetune(both, data, tmp_path / "b", TINY, resume=True)["steps"] == 6
    with torch.no_grad():
        both.get_parameter(changed)[0, 0] += 1
    with pytest.raises(ValueError, match="checksum of the model to start from was"):
        finetune(both, data, tmp_path / "b", TINY, resume=True)


def test_a_head_for_the_same_classes_is_kept(tmp_path: Path) -> None:
    data = images()
    finetune(start(), data, tmp_path, TINY)
    both = load(tmp_path / "model")
    assert torch.equal(ImageGPTWithBothHeads.of(both, data.class_names).score.weight, both.score.weight)
    assert not ImageGPTWithBothHeads.of(both, ["a", "b", "c"]).score.weight.any()
    fresh = random_weights(both, 0)
    assert not fresh.lm_head.weight.any()
    assert not torch.equal(fresh.transformer.wpe.weight, both.transformer.wpe.weight)


def test_the_choice_of_images() -> None:
    """Each class alike, validation apart, fewer shots among more, never a held-out image."""
    data = images(60)
    data.tokens[:, 0], data.tokens[:, 1] = torch.arange(60) // 6, torch.arange(60) % 6  # each its own
    few, many = Part(data, 4, 0.25, 0), Part(data, 8, 0.25, 0)
    sets = []
    for part, shots in ((few, 4), (many, 8)):
        train, labels = part.train_batch(range(part.n_train))
        held = torch.cat([tokens for tokens, _ in part.heldout_batches(2)])
        assert labels is not None
        assert torch.bincount(labels).tolist() == [shots * 3 // 4] * 3
        assert (part.n_train, part.n_heldout) == (3 * shots * 3 // 4, 3 * shots // 4)
        sets.append({tuple(row[:2]) for row in torch.cat([train, held]).tolist()})
        assert len(sets[-1]) == 3 * shots
    assert sets[0] < sets[1]
    assert not sets[1] & {tuple(row[:2]) for row in data.heldout_tokens.tolist()}
    assert few.fingerprint() != many.fingerprint() != Part(data, 8, 0.25, 1).fingerprint()
    with pytest.raises(ValueError, match="class 'kind 0' has 15 images to train on; shots wants 16"):
        Part(data, 16, 0.0, 0)


def test_wrong_inputs(tmp_path: Path) -> None:
    data = images()
    one = dataclasses.replace(data, labels=torch.zeros(48, dtype=torch.int64), class_names=["a"])
    for wrong, reason in (
        (one, "the images have 1 class; want 2"),
        (dataclasses.replace(data, labels=None, class_names=()), "the images have no classes; want 2"),
        (
            dataclasses.replace(data, clusters=np.zeros((7, 3), np.float32), tokenizer=None),
            "have 7 colours, the model 6",
        ),
        (dataclasses.replace(data, tokens=data.tokens[:, :9], tokenizer=None), "have 3x3 = 9 pixels, the model 16"),
    ):
        with pytest.raises(ValueError, match=reason):
            finetune(start(), wrong, tmp_path / "out", TINY)
    with pytest.raises(ValueError, match="gen_weight: the model is bidirectional"):
        finetune(start(bidirectional=True), data, tmp_path / "out", TINY)
    with pytest.raises(ValueError, match=r"freeze_below is 3; want 0\.\.2"):
        finetune(start(), data, tmp_path / "out", dataclasses.replace(TINY, freeze_below=3))
    for field, value in (("gen_weight", -1), ("validation", 1.0), ("shots", 0), ("freeze_below", -1), ("lr", 0)):
        with pytest.raises(ValueError, match=f"^{field} is"):
            dataclasses.replace(TINY, **{field: value})
    assert not (tmp_path / "out").exists()


def test_a_bidirectional_model_classifies_alone(tmp_path: Path) -> None:
    """Of the whole image, without SOS."""
    data = images()
    summary = finetune(start(bidirectional=True), data, tmp_path, dataclasses.replace(TINY, gen_weight=0.0))
    served = ImageGPTForImageClassification.from_pretrained(tmp_path / "model")
    assert (served.config.classify_with_sos, summary["nats"], summary["nats_before"]) == (False, None, None)
    tokens, labels = next(data.heldout_batches())
    assert float((served(tokens).logits.argmax(dim=1) == labels).double().mean()) == summary["accuracy"]


def saved(folder: Path) -> str:
    """A model with its colours."""
    start().save_pretrained(folder)
    ImageGPTImageProcessor(clusters=COLOURS, size={"height": 4, "width": 4}).save_pretrained(folder)
    return str(folder)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = saved(tmp_path / "m"), str(tmp_path / "d.npz")
    save_tokens(images(), file)
    options = ["--steps", "2", "--batch-size", "4", "--shots", "8", "--no-flip", "--device", "cpu"]
    assert main(["finetune", model, file, "--out", str(tmp_path / "r"), "--json", *options]) == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["classes"], summary["train_images"], summary["validation_images"]) == (3, 24, 0)
    assert [json.loads(line)["step"] for line in told.err.splitlines()] == [1, 2]
    # Pictures of the model's own colours; a class is a folder.
    for i, token in enumerate([0, 1] * 6):
        shade = np.rint((COLOURS[token] + 1) * 127.5).astype(np.uint8)
        (tmp_path / "p" / f"c{token}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.broadcast_to(shade, (8, 6, 3)).copy()).save(tmp_path / "p" / f"c{token}" / f"{i}.png")
    where = ["--out", str(tmp_path / "r2")]
    assert main(["finetune", model, str(tmp_path / "p"), *where, "--holdout", "0", *options[:4], "--scratch"]) == 0
    assert "2 classes, 12 images, step 2 of 2; no images are held out" in capsys.readouterr().out
    assert main(["finetune", model, str(tmp_path / "p"), *where, "--holdout", "0", *options[:4]]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_wrong_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file, out = saved(tmp_path / "m"), tmp_path / "d.npz", ["--out", str(tmp_path / "r")]
    save_tokens(
        dataclasses.replace(images(), clusters=COLOURS + np.float32(0.25) * (COLOURS < 0), tokenizer=None), file
    )
    with np.load(file) as arrays:
        kept = dict(arrays)
    np.savez(tmp_path / "labels.npz", **{**kept, "labels": np.full(48, 3), "clusters": COLOURS})
    np.savez(tmp_path / "none.npz", **{name: value for name, value in kept.items() if "label" not in name})
    empty = {**kept, "clusters": COLOURS, "class_names": np.array([*kept["class_names"], "nobody"])}
    np.savez(tmp_path / "empty.npz", **empty)
    for given, code, reason in (
        ([str(tmp_path / "x")], 1, "no such file or directory"),
        ([str(file)], 1, "d.npz: its colours are not those of"),
        ([str(tmp_path / "labels.npz")], 1, "labels.npz: not a token file: label 3 is not in 0..2"),
        ([str(tmp_path / "none.npz")], 1, "none.npz: not a token file: has no array 'labels'"),
        ([str(tmp_path / "empty.npz")], 1, "class 'nobody' has no image to train on"),
        ([str(file), "--holdout", "0.5"], 2, "--holdout, --skip-unreadable: only for a directory"),
        ([str(file), "--shots", "0"], 2, "--shots is 0"),
        ([str(file), "--freeze-below", "99"], 2, "--freeze-below is 99; want 0..2"),
        ([str(file), "--resume", "--force"], 2, "give one of them"),
        ([str(file), "--resume"], 1, "d.npz: its colours"),
    ):
        assert main(["finetune", model, *given, *out]) == code, given
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_train_goes_on_from_a_model(tmp_path: Path) -> None:
    """As it was, and made to fit other colours, sizes and classes; the run is another's after another start."""
    data, old = images(), torch.from_numpy(COLOURS)
    config = TrainConfig(
        n_layer=2, n_embd=32, n_head=2, steps=1, batch_size=4, lr=1e-9, dropout=0.0, flip=False, shift=0
    )
    plain = dataclasses.replace(data, labels=None, class_names=())
    same = adapted(start(), old, (4, 4), plain, old)
    trained = train(plain, tmp_path / "a", config, objective=Continued(start=same))
    torch.testing.assert_close(trained.state_dict(), start().state_dict(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="checksum of the model to start from was"):
        train(plain, tmp_path / "a", config, objective=Continued(start=start(seed=1)), resume=True)
    # With classes, an image of any is what it was; of a class, too, before it is learned.
    classed = adapted(start(), old, (4, 4), data, old)
    assert (classed.config.n_classes, classed.config.vocab_size) == (3, 10)
    tokens, labels = data.train_batch(range(5))
    wanted = image_nats(start(), tokens)
    torch.testing.assert_close(image_nats(classed, tokens), wanted)
    torch.testing.assert_close(image_nats(classed, tokens, labels), wanted)
    assert train(data, tmp_path / "b", config, objective=Continued(start=classed)).config.n_classes == 3
    # Two colours for one: the rows of the nearest.
    new = torch.cat([old, old[2:3] + 0.01])
    finer = adapted(start(), old, (4, 4), dataclasses.replace(plain, clusters=new.numpy(), tokenizer=None), new)
    assert torch.equal(finer.transformer.wte.weight[6], start().transformer.wte.weight[2])
    assert finer.config.n_colours == 7
    larger = dataclasses.replace(plain, tokens=plain.tokens.repeat(1, 4), tokenizer=None)
    assert adapted(start(), old, (4, 4), larger, old).config.n_positions == 64
    with pytest.raises(ValueError, match="the model has 6 colours, its processor 7"):
        adapted(start(), new, (4, 4), plain, old)
    with pytest.raises(ValueError, match="the model to start from has n_layer 2, and the run 3"):
        train(plain, tmp_path / "c", dataclasses.replace(config, n_layer=3), objective=Continued(start=start()))


def test_train_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file, out = saved(tmp_path / "m"), str(tmp_path / "d.npz"), ["--out", str(tmp_path / "r")]
    larger = dataclasses.replace(images(), tokens=images().tokens.repeat(1, 4), tokenizer=None)
    save_tokens(larger, file)
    options = ["--steps", "1", "--batch-size", "4", "--classes", "--device", "cpu", "--json", *out]
    assert main(["train", file, "--init", model, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    trained = ImageGPTForCausalImageModeling.from_pretrained(told["model"])
    assert (trained.config.n_embd, trained.config.n_positions, trained.config.n_classes) == (32, 64, 3)
    assert main(["train", file, "--init", model, *options, "--force", "--n-layer", "5"]) == 2
    assert "--n-layer is 5, but the model of --init has 2" in capsys.readouterr().err
    assert main(["train", file, "--init", model, *out, "--force", "--objective", "masked"]) == 2
    assert "--init: only with --objective next_pixel" in capsys.readouterr().err
