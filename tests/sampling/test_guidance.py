"""Classes and classifier-free guidance: what is drawn is what two uncached forwards say, at no cost without it."""

import numpy as np
import pytest
import torch
from small_models import small_pipeline

from igpt_fast import Pipeline, reference
from igpt_fast.draws import Sampling
from igpt_fast.engines import choice as decoders
from igpt_fast.engines.decoder import Decoder
from igpt_fast.files import BUNDLED
from igpt_fast.learning.data import load_tokens
from igpt_fast.sampling import decoding as generation
from igpt_fast.sampling.decoding import decode
from igpt_fast.sampling.rules import Guidance, stream_uniforms

HEIGHT, WIDTH, COLOURS, CLASSES = 5, 4, 9, 3
PIXELS, SOS = HEIGHT * WIDTH, COLOURS + CLASSES


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline(HEIGHT, WIDTH, COLOURS, CLASSES)


def log_probabilities(pipeline: Pipeline, begin: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, colours) of an uncached forward."""
    with torch.no_grad():
        logits = pipeline.model(torch.cat([begin[:, None], tokens[:, :-1]], dim=1)).logits
    return torch.log_softmax(logits[..., :COLOURS], dim=-1)


def expected_draws(
    pipeline: Pipeline,
    begin: torch.Tensor,
    tokens: torch.Tensor,
    uniforms: torch.Tensor,
    scale: float,
    *settings: float,
) -> torch.Tensor:
    given, without = (log_probabilities(pipeline, b, tokens) for b in (begin, torch.full_like(begin, SOS)))
    guided = without + scale * (given - without)
    return torch.stack([reference.sample(guided[:, t], uniforms[:, t], *settings) for t in range(tokens.shape[1])], 1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 20.0])
def test_samples_are_those_of_the_guided_distribution(pipeline: Pipeline, scale: float) -> None:
    labels = [0, 2, 1, 2, 0]
    options = {"temperature": 1.1, "top_k": 7, "top_p": 0.95, "min_p": 0.01}
    result = pipeline.sample(5, seed=4, labels=labels, cfg_scale=scale, batch_size=3, first=7, **options)
    begin = torch.tensor(labels) + COLOURS
    uniforms = stream_uniforms(4, torch.arange(7, 12), 0, PIXELS, torch.device("cpu"))
    expected = expected_draws(pipeline, begin, result.tokens, uniforms, scale, *options.values())
    assert torch.equal(result.tokens, expected)
    given = log_probabilities(pipeline, begin, result.tokens).gather(2, result.tokens[..., None])[..., 0]
    torch.testing.assert_close(result.logprobs.double(), given, rtol=1e-5, atol=1e-5)  # before guidance
    assert result.labels.tolist() == labels
    assert result.settings["cfg_scale"] == scale
    assert int(result.tokens.max()) < COLOURS


def test_only_colours_are_drawn(pipeline: Pipeline) -> None:
    """Whatever the head says of the classes."""
    head = pipeline.model.lm_head.weight
    before = head[COLOURS:].detach().clone()
    with torch.no_grad():
        head[COLOURS:] = 50.0 * head[:CLASSES]
    try:
        for temperature in (0.0, 1.0, 100.0):
            result = pipeline.sample(20, seed=0, labels=1, cfg_scale=2.0, temperature=temperature)
            assert int(result.tokens.max()) < COLOURS
        assert int(pipeline.model.generate(do_sample=True, seed=0, num_return_sequences=20)[:, 1:].max()) < COLOURS
    finally:
        with torch.no_grad():
            head[COLOURS:] = before


def test_completions_of_a_class(pipeline: Pipeline) -> None:
    images = pipeline.processor.decode(torch.randint(0, COLOURS, (2, PIXELS)))
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0], mask[3, 1:3] = True, True
    result = pipeline.complete(images, keep=mask, n=3, seed=2, labels=[2, 0], cfg_scale=2.5)
    begin = torch.tensor([2, 2, 2, 0, 0, 0]) + COLOURS
    streams = torch.tensor([[1 << 32], [2 << 32]]) + torch.arange(3)
    uniforms = stream_uniforms(2, streams.flatten(), 0, PIXELS, torch.device("cpu"))
    expected = expected_draws(pipeline, begin, result.tokens, uniforms, 2.5)
    unknown = torch.from_numpy(~mask).flatten()
    assert torch.equal(result.tokens[:, unknown], expected[:, unknown])
    assert result.labels.tolist() == [2, 2, 2, 0, 0, 0]
    assert not torch.equal(result.tokens, pipeline.complete(images, keep=mask, n=3, seed=2).tokens)
    assert torch.equal(
        pipeline.complete(images[1:], keep=mask, n=3, seed=2, labels=0, cfg_scale=2.5, first_input=1).tokens,
        result.tokens[3:],
    )


def test_guidance_doubles_the_batch_and_its_absence_does_not(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make(model: object, batch: int, *others: object) -> Decoder:
        made.append(batch)
        return decoders.make_decoder(model, batch, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "make_decoder", make)
    plain = pipeline.sample(4, seed=0, labels=1)
    same = pipeline.sample(4, seed=0, labels=1, cfg_scale=1)
    assert torch.equal(plain.tokens, same.tokens)
    pipeline.sample(4, seed=0, labels=1, cfg_scale=1.5)
    assert made == [4, 4, 8]
    assert pipeline.default_batch_size(guided=True) <= pipeline.default_batch_size()


def test_generate_is_guided_as_transformers_does(pipeline: Pipeline) -> None:
    model = pipeline.model
    prompt = torch.cat([torch.tensor([[COLOURS + 1], [SOS]]), torch.randint(0, COLOURS, (2, 4))], dim=1)
    result = model.generate(prompt, do_sample=True, seed=3, guidance_scale=2.0, num_return_sequences=2)
    assert result.shape == (4, PIXELS + 1)
    uniforms = stream_uniforms(3, torch.arange(4), 0, PIXELS - 4, torch.device("cpu"))
    expected = expected_draws(
        pipeline, prompt[:, 0].repeat_interleave(2), result[:, 1:], torch.nn.functional.pad(uniforms, (4, 0)), 2.0
    )
    assert torch.equal(result[:, 5:], expected[:, 4:])
    negative = prompt[:1].clone()
    negative[0, 0] = COLOURS
    other = model.generate(prompt, guidance_scale=2.0, negative_prompt_ids=negative)
    assert torch.equal(other, model.generate(prompt, guidance_scale=2.0, negative_prompt_ids=negative.expand(2, -1)))
    assert torch.equal(model.generate(prompt, guidance_scale=1.0), model.generate(prompt))


def test_guidance_is_transformers(pipeline: Pipeline) -> None:
    """Its processor, on the same two distributions."""
    from transformers.generation import logits_process as processors

    context = torch.tensor([[COLOURS + 2, 1, 5]])
    without = torch.tensor([[SOS, 1, 5]])
    model = pipeline.model

    class Colours(torch.nn.Module):
        """Of the model's outputs those that are drawn from."""

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            output = model(input_ids)
            output.logits = output.logits[..., :COLOURS]
            return output

    processor = processors.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        3.0, Colours(), unconditional_ids=without, use_cache=False
    )
    with torch.no_grad():
        theirs = processor(context, model(context).logits[:, -1, :COLOURS])
    numbers = (torch.arange(200) + 0.5)[:, None] / 200
    drawn = decode(model, context, numbers, Sampling(), guidance=Guidance(3.0, without))
    assert torch.equal(drawn.tokens[:, 0], reference.sample(theirs.expand(200, -1), numbers[:, 0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": 3}, ValueError, r"label 3 is not in 0\.\.2"),
        ({"labels": -1}, ValueError, "label -1"),
        ({"labels": [0]}, ValueError, "labels has 1 entries"),
        ({"labels": 0.5}, TypeError, "labels is 0.5"),
        ({"labels": ["cat", "dog"]}, TypeError, "want an integer, or one for each"),
        ({"cfg_scale": 2.0}, ValueError, "no effect without labels"),
        ({"labels": 0, "cfg_scale": -1.0}, ValueError, r"cfg_scale is -1.0; want a number in \[0, 1000\]"),
        ({"labels": 0, "cfg_scale": float("nan")}, ValueError, "cfg_scale is nan"),
        ({"labels": 0, "cfg_scale": True}, ValueError, "cfg_scale is True"),
    ],
)
def test_wrong_labels_and_scales(pipeline: Pipeline, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline.sample(2, **options)
    with pytest.raises(error, match=message):
        pipeline.complete(pipeline.sample(2).images, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "no row of input_ids begins with a class"),
        ({"negative_prompt_ids": torch.tensor([[SOS]])}, "has no effect"),
        ({"guidance_scale": 1.0, "negative_prompt_ids": torch.tensor([[SOS]])}, "has no effect"),
        ({"guidance_scale": -2.0}, "guidance_scale is -2.0"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[SOS, 1]])}, r"\(1, 2\), input_ids \(1, 1\)"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[SOS + 1]])}, f"token {SOS + 1}"),
    ],
)
def test_wrong_guidance_of_generate(pipeline: Pipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.model.generate(**options)


def test_a_model_without_classes() -> None:
    with pytest.raises(ValueError, match="no classes"):
        small_pipeline(HEIGHT, WIDTH, COLOURS, 0).sample(1, labels=0)


def test_the_bundled_model_knows_its_classes() -> None:
    """Held-out pictures are likelier under their class than under any other, and under none."""
    data = load_tokens(BUNDLED.parent / "emoji16.npz", classes=True)
    pipeline, labels = Pipeline.from_pretrained(device="cpu"), data.heldout_labels
    assert list(pipeline.model.config.id2label.values()) == list(data.class_names or ())
    assert labels is not None
    for name in ("smileys", "flags"):
        label = pipeline.model.config.label2id[name]
        pictures = pipeline.processor.decode(data.heldout_tokens[labels == label][:8])
        nats = [float(pipeline.score(pictures, labels=k).nats_per_pixel.mean()) for k in range(9)]
        assert min(nats) == nats[label]
        assert nats[label] < float(pipeline.score(pictures).nats_per_pixel.mean())


def test_decode_refuses_a_guidance_of_another_shape(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="want one shape"):
        decode(
            pipeline.model,
            torch.tensor([[SOS]]),
            torch.rand(1, 4),
            Sampling(),
            guidance=Guidance(2.0, torch.tensor([[SOS, 1]])),
        )
