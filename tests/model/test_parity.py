"""The model classes against transformers' on the same random weights, by the rule in tolerance.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tolerance import Tensors, Trio, assert_parity, compare, gradients, losses, make_trio, outputs, randomise, tokens
from torch import Tensor, nn

from igpt_fast import DynamicCache, StaticCache

CAUSAL, CLASSIFIER, BASE = "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification", "ImageGPTModel"
DTYPES = [torch.float32, torch.bfloat16]
SMALL = {"n_layer": 2, "n_positions": 128, "vocab_size": 65, "n_embd": 128, "n_head": 2, "num_labels": 10}


def check_forward(trio: Trio, ids: Tensor) -> None:
    """Outputs and hidden states; the attentions too, which are another path, written out."""
    trio.assert_parity(lambda model: outputs(model, input_ids=ids, output_attentions=False))
    trio.assert_parity(lambda model: outputs(model, input_ids=ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "length"), [(32, 65), (64, 97), (96, 65), (128, 66)])
def test_causal_model(head_dim: int, length: int, dtype: torch.dtype) -> None:
    trio = make_trio(CAUSAL, dtype, **{**SMALL, "n_embd": 2 * head_dim})
    ids = tokens(trio.ours.config, 3, length)
    check_forward(trio, ids)
    trio.assert_parity(lambda model: losses(model, 2, 33))
    trio.assert_parity(lambda model: gradients(model, input_ids=ids, labels=ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_classifier(problem: str | None, dtype: torch.dtype) -> None:
    trio = make_trio(CLASSIFIER, dtype, **SMALL, problem_type=problem)
    ids = tokens(trio.ours.config, 3, 66)
    labels = (torch.arange(48) % 10).view(16, 3)
    if problem is not None:
        labels = torch.rand(16, 3, 10).round()
    trio.assert_parity(lambda model: outputs(model, input_ids=ids))
    trio.assert_parity(lambda model: losses(model, 3, 17, labels.__getitem__))
    trio.assert_parity(
        lambda model: gradients(model, input_ids=ids, labels=labels[0].to(model.dtype) if problem else labels[0])
    )


def test_regression_of_one_number() -> None:
    trio = make_trio(CLASSIFIER, torch.float32, **{**SMALL, "num_labels": 1})
    labels = torch.randn(16, 3)
    trio.assert_parity(lambda model: losses(model, 3, 7, labels.__getitem__))
    assert trio.ours.config.problem_type == trio.theirs.config.problem_type == "regression"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"activation_function": "gelu_new", "n_inner": 72, "layer_norm_epsilon": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    trio = make_trio(BASE, dtype, **{**SMALL, "n_embd": 64}, **options)
    check_forward(trio, tokens(trio.ours.config, 2, 65))


def test_half_precision() -> None:
    trio = make_trio(CAUSAL, torch.float16, **{**SMALL, "n_embd": 64})
    check_forward(trio, tokens(trio.ours.config, 2, 33))


def test_base_model_and_other_inputs() -> None:
    trio = make_trio(BASE, torch.float32, **SMALL)
    ids = tokens(trio.ours.config, 2, 33)
    places = torch.randperm(128)[:33][None]
    embeds = torch.randn(2, 33, 128)
    trio.assert_parity(lambda model: outputs(model, input_ids=ids, position_ids=places, token_type_ids=ids.flip(1)))
    trio.assert_parity(lambda model: outputs(model, inputs_embeds=embeds.to(model.dtype)))
    trio.assert_parity(lambda model: outputs(model, input_ids=ids[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_left_padding(dtype: torch.dtype) -> None:
    """A padded batch equals transformers' at the visible positions, and the rows run alone."""
    trio = make_trio(CAUSAL, dtype, **SMALL)
    lengths, total = (65, 40, 1), 65
    ids = tokens(trio.ours.config, 3, total)
    visible = torch.arange(total) >= total - torch.tensor(lengths)[:, None]
    places = (visible.cumsum(1) - 1).clamp(min=0)

    def padded(model: nn.Module, **kwargs: Any) -> Tensors:
        found = outputs(model, input_ids=ids, attention_mask=visible.long(), position_ids=places, **kwargs)
        return {name: value[visible] for name, value in found.items() if value.ndim == 3}

    trio.assert_parity(lambda model: padded(model, output_attentions=False))
    trio.assert_parity(padded)
    alone = [
        outputs(trio.ours, input_ids=row[total - n :][None])["logits"][0] for row, n in zip(ids, lengths, strict=True)
    ]
    theirs, exact = padded(trio.theirs)["logits"], padded(trio.exact)["logits"]
    assert_parity(torch.cat(alone), theirs, exact)


def test_padding_gives_the_gradients_of_the_rows_alone() -> None:
    trio = make_trio(CAUSAL, torch.float32, **SMALL)
    ids = tokens(trio.ours.config, 1, 40)
    padded = torch.cat([tokens(trio.ours.config, 1, 25, seed=9), ids], dim=1)
    visible = torch.arange(65)[None] >= 25
    arguments = {
        "input_ids": padded,
        "labels": padded.masked_fill(torch.arange(65)[None] <= 25, -100),
        "attention_mask": visible,
        "position_ids": (visible.cumsum(1) - 1).clamp(min=0),
    }
    ours = gradients(trio.ours, **arguments)
    theirs, exact = (gradients(model, input_ids=ids, labels=ids) for model in (trio.theirs, trio.exact))
    for name in ours:
        assert_parity(ours[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["own", "dynamic", "static", "transformers"])
def test_cached_continuation(kind: str, dtype: torch.dtype) -> None:
    """In pieces of 1, 30, 1, 33 positions with a cache, as transformers in one go."""
    trio = make_trio(CAUSAL, dtype, **SMALL)
    config = trio.ours.config
    ids = tokens(config, 3, 65)
    cache: Any = {
        "own": lambda: None,
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(2, 3, 2, 65, 64, dtype=dtype, device="cpu"),
        "transformers": transformers.DynamicCache,
    }[kind]()
    pieces = []
    with torch.no_grad():
        for piece in ids.split([1, 30, 1, 33], dim=1):
            result = trio.ours(piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            pieces.append(result.logits)
    assert cache.get_seq_length() == 65
    theirs, exact = (outputs(model, input_ids=ids)["logits"] for model in (trio.theirs, trio.exact))
    assert_parity(torch.cat(pieces, dim=1), theirs, exact)


def test_cached_continuation_of_a_padded_batch() -> None:
    trio = make_trio(CAUSAL, torch.float32, **SMALL)
    ids = tokens(trio.ours.config, 2, 40)
    visible = torch.arange(40) >= torch.tensor([[0], [13]])
    places = (visible.cumsum(1) - 1).clamp(min=0)
    pieces, cache = [], DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 7), (7, 20), (20, 21), (21, 40)):
            arguments = {"attention_mask": visible[:, :end], "position_ids": places[:, start:end]}
            pieces.append(trio.ours(ids[:, start:end], past_key_values=cache, **arguments).logits)
    theirs, exact = (
        outputs(model, input_ids=ids, attention_mask=visible.long(), position_ids=places)["logits"][visible]
        for model in (trio.theirs, trio.exact)
    )
    assert_parity(torch.cat(pieces, dim=1)[visible], theirs, exact)


def test_float64_is_float64() -> None:
    """What separates us from transformers in float64 is rounding: the fp32 error, scaled by the ratio of the eps."""
    trio = make_trio(CAUSAL, torch.float32, **SMALL)
    ids = tokens(trio.ours.config, 2, 65)
    theirs, exact = (outputs(model, input_ids=ids) for model in (trio.theirs, trio.exact))
    ours = outputs(trio.ours.double(), input_ids=ids)
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for name, value in ours.items():
        assert value.dtype == torch.float64
        rounding = compare(theirs[name], theirs[name], exact[name])
        unit = torch.finfo(torch.float64).eps * float(exact[name].abs().max())
        # Two results that are each off by rounding, and twice for ours.
        assert float((value - exact[name]).abs().max()) <= 3 * rounding.theirs * scale + unit, name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)])
def test_the_full_small_configuration(dtype: torch.dtype) -> None:
    trio = make_trio(CAUSAL, dtype)
    assert (trio.ours.config.n_layer, trio.ours.config.n_embd, trio.ours.num_parameters()) == (24, 512, 76_682_240)
    ids = tokens(trio.ours.config, 1, 129)
    trio.assert_parity(lambda model: outputs(model, input_ids=ids, output_attentions=False))
    trio.assert_parity(lambda model: losses(model, 1, 9))


def test_the_rule_can_fail() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    theirs = exact.to(torch.bfloat16)
    assert compare(theirs, theirs, exact).passed
    assert compare(exact.float(), theirs, exact).passed
    assert not compare(theirs * 1.02, theirs, exact).passed
    assert not compare(theirs.masked_fill(torch.arange(100) == 7, float("nan")), theirs, exact).passed
    assert not compare(theirs + 0.02, theirs, exact).passed  # too small for the largest error, but systematic


def test_a_wrong_weight_is_noticed() -> None:
    trio = make_trio(CAUSAL, torch.bfloat16, **SMALL)
    ids = tokens(trio.ours.config, 2, 65)
    randomise(trio.ours.transformer.h[1].ln_2, seed=5)
    with pytest.raises(AssertionError, match=r"hidden_states\[2\]"):
        trio.assert_parity(lambda model: outputs(model, input_ids=ids))
