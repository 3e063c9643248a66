"""generate: equal to the uncached forward at every position; streams, lengths, options, errors."""

import functools
import gc
from collections.abc import Iterator
from threading import Thread

import pytest
import torch
import transformers
from small_models import small

from igpt_fast import ImageGPTForCausalImageModeling, reference
from igpt_fast.draws import Sampling
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.sampling import decoding as generation
from igpt_fast.sampling.decoding import decode
from igpt_fast.sampling.rules import stream_uniforms

small_model = functools.partial(small, n_positions=64, n_embd=32, spread=0.3)


@pytest.fixture(scope="module")
def model() -> ImageGPTForCausalImageModeling:
    return small_model()


def sos(model: ImageGPTForCausalImageModeling, batch: int = 1) -> torch.Tensor:
    return torch.full((batch, 1), model.config.sos_token_id)


@pytest.mark.parametrize("n_positions", [1, 2, 64, 1024])
def test_greedy_equals_the_argmax_of_the_uncached_forward(n_positions: int) -> None:
    """At every position, to the last one; ties and near ties aside, which fp64 keeps away."""
    model = small_model(n_positions=n_positions).double()
    tokens = model.generate(sos(model, 2))
    assert tokens.shape == (2, n_positions + 1)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    assert torch.equal(tokens[:, 1:], logits.argmax(dim=-1))
    if n_positions > 2:
        assert len(tokens[0].unique()) > 2  # not a constant picture, which any cache would give


def test_greedy_equals_transformers(model: ImageGPTForCausalImageModeling) -> None:
    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())
    context = torch.cat([sos(model, 3), torch.randint(0, 16, (3, 20))], dim=1)
    expected = theirs.generate(context, max_length=65, do_sample=False)
    assert torch.equal(model.generate(context), expected)


def test_logprobs_are_the_models(model: ImageGPTForCausalImageModeling) -> None:
    uniforms = torch.rand(3, 64)
    drawn = decode(model, sos(model, 3), uniforms, Sampling(temperature=0.7, top_k=5))
    with torch.no_grad():
        logits = model(torch.cat([sos(model, 3), drawn.tokens[:, :-1]], dim=1)).logits
    expected = torch.log_softmax(logits, dim=-1).gather(2, drawn.tokens[..., None])[..., 0]
    torch.testing.assert_close(drawn.logprobs, expected)


def test_draws_are_those_of_the_uncached_distribution(model: ImageGPTForCausalImageModeling) -> None:
    model = small_model().double()
    settings = Sampling(temperature=1.3, top_k=9, top_p=0.9)
    uniforms = torch.rand(4, 64)
    drawn = decode(model, sos(model, 4), uniforms, settings)
    with torch.no_grad():
        logits = model(torch.cat([sos(model, 4), drawn.tokens[:, :-1]], dim=1)).logits
    for t in range(64):
        assert torch.equal(drawn.tokens[:, t], reference.sample(logits[:, t], uniforms[:, t], 1.3, 9, 0.9))


def test_seeded_rows_do_not_depend_on_the_batch() -> None:
    model = small_model().double()
    whole = model.generate(sos(model, 7), do_sample=True, seed=5)
    assert torch.equal(whole[:3], model.generate(sos(model, 3), do_sample=True, seed=5))
    assert torch.equal(whole, model.generate(sos(model), do_sample=True, seed=5, num_return_sequences=7))
    assert not torch.equal(whole, model.generate(sos(model, 7), do_sample=True, seed=6))
    assert len({tuple(row.tolist()) for row in whole}) == 7


def test_generator_and_the_global_generator(model: ImageGPTForCausalImageModeling) -> None:
    first = model.generate(do_sample=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, model.generate(do_sample=True, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(1)
    second = model.generate(do_sample=True)
    assert not torch.equal(second, model.generate(do_sample=True))
    torch.manual_seed(1)
    assert torch.equal(second, model.generate(do_sample=True))


def test_lengths(model: ImageGPTForCausalImageModeling) -> None:
    context = torch.cat([sos(model, 2), torch.randint(0, 16, (2, 9))], dim=1)
    assert model.generate(context, max_new_tokens=3).shape == (2, 13)
    assert model.generate(context, max_length=20).shape == (2, 20)
    assert torch.equal(model.generate(context)[:, :10], context)
    assert model.generate(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 65)
    full = torch.cat([sos(model), torch.randint(0, 16, (1, 63))], dim=1)
    assert model.generate(full).shape == (1, 65)


def test_training_mode_is_left_as_it_was(model: ImageGPTForCausalImageModeling) -> None:
    noisy = small_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    with torch.no_grad():
        expected = noisy.eval().generate()
    noisy.train()
    assert torch.equal(noisy.generate(), expected)
    assert noisy.training
    assert noisy.transformer.h[0].attn.resid_dropout.training
    noisy.transformer.h[1].eval()
    noisy.generate(sos(noisy), max_new_tokens=2)
    assert noisy.training
    assert not any(module.training for module in noisy.transformer.h[1].modules())


def test_threads_share_a_model_in_training_mode() -> None:
    """Neither decodes with dropout because the other has finished."""
    noisy = small_model(resid_pdrop=0.5)
    expected = noisy.generate()
    noisy.train()
    results: list[torch.Tensor] = []
    lengths = (5, 65, 9, 65)
    threads = [Thread(target=lambda n=n: results.append(noisy.generate(max_length=n))) for n in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert torch.equal(result, expected[:, : result.shape[1]])
    assert noisy.training


@pytest.mark.parametrize("others", [0, 1])
def test_a_decoding_that_the_collector_ends_inside_of_another(others: int) -> None:
    """While the other one begins, in the same thread; the mode is back when the last has ended."""
    model = torch.nn.Dropout()
    evaluate, after = model.eval, []

    def collects() -> torch.nn.Module:
        gc.collect()
        return evaluate()

    def decoding() -> Iterator[None]:
        with generation._evaluating(model):
            yield

    def begins() -> None:
        kept = [decoding() for _ in range(others)]
        abandoned: list[object] = [decoding()]
        for each in (*kept, abandoned[0]):
            next(each)  # type: ignore[call-overload]
        abandoned.append(abandoned)  # which only the collector frees
        del abandoned, each
        model.eval = collects  # type: ignore[method-assign]
        with generation._evaluating(model):
            after.append(model.training)
        after.append(model.training)
        del kept
        after.append(model.training)

    thread = Thread(target=begins, daemon=True)
    thread.start()
    thread.join(20)
    assert after == [False, others == 0, True]


def test_ctrl_c_while_a_decoding_begins() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())

    def interrupted(mode: bool) -> None:
        raise KeyboardInterrupt

    model[1].train = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt), generation._evaluating(model):
        pytest.fail("the block is not reached")
    del model[1].train
    with generation._evaluating(model):
        assert not model.training
    assert all(module.training for module in model.modules())


def test_callback_sees_every_token(model: ImageGPTForCausalImageModeling) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    tokens = model.generate(sos(model, 2), callback=lambda step, row: seen.append((step, row.clone())))
    assert [step for step, _ in seen] == list(range(64))
    assert torch.equal(torch.stack([row for _, row in seen], dim=1), tokens[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 66}, "66"),
        ({"max_length": 1}, "none"),
        ({"max_new_tokens": 0}, "none"),
        ({"max_new_tokens": 65}, "66"),
        ({"max_length": 5, "max_new_tokens": 5}, "not both"),
        ({"temperature": 0.5}, "do_sample"),
        ({"top_k": 5}, "do_sample"),
        ({"num_return_sequences": 2}, "do_sample"),
        ({"num_return_sequences": 0}, "0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"input_ids": torch.tensor([[16]]), "inputs": torch.tensor([[16]])}, "not both"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "min_p": -0.5}, "min_p"),
        ({"min_p": 0.5}, "do_sample"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"seed": 1}, "do_sample"),
        ({"max_new_tokens": 2.0}, "2.0"),
        ({"do_sample": True, "seed": -1}, "seed"),
        ({"do_sample": True, "seed": 1 << 64}, "seed"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, "not both"),
        ({"input_ids": torch.tensor([[17]])}, "17"),
        ({"input_ids": torch.tensor([[-1]])}, "-1"),
        ({"input_ids": torch.tensor([16])}, r"\(1,\)"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.int64)}, r"\(1, 0\)"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.int64)}, "none"),
    ],
)
def test_wrong_values(model: ImageGPTForCausalImageModeling, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**options)


def test_transformers_neutral_values(model: ImageGPTForCausalImageModeling) -> None:
    context = torch.cat([sos(model, 2), torch.randint(0, 16, (2, 9))], dim=1)
    options = {"do_sample": True, "seed": 1}
    expected = model.generate(context, **options)
    neutral = model.generate(
        inputs=context, attention_mask=torch.ones_like(context), use_cache=True, top_k=0, top_p=1.0, **options
    )
    assert torch.equal(neutral, expected)


def test_wrong_types(model: ImageGPTForCausalImageModeling) -> None:
    with pytest.raises(TypeError, match="float32"):
        model.generate(torch.zeros(1, 1))
    with pytest.raises(TypeError, match="list"):
        model.generate([[16]])


def test_min_p_of_generate(model: ImageGPTForCausalImageModeling) -> None:
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 5}
    assert torch.equal(model.generate(**options, min_p=1.0), model.generate().expand(5, -1))
    assert torch.equal(model.generate(**options, min_p=0.0), model.generate(**options))
    assert not torch.equal(model.generate(**options, min_p=0.2), model.generate(**options))


def test_known_tokens_are_read_in_place_of_drawn_ones() -> None:
    model = small_model().double()
    known = torch.randint(0, 16, (6, 40)).masked_fill(torch.rand(6, 40) < 0.6, -1)
    known[:, 7], known[:, 8] = 3, -1
    context, uniforms = torch.cat([sos(model, 2), torch.randint(0, 16, (2, 9))], dim=1), torch.rand(6, 40)
    calls: list[torch.Tensor] = []
    drawn = decode(model, context, uniforms, Sampling(0.9), lambda t, tokens: calls.append(tokens.clone()), known=known)
    assert torch.equal(torch.stack(calls, 1), drawn.tokens)
    assert torch.equal(drawn.tokens[known >= 0], known[known >= 0])
    with torch.no_grad():
        logits = model(torch.cat([context.repeat_interleave(3, dim=0), drawn.tokens[:, :-1]], dim=1)).logits[:, 9:]
    for t in range(40):
        expected = reference.sample(logits[:, t], uniforms[:, t], 0.9)
        assert torch.equal(drawn.tokens[:, t], torch.where(known[:, t] >= 0, known[:, t], expected))
    expected = torch.log_softmax(logits, dim=-1).gather(2, drawn.tokens[..., None])[..., 0]
    torch.testing.assert_close(drawn.logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoder_refuses_more_than_it_was_made_for(model: ImageGPTForCausalImageModeling) -> None:
    with pytest.raises(ValueError, match="capacity"):
        ReferenceDecoder(model, 1, 65)
    decoder = ReferenceDecoder(model, 1, 2)
    with torch.no_grad():
        decoder.prefill(torch.zeros(1, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match="fit"):
            decoder.step(torch.zeros(1, dtype=torch.int64))


def test_streams_are_told_apart_by_seed_stream_and_position() -> None:
    cpu = torch.device("cpu")
    streams = torch.tensor([0, 1, 5, 1 << 32, (1 << 62) + 3])
    numbers = stream_uniforms(9, streams, 0, 100, cpu)
    assert numbers.unique().numel() > 495
    assert torch.equal(numbers[:, 40:60], stream_uniforms(9, streams, 40, 20, cpu))
    assert torch.equal(numbers[2:3], stream_uniforms(9, streams[2:3], 0, 100, cpu))
    for seed in (8, 9 + (1 << 32), (1 << 64) - 1):
        assert (stream_uniforms(seed, streams, 0, 100, cpu) == numbers).sum() < 3
