"""Pipeline.score: pictures to scores; batches, memory, Ctrl-C, and models that are broken."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_pipeline

from igpt_fast import Pipeline, Scores
from igpt_fast.likelihood import scoring
from igpt_fast.likelihood.nats import evaluating, image_nats, mean_nats
from igpt_fast.likelihood.scores import InterruptedScoring, model_hash
from igpt_fast.likelihood.transfer import one_ahead
from igpt_fast.sampling.results import NotFiniteError

HEIGHT, WIDTH, COLOURS = 4, 5, 16


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline(HEIGHT, WIDTH, COLOURS, classes=2)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(COLOURS, (7, HEIGHT * WIDTH), generator=torch.Generator().manual_seed(2))


def picture(seed: int, width: int = 30, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 100])
def test_every_image_counts_however_they_are_batched(
    pipeline: Pipeline, tokens: torch.Tensor, batch_size: int | None
) -> None:
    seen: list[tuple[int, int]] = []
    labels = [0, 1, 0, 1, 0, 1, 1]
    found = pipeline.score_tokens(tokens, labels, batch_size, lambda *done: seen.append(done))
    with torch.no_grad():
        want = torch.cat(
            [image_nats(pipeline.model, row[None], torch.tensor([c])) for row, c in zip(tokens, labels, strict=True)]
        )
    torch.testing.assert_close(found.nats, want.float())
    assert not found.nats.is_inference()
    assert torch.equal(found.tokens, tokens)
    assert found.labels is not None
    assert found.labels.tolist() == labels
    size = min(batch_size or 64, 7)
    assert seen == [(min(stop, 7), 7) for stop in range(size, 7 + size, size)]


def test_pictures_are_cut_out_as_for_completion(pipeline: Pipeline, tmp_path: Path) -> None:
    pictures = [picture(0), picture(1, 50, 11), picture(2, 9, 40)]
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    found, again = pipeline.score(pictures), pipeline.score([str(path) for path in paths])
    originals = pipeline.complete(pictures, keep=0.5, n=1, seed=0).originals
    assert originals is not None
    assert torch.equal(found.tokens, originals)
    assert torch.equal(found.nats, again.nats)
    assert found.names == ["0", "1", "2"]
    assert again.names == [str(path) for path in paths]
    single = pipeline.score(pictures[1])
    torch.testing.assert_close(single.nats[0], found.nats[1])
    assert not torch.allclose(pipeline.score(pictures, labels=1).nats, found.nats)


def test_what_is_no_image_and_no_label(pipeline: Pipeline, tokens: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        pipeline.score([picture(0), tmp_path / "text.png"])
    with pytest.raises(FileNotFoundError):
        pipeline.score(tmp_path / "none.png")
    with pytest.raises(ValueError, match="images is empty"):
        pipeline.score([])
    with pytest.raises(TypeError):
        pipeline.score([3.5])
    with pytest.raises(ValueError, match=r"label 2 is not in 0\.\.1"):
        pipeline.score(picture(0), labels=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipeline.score_tokens(tokens, batch_size=0)
    with pytest.raises(ValueError, match=r"token 16 is not in 0\.\.15"):
        pipeline.score_tokens(tokens + 1)
    with pytest.raises(ValueError, match=r"tokens must be \(N, 20\) integers"):
        pipeline.score_tokens(tokens[:, :5])
    with pytest.raises(ValueError, match="1 names for 7 images"):
        pipeline.score_tokens(tokens, names=["a"])
    with pytest.raises(TypeError, match="tokens must be a tensor, got ndarray"):
        pipeline.score_tokens(tokens.numpy())
    with pytest.raises(ValueError, match=r"integers, got \(7, 20\) torch.bool"):
        pipeline.score_tokens(tokens > 3)
    assert torch.equal(pipeline.score_tokens(tokens.to(torch.uint16)).nats, pipeline.score_tokens(tokens).nats)


@pytest.mark.parametrize("wrong", [{"labels": 2}, {"labels": [0, 1]}, {"batch_size": 0}, {"names": ["a", "b"]}])
def test_what_stands_beside_the_images_is_checked_before_they_are_read(
    pipeline: Pipeline, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("igpt_fast.pipeline.read_images", lambda *_: pytest.fail("images are read"))
    with pytest.raises(ValueError, match=r"label|batch_size|names"):
        pipeline.score([picture(0)], **wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_default(pipeline: Pipeline, tokens: torch.Tensor, dtype: torch.dtype) -> None:
    want = pipeline.score_tokens(tokens).nats
    torch.set_default_dtype(dtype)
    try:
        found, none = pipeline.score_tokens(tokens).nats, scoring.nothing(pipeline.model, pipeline.processor).nats
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == none.dtype == torch.float32
    assert torch.equal(found, want)


def test_logits_that_are_not_finite_are_an_error(tokens: torch.Tensor) -> None:
    broken = small_pipeline(HEIGHT, WIDTH, COLOURS)
    tokens = tokens.clamp(max=COLOURS - 2)
    tokens[4, 7] = COLOURS - 1  # the colour that brings NaN
    with torch.no_grad():
        broken.model.transformer.wte.weight[COLOURS - 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"the logits are not finite \(4, pixel \d\)") as caught:
        broken.score_tokens(tokens, batch_size=2)
    assert isinstance(caught.value.partial, Scores)
    assert len(caught.value.partial) == 4
    with pytest.raises(NotFiniteError) as caught:
        broken.score_tokens(tokens, batch_size=5)
    assert caught.value.partial is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("computing", [False, True])
def test_ctrl_c_keeps_what_is_finished(
    pipeline: Pipeline, tokens: torch.Tensor, ahead: bool, computing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a GPU has begun: where there is one, it is a batch ahead."""
    whole = pipeline.score_tokens(tokens)

    def stop(done: int, _: int) -> None:
        if done == 4 and not computing:
            raise KeyboardInterrupt

    def interrupted(model: Any, some: torch.Tensor, labels: Any = None) -> torch.Tensor:
        if computing and torch.equal(some, tokens[4:6]):
            raise KeyboardInterrupt
        return image_nats(model, some, labels)

    monkeypatch.setattr(scoring, "image_nats", interrupted)
    if ahead:
        monkeypatch.setattr(scoring, "one_ahead", lambda items, _: one_ahead(items, torch.device("cuda")))
    with pytest.raises(InterruptedScoring) as caught:
        pipeline.score_tokens(tokens, batch_size=2, progress=stop)
    partial = caught.value.partial
    assert partial is not None
    count = 6 if ahead and not computing else 4
    torch.testing.assert_close(partial.nats, whole.nats[:count])
    assert partial.names == [str(i) for i in range(count)]


def test_where_memory_does_not_suffice_there_are_fewer_at_a_time(
    pipeline: Pipeline, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def little(model: Any, some: torch.Tensor, labels: Any = None) -> torch.Tensor:
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return image_nats(model, some, labels)

    whole = pipeline.score_tokens(tokens)
    monkeypatch.setattr(scoring, "image_nats", little)
    with pytest.warns(RuntimeWarning, match="out of memory with [73] images at a time; goes on with [31]") as warned:
        found = pipeline.score_tokens(tokens)
    assert len(warned) == 2
    torch.testing.assert_close(found.nats, whole.nats)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_the_model_is_put_back_as_it_was(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    """Each of its modules, also after an error."""
    model = pipeline.model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]

    def fails() -> Iterator[Any]:
        yield tokens, None
        raise RuntimeError("no more")

    try:
        assert torch.equal(pipeline.score_tokens(tokens).nats, pipeline.score_tokens(tokens).nats)
        assert [module.training for module in model.modules()] == modes
        with pytest.raises(RuntimeError, match="no more"):
            mean_nats(model, fails())
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_a_model_in_evaluation_mode_is_not_told_so_again(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(type(pipeline.model), "train", lambda model, mode=True: told.append(mode))
    with evaluating(pipeline.model):
        assert not told


def test_a_model_is_known_by_its_weights_whatever_their_dtype() -> None:
    one, other = small_pipeline(3, 3, 5, dtype=torch.float32), small_pipeline(3, 3, 5, seed=1, dtype=torch.float32)
    known = model_hash(one.model)
    assert known == model_hash(small_pipeline(3, 3, 5, dtype=torch.float32).model.bfloat16())
    assert known != model_hash(other.model)
    digest = hashlib.sha256()  # as files of scores have it
    for name, weight in sorted(one.model.bfloat16().state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode() + weight.flatten()[:256].float().numpy().tobytes())
    assert known == digest.hexdigest()[:12]


def test_batches_are_bounded_by_memory(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scoring.default_batch_size(pipeline.model) == 64
    monkeypatch.setattr(scoring, "BUDGET", 1)
    assert scoring.default_batch_size(pipeline.model) == 1


def test_pictures_are_read_lazily_in_groups(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in order, failures in place, and no more than a group is asked for at a time."""
    monkeypatch.setattr(scoring, "_READ_AT_ONCE", 2)
    ticks: list[int] = []
    found = scoring.read_images([picture(0), 7, picture(1)], pipeline.processor, ticks.append)
    assert [type(item).__name__ for item in found] == ["Tensor", "TypeError", "Tensor"]
    assert ticks == [2, 3]
