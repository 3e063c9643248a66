"""The pieces of our models, called and hooked as transformers' are; cross-attention, whose cache crashes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_models import ids, small
from torch import Tensor
from torch.utils import _pytree

import igpt_fast
from igpt_fast import hf
from igpt_fast.engines.cpu.forward import why_not
from igpt_fast.engines.encoder_cache import EncoderDecoderCache


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """One of ours and one of theirs of the same weights."""
    model = small(torch.float64)
    return model, hf.to_transformers(model)


def test_blocks_and_attention_by_themselves(pair: tuple[Any, Any]) -> None:
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    added = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    added[0, :, :, 1] = added[1, :, :, 0] = torch.finfo(torch.float64).min
    added[1, :, 0, 0] = 0.0  # the first position sees itself
    for part in (lambda model: model.transformer.h[1], lambda model: model.transformer.h[0].attn):
        ours, theirs = (part(model) for model in pair)
        for mask in (None, added):
            found, wanted = ours(x, attention_mask=mask), theirs(x, attention_mask=mask)
            assert isinstance(found, tuple)
            torch.testing.assert_close(found[0], wanted[0])
        found, wanted = (each(hidden_states=x, output_attentions=True) for each in (ours, theirs))
        torch.testing.assert_close(found[1], wanted[1])
    cache = transformers.DynamicCache()
    first = pair[0].transformer.h[0](x[:, :3], layer_past=cache)[0]
    second = pair[0].transformer.h[0](x[:, 3:], cache)[0]
    torch.testing.assert_close(torch.cat([first, second], dim=1), pair[1].transformer.h[0](x)[0])


def test_the_dropout_of_the_attention_is_called_where_it_is_hooked(pair: tuple[Any, Any]) -> None:
    tokens = ids(pair[0], 2, 6)
    plain = pair[0](tokens).logits
    seen: list[list[Tensor]] = [[], []]
    for model, kept in zip(pair, seen, strict=True):
        for block in model.transformer.h:
            block.attn.attn_dropout.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    torch.testing.assert_close(pair[0](tokens).logits, plain)
    pair[1](tokens)
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(seen[0]) == 2
    pair[0].transformer.h[0].attn.attn_dropout = torch.nn.Hardtanh(0.0, 0.1)  # another module is called as well
    assert not torch.equal(pair[0](tokens).logits, plain)


def across(seed: int = 0) -> Any:
    return small(torch.float64, seed, add_cross_attention=True, attn_pdrop=0.0)


def their_model(model: Any) -> Any:
    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict()))
    theirs.double().eval().load_state_dict(model.state_dict())
    return theirs


def test_cross_attention() -> None:
    model, tokens, states = across(), ids(across(), 2, 6), torch.randn(2, 4, 48, dtype=torch.float64)
    theirs = their_model(model)
    assert list(model.state_dict()) == list(theirs.state_dict())
    wanted = theirs(tokens, encoder_hidden_states=states, use_cache=False, output_attentions=True)
    found = model(tokens, encoder_hidden_states=states, output_attentions=True)
    torch.testing.assert_close(found.logits, wanted.logits)
    for ours, of_theirs in zip(found.cross_attentions, wanted.cross_attentions, strict=True):
        torch.testing.assert_close(ours, of_theirs)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    hidden = model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask).logits
    torch.testing.assert_close(hidden, model(tokens, encoder_hidden_states=states[:, :2]).logits)
    pair = (transformers.DynamicCache(), transformers.DynamicCache())
    for cache in (EncoderDecoderCache(), transformers.EncoderDecoderCache(*pair), igpt_fast.DynamicCache()):
        steps = [model(part, encoder_hidden_states=states, past_key_values=cache).logits for part in tokens.split(2, 1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted.logits)
    assert isinstance(found.past_key_values, EncoderDecoderCache)
    with pytest.raises(ValueError, match=r"encoder_attention_mask: expected \(B, S\) = \(2, 4\)"):
        model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask[:, :2])


def test_an_encoders_keys_are_made_once() -> None:
    model, states = across(), torch.randn(1, 4, 48, dtype=torch.float64)
    calls: list[None] = []
    model.transformer.h[0].crossattention.c_attn.register_forward_hook(lambda *_: calls.append(None))
    cache = model(ids(model, 1, 3), encoder_hidden_states=states).past_key_values
    model(ids(model, 1, 1), encoder_hidden_states=states, past_key_values=cache)
    assert len(calls) == 1


def test_an_encoders_keys_are_used_without_its_states() -> None:
    model, tokens, states = across(), ids(across(), 2, 6), torch.randn(2, 4, 48, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    for encoder_mask in (None, mask):
        arguments = {"encoder_attention_mask": encoder_mask}
        wanted = model(tokens, encoder_hidden_states=states, **arguments).logits
        cache = model(tokens[:, :4], encoder_hidden_states=states, **arguments).past_key_values
        found = model(tokens[:, 4:], past_key_values=cache, **arguments).logits
        torch.testing.assert_close(found, wanted[:, 4:])
    with pytest.raises(ValueError, match=r"encoder_attention_mask: expected \(B, S\) = \(2, 4\), got \(2, 3\)"):
        model(tokens[:, :1], past_key_values=cache, encoder_attention_mask=mask[:, :3])


@pytest.mark.parametrize("shape", [(1, 4, 48), (4, 4, 48), (2, 4, 47), (2, 48)])
def test_states_of_another_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected \(B, S, n_embd\) = \(2, S, 48\), got"):
        across()(ids(across(), 2, 6), encoder_hidden_states=torch.randn(shape, dtype=torch.float64))


def test_the_parts_of_an_encoders_cache() -> None:
    model, tokens, states = across(), ids(across(), 2, 6), torch.randn(2, 4, 48, dtype=torch.float64)
    cache = model(tokens, encoder_hidden_states=states).past_key_values
    paths, tree = _pytree.tree_flatten_with_path(cache)
    assert _pytree.keystr(paths[0][0]) == ".self_attention_cache.keys[0]"
    assert _pytree.treespec_loads(_pytree.treespec_dumps(tree)) == tree
    twins = [_pytree.tree_unflatten([leaf.clone() for _, leaf in paths], tree), EncoderDecoderCache(iter(cache))]
    for twin in twins:
        assert len(list(twin)) == 2
        for layer, wanted in zip(twin, cache, strict=True):
            assert [part.shape[2] for part in layer] == [6, 6, 4, 4]
            assert all(map(torch.equal, layer, wanted))
        assert twin.is_updated == {0: True, 1: True}
    twins[0].batch_select_indices(torch.tensor([1]))
    one = model(tokens[1:], past_key_values=twins[0]).logits
    torch.testing.assert_close(one, model(tokens, past_key_values=cache).logits[1:])
    alone = EncoderDecoderCache(model(tokens).past_key_values)
    assert [len(layer) for layer in alone] == [2, 2]


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_with_an_encoder(options: dict[str, Any]) -> None:
    model, tokens, states = across(), ids(across(), 2, 3), torch.randn(2, 4, 48, dtype=torch.float64)
    wanted = their_model(model).generate(
        tokens, max_new_tokens=4, encoder_hidden_states=states, **{**options, "use_cache": False}
    )
    found = model.generate(tokens, max_new_tokens=4, encoder_hidden_states=states, **options)
    assert torch.equal(found, wanted)


def test_without_an_encoder_it_is_the_same_network() -> None:
    model = across()
    plain = small(torch.float64)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "cross" not in k})
    tokens = ids(model, 2, 6)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=3), plain.generate(tokens, max_new_tokens=3))
    assert "int64" not in str(why_not(model.to(torch.bfloat16).transformer, tokens))


def test_recomputation_with_an_encoder() -> None:
    states = torch.randn(2, 4, 48, dtype=torch.float64, requires_grad=True)
    grads = []
    for recompute in (False, True):
        model = small(torch.float64, add_cross_attention=True, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
        if recompute:
            model.gradient_checkpointing_enable()
        states.grad = None
        model(ids(model, 2, 6), encoder_hidden_states=states).logits.square().sum().backward()
        assert states.grad is not None
        grads.append(states.grad.clone())
    torch.testing.assert_close(*grads)
