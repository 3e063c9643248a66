"""Exact speculation: the pictures of plain decoding, bit for bit, whatever is asked for; streams, errors."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small

from igpt_fast import ImageGPTForCausalImageModeling, backend
from igpt_fast.draws import Sampling
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.pipeline import InterruptedGeneration, NotFiniteError, Pipeline
from igpt_fast.sampling.decoding import Drawn, decode
from igpt_fast.sampling.rules import RandomStreams

no_native = pytest.mark.skipif(backend._C is None or backend._C.cpu_isa() == "generic", reason="no native decoder")
pytestmark = no_native


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu")


def settings(rng: random.Random) -> Sampling:
    return Sampling(
        rng.choice([0.0, 0.3, 0.8, 1.0, 1.0, 2.0]),
        rng.choice([None, None, 1, 3, 40]),
        rng.choice([None, None, 0.3, 0.9, 1.0]),
        rng.choice([None, None, 0.05, 0.5]),
    )


def drawn_both_ways(model: ImageGPTForCausalImageModeling, rng: random.Random) -> tuple[Drawn, Drawn]:
    config = model.config
    given = rng.randrange(config.n_positions // 2)
    count = rng.randint(1, config.n_positions - given)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    context = torch.randint(0, config.n_colours, (1, given + 1), generator=generator)
    context[0, 0] = config.sos_token_id
    uniforms: Any = torch.rand(1, count, generator=generator)
    if rng.random() < 0.5:
        uniforms = RandomStreams(rng.randrange(1 << 64), torch.tensor([rng.randrange(1 << 40)]), given, count)
    known = None
    if rng.random() < 0.5:
        known = torch.randint(0, config.n_colours, (1, count), generator=generator)
        known = known.masked_fill(torch.rand(1, count, generator=generator) < rng.random(), -1)
    options: dict[str, Any] = {"sampling": settings(rng), "dtype": rng.choice([None, "int8"]), "known": known}
    torch.set_num_threads(rng.choice([1, 1, 2, 3]))
    ahead = decode(model, context, uniforms, **options)
    assert ahead.steps > 0 or backend._C.cpu_isa() == "neon"  # in int8 too, but where no integers are multiplied
    return ahead, decode(model, context, uniforms, **options, speculate=False)


def test_random_settings(pytestconfig: pytest.Config, pipeline: Pipeline) -> None:
    """1,000 with --soak. Of small weights come flat pictures, of large ones noise; there emoji too."""
    rng = random.Random(7)
    models = [small(n_positions=64, n_embd=32, n_head=1, spread=spread) for spread in (0.02, 0.3)]
    models.append(small(n_positions=100, n_embd=48, n_classes=3))
    soak = pytestconfig.getoption("--soak")
    models += [pipeline.model] if soak else []
    steps = tokens = 0
    for i in range(1000 if soak else 30):
        ahead, plain = drawn_both_ways(models[i % len(models)], rng)
        assert torch.equal(ahead.tokens, plain.tokens), i
        assert torch.equal(ahead.logprobs, plain.logprobs), i
        assert plain.steps == 0
        steps, tokens = steps + ahead.steps, tokens + ahead.tokens.numel() * (ahead.steps > 0)
    assert tokens > 1.5 * steps > 0


def test_masks_and_candidates(pipeline: Pipeline) -> None:
    picture = pipeline.sample(1, seed=3).images[0]
    mask = np.random.default_rng(0).random((16, 16)) < 0.7
    mask[:10] = True
    for options in ({"keep": mask, "candidates": 2}, {"keep": 0.75}):
        given: dict[str, Any] = {"n": 1, "seed": 5, "batch_size": 1, **options}
        ahead, plain = (pipeline.complete([picture], **given, speculate=on) for on in (True, False))
        assert torch.equal(ahead.tokens, plain.tokens)
        assert torch.equal(ahead.logprobs.nan_to_num(9.0), plain.logprobs.nan_to_num(9.0))
        assert ahead.settings["kept_per_step"] > 1.2
        assert "kept_per_step" not in plain.settings


def test_rows_come_in_order_and_batches_have_the_same(pipeline: Pipeline) -> None:
    stream = pipeline.stream(2, seed=1, batch_size=1)
    events = list(stream)
    assert [(event.first, event.row) for event in events] == [(i, row) for i in range(2) for row in range(16)]
    assert torch.equal(torch.cat([event.tokens[0] for event in events]).view(2, 256), stream.result.tokens)
    assert [event.done for event in events] == [16 * i for i in range(1, 33)]
    together = pipeline.sample(2, seed=1)
    assert torch.equal(together.tokens, stream.result.tokens)
    assert "kept_per_step" not in together.settings
    assert stream.result.settings["kept_per_step"] > 1.3


def test_generate_and_its_callback() -> None:
    model = small(n_positions=64, n_embd=32, n_head=1, spread=0.02)
    seen: list[tuple[int, int]] = []
    tokens = model.generate(do_sample=True, seed=4, callback=lambda t, token: seen.append((t, int(token))))
    assert seen == list(enumerate(tokens[0, 1:].tolist()))
    assert torch.equal(tokens, model.generate(do_sample=True, seed=4, speculate=False))


@pytest.mark.parametrize("value", [0, "no", None])
def test_speculate_is_true_or_false(value: Any, pipeline: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"^speculate is .*; want True or False"):
        pipeline.sample(1, speculate=value)
    if value is not None:
        with pytest.raises(TypeError, match=r"^generate: speculate is .*; want True or False"):
            pipeline.model.generate(speculate=value)


def test_drafts_refuse_what_they_would_misread() -> None:
    model = small(n_positions=64, n_embd=32, n_head=1, spread=0.02)
    decoder, context, numbers = CpuDecoder(model, 1, 8), torch.tensor([[16]]), torch.rand(1, 5)
    others = (context.int(), numbers, None), (context, numbers.double(), None), (context, numbers, context)
    for wrong in (*others, (context, numbers.repeat(2, 1), None)):
        with pytest.raises(ValueError, match=r"^drafts: "):
            decoder.drafts(*wrong, Sampling(), 8)


def test_the_default_device_is_not_asked_for_what_stands_on_the_cpu(pipeline: Pipeline) -> None:
    def drawn() -> list[torch.Tensor]:
        completed = pipeline.complete(pictures, keep=mask, n=2, candidates=2, seed=3)
        sampled = pipeline.sample(2, seed=2, labels=1, cfg_scale=2.0)
        return [sampled.tokens, completed.tokens, completed.logprobs.nan_to_num()]

    pictures, mask = pipeline.sample(2, seed=1).images, np.arange(256).reshape(16, 16) % 7 > 0
    want = drawn()
    with torch.device("meta"):
        found = drawn()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_the_default_device_is_not_asked() -> None:
    model = small(n_positions=64, n_embd=32, n_head=1, spread=0.02)
    want, context = model.generate(do_sample=True, seed=4), torch.tensor([[16]])
    numbers = torch.rand(1, 64)

    def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ahead, alone = (decode(model, context, numbers, Sampling(), speculate=speculate) for speculate in (True, False))
        assert torch.equal(ahead.tokens, alone.tokens)
        return ahead.tokens, ahead.logprobs, alone.logprobs

    plain = drawn()
    with torch.device("meta"):
        assert torch.equal(model.generate(context, do_sample=True, seed=4), want)
        assert all(torch.equal(got, wanted) for got, wanted in zip(drawn(), plain, strict=True))


def test_it_can_be_interrupted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    want, read, calls = pipeline.sample(1, seed=2), CpuDecoder.step_rows, []

    def interrupted(self: CpuDecoder, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 300:
            raise KeyboardInterrupt
        return read(self, tokens)

    monkeypatch.setattr(CpuDecoder, "step_rows", interrupted)
    with pytest.raises(InterruptedGeneration) as error:
        pipeline.sample(9, seed=2, batch_size=1)
    assert error.value.partial is not None
    assert torch.equal(error.value.partial.tokens[0], want.tokens[0])
    assert torch.equal(pipeline.sample(1, seed=2).tokens, want.tokens)


def test_where_memory_does_not_suffice_for_rows(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single image nothing can be halved: the error is the caller's."""

    def fails(self: CpuDecoder, tokens: torch.Tensor) -> torch.Tensor:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(CpuDecoder, "step_rows", fails)
    with pytest.raises(MemoryError):
        pipeline.sample(1, seed=2)


def test_logits_that_are_not_finite() -> None:
    model = small(n_positions=64, n_embd=32, n_head=1)
    with torch.no_grad():
        model.transformer.wpe.weight[40:] = torch.nan
    errors = []
    for on in (True, False):
        with pytest.raises(FloatingPointError, match="position 40") as error:
            model.generate(do_sample=True, seed=1, speculate=on)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert issubclass(NotFiniteError, FloatingPointError)


def test_nothing_is_tried_where_nothing_can_be_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise: a few rows are wasted until that shows, and hardly one after that."""
    model = small(n_positions=1024, n_embd=32, n_head=1, vocab_size=257, spread=0.001)
    rows, read = [], CpuDecoder.step_rows

    def counted(self: CpuDecoder, tokens: torch.Tensor) -> torch.Tensor:
        rows.append(len(tokens) - 1)
        return read(self, tokens)

    monkeypatch.setattr(CpuDecoder, "step_rows", counted)
    model.generate(do_sample=True, seed=4)
    assert sum(rows) < 30
