"""Inpainting: masks and rows, clamped pixels, candidates by the likelihood of what follows, and pictures of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_pipeline

from igpt_fast import Pipeline
from igpt_fast.files import BUNDLED
from igpt_fast.learning.data import load_tokens
from igpt_fast.sampling.inpainting import following, given_pixels, primer_lengths, resample


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline(6, 5, 9)


def pictures(pipeline: Pipeline, n: int, seed: int = 0) -> tuple[list[Image.Image], torch.Tensor]:
    """Images in the model's colours, and their tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        0, len(pipeline.processor.clusters), (n, pipeline.model.config.n_positions), generator=generator
    )
    return pipeline.processor.decode(tokens), tokens


def checkered(height: int, width: int) -> np.ndarray:
    return np.indices((height, width)).sum(0) % 3 == 1


# ---- What is given ------------------------------------------------------------------------------------------


def test_rows_and_fractions() -> None:
    for keep, rows in ((0.5, 3), (2, 2), (0, 0), (0.0, 0), (5, 5), (1, 1)):
        given = given_pixels(keep, 2, 6, 5)
        assert given.shape == (2, 30)
        assert torch.equal(given, (torch.arange(30) < 5 * rows).expand(2, -1))
        assert primer_lengths(given).tolist() == [5 * rows] * 2
        assert not following(given).any()


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_masks(kind) -> None:
    mask = np.zeros((2, 6, 5), dtype=bool)
    mask[0, :2], mask[0, 2, :3], mask[0, 4, 1] = True, True, True
    given = given_pixels(kind(mask), 2, 6, 5)
    assert torch.equal(given, torch.from_numpy(mask.reshape(2, 30)))
    assert primer_lengths(given).tolist() == [13, 0]
    assert following(given).nonzero().tolist() == [[0, 21]]
    assert torch.equal(given_pixels(kind(mask[1]), 3, 6, 5), torch.zeros(3, 30, dtype=torch.bool))


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (6, ValueError, "keep is 6; want .* rows below 6"),
        (-1, ValueError, "keep is -1"),
        (1.0, ValueError, "keep is 1.0"),
        (np.zeros((6, 5)), TypeError, "float64; want a mask of bool"),
        (np.zeros((5, 6), bool), ValueError, r"shape \(5, 6\); want \(6, 5\) or \(2, 6, 5\)"),
        (np.zeros((3, 6, 5), bool), ValueError, r"shape \(3, 6, 5\)"),
        (np.ones((6, 5), bool), ValueError, "gives every pixel"),
        (np.stack([np.ones((6, 5), bool), np.zeros((6, 5), bool)]), ValueError, "gives every pixel"),
    ],
)
def test_wrong_keep(pipeline: Pipeline, keep: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline.complete(pictures(pipeline, 2)[0], keep=keep)


# ---- What is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_known_pixels_are_clamped_and_scored(pipeline: Pipeline, batch_size: int | None) -> None:
    images, tokens = pictures(pipeline, 3)
    masks = np.stack([checkered(6, 5), np.roll(checkered(6, 5), 1), np.zeros((6, 5), bool)])
    masks[:, 0] = True
    masks[1, 1:] = True
    masks[1, 3, 2] = False
    result = pipeline.complete(images, keep=masks, n=2, seed=3, batch_size=batch_size)
    known = torch.from_numpy(masks.reshape(3, 30)).repeat_interleave(2, dim=0)
    originals = tokens.repeat_interleave(2, dim=0)
    assert torch.equal(result.tokens[known], originals[known])
    assert result.given == 5
    assert torch.equal(result.known, known[::2])
    with torch.no_grad():
        context = torch.nn.functional.pad(result.tokens[:, :-1], (1, 0), value=9)
        exact = torch.log_softmax(pipeline.model(context).logits, -1).gather(2, result.tokens[..., None])[..., 0]
    assert torch.equal(result.logprobs.isnan(), known)
    torch.testing.assert_close(result.logprobs[~known].double(), exact[~known], rtol=1e-5, atol=1e-5)
    follows = following(known)
    assert torch.equal(~result.known_logprobs.isnan(), follows)
    torch.testing.assert_close(result.known_logprobs[follows].double(), exact[follows], rtol=1e-5, atol=1e-5)
    assert follows.any(dim=1).tolist() == [True] * 4 + [False] * 2
    assert not torch.equal(result.tokens[0], result.tokens[1])


def test_a_mask_of_the_upper_rows_is_rows(pipeline: Pipeline) -> None:
    images, _ = pictures(pipeline, 2)
    mask = np.zeros((6, 5), dtype=bool)
    mask[:4] = True
    want = pipeline.complete(images, keep=4, n=3, seed=1)
    assert torch.equal(pipeline.complete(images, keep=mask, n=3, seed=1).tokens, want.tokens)
    assert torch.equal(pipeline.complete(images, keep=4 / 6, n=3, seed=1).tokens, want.tokens)


def test_inputs_have_streams_of_their_own(pipeline: Pipeline) -> None:
    """The parts of a run that is split by inputs are those of the whole."""
    images, _ = pictures(pipeline, 4)
    options = {"keep": checkered(6, 5), "n": 2, "seed": 1, "candidates": 3}
    whole = pipeline.complete(images, **options)
    assert torch.equal(pipeline.complete(images[:1], **options).tokens, whole.tokens[:2])
    assert torch.equal(pipeline.complete(images[1:], first_input=1, **options).tokens, whole.tokens[2:])
    for first in (-1, 1 << 31, True, 0.5):
        with pytest.raises(ValueError, match="first_input is"):
            pipeline.complete(images, first_input=first)


# ---- Candidates ---------------------------------------------------------------------------------------------


def test_resample_takes_by_weight() -> None:
    n = 4000
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    logweights = (weights.log() - 5000.0).expand(n, -1)
    taken, sizes = resample(logweights, (torch.arange(n) + 0.5) / n)
    assert torch.bincount(taken, minlength=4).tolist() == [n // 8, 0, 3 * n // 8, n // 2]
    torch.testing.assert_close(sizes, torch.full((n,), 64 / 26))
    taken, sizes = resample(torch.zeros(2, 7, dtype=torch.float64), torch.tensor([0.0, 0.999]))
    assert taken.tolist() == [0, 6]
    torch.testing.assert_close(sizes, torch.full((2,), 7.0))


@pytest.mark.parametrize("batch_size", [None, 1, 5, 7])
def test_one_candidate_is_taken_by_the_documented_rule(pipeline: Pipeline, batch_size: int | None) -> None:
    """Candidate c of completion j of input i draws from stream (i, j, c); number T of stream (i, j) chooses."""
    from igpt_fast import reference
    from igpt_fast.draws import Sampling
    from igpt_fast.sampling.decoding import decode

    images, tokens = pictures(pipeline, 2)
    mask, m, n, seed, batch = torch.from_numpy(checkered(6, 5)).flatten(), 4, 3, 11, 2 * 3 * 4
    mask[0] = True
    result = pipeline.complete(
        images, keep=mask.view(6, 5), n=n, seed=seed, candidates=m, batch_size=batch_size, temperature=1.3
    )
    first = int(primer_lengths(mask[None]))
    i, j, c = torch.meshgrid(torch.arange(2), torch.arange(n), torch.arange(m), indexing="ij")
    streams = ((i + 1) << 32) + (c << 24) + j
    uniforms = reference.uniform(seed, streams.flatten(), first, 30 - first)
    context = torch.nn.functional.pad(tokens[:, :first], (1, 0), value=9)
    known = tokens[:, first:].masked_fill(~mask[first:], -1).repeat_interleave(n * m, dim=0)
    drawn = decode(pipeline.model, context, uniforms, Sampling(1.3), known=known)
    weights = drawn.logprobs.double()[:, mask[first:]].sum(1).view(2 * n, m)
    numbers = reference.uniform(seed, streams[..., 0].flatten(), 30, 1)[:, 0]
    probabilities = torch.softmax(weights, 1)
    taken = (probabilities.cumsum(1) <= numbers[:, None]).sum(1)
    expected = drawn.tokens.view(2 * n, m, -1)[torch.arange(2 * n), taken]
    assert torch.equal(result.tokens[:, first:], expected)
    torch.testing.assert_close(result.effective_sample_size, 1 / probabilities.square().sum(1).float())
    assert result.settings["candidates"] == m
    assert batch == len(drawn.tokens)


def test_candidates_approach_the_conditional_distribution() -> None:
    """Of an image so small that p(unknown | known) can be listed: pixels 0, 1 and 3 drawn, 2 and 4 given."""
    pipeline = small_pipeline(1, 5, 3, seed=1, spread=0.5)
    model, known = pipeline.model, {2: 1, 4: 2}
    whole = torch.tensor([t for t in itertools.product(range(3), repeat=5) if all(t[i] == k for i, k in known.items())])
    with torch.no_grad():
        context = torch.nn.functional.pad(whole[:, :-1], (1, 0), value=3)
        likelihood = torch.log_softmax(model(context).logits, -1).gather(2, whole[..., None]).sum((1, 2)).exp()
    exact = likelihood / likelihood.sum()
    image = pipeline.processor.decode(whole[:1])[0]
    mask = np.array([[False, False, True, False, True]])

    def distance(candidates: int, n: int = 1500) -> float:
        result = pipeline.complete(image, keep=mask, n=n, candidates=candidates, seed=5, batch_size=4096)
        places = (result.tokens[:, None] == whole).all(-1).float().argmax(1)
        counts = torch.bincount(places, minlength=len(whole)) / n
        return float((counts - exact).abs().sum() / 2)

    alone, many = distance(1), distance(24)
    assert alone > 0.25, "clamping would do"
    assert many < 0.08  # of 1500 exact draws: 0.05


def test_candidates_are_better_on_held_out_emoji() -> None:
    """The left half of pictures that the model has not seen, from the right: nearer to the truth with candidates."""
    data = load_tokens(BUNDLED.parent / "emoji16.npz")
    pipeline = Pipeline.from_pretrained(device="cpu")
    originals = data.tokens[data.heldout][::20][:6].long()
    images = pipeline.processor.decode(originals)
    mask = np.zeros((16, 16), dtype=bool)
    mask[:, 8:] = True
    unknown = torch.from_numpy(~mask).flatten()
    fits, right = [], []
    for candidates in (1, 8):
        result = pipeline.complete(images, keep=mask, n=1, candidates=candidates, seed=0)
        assert torch.equal(result.tokens[:, ~unknown], originals[:, ~unknown])
        fits.append(float(result.known_logprobs.nansum() / len(images)))
        right.append(float((result.tokens == originals)[:, unknown].float().mean()))
    assert fits[1] > fits[0] + 5.0  # nats an image
    assert right[1] > right[0] + 0.02
    assert 1.0 <= float(result.effective_sample_size.min()) <= float(result.effective_sample_size.max()) <= 8.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates is 0; want an integer in 1..256"),
        ({"candidates": 257}, "candidates is 257"),
        ({"candidates": 2, "keep": 0.5}, "no given pixel follows"),
        ({"candidates": 2, "keep": checkered(6, 5), "temperature": 0.0}, "temperature 0"),
    ],
)
def test_wrong_candidates(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.complete(pictures(pipeline, 1)[0], **options)


# ---- Pictures -----------------------------------------------------------------------------------------------


def test_grid_and_animation_show_what_was_given(pipeline: Pipeline, tmp_path: Path) -> None:
    images, _ = pictures(pipeline, 2)
    mask = checkered(6, 5)
    result = pipeline.complete(images, keep=mask, n=2, seed=0)
    grid = np.asarray(result.grid(scale=1).convert("RGB"))
    original = np.asarray(images[0])
    shown = grid[:6, 6 : 6 + 5]  # the second cell of the first row, behind a gap of one pixel
    assert np.array_equal(shown[mask], original[mask])
    assert (shown[~mask] == 224).all()
    result.save_gif(tmp_path / "draw.gif", scale=1)
    with Image.open(tmp_path / "draw.gif") as animation:
        assert animation.n_frames == 7
        animation.seek(2)
        frame = np.asarray(animation.convert("RGB"))[:6, 12 : 12 + 5]
    completed = np.asarray(result.images[0])
    assert np.array_equal(frame[:2], completed[:2])
    assert np.array_equal(frame[mask], completed[mask])
    assert (frame[2:][~mask[2:]] == 224).all()
