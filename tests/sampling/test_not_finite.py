"""Logits that are no numbers: an error on every engine, never colour 0."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, Pipeline, backend
from igpt_fast.cli.main import main
from igpt_fast.draws import Sampling
from igpt_fast.engines import choice
from igpt_fast.sampling import decoding
from igpt_fast.sampling.decoding import decode
from igpt_fast.sampling.rules import Guidance, RandomStreams

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 70, "vocab_size": 41}
FIRST = "image 0, position 0"


@pytest.fixture(params=["reference", "cpu", "cuda"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        request.getfixturevalue("emulation")
    elif request.param == "cpu" and backend._C is None:
        pytest.skip(backend.native_reason)
    with backend.use_backend("auto" if request.param == "cpu" else backend.get_backend()):
        yield request.param


def small(dtype: torch.dtype = torch.bfloat16) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(ImageGPTConfig(**SIZES)).to(dtype).eval()


def spoil(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_weight(engine: str, value: float) -> None:
    model = small()
    spoil(model.transformer.h[1].mlp.c_fc.bias, value)
    for options in ({}, {"do_sample": True, "seed": 1}, {"do_sample": True, "generator": torch.Generator()}):
        with pytest.raises(FloatingPointError, match=FIRST):
            model.generate(max_new_tokens=3, **options)
    context = torch.tensor([[40, 1, 2], [40, 3, 4]])
    with pytest.raises(FloatingPointError, match="image 0, position 2"):
        model.generate(context, max_new_tokens=3)


def test_one_logit(engine: str) -> None:
    """That overflows, of finite weights."""
    model = small()
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([[40]])).last_hidden_state[0, 0]
        model.lm_head.weight[5] = 3e38 * hidden.sign()
    for options in ({}, {"do_sample": True, "seed": 1, "top_k": 3}):
        with pytest.raises(FloatingPointError, match=FIRST):
            model.generate(max_new_tokens=1, **options)


def test_the_first_of_several(engine: str) -> None:
    """A position's, of one image: the others' numbers are their own."""
    model = small()
    spoil(model.transformer.wte.weight[7:], torch.nan)
    known = torch.tensor([[1, 2, 3], [1, 7, 3]])
    sos = torch.full((2, 1), model.config.sos_token_id)
    with pytest.raises(FloatingPointError, match="image 6, position 2"):
        decode(model, sos, torch.zeros(2, 3), Sampling(), known=known, first=5)
    drawn = decode(model, sos, torch.zeros(2, 3), Sampling(), known=torch.tensor([[1, 2, 3], [1, 2, 7]]))
    assert drawn.logprobs.isfinite().all()


def test_every_way_of_drawing(engine: str) -> None:
    """Numbers made by the engine, given ones, and the other context of a guidance."""
    model = small()
    spoil(model.transformer.wte.weight[7:], torch.nan)
    sos, numbers = torch.full((1, 1), model.config.sos_token_id), torch.full((1, 2), 0.5)
    away = Guidance(2.0, torch.full((1, 1), 7))
    with pytest.raises(FloatingPointError, match=FIRST):
        decode(model, sos, numbers, Sampling(), guidance=away)
    for uniforms in (numbers, RandomStreams(0, torch.zeros(1, dtype=torch.int64), 0, 2)):
        with pytest.raises(FloatingPointError, match=FIRST):
            decode(model, torch.full((1, 1), 7), uniforms, Sampling())


def forbid(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([3]), -torch.inf)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_colour_may_be_forbidden(scale: float) -> None:
    """Minus infinity is no error: never drawn, under guidance too, and of likelihood 0 where it is given."""
    model = small(torch.float32)
    model.lm_head.register_forward_hook(lambda _, __, logits: forbid(logits))
    sos = torch.full((8, 1), model.config.sos_token_id)
    guidance = Guidance(scale, torch.ones_like(sos))
    drawn = decode(model, sos, torch.rand(8, 20), Sampling(), guidance=guidance)
    assert drawn.logprobs.isfinite().all()
    assert not (drawn.tokens == 3).any()
    assert len(drawn.tokens.unique()) > 10
    drawn = decode(model, sos, torch.rand(8, 2), Sampling(), known=torch.tensor([[3, -1]]).expand(8, 2))
    assert (drawn.logprobs[:, 0] == -torch.inf).all()


def test_what_is_finished_is_not_lost() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    want, weight = pipeline.sample(2, seed=1), pipeline.model.transformer.ln_f.weight

    def spoilt(done: int, total: int) -> None:
        if done > 2 * 256:
            spoil(weight, torch.nan)

    with pytest.raises(FloatingPointError) as caught:
        pipeline.sample(5, seed=1, batch_size=1, progress=spoilt)
    assert torch.equal(caught.value.partial.tokens[:2], want.tokens)
    with pytest.raises(FloatingPointError) as caught:
        pipeline.sample(5, seed=1)
    assert caught.value.partial is None


def test_an_error_that_is_kept_keeps_no_decoder() -> None:
    """The model is in training mode again, though the error's frames live: of the logits, and of a callback."""
    pipeline, made = Pipeline.from_pretrained(device="cpu"), []

    def make(*arguments: Any) -> Any:
        decoder = choice.make_decoder(*arguments)
        made.append(weakref.ref(decoder))
        return decoder

    def failing(*_: object) -> None:
        raise ZeroDivisionError

    model = pipeline.model.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "make_decoder", make)
        with pytest.raises(ZeroDivisionError) as caught:
            pipeline.sample(1, progress=failing)
        assert (model.training, made.pop()()) == (True, None)
        sos, numbers = torch.full((1, 1), model.config.sos_token_id), torch.full((1, 2), 0.5)
        with pytest.raises(ZeroDivisionError) as caught:
            decode(model, sos, numbers, Sampling(), failing)
        assert (model.training, made.pop()()) == (True, None)
        spoil(model.transformer.ln_f.weight, torch.nan)
        with pytest.raises(FloatingPointError) as caught:
            pipeline.sample(1)
        assert (model.training, made.pop()()) == (True, None)
    del caught


def test_the_number_is_that_of_the_whole() -> None:
    """Of a shard, behind a first one, among completions and their candidates."""
    pipeline = Pipeline.from_pretrained(device="cpu")
    spoil(pipeline.model.transformer.ln_f.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="image 4, position 0"):
        pipeline.start(pipeline.request(8, batch_size=2).shard(range(4, 8))).drained()
    with pytest.raises(FloatingPointError, match="image 1000, "):
        pipeline.sample(2, first=1000)
    images, keep = [torch.zeros(16, 16, 3, dtype=torch.uint8)] * 3, torch.ones(16, 16, dtype=torch.bool)
    keep[14, 3:6] = False
    for candidates in (1, 3):
        request = pipeline.request(2, images=images, keep=keep, candidates=candidates, batch_size=2)
        with pytest.raises(FloatingPointError, match="image 4, position 227"):  # the first of the third input's two
            pipeline.start(request.shard(range(2, 3))).drained()


def test_pipelines_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    spoil(pipeline.model.transformer.ln_f.weight, torch.nan)
    stream = pipeline.stream(3, seed=0, batch_size=2)
    with pytest.raises(FloatingPointError, match=FIRST):
        next(stream)  # no row of no numbers before
    with pytest.raises(FloatingPointError, match="image 0, position 240"):
        pipeline.complete(pipeline.processor.decode(torch.zeros(1, 256, dtype=torch.int64)), keep=15, n=2)
    nn.init.constant_(pipeline.model.transformer.ln_f.weight, 3e38)  # a number, as all that loading lets through
    pipeline.model.save_pretrained(tmp_path)
    pipeline.processor.save_pretrained(tmp_path)
    out = tmp_path / "x.png"
    assert main(["sample", "--model", str(tmp_path), "--n", "1", "--device", "cpu", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "not finite" in told
    assert "internal error" not in told
    assert not out.exists()
