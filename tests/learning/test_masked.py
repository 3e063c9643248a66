"""Masked pixels as an objective: OpenAI's loss, masks that depend on nothing but what they should, a run of them."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import ids, small
from torch import Tensor

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTModel
from igpt_fast.cli.main import main
from igpt_fast.learning.data import TokenData, save_tokens
from igpt_fast.learning.extraction import extract
from igpt_fast.learning.features import ImageGPTFeatures
from igpt_fast.learning.objectives.masked import Masked, fixed_masks, vote
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.probe import probe
from igpt_fast.learning.run import run
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.stepping import inputs_at
from igpt_fast.learning.train import new_model, train
from igpt_fast.likelihood.masked import hide, masked_nats

TINY = TrainConfig(
    n_layer=1, n_embd=32, n_head=2, steps=12, batch_size=4, lr=1e-3, warmup_steps=3, eval_every=6, save_every=4
)


@pytest.fixture(scope="module")
def tiny() -> TokenData:
    tokens = torch.randint(0, 6, (30, 16), generator=torch.Generator().manual_seed(1))
    clusters = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
    return TokenData(tokens, clusters, torch.arange(30) % 5 == 0)


def bert(**fields: object) -> ImageGPTForCausalImageModeling:
    """In float64; the weights of its embeddings are random, but for the mask's."""
    model = small(torch.float64, bidirectional=True, **fields)
    with torch.no_grad():
        model.transformer.wte.weight[-1] = 0.0
    return model


def images(model: ImageGPTForCausalImageModeling, batch: int = 3, length: int = 12) -> Tensor:
    return ids(model, batch, length) % model.config.n_colours


def test_loss_is_that_of_openai() -> None:
    """Embeddings times what is kept, before the positions are added; of an image, then of the batch."""
    model = bert()
    tokens, mask = Masked(0.3).inputs(images(model), None, torch.Generator().manual_seed(5))
    assert mask.any(1).all()
    assert not mask.all(1).any()
    got = Masked(0.3).losses(model, tokens, mask).mean()
    want = 0.0
    for image, hidden in zip(tokens, mask, strict=True):
        embeddings = torch.stack(
            [model.transformer.wte.weight[x] * (not m) for x, m in zip(image, hidden, strict=True)]
        )
        chances = torch.softmax(model(inputs_embeds=embeddings[None]).logits[0], dim=-1).detach()
        nats = [-math.log(chances[t, image[t]]) for t in range(len(image)) if hidden[t]]
        want += sum(nats) / len(nats) / len(tokens)
    assert got.item() == pytest.approx(want, rel=1e-9)


def test_nothing_masked_is_no_loss_and_no_gradient() -> None:
    model = bert()
    tokens = images(model, 2)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, 3] = True
    losses = Masked().losses(model, tokens, mask)
    assert losses[0] == 0.0
    assert losses[1] > 0.0
    losses[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_gradients_reach_later_pixels(bidirectional: bool) -> None:
    model = small(torch.float64, bidirectional=bidirectional)
    embeddings = torch.randn(1, 12, 48, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=embeddings).logits[0, 4].logsumexp(-1).backward()
    reached = embeddings.grad.abs().sum(-1)[0] > 0  # type: ignore[union-attr]
    assert reached[:5].all()
    assert reached[5:].all() if bidirectional else not reached[5:].any()


def test_the_embedding_of_the_mask_stays_zero(tiny: TokenData, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, weight_decay=0.5, lr=0.1, warmup_steps=1)
    table = train(tiny, tmp_path, config, objective=Masked()).transformer.wte.weight
    assert not table[-1].any()
    assert table[:-1].any(1).all()
    model = ImageGPTModel(small(bidirectional=True).config)  # by whoever makes one: the twin of random weights
    assert not model.wte.weight[-1].any()
    assert not model.resize_token_embeddings(30).weight[-1].any()
    assert model.wte.padding_idx == 29
    assert small().transformer.wte.padding_idx is None


def test_narrow_networks_begin_wider(tiny: TokenData) -> None:
    model = new_model(tiny, TINY, Masked())
    assert model.config.initializer_range == 32**-0.5
    assert model.transformer.h[0].attn.c_attn.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert not model.lm_head.weight.any()
    wide = new_model(tiny, dataclasses.replace(TINY, n_embd=512), Masked())
    assert wide.config.initializer_range == 0.02


def test_masks_are_drawn_for_a_whole_step(tiny: TokenData) -> None:
    """And any split of a step among processes has the same losses."""
    objective, model = Masked(), new_model(tiny, TINY, Masked())
    torch.nn.init.normal_(model.lm_head.weight)
    tokens, mask = inputs_at(3, tiny, TINY, objective)
    assert torch.equal(mask, inputs_at(3, tiny, TINY, objective)[1])
    assert not torch.equal(mask, inputs_at(4, tiny, TINY, objective)[1])
    whole = objective.losses(model.eval(), tokens, mask)
    for world in (2, 3):
        for rank in range(world):
            part = objective.losses(model, tokens[rank::world], mask[rank::world])
            torch.testing.assert_close(part, whole[rank::world])


def test_rate() -> None:
    tokens = torch.randint(0, 6, (400, 100), generator=torch.Generator().manual_seed(2))
    drawn = Masked().inputs(tokens, None, torch.Generator().manual_seed(3))[1]
    for mask in (drawn, *fixed_masks(tokens, 2)):
        assert float(mask.float().mean()) == pytest.approx(0.15, abs=0.006)  # three standard deviations
        for dim in (0, 1):
            spread = mask.float().mean(dim).std() * mask.shape[dim] ** 0.5
            assert float(spread) == pytest.approx((0.15 * 0.85) ** 0.5, rel=0.3)


def test_fixed_masks_follow_the_image_alone() -> None:
    tokens = torch.randint(0, 6, (40, 25), generator=torch.Generator().manual_seed(2))
    masks = fixed_masks(tokens, 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:17]
    assert torch.equal(fixed_masks(tokens[order].to(torch.uint8), 5), masks[:, order])
    assert torch.equal(fixed_masks(tokens, 2), masks[:2])
    unlike = [masks[0], masks[1], fixed_masks(tokens, 1, seed=1)[0], fixed_masks((tokens + 1) % 6, 1)[0]]
    for i, one in enumerate(unlike):
        for other in unlike[:i]:
            assert 0.1 < float((one & other).sum() / one.sum()) < 0.2  # as independent ones do
    assert fixed_masks(tokens, 0).shape == (0, 40, 25)
    assert fixed_masks(tokens, 1, probability=1.0).all()
    with pytest.raises(ValueError, match="seed"):
        fixed_masks(tokens, 1, seed=-1)


def test_vote_is_the_mean_over_masks() -> None:
    model = bert()
    tokens = images(model)

    def read(fed: Tensor) -> Tensor:
        return model(fed).logits.mean(1)

    want = torch.stack(
        [read(tokens.masked_fill(mask, model.config.sos_token_id)) for mask in fixed_masks(tokens, 5, 7)]
    )
    torch.testing.assert_close(vote(read, model.config, tokens, seed=7), want.mean(0))
    assert torch.equal(vote(read, model.config, tokens, masks=0), read(tokens))
    with pytest.raises(ValueError, match="masks: the model's attention is causal"):
        vote(read, small().config, tokens)


@pytest.mark.parametrize("masks", [None, 1, 0])
def test_features_are_a_vote(masks: int | None) -> None:
    """Of as many masks as are asked for, five if nobody says; in batches of any size."""
    model = bert(n_positions=12)
    tokens = images(model, 7)
    got = extract(model, tokens, [1, 2], masks=masks, batch_size=3)
    seen = [hide(model.config, tokens, mask) for mask in fixed_masks(tokens, 5 if masks is None else masks)] or [tokens]
    for i, layer in enumerate((1, 2)):
        want = sum(model.forward_intermediates(fed, [layer - 1])[0] for fed in seen) / len(seen)
        torch.testing.assert_close(torch.from_numpy(got[:, i]), want.float().detach(), rtol=1e-5, atol=1e-6)
    features = ImageGPTFeatures(model, 2, masks=masks).fit_transform(tokens.numpy())
    np.testing.assert_allclose(features, got[:, 1], rtol=1e-5, atol=1e-6)


def test_masks_are_for_bidirectional_models() -> None:
    model = small(n_positions=12)
    tokens = ids(model, 8, 12) % 16
    assert np.array_equal(extract(model, tokens, masks=0), extract(model, tokens))
    for read in (
        lambda: extract(model, tokens, masks=5),
        lambda: ImageGPTFeatures(model, 2, masks=5).fit(tokens.numpy()),
        lambda: probe((tokens, [0, 1] * 4), (tokens, [0, 1] * 4), model, np.zeros((16, 3), np.float32), masks=5),
    ):
        with pytest.raises(ValueError, match="masks is 5, and the network is causal"):
            read()


def test_probe_votes() -> None:
    model = bert(n_positions=12).float()
    tokens = images(model, 40)
    labels = (tokens[:, 0] < 8).numpy().astype(np.int64)
    results = [
        probe(
            (tokens[:20], labels[:20]),
            (tokens[20:], labels[20:]),
            model,
            np.zeros((16, 3), np.float32),
            shots=[],
            masks=masks,
        )
        for masks in (None, 1)
    ]
    assert [result.masks for result in results] == [5, 1]
    assert "the mean over 5 masks of each image" in results[0].table()


def test_a_causal_model_has_no_masked_nats() -> None:
    with pytest.raises(ValueError, match="masked_nats: the model's attention is causal"):
        masked_nats(small(), torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="mask_probability"):
            Masked(wrong)


def test_it_learns_what_only_later_pixels_tell(tmp_path: Path) -> None:
    """The first two pixels of an image are the last two and one: a pixel is unknown where both are masked."""
    colours, probability = 4, 0.25
    later = torch.randint(0, colours, (2000, 2), generator=torch.Generator().manual_seed(0))
    clusters = np.zeros((colours, 3), np.float32)
    data = TokenData(torch.cat([(later + 1) % colours, later], 1), clusters, torch.arange(2000) >= 1600)
    config = dataclasses.replace(TINY, steps=200, batch_size=64, lr=1e-2, warmup_steps=20, flip=False, shift=0)
    config = dataclasses.replace(config, dropout=0.0, weight_decay=0.01, bf16=False, eval_every=200, save_every=200)
    model = train(data, tmp_path, config, objective=Masked(probability))
    got = Masked(probability).evaluate(model, data)["heldout_masked_nats"]
    mask = fixed_masks(data.heldout_tokens, 1, probability=probability)[0]
    unknown = (mask & mask.roll(2, 1)).sum() / mask.sum()
    assert got == pytest.approx(float(unknown) * math.log(colours), abs=0.06)
    assert got < 0.4 < 0.5 * math.log(colours)  # what a causal model has at best
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["heldout_masked_nats"] == got


def test_resume(tiny: TokenData, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny, whole, TINY, objective=Masked())
    train(tiny, parts, TINY, objective=Masked(), stop_after=5)
    with pytest.raises(ValueError, match=re.escape("objective was 'masked', is 'next_pixel'")):
        train(tiny, parts, TINY, resume=True)
    with pytest.raises(ValueError, match=r"mask_probability was 0\.15, is 0\.2"):
        train(tiny, parts, TINY, objective=Masked(0.2), resume=True)
    train(tiny, parts, TINY, objective=Masked(), resume=True)
    one, other = (torch.load(out / "train.pt", weights_only=True) for out in (whole, parts))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    losses = [[json.loads(line)["masked_nats"] for line in (out / "log.jsonl").open()] for out in (whole, parts)]
    assert losses[0] == losses[1]


def test_a_state_of_before_there_were_objectives(tiny: TokenData, tmp_path: Path) -> None:
    train(tiny, tmp_path, TINY, stop_after=5)
    state = torch.load(tmp_path / "train.pt", weights_only=True)
    assert state["identity"]["config"].pop("objective") == NextPixel.name
    torch.save(state, tmp_path / "train.pt")
    with pytest.raises(ValueError, match="objective was 'next_pixel', is 'masked'"):
        train(tiny, tmp_path, TINY, objective=Masked(), resume=True)
    train(tiny, tmp_path, TINY, resume=True)
    state["identity"]["config"]["objective"] = 5
    torch.save(state, tmp_path / "train.pt")
    with pytest.raises(ValueError, match="identity's objective is 5; want a name"):
        train(tiny, tmp_path, TINY, resume=True)


@pytest.mark.parametrize("bf16", [False, True])
def test_precisions(tiny: TokenData, tmp_path: Path, bf16: bool) -> None:
    config = dataclasses.replace(TINY, bf16=bf16, steps=6)
    model = train(tiny, tmp_path, config, objective=Masked())
    assert model.dtype == torch.float32
    losses = [json.loads(line)["masked_nats"] for line in (tmp_path / "log.jsonl").open()]
    assert all(1.0 < loss < 3.0 for loss in losses)


def test_nothing_to_evaluate(tiny: TokenData) -> None:
    model = new_model(tiny, TINY, Masked()).train()
    none = dataclasses.replace(tiny, heldout=torch.zeros(30, dtype=torch.bool))
    assert Masked().evaluate(model, none) == {}
    assert Masked(1e-12).evaluate(model, tiny) == {}
    assert model.training


@pytest.mark.parametrize("held", [True, False])
def test_run(tiny: TokenData, tmp_path: Path, held: bool) -> None:
    """A model that loads and knows what it is, and a picture of what it makes of images."""
    data = tiny if held else dataclasses.replace(tiny, heldout=torch.zeros(30, dtype=torch.bool))
    summary = run(data, tmp_path, TINY, objective=Masked())
    assert "heldout_nats" not in summary
    assert "lookup_table_nats" not in summary
    assert (summary["heldout_masked_nats"] is not None) == held
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "model")
    assert model.config.bidirectional
    if held:
        assert Masked().evaluate(model, data)["heldout_masked_nats"] == pytest.approx(summary["heldout_masked_nats"])
    shown = (data.heldout_tokens if held else data.train_tokens)[:16]
    mask = fixed_masks(shown, 1)[0].view(-1, 4, 4)
    rows = -(-len(shown) // 2)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (6 * 160 - 32, rows * 160 - 32)
        cells = np.array(picture)[16::32, 16::32]  # a pixel of the image each, and of the gaps
    assert (cells[:4, :4][mask[0]] == 224).all()
    assert (cells[:4, 5:9][~mask[0]] == cells[:4, 10:14][~mask[0]]).all()
    guesses = model(hide(model.config, shown.long(), mask.flatten(1))).logits.argmax(-1).view(-1, 4, 4)
    colour = np.rint(127.5 * (data.clusters[guesses[0]] + 1))
    assert (cells[:4, 5:9][mask[0]] == colour[mask[0]]).all()


def test_command(tiny: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokens(dataclasses.replace(tiny, labels=torch.arange(30) % 3), tmp_path / "data.npz")
    out = tmp_path / "out"
    how = ["train", str(tmp_path / "data.npz"), "--out", str(out), "--objective", "masked", "--device", "cpu"]
    how += ["--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--steps", "4", "--batch-size", "4"]
    assert main([*how, "--classes"]) == 2
    assert "--classes: a model of --objective masked cannot draw" in capsys.readouterr().err
    assert main([*how, "--label-dropout", "0.2"]) == 2
    assert main([*how, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["heldout_masked_nats"] > 0
    assert main([*how, "--resume"]) == 0
    assert "nats/masked pixel (histogram" in capsys.readouterr().out
    assert main([*(part for part in how if part not in ("--objective", "masked")), "--resume"]) == 1
    assert "objective was 'masked', is 'next_pixel'" in capsys.readouterr().err
    model = ["--model", str(out / "model"), "--device", "cpu", "--json"]
    for masks in (None, 0):
        file = tmp_path / f"{masks}.npz"
        more = [] if masks is None else ["--masks", str(masks)]
        assert main(["features", str(tmp_path / "data.npz"), "--out", str(file), *model, *more]) == 0
        assert json.loads(capsys.readouterr().out)["masks"] == (5 if masks is None else masks)
        assert main(["probe", str(tmp_path / "data.npz"), "--shots", "none", *model, *more]) == 0
        assert json.loads(capsys.readouterr().out)["masks"] == (5 if masks is None else masks)
    one, other = (np.load(tmp_path / f"{masks}.npz") for masks in (None, 0))
    assert '"masks": 5' in str(one["about"])
    assert not np.allclose(one["layer_1"], other["layer_1"])
    assert main(["features", str(tmp_path / "data.npz"), "--out", str(tmp_path / "x.npz"), "--masks", "5"]) == 2
    assert "masks is 5, and the network is causal" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "data.npz"), "--model", str(out / "model"), "--device", "cpu"]) == 1
    assert "the model's attention is bidirectional (a BERT): it predicts masked pixels" in capsys.readouterr().err
    assert main(["sample", "--model", str(out / "model"), "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 1
    assert "the model's attention is bidirectional (a BERT): it predicts masked pixels" in capsys.readouterr().err
