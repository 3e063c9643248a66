"""Pipeline: images of a small random model; seeds, batches, completions, files, interruption."""

import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_pipeline

from igpt_fast import ImageGPTImageProcessor, Pipeline
from igpt_fast.files import BUNDLED
from igpt_fast.sampling.results import Generation, InterruptedGeneration, save_tokens

SIDE, COLOURS = 8, 16


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline(SIDE, SIDE, COLOURS, spread=0.2)


def photograph(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_sample(pipeline: Pipeline) -> None:
    result = pipeline.sample(5, seed=3)
    assert result.tokens.shape == result.logprobs.shape == (5, SIDE * SIDE)
    assert result.tokens.dtype == torch.int64
    assert int(result.tokens.min()) >= 0
    assert int(result.tokens.max()) < COLOURS
    assert len(result.images) == len(result) == 5
    palette = np.rint(127.5 * (np.asarray(pipeline.processor.clusters) + 1)).astype(np.uint8)
    for tokens, image in zip(result.tokens, result.images, strict=True):
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image).reshape(-1, 3), palette[tokens.numpy()])


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_sixteen_images_are_the_same_however_they_are_batched(pipeline: Pipeline, batch_size: int) -> None:
    expected = pipeline.sample(16, seed=7, batch_size=8)
    result = pipeline.sample(16, seed=7, batch_size=batch_size)
    assert torch.equal(result.tokens, expected.tokens)
    torch.testing.assert_close(result.logprobs, expected.logprobs)
    assert torch.equal(pipeline.sample(4, seed=7).tokens, expected.tokens[:4])


def test_the_bundled_model_gives_the_same_images_however_they_are_batched() -> None:
    """In float32, on its first rows of pixels and through the whole of images of real use."""
    bundled = Pipeline.from_pretrained()
    expected = bundled.sample(6, seed=1, batch_size=6)
    assert torch.equal(bundled.sample(6, seed=1, batch_size=1).tokens, expected.tokens)
    assert torch.equal(bundled.sample(6, seed=1, batch_size=4).tokens, expected.tokens)


def test_a_seed_is_drawn_and_reported(pipeline: Pipeline) -> None:
    torch.manual_seed(0)
    first, second = pipeline.sample(1), pipeline.sample(1)
    assert first.seed != second.seed
    assert torch.equal(pipeline.sample(1, seed=first.seed).tokens, first.tokens)


def test_logprobs_sum_to_the_likelihood(pipeline: Pipeline) -> None:
    result = pipeline.sample(3, seed=1, temperature=0.5, top_k=7)
    context = torch.nn.functional.pad(result.tokens[:, :-1], (1, 0), value=COLOURS)
    with torch.no_grad():
        logits = pipeline.model(context).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), result.tokens.flatten(), reduction="none")
    torch.testing.assert_close(-result.logprobs.flatten().double(), nats, rtol=1e-5, atol=1e-5)


def test_complete(pipeline: Pipeline) -> None:
    images = [photograph(), photograph(30, 90, seed=1), np.asarray(photograph(8, 8, seed=2))]
    result = pipeline.complete(images, keep=0.5, n=2, seed=4)
    assert result.tokens.shape == (6, SIDE * SIDE)
    assert result.originals is not None
    half = SIDE * SIDE // 2
    assert result.given == half
    for i in range(3):
        for j in range(2):
            assert torch.equal(result.tokens[2 * i + j, :half], result.originals[i, :half])
    assert result.logprobs[:, :half].isnan().all()
    assert not result.logprobs[:, half:].isnan().any()
    assert not torch.equal(result.tokens[0], result.tokens[1])
    more = pipeline.complete(images, keep=0.5, n=5, seed=4, batch_size=4)
    assert torch.equal(more.tokens[5:7], result.tokens[2:4])  # a completion's stream does not depend on how many


def test_complete_takes_the_middle_in_the_models_aspect(pipeline: Pipeline) -> None:
    wide = np.zeros((40, 100, 3), dtype=np.uint8)
    wide[:, 30:70] = 255
    result = pipeline.complete(wide, n=1, seed=0)
    assert result.inputs is not None
    assert result.inputs[0].size == (40, 40)
    assert (np.asarray(result.inputs[0]) == 255).all()


@pytest.mark.parametrize(("keep", "rows"), [(0.0, 0), (0.1, 1), (0.5, 4), (0.9, 7)])
def test_keep_is_rounded_to_rows(pipeline: Pipeline, keep: float, rows: int) -> None:
    assert pipeline.complete(photograph(), keep=keep, n=1, seed=0).given == rows * SIDE


def test_files(pipeline: Pipeline, tmp_path: Path) -> None:
    result = pipeline.sample(5, seed=3)
    result.save_grid(tmp_path / "grid.png", columns=3, scale=2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] >= 3 * SIDE * 2
        colours = {tuple(pixel) for pixel in np.asarray(grid.convert("RGB")).reshape(-1, 3).tolist()}
    for image in result.images:
        assert {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()} <= colours
    result.save_gif(tmp_path / "draw.gif", scale=1)
    with Image.open(tmp_path / "draw.gif") as animation:
        assert animation.n_frames == SIDE + 1
    for save, name in ((partial(result.save_gif, scale=1), "draw.gif"), (partial(save_tokens, result), "draw.npz")):
        save(tmp_path / name)
        with io.BytesIO() as file:  # an open file gets the same
            save(file)
            assert file.getvalue() == (tmp_path / name).read_bytes()
    completion = pipeline.complete([photograph(), photograph(seed=1)], n=2, seed=0)
    completion.save_grid(tmp_path / "complete.png")
    completion.save_gif(tmp_path / "complete.gif")
    with Image.open(tmp_path / "complete.gif") as animation:
        assert animation.n_frames == SIDE // 2 + 1
    with pytest.raises(FileExistsError, match="exists"):
        result.save_grid(tmp_path / "grid.png", overwrite=False)
    with pytest.raises(ValueError, match="scale"):
        result.save_grid(tmp_path / "grid.png", scale=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("complete.gif", "complete.png", "draw.gif", "draw.npz", "grid.png")
    ]


def test_progress_counts_every_pixel(pipeline: Pipeline) -> None:
    calls: list[tuple[int, int]] = []
    pipeline.sample(5, seed=0, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5 * SIDE * SIDE, 5 * SIDE * SIDE)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_interruption_keeps_the_finished_batches(pipeline: Pipeline) -> None:
    def stop(done: int, total: int) -> None:
        if done > 3 * SIDE * SIDE:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedGeneration) as caught:
        pipeline.sample(5, seed=2, batch_size=2, progress=stop)
    partial = caught.value.partial
    assert partial is not None
    assert torch.equal(partial.tokens, pipeline.sample(2, seed=2).tokens)
    with pytest.raises(InterruptedGeneration) as caught:
        pipeline.sample(5, seed=2, progress=stop)
    assert caught.value.partial is None


def test_interruption_keeps_the_finished_completions(pipeline: Pipeline, tmp_path: Path) -> None:
    images, half = [photograph(seed=i) for i in range(3)], SIDE * SIDE // 2

    def interrupted(after: int, batch_size: int) -> Generation | None:
        def stop(done: int, total: int) -> None:
            if done > after * half:
                raise KeyboardInterrupt

        with pytest.raises(InterruptedGeneration) as caught:
            pipeline.complete(images, n=2, seed=2, batch_size=batch_size, progress=stop)
        return caught.value.partial

    partial = interrupted(3, batch_size=3)  # in the second batch; a batch has all completions of an image
    assert partial is not None
    expected = pipeline.complete(images[:1], n=2, seed=2)
    assert torch.equal(partial.tokens, expected.tokens)
    partial.save_grid(tmp_path / "partial.png")
    expected.save_grid(tmp_path / "expected.png")
    assert (tmp_path / "partial.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    partial = interrupted(3, batch_size=1)
    assert partial is not None
    assert (len(partial), partial.counts, partial.labels) == (3, [2, 1], None)
    assert torch.equal(partial.tokens, pipeline.complete(images[:2], n=2, seed=2, batch_size=1).tokens[:3])
    assert interrupted(1, batch_size=2) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"n": True}, "n is True"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 2.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_wrong_settings(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.sample(**options)
    with pytest.raises(ValueError, match=message):
        pipeline.complete(photograph(), **options)


@pytest.mark.parametrize("keep", [-0.1, 1.0, 0.99, float("nan"), "half", True])
def test_wrong_keep(pipeline: Pipeline, keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        pipeline.complete(photograph(), keep=keep)


def test_no_images(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="empty"):
        pipeline.complete([])
    with pytest.raises(TypeError):
        pipeline.complete([None])
    with pytest.raises(FileNotFoundError, match="missing"):
        pipeline.complete("missing.png")


def test_model_and_processor_must_fit(pipeline: Pipeline) -> None:
    clusters = pipeline.processor.clusters
    with pytest.raises(ValueError, match="colours"):
        Pipeline(pipeline.model, ImageGPTImageProcessor(clusters=clusters[:9], size={"height": SIDE, "width": SIDE}))
    with pytest.raises(ValueError, match="pixels"):
        Pipeline(pipeline.model, ImageGPTImageProcessor(clusters=clusters, size={"height": SIDE, "width": 9}))


@pytest.mark.parametrize("setting", [{"do_resize": False}, {"do_normalize": False}, {"do_color_quantize": False}])
def test_a_processor_that_cannot_serve_is_refused(pipeline: Pipeline, setting: dict[str, bool]) -> None:
    size = {"height": SIDE, "width": SIDE}
    with pytest.raises(ValueError, match="processor"):
        Pipeline(pipeline.model, ImageGPTImageProcessor(clusters=pipeline.processor.clusters, size=size, **setting))


@pytest.mark.filterwarnings("ignore:.*newly initialised")
def test_a_checkpoint_without_a_head_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.model.transformer.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head"):
        Pipeline.from_pretrained(tmp_path)


def test_completions_have_streams_of_their_own(pipeline: Pipeline) -> None:
    """With nothing kept they are samples, but not those of the same seed."""
    completed = pipeline.complete(photograph(), keep=0.0, n=3, seed=5)
    assert not torch.equal(completed.tokens, pipeline.sample(3, seed=5).tokens)


def test_files_are_opened(pipeline: Pipeline, tmp_path: Path) -> None:
    photograph().save(tmp_path / "photo.png")
    expected = pipeline.complete(photograph(), n=1, seed=0)
    assert torch.equal(pipeline.complete(tmp_path / "photo.png", n=1, seed=0).tokens, expected.tokens)
    assert torch.equal(pipeline.complete([str(tmp_path / "photo.png")], n=1, seed=0).tokens, expected.tokens)
    with pytest.raises(ValueError, match="columns"):
        expected.grid(columns=3)


def test_from_pretrained_reads_what_was_saved(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, device="cpu", dtype="auto")
    assert torch.equal(loaded.sample(2, seed=1).tokens, pipeline.sample(2, seed=1).tokens)
    assert Pipeline.from_pretrained(tmp_path, device="cpu").model.dtype == torch.float32


def test_the_bundled_model_is_small_and_knows_its_data() -> None:
    """Real input, offline: the likelihood of the held-out emoji is what the model card says."""
    from igpt_fast.learning.data import load_tokens
    from igpt_fast.learning.evaluate import evaluate

    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 8 << 20
    bundled = Pipeline.from_pretrained()
    data = load_tokens(BUNDLED.parent / "emoji16.npz")
    assert np.array_equal(np.asarray(bundled.processor.clusters), data.clusters)
    assert evaluate(bundled.model, data.tokens[data.heldout][::4]) < 1.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_drawn_does_not_hang_on_the_default_dtype(dtype: torch.dtype) -> None:
    pipeline = small_pipeline(3, 4, 9, dtype=torch.float32)
    image, sos = Image.new("RGB", (4, 3), "red"), torch.full((2, 1), 9)

    def drawn() -> list[torch.Tensor]:
        whole, part = pipeline.sample(2, seed=0), pipeline.complete(image, n=1, seed=0)
        tokens = pipeline.model.generate(sos, do_sample=True, generator=torch.Generator().manual_seed(0))
        return [whole.tokens, whole.logprobs, part.logprobs, tokens]

    want = drawn()
    torch.set_default_dtype(dtype)
    try:
        got = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_what_a_notebook_shows(pipeline: Pipeline) -> None:
    size = f"{SIDE}x{SIDE}"
    network = r"\d\.\d\d M parameters, float64 on cpu"
    assert re.fullmatch(rf"Pipeline\({size} pixels of {COLOURS} colours; {network}\)", repr(pipeline))
    result = pipeline.sample(3, seed=7)
    drawn = r"\d\.\d{3} nats a drawn pixel, seed 7, engine \w+, dtype float64"
    assert re.fullmatch(rf"Generation\(3 images of {size}, {drawn}\)", repr(result))
    with Image.open(io.BytesIO(result._repr_png_() or b"")) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(result.grid()))
    completed = pipeline.complete(result.images[:2], n=1, seed=1)
    assert repr(completed).startswith(f"Generation(2 images of {size}, completions of 2, ")
    unknown = torch.full((20_000, SIDE * SIDE), torch.nan)
    many = Generation(result.tokens[:1].expand(20_000, -1), unknown, pipeline.processor, 7)
    assert many._repr_png_() is None
    assert repr(many) == f"Generation(20000 images of {size}, seed 7)"


@pytest.mark.parametrize("wrong", [("x", "y"), ("x", None), (None, "y")])
def test_names_are_for_from_pretrained(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"Pipeline\.from_pretrained\(.*\) loads both"):
        Pipeline(*wrong)
    with pytest.raises(TypeError, match=r"got str and str; Pipeline\.from_pretrained\('a/b'\)"):
        Pipeline("a/b", "c")  # type: ignore[arg-type]


def test_fit(pipeline: Pipeline) -> None:
    """All of a wide picture, with white around it, or squeezed."""
    wide = Image.fromarray(np.zeros((SIDE, 2 * SIDE, 3), np.uint8))
    kept = {"keep": SIDE - 1, "n": 1, "seed": 1}
    originals = {fit: pipeline.complete(wide, fit=fit, **kept).originals for fit in ("crop", "pad", "stretch")}
    assert torch.equal(originals["crop"], originals["stretch"])
    assert originals["crop"].unique().numel() == 1
    assert not torch.equal(originals["pad"], originals["crop"])
    assert torch.equal(originals["pad"][:, SIDE * SIDE // 2 + SIDE // 2], originals["crop"][:, 0])
    assert pipeline.complete(wide, fit="pad", **kept).settings["fit"] == "pad"
    with pytest.raises(ValueError, match="fit is 'squash'; want one of crop, pad, stretch"):
        pipeline.complete(wide, fit="squash")
