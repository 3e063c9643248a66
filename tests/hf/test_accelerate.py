"""transformers' ImageGPT accelerated in place: the same object, the same numbers, and transformers' own tools on it."""

import copy
import gc
import io
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate as accelerate_library
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.imagegpt import modeling_imagegpt as theirs

from igpt_fast import hf, ops
from igpt_fast.engines.cpu import decoder as cpu
from igpt_fast.engines.cpu import weights as packing
from igpt_fast.hf import modules
from igpt_fast.hf.cache import DecoderCache

LM, NETWORK, CLASSIFIER = "ImageGPTForCausalImageModeling", "ImageGPTModel", "ImageGPTForImageClassification"
FIELDS: dict[str, Any] = {
    **{"vocab_size": 17, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 3},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
TOKENS = torch.tensor([[16, 3, 0, 9, 12], [16, 1, 15, 2, 7], [16, 8, 8, 0, 4]])
LONG = {"max_length": 25}
native = pytest.mark.skipif(packing.no_native_decoder() is not None, reason=str(packing.no_native_decoder()))


def make(name: str = LM, **fields: Any) -> Any:
    """transformers' own, every parameter random."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.ImageGPTConfig(**{**FIELDS, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def both(name: str = LM, **fields: Any) -> tuple[Any, Any]:
    """transformers', and an accelerated copy."""
    model = make(name, **fields)
    return model, hf.accelerate(copy.deepcopy(model))


def first(output: Any) -> Tensor:
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def why(model: nn.Module, part: str) -> str | None:
    """Why a part is not served; there is one such row."""
    (row,) = [row for row in hf.accelerated(model) if row.part == part]
    return row.reason


class Length(transformers.StoppingCriteria):
    """Ends ``generate`` before its ``max_length``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images of every step of a native decoder."""
    seen: list[int] = []
    step = cpu.CpuDecoder.step
    monkeypatch.setattr(cpu.CpuDecoder, "step", lambda self, tokens: seen.append(len(tokens)) or step(self, tokens))
    return seen


@pytest.mark.parametrize("name", [LM, NETWORK, CLASSIFIER])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False, "activation_function": "gelu_new", "n_inner": 24, "layer_norm_epsilon": 1e-2},
        {"activation_function": "relu"},
        {"attn_pdrop": 1.0},
    ],
)
def test_the_same_numbers_and_gradients(name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = both(name, **fields)
    called = set()
    for op in ("rms_norm", "causal_attention_packed", "activation"):
        run = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, op=op, run=run: called.add(op) or run(*a))
    extra = {LM: {"labels": TOKENS.clamp(max=15)}, NETWORK: {}, CLASSIFIER: {"labels": torch.tensor([0, 2, 1])}}[name]
    results = []
    for model in (plain, fast):
        output = model.train()(TOKENS, output_hidden_states=True, use_cache=False, **extra)
        loss = output.loss if extra else output.last_hidden_state.square().mean()
        loss.backward()
        results.append((output, loss))
    (want, want_loss), (got, loss) = results
    close(loss, want_loss)
    close(first(got), first(want))
    assert type(got) is type(want)
    assert len(got.hidden_states) == 3
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        close(a, b)
    for (key, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)
    relu = fields.get("activation_function") == "relu"
    assert called == {"rms_norm", "causal_attention_packed", "activation"} - ({"activation"} if relu else set())


def test_the_same_object_and_back_again() -> None:
    for name in (LM, NETWORK, CLASSIFIER):
        plain = make(name)
        model = copy.deepcopy(plain)
        before, inside = classes(model), [dict(module.__dict__) for module in model.modules()]
        assert hf.accelerate(model) is model
        assert isinstance(model, getattr(transformers, name))
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [kind.__name__ for kind in classes(model)] == [kind.__name__ for kind in before]
        changed = [kind for kind, old in zip(classes(model), before, strict=True) if kind is not old]
        assert set(changed) >= {modules.ImageGPTLayerNorm, modules.ImageGPTAttention, modules.ImageGPTMLP}
        first_time = classes(model)
        assert classes(hf.accelerate(model)) == first_time
        model(TOKENS)
        assert [dict(module.__dict__) for module in model.modules()] == inside
        assert hf.restore(model) is model
        assert classes(model) == before
        assert torch.equal(first(model(TOKENS)), first(plain(TOKENS)))
        assert classes(hf.restore(model)) == before


def test_signatures_are_those_of_transformers() -> None:
    import inspect

    for kind, ours in modules.SERVED.items():
        assert inspect.signature(ours.forward) == inspect.signature(kind.forward)  # type: ignore[attr-defined]
        assert ours.__name__ == kind.__name__


@native
@pytest.mark.parametrize("context", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "top_k": 3}])
def test_generate_chooses_the_same_tokens(steps: list[int], batch: int, context: int, settings: dict[str, Any]) -> None:
    plain, fast = both()
    drawn = []
    for model in (plain, fast):
        torch.manual_seed(1)
        drawn.append(model.generate(TOKENS[:batch, :context], **LONG, **settings))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (batch, 25)
    assert len(steps) == 24 - context + (context == 1)
    assert set(steps) == {batch}


@native
def test_scores_processors_criteria_and_streamers(steps: list[int]) -> None:
    plain, fast = both()

    class Ban(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.scatter(1, input_ids[:, -1:].clamp(max=15), -torch.inf)

    class Streamer:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    results = []
    for model in (plain, fast):
        streamer = Streamer()
        result = model.generate(
            TOKENS[:, :2],
            **LONG,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            repetition_penalty=1.2,
            logits_processor=transformers.LogitsProcessorList([Ban()]),
            stopping_criteria=transformers.StoppingCriteriaList([Length(20)]),
        )
        model.generate(TOKENS[:1, :2], **LONG, do_sample=False, eos_token_id=5, pad_token_id=0, streamer=streamer)
        results.append((result, streamer.got))
    (want, streamed), (got, got_streamed) = results
    assert type(got) is type(want)
    assert torch.equal(got.sequences, want.sequences)
    assert got_streamed == streamed
    assert streamed[-1] == "end"
    for name in ("scores", "logits"):
        for a, b in zip(got[name], want[name], strict=True):
            close(a, b)
    assert steps


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True},
        {"do_sample": False, "guidance_scale": 1.5},
        {"do_sample": False, "attention_mask": torch.tensor([[0, 1, 1, 1]])},
        {"do_sample": False, "prefill_chunk_size": 2},
    ],
)
def test_other_ways_to_generate(settings: dict[str, Any]) -> None:
    plain, fast = both()
    drawn = [model.generate(TOKENS[:1, :4], max_length=16, **settings) for model in (plain, fast)]
    assert torch.equal(*(result if isinstance(result, Tensor) else result.sequences for result in drawn))


@native
def test_a_cache_that_is_looked_into_is_an_ordinary_one() -> None:
    plain, fast = both()
    settings = {"max_length": 12, "do_sample": False, "return_dict_in_generate": True}
    want = plain.generate(TOKENS, **settings)

    def cache() -> Any:
        made = fast.generate(TOKENS, **settings).past_key_values
        assert type(made) is DecoderCache
        assert isinstance(made, DynamicCache)
        assert (made.get_seq_length(), made.is_compileable, hasattr(made, "nothing")) == (11, False, False)
        return made

    order = torch.tensor([2, 0, 0])
    ways: list[Callable[[Any], Any]] = [
        lambda c: c,
        lambda c: c.reorder_cache(order) or c,
        lambda c: c.crop(-4) or c,
        lambda c: c.batch_select_indices(order[:2]) or c,
        lambda c: c.batch_repeat_interleave(2) or c,
        lambda c: c.update(torch.ones(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 1) and c,
        copy.deepcopy,
        lambda c: pickle.loads(pickle.dumps(c)),
    ]
    for way in ways:
        reference, got = way(copy.deepcopy(want.past_key_values)), way(cache())
        pairs = list(zip(got, reference, strict=True))
        assert type(got) is DynamicCache
        assert got.get_seq_length() == reference.get_seq_length()
        for (keys, values, _), (want_keys, want_values, _) in pairs:
            close(keys, want_keys)
            close(values, want_values)


@native
def test_a_cache_of_the_caller_is_filled(steps: list[int]) -> None:
    plain, fast = both()
    caches = [DynamicCache(), DynamicCache(config=fast.config)]
    for model, cache in zip((plain, fast), caches, strict=True):
        model.generate(TOKENS, past_key_values=cache, max_length=9, do_sample=False)
    assert len(steps) == 3
    for (keys, values, _), (want_keys, want_values, _) in zip(*reversed(caches), strict=True):
        close(keys, want_keys)
        close(values, want_values)
    assert [type(cache) for cache in caches] == [DynamicCache] * 2


@native
def test_going_on_with_a_cache(steps: list[int]) -> None:
    plain, fast = both()
    whole = plain.generate(TOKENS, **LONG, do_sample=False)
    hidden = torch.tensor([[0, *[1] * 11]] * 3)
    begun = fast.generate(TOKENS, max_length=10, do_sample=False, return_dict_in_generate=True)
    steps.clear()
    rest = fast.generate(begun.sequences, past_key_values=begun.past_key_values, **LONG, do_sample=False)
    assert torch.equal(rest, whole)
    assert len(steps) == 15
    for served, call in (  # by hand: a step, several, and what the decoder does not give
        (1, lambda model, cache: model(whole[:, 9:10], past_key_values=cache).logits),
        (3, lambda model, cache: model(whole[:, 9:12], past_key_values=cache).logits),
        (
            0,
            lambda model, cache: model(whole[:, 9:12], past_key_values=cache, output_hidden_states=True).hidden_states[
                1
            ],
        ),
        (0, lambda model, cache: model(whole[:, 9:12], past_key_values=cache, attention_mask=hidden).logits),
        (0, lambda model, cache: model(whole[:, 9:12], past_key_values=cache, position_ids=hidden[:, 9:]).logits),
        (0, lambda model, cache: model.transformer(whole[:, 9:12], past_key_values=cache)[0]),
        (0, lambda model, cache: model(whole[:, 9:12], past_key_values=cache, return_dict=False)[0]),
    ):
        results = []
        for model in (plain, fast):
            stop = transformers.StoppingCriteriaList([Length(10)])
            past = model.generate(TOKENS, **LONG, do_sample=False, return_dict_in_generate=True, stopping_criteria=stop)
            assert past.past_key_values.get_seq_length() == 9
            steps.clear()
            with torch.no_grad():
                results.append(call(model, past.past_key_values))
        close(results[1], results[0])
        assert len(steps) == served
    # A decoder that changed weights leave behind.
    begun = fast.generate(TOKENS, max_length=10, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        fast.lm_head.weight.neg_()
    rest = fast.generate(begun.sequences, past_key_values=begun.past_key_values, **LONG, do_sample=False)
    assert torch.equal(rest, hf.restore(fast).generate(begun.sequences, **LONG, do_sample=False))


def after_8(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
    """A criterion that leaves a decoder room for more."""
    return torch.full(tokens.shape[:1], tokens.shape[1] >= 8)


STOPPED: dict[str, Any] = {"max_length": 20, "do_sample": False, "stopping_criteria": [after_8]}


@native
def test_a_cache_of_the_caller_outlives_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def rest(decoder: Any) -> int:  # as CudaDecoder's
        del decoder.model
        return 1

    monkeypatch.setattr(cpu.CpuDecoder, "rest", rest)
    plain, fast = both()
    ways: list[Callable[[Any, Any, Tensor], Any]] = [
        lambda model, cache, tokens: model(tokens[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1:],
        lambda model, cache, tokens: model.generate(tokens, past_key_values=cache, **LONG, do_sample=False).float(),
        lambda model, cache, tokens: cache.crop(-1) or next(iter(cache))[0],
    ]
    for way in ways:
        results = []
        for model in (plain, fast):
            cache = DynamicCache()
            tokens = model.generate(TOKENS, past_key_values=cache, **STOPPED)
            model.generate(TOKENS[:, :3], max_new_tokens=4, do_sample=True)  # who has the decoder next
            with torch.no_grad():
                results.append(way(model, cache, tokens))
        close(results[1], results[0])


@native
def test_a_cache_of_another_model_is_an_ordinary_one() -> None:
    results = []
    for model in both():
        cache, other = DynamicCache(), copy.deepcopy(model)
        tokens = model.generate(TOKENS, past_key_values=cache, **STOPPED)
        with torch.no_grad():
            other.lm_head.weight.neg_()
            results.append(other(tokens[:, 7:], past_key_values=cache).logits)
    close(results[1], results[0])


@native
def test_a_cache_whose_read_failed_is_used_again() -> None:
    plain, fast = both()
    results = []
    for model in (plain, fast):
        cache = DynamicCache()
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[16, 99999]]), past_key_values=cache, max_new_tokens=2)
        if model is plain:  # which leaves nothing behind where the first layer was not reached
            assert cache.get_seq_length() == 0
        tokens = model.generate(TOKENS, past_key_values=cache, **STOPPED)
        with torch.no_grad():
            if model is fast:
                with pytest.raises(ValueError, match="token 99999 is not in"):
                    model(torch.tensor([[1, 99999]] * 3), past_key_values=cache)
                assert cache.get_seq_length() == 7
            results.append(model(tokens[:, 7:], past_key_values=cache).logits)
    close(results[1], results[0])


@pytest.mark.gpu
def test_generate_on_cuda() -> None:
    plain, fast = (model.cuda() for model in both())
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert hf.accelerated(fast)[0].by == "cuda"
    caches = DynamicCache(), DynamicCache()
    want, got = (
        model.generate(TOKENS.cuda(), past_key_values=cache, **settings)
        for model, cache in zip((plain, fast), caches, strict=True)
    )
    assert torch.equal(got, want)
    assert torch.equal(fast.generate(TOKENS[:2].cuda(), **settings), want[:2])
    for (keys, values, *_), (want_keys, want_values, *_) in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(keys, want_keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(values, want_values, atol=1e-3, rtol=1e-3)


@native
def test_changed_weights_are_seen_and_unchanged_ones_not_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *a: packs.append(1) or pack(*a))
    _, fast = both()

    def check() -> None:
        assert why(hf.accelerate(fast), "generate") is None
        want = hf.restore(copy.deepcopy(fast)).generate(TOKENS, **LONG, do_sample=False)
        assert torch.equal(fast.generate(TOKENS, **LONG, do_sample=False), want)

    check()
    check()
    assert len(packs) == 1
    fast.transformer.h[0].mlp.c_fc.weight.data.mul_(-1.0)
    check()
    fast.transformer.wte.weight = nn.Parameter(fast.transformer.wte.weight.detach().roll(1, 0))
    check()
    fast.lm_head = nn.Linear(32, 16, bias=False)
    check()
    fast.to(torch.bfloat16)
    fast.generate(TOKENS, **LONG)
    fast.load_state_dict(make().state_dict(), assign=True)
    check()
    assert len(packs) == 6


def test_heads_keep_their_class_in_float32_and_may_be_gone() -> None:
    """Quantizers look for torch's by its type."""
    _, fast = both()
    assert type(fast.lm_head) is nn.Linear
    assert type(hf.accelerate(fast.to(torch.bfloat16)).lm_head) is modules.Linear
    assert type(hf.restore(fast).lm_head) is nn.Linear
    del fast.lm_head
    hf.restore(hf.accelerate(fast))


@native
def test_nothing_stays_when_the_model_goes() -> None:
    _, fast = both()
    fast.generate(TOKENS, **LONG)
    gone = weakref.ref(fast), weakref.ref(fast.transformer.wte.weight)
    del fast
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("name", [LM, NETWORK, CLASSIFIER])
@pytest.mark.parametrize("arguments", [{}, {"output_hidden_states": True}, {"use_cache": False, "return_dict": False}])
def test_the_whole_forward_pass_in_one_call(
    name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no compiled module, PyTorch's layers stand in for its pass."""
    forwards, calls = modules.forwards, []
    run = forwards.run
    if forwards.no_native_decoder():
        run = lambda *a: None  # noqa: E731
        monkeypatch.setattr(forwards, "no_native_decoder", lambda: None)
        monkeypatch.setattr(forwards, "why_not", lambda network, tokens: None)
    monkeypatch.setattr(forwards, "run", lambda *a: calls.append(a) or run(*a))
    plain, fast = (model.to(torch.bfloat16) for model in both(name))
    with torch.no_grad():
        for more in ({}, {"attention_mask": torch.ones_like(TOKENS), "position_ids": torch.arange(5)[None]}):
            want, got = (model(TOKENS, **arguments, **more) for model in (plain, fast))
            assert type(got) is type(want)
            assert len(got) == len(want)
            torch.testing.assert_close(got[0], want[0], rtol=0.1, atol=0.3)
            if arguments.get("output_hidden_states"):
                assert [state.shape for state in got.hidden_states] == [state.shape for state in want.hidden_states]
            if arguments.get("use_cache", True):
                assert type(got.past_key_values) is DynamicCache
                pairs = zip(got.past_key_values, want.past_key_values, strict=True)
                assert all(a[0].shape == b[0].shape for a, b in pairs)
        assert len(calls) == 2
        body = fast if name == NETWORK else fast.transformer
        for away in ({"output_attentions": True}, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 3)}):
            fast(TOKENS, **away)
        fast(TOKENS, position_ids=torch.arange(5).flip(0)[None])
        body.h[1].ln_2.register_forward_hook(lambda *a: None)
        fast(TOKENS)
        assert len(calls) == 2


def test_masks_attentions_and_autocast_are_left_to_transformers() -> None:
    plain, fast = both()
    for arguments in (
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)},
        {"output_attentions": True},
        {"inputs_embeds": torch.ones(3, 5, 32), "input_ids": None},
        {"position_ids": torch.tensor([[4, 3, 2, 1, 0]])},
        {"token_type_ids": TOKENS},
    ):
        arguments = {"input_ids": TOKENS, **arguments}
        want, got = plain(**arguments), fast(**arguments)
        close(got.logits, want.logits)
        for a, b in zip(got.attentions or (), want.attentions or (), strict=True):
            close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(TOKENS).logits, plain(TOKENS).logits)
        assert why(fast, "generate") == "autocast is on"


def test_what_transformers_does_not_know_it_does_not_do() -> None:
    """A configuration of ours says that attention looks ahead; transformers' does not, accelerated or not."""
    plain, fast = both(bidirectional=True)
    close(fast(TOKENS).logits, plain(TOKENS).logits)
    assert torch.equal(*(model.generate(TOKENS, **LONG, do_sample=False) for model in (plain, fast)))
    assert "attention is bidirectional" in str(why(fast, "generate"))


def test_cross_attention_stays() -> None:
    plain, fast = both(NETWORK, add_cross_attention=True)
    states = torch.randn(3, 4, 32)
    got, want = (model(TOKENS, encoder_hidden_states=states, use_cache=False)[0] for model in (fast, plain))
    close(got, want)
    assert why(fast, "h.0.crossattention") == "it is cross-attention"
    assert why(fast, "h.0.attn") is None


@pytest.mark.parametrize("where", ["", "transformer", "transformer.h.0", "transformer.h.1.attn.c_proj", "lm_head"])
def test_hooks_and_patched_forwards_do_what_they_did(where: str, steps: list[int]) -> None:
    def doubled(model: Any, patch: bool) -> Any:
        module = model.get_submodule(where)

        def twice(output: Any) -> Any:
            if isinstance(output, Tensor):
                return 2 * output
            name = next(iter(output)) if isinstance(output, dict) else None
            if name is None:
                return (2 * output[0], *output[1:])
            output[name] = 2 * output[name]
            return output

        if patch:
            inner = module.forward
            module.forward = lambda *args, **kwargs: twice(inner(*args, **kwargs))
        else:
            module.register_forward_hook(lambda module, args, output: twice(output))
        return model

    for patch in (False, True):
        plain, fast = doubled(make(), patch), doubled(hf.accelerate(make()), patch)
        close(fast(TOKENS).logits, plain(TOKENS).logits)
        drawn = [model.generate(TOKENS, **LONG, do_sample=False) for model in (plain, fast)]
        assert torch.equal(*drawn)
        assert "a forward of its own" in str(why(fast, "generate"))
        early = hf.accelerate(doubled(make(), patch))
        close(early(TOKENS).logits, plain(TOKENS).logits)
    assert not steps


def test_hooks_of_the_library_accelerate_are_respected() -> None:
    plain, fast = both()

    class Twice(accelerate_library.hooks.ModelHook):
        def post_forward(self, module: Any, output: Tensor) -> Tensor:
            return 2 * output

    for model in (plain, fast):
        accelerate_library.hooks.add_hook_to_module(model.transformer.h[0].mlp, Twice())
    close(fast(TOKENS).logits, plain(TOKENS).logits)
    assert why(fast, "transformer.h.0.mlp") == "it has a forward of its own"
    assert why(fast, "generate") == "transformer.h.0.mlp has a hook or a forward of its own"


def test_what_is_served_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = both()
    rows = hf.accelerated(fast)
    assert [row.part for row in rows[:4]] == [
        "generate",
        "transformer.forward",
        *(f"transformer.h.0.{part}" for part in ("ln_1", "attn")),
    ]
    assert {row[1:] for row in rows[2:]} == {("ops", None)}
    assert len(rows) == 2 + 2 * 4 + 1
    assert {row.reason for row in hf.accelerated(plain)} == {"it is not accelerated"}
    assert {row.by for row in hf.accelerated(plain)} == {"modules", "transformers"}
    if packing.no_native_decoder() is None:
        assert rows[0] == hf.Served("generate", "cpu", None)

    class Mine(theirs.ImageGPTMLP):
        pass

    class Root(theirs.ImageGPTForCausalImageModeling):
        pass

    model = make(activation_function="silu")
    model.__class__, model.transformer.h[0].mlp.__class__ = Root, Mine
    model.transformer.h[1].attn.bias.fill_(True)
    monkeypatch.setattr(theirs.ImageGPTLayerNorm, "forward", lambda self, tensor: tensor)
    reasons = {row.part: row.reason for row in hf.accelerated(hf.accelerate(model))}
    assert reasons["generate"] == f"it is a {__name__}.{Root.__qualname__}"
    assert reasons["transformer.h.0.mlp"] == f"it is a {__name__}.{Mine.__qualname__}"
    assert reasons["transformer.h.1.mlp"] == (
        "its activation, a SiLUActivation, has no kernel, or something is around it"
    )
    assert reasons["transformer.h.1.attn"] == "its mask is not the causal one"
    assert reasons["transformer.ln_f"] == "the forward of transformers' ImageGPTLayerNorm has been replaced"
    monkeypatch.undo()
    fast.train()
    assert why(fast, "generate") == "the model is in training mode"
    fast.eval().transformer.h[1].ln_1.eps = 0.1
    assert why(fast, "generate") == "a norm or an activation is not the configuration's"
    fast.transformer.h[1].ln_1.eps = 1e-5
    fast.transformer.h[1].attn.scale_attn_weights = False
    assert why(fast, "generate") == "the scale of the scores is not the configuration's"
    fast.transformer.h[0].attn.bias.fill_(True)
    hf.accelerate(fast)
    assert why(fast, "transformer.h.0.attn") == "its mask is not the causal one"
    fast.transformer.h = fast.transformer.h[1:]
    assert "it is not the network that its configuration says" in str(why(fast, "generate"))


def test_what_is_refused() -> None:
    for call in (hf.accelerate, hf.restore, hf.accelerated):
        with pytest.raises(
            TypeError, match=rf"{call.__name__}: model is a torch\.nn.*Linear, with no ImageGPT of tran"
        ):
            call(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"model is a builtins\.NoneType, .* want its ImageGPTModel"):
            call(None)  # type: ignore[type-var, arg-type]
    _, fast = both()
    with pytest.raises(ValueError, match=r"past_key_values is a StaticCache, .*want a DynamicCache"):
        fast.generate(TOKENS, **LONG, cache_implementation="static")
    with pytest.raises(IndexError):  # as transformers has it: there is no such position
        fast.generate(TOKENS, max_length=30, do_sample=False)


def test_files_copies_and_pickles(tmp_path: Path) -> None:
    plain, fast = both()
    fast.generate(TOKENS, **LONG)
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["architectures"] == [LM]
    loaded = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert type(loaded) is type(plain)
    assert torch.equal(loaded(TOKENS).logits, plain(TOKENS).logits)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert classes(twin) == classes(fast)
        assert torch.equal(twin(TOKENS).logits, fast(TOKENS).logits)
        assert torch.equal(*(model.generate(TOKENS, **LONG, do_sample=False) for model in (twin, fast)))


class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index], "labels": TOKENS[index].clamp(max=15)}


def test_trainer_before_and_after(tmp_path: Path, steps: list[int]) -> None:
    plain, fast = both()
    late = make()
    for model in (plain, fast, late):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Images())
        trainer.train()
        if model is late:
            hf.accelerate(model)
        assert trainer.predict(Images()).metrics["test_loss"] > 0
    for model in (fast, late):
        for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(*(m.eval().generate(TOKENS, **LONG, do_sample=False) for m in (model, hf.restore(model))))


@pytest.mark.parametrize("late", [False, True])
def test_peft_before_and_after(late: bool, steps: list[int]) -> None:
    model = make()
    settings = peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, r=2)
    if not late:
        hf.accelerate(model)
    adapted = peft.get_peft_model(model, settings)
    if late:
        assert hf.accelerate(adapted) is adapted
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    plain = hf.restore(copy.deepcopy(adapted))
    for each in (adapted, plain):
        each.train()(input_ids=TOKENS, labels=TOKENS.clamp(max=15)).loss.backward()
        each.eval()
    gradients = zip(adapted.named_parameters(), plain.parameters(), strict=True)
    for (name, got), want in gradients:
        assert (got.grad is None) == (want.grad is None) == ("lora" not in name)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)
    part = "base_model.model.generate"
    assert why(adapted, part) == "transformer.h.0.attn.c_attn is a peft.tuners.lora.layer.Linear"
    want = plain.generate(input_ids=TOKENS, **LONG, do_sample=False)
    assert torch.equal(adapted.generate(input_ids=TOKENS, **LONG, do_sample=False), want)
    assert not steps
    merged = adapted.merge_and_unload()
    assert merged is model
    assert torch.equal(merged.generate(TOKENS, **LONG, do_sample=False), want)
    assert steps or packing.no_native_decoder()


def test_pipelines() -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (16, 3))
    processor = transformers.ImageGPTImageProcessorPil(clusters=clusters, size={"height": 4, "width": 4})
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 9, 3), np.uint8))
    for name, task in ((CLASSIFIER, "image-classification"), (NETWORK, "image-feature-extraction")):
        want, got = (transformers.pipeline(task, model=m, image_processor=processor)(picture) for m in both(name))
        if name == CLASSIFIER:
            assert [row["label"] for row in got] == [row["label"] for row in want]
            got, want = ([row["score"] for row in rows] for rows in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_torch_compile(steps: list[int]) -> None:
    torch.compiler.reset()
    plain, fast = both(n_layer=1)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(TOKENS, use_cache=False).logits, plain(TOKENS).logits)
    fast.compile(backend="eager")
    assert torch.equal(*(model.generate(TOKENS, max_length=8, do_sample=False) for model in (fast, plain)))
    assert why(fast, "generate") == "torch compiles what a call of the model does"
    assert not steps
    torch.compiler.reset()


def test_an_export_runs_without_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size at which kernels begin to serve: no op is asked."""
    plain, fast = both(n_layer=1)
    for op in ("rms_norm", "causal_attention", "causal_attention_packed", "activation"):
        monkeypatch.setattr(ops, op, None)
    program = torch.export.export(fast, (TOKENS,), {"use_cache": False}, strict=False)
    close(program.module()(TOKENS, use_cache=False).logits, plain(TOKENS).logits)
    fast.config.return_dict = fast.config.use_cache = False
    traced = torch.jit.trace(fast, (TOKENS,), check_trace=False)
    close(traced(TOKENS)[0], plain(TOKENS).logits)
