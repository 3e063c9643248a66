"""The model classes by themselves: interface, masks, checkpointing, dropout, torch's machinery, errors."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers
from tolerance import assert_parity
from torch import Tensor, nn

import igpt_fast
from igpt_fast import DynamicCache, ImageGPTConfig, StaticCache, ops
from igpt_fast import model as model_module
from igpt_fast.engines import memory
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.model.outputs import CausalImageModelingOutput

CAUSAL, CLASSIFIER, BASE = "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification", "ImageGPTModel"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make(head: str = CAUSAL, **changes: Any) -> Any:
    small = {"n_layer": 2, "n_positions": 16, "vocab_size": 9, "n_embd": 32, "n_head": 2, "num_labels": 3}
    model = getattr(model_module, head)(ImageGPTConfig(**{**small, **NO_DROPOUT, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


IDS = torch.tensor([[8, 1, 2, 3, 4, 5, 6, 7], [8, 7, 0, 5, 4, 0, 2, 1]])


# --- as transformers has it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
@pytest.mark.parametrize("options", [{}, {"n_inner": 12}])
def test_state_dict_has_the_keys_and_shapes_of_transformers(head: str, options: dict[str, int]) -> None:
    ours = make(head, **options)
    fields = {name: getattr(ours.config, name) for name in ("n_layer", "n_positions", "vocab_size", "n_embd", "n_head")}
    theirs = getattr(transformers, head)(transformers.ImageGPTConfig(**fields, **options, num_labels=3))
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    ours.base_model.requires_grad_(False)
    theirs.base_model.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
def test_forward_takes_the_arguments_of_transformers_and_no_others(head: str) -> None:
    forward = inspect.signature(getattr(transformers, head).forward).parameters.values()
    theirs = {p.name: p.default for p in forward if p.kind is not p.VAR_KEYWORD}
    ours = inspect.signature(getattr(model_module, head).forward).parameters
    assert {p.name: p.default for p in ours.values()} == theirs
    assert list(ours) == list(theirs)  # positions too
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make(head)(IDS, cache_position=torch.arange(8))


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
@pytest.mark.parametrize("wanted", [False, True])
def test_outputs_have_the_fields_of_transformers(head: str, wanted: bool) -> None:
    ours = make(head)
    theirs = getattr(transformers, head)(
        transformers.ImageGPTConfig(**ours.config.extra, n_layer=2, n_positions=16, vocab_size=9, n_embd=32, n_head=2)
    ).eval()
    options: dict[str, Any] = {"output_hidden_states": wanted, "output_attentions": wanted, "use_cache": wanted}
    if head != BASE:
        options["labels"] = IDS if head == CAUSAL else torch.tensor([0, 1])
    if head == CAUSAL:
        options["labels"] = IDS.clamp(max=7)
    with torch.no_grad():
        mine, other = ours(IDS, **options), theirs(IDS, **options)
        as_tuple = ours(IDS, **options, return_dict=False)
    assert list(mine.keys()) == list(other.keys())
    assert {f.name for f in fields(mine)} == {f.name for f in fields(other)}
    assert len(mine) == len(other) == len(as_tuple) == len(mine.to_tuple())
    for i, name in enumerate(mine):
        assert mine[i] is mine[name] is getattr(mine, name) is mine.get(name)
        assert type(mine[i]) is type(other[i]) or name == "past_key_values"
        if isinstance(mine[i], tuple):
            assert [x.shape for x in mine[i]] == [x.shape for x in other[i]] == [x.shape for x in as_tuple[i]]
    assert mine[:1] == mine.to_tuple()[:1]
    assert ("past_key_values" in mine) is wanted
    assert mine.cross_attentions is None if head != CLASSIFIER else not hasattr(mine, "cross_attentions")
    with pytest.raises(KeyError):
        mine["attentions" if not wanted else "no_such_field"]


def test_configuration_gives_the_defaults() -> None:
    model = make(output_hidden_states=True, output_attentions=True, use_cache=False, return_dict=False)
    with torch.no_grad():
        logits, hidden, attentions = model(IDS)
    assert (logits.shape, len(hidden), len(attentions)) == ((2, 8, 8), 3, 2)
    assert torch.equal(attentions[0].sum(-1).round(decimals=4), torch.ones(2, 2, 8))


def test_aliases() -> None:
    assert igpt_fast.ImageGPTForCausalLM is igpt_fast.ImageGPTForCausalImageModeling


@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing_but_the_memory(kwargs: dict[str, bool], every: int) -> None:
    model = make(attn_pdrop=0.3, resid_pdrop=0.3).train()  # dropout: the same masks in the recomputation

    def run() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(3)
        loss = model(IDS, labels=IDS.clamp(max=7)).loss
        return loss.detach(), _backward(model, loss)

    plain = run()
    calls = []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(kwargs or None, every_n_layers=every)
    assert model.is_gradient_checkpointing
    loss, gradients = run()
    assert len(calls) == 2 + 2 // every  # forward, and the recomputed blocks
    assert torch.equal(loss, plain[0])
    for a, b in zip(gradients, plain[1], strict=True):
        assert torch.equal(a, b)
    assert model(IDS).past_key_values is None
    assert model.eval()(IDS).past_key_values is not None
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def _backward(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_gradient_checkpointing_and_caches() -> None:
    model = make().train()
    model.activation_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache=True has no effect"):
        assert model(IDS, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values cannot be combined with gradient checkpointing"):
        model(IDS, past_key_values=DynamicCache())
    model.activation_checkpointing_disable()
    assert model(IDS, use_cache=True).past_key_values.get_seq_length() == 8
    with pytest.raises(ValueError, match="every_n_layers is 0"):
        model.gradient_checkpointing_enable(every_n_layers=0)


@pytest.mark.parametrize("name", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_works_in_training_only(name: str) -> None:
    model = make(BASE, **{name: 0.5})
    with torch.no_grad():
        plain = model(IDS)[0]
        assert torch.equal(model(IDS)[0], plain)
        model.train()
        assert not torch.equal(model(IDS)[0], plain)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert torch.equal(model(IDS)[0], plain)


def test_problem_type_is_inferred_once() -> None:
    model = make(CLASSIFIER)
    model(IDS, labels=torch.tensor([0, 2]))
    assert model.config.problem_type == "single_label_classification"
    model = make(CLASSIFIER)
    loss = model(IDS, labels=torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).loss
    assert model.config.problem_type == "multi_label_classification"
    assert loss.isfinite()


def test_ignored_labels_and_fp32_loss() -> None:
    model = make()
    labels = IDS.clamp(max=7)
    partly = labels.clone()
    partly[:, 4:] = -100
    with torch.no_grad():
        assert torch.allclose(model(IDS, labels=partly).loss, model(IDS[:, :4], labels=labels[:, :4]).loss)
        half = model.bfloat16()(IDS, labels=labels)
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32


# --- masks, positions, caches --------------------------------------------------------------------------------------


def test_nothing_hidden_reaches_a_visible_position() -> None:
    """Whatever stands in the padding: another token, or an embedding that is NaN."""
    model = make(BASE)
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    embeds = model.wte(IDS).detach()
    poisoned = embeds.masked_fill(mask[:, :, None] == 0, math.nan)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask)[0]
        found = model(inputs_embeds=poisoned, attention_mask=mask)[0]
        # In the cache the poison lies before the visible positions.
        cache = DynamicCache()
        pieces = [model(inputs_embeds=poisoned[:, :5], attention_mask=mask[:, :5], past_key_values=cache)[0]]
        pieces.append(model(inputs_embeds=poisoned[:, 5:], attention_mask=mask, past_key_values=cache)[0])
    assert torch.equal(found[mask == 1], expected[mask == 1])
    torch.testing.assert_close(torch.cat(pieces, 1)[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_ones_is_no_mask(dtype: torch.dtype) -> None:
    model = make()
    with torch.no_grad():
        masked = model(IDS, attention_mask=torch.ones(2, 8, dtype=dtype)).logits
        torch.testing.assert_close(masked, model(IDS).logits)


def test_causality() -> None:
    model = make()
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 8
    with torch.no_grad():
        before, after = model(IDS).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_static_cache_to_the_last_position() -> None:
    model = make()
    ids = torch.randint(8, (2, 16))
    cache = StaticCache(2, 2, 2, 16, 16, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        found = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(16)], dim=1)
        torch.testing.assert_close(found, model(ids).logits)
        with pytest.raises(ValueError, match="17 positions exceed n_positions=16"):
            model(ids[:, :1], past_key_values=cache)


def test_use_cache_false_returns_none_but_keeps_a_given_one() -> None:
    model = make()
    assert model(IDS, use_cache=False).past_key_values is None
    cache = DynamicCache()
    assert model(IDS, use_cache=False, past_key_values=cache).past_key_values is cache


def test_caches_of_transformers() -> None:
    """Its DynamicCache works, in a pair with an encoder's too; the StaticCache, silently wrong there, raises."""
    model = make()
    theirs = transformers.ImageGPTConfig(n_layer=2, n_embd=32, n_head=2)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=theirs)
        model(IDS[:, :3], past_key_values=cache)
        torch.testing.assert_close(model(IDS[:, 3:], past_key_values=cache).logits, model(IDS).logits[:, 3:])
        with pytest.raises(
            ValueError, match=r"StaticCache returned 16 positions after 0 \+ 8; use igpt_fast.StaticCache"
        ):
            model(IDS, past_key_values=transformers.StaticCache(theirs, max_cache_len=16))
        pair = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        torch.testing.assert_close(model(IDS, past_key_values=pair).logits, model(IDS).logits)
        assert pair.get_seq_length() == 8


def test_a_cache_of_another_model_is_refused() -> None:
    model = make()
    with torch.no_grad():
        cache = make(n_head=4)(IDS).past_key_values
        with pytest.raises(ValueError, match=r"made for \(batch, heads, head_dim\) = \(2, 4, 8\), got \(2, 2, 16\)"):
            model(IDS, past_key_values=cache)
        cache = make(n_layer=1)(IDS).past_key_values
        with pytest.raises(ValueError, match="holds 8 positions of the first layer and 0 of the last one"):
            model(IDS, past_key_values=cache)


# --- torch's machinery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
def test_copies_and_pickles(head: str) -> None:
    model = make(head)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model(IDS, output_hidden_states=True)
    for twin in twins:
        assert twin.config == model.config
        assert twin.config is not model.config
        assert torch.equal(twin(IDS)[0], expected[0])
    assert torch.equal(pickle.loads(pickle.dumps(expected)).hidden_states[1], expected.hidden_states[1])


@pytest.mark.parametrize("head", [CAUSAL, CLASSIFIER])
def test_compiles_in_one_graph_with_its_backward(head: str) -> None:
    model = make(head)
    labels = IDS.clamp(max=7) if head == CAUSAL else torch.tensor([0, 2])
    arguments = {"labels": labels, "attention_mask": torch.ones(2, 8), "output_hidden_states": True}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = model(IDS, **arguments), compiled(IDS, **arguments)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.past_key_values.get_seq_length() == 8
    pairs = zip(_backward(model, found.loss), copy.deepcopy(_backward(model, expected.loss)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    # A second call with the cache that the first one made.
    if head == CAUSAL:
        with torch.no_grad():
            a = compiled(IDS[:, :2], past_key_values=model(IDS).past_key_values).logits
            torch.testing.assert_close(a, model(IDS[:, :2], past_key_values=model(IDS).past_key_values).logits)


def test_exports_with_any_length() -> None:
    model = make()
    length = torch.export.Dim("length", min=2, max=16)
    program = torch.export.export(model, (IDS,), dynamic_shapes={"input_ids": {1: length}})
    for ids in (IDS, IDS[:, :5]):
        found = program.module()(ids)
        assert isinstance(found, CausalImageModelingOutput)
        torch.testing.assert_close(found.logits, model(ids).logits)
    assert found.past_key_values.get_seq_length() == 5


def test_functional_call_and_per_sample_gradients() -> None:
    model = make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        arguments = {"input_ids": ids[None], "labels": ids[None].clamp(max=7), "use_cache": False}
        return torch.func.functional_call(model, parameters, (), arguments).loss

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IDS)
    _backward(model, model(IDS, labels=IDS.clamp(max=7)).loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make()
    model = model.to(dtype)
    assert model.dtype == dtype
    out = model(IDS, labels=IDS.clamp(max=7), output_hidden_states=True, output_attentions=True)
    assert all(x.dtype == dtype for x in (out.logits, *out.hidden_states, *out.attentions))
    assert all(gradient.isfinite().all() for gradient in _backward(model, out.loss))


def test_autocast() -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS.clamp(max=7), output_hidden_states=True)
        assert out.logits.dtype == torch.bfloat16
        assert out.hidden_states[1].dtype == torch.float32  # the residual stream stays wide
        assert out.loss.dtype == torch.float32
        cache = StaticCache(2, 2, 2, 16, 16, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            model(IDS[:, :3], past_key_values=cache)
            found = model(IDS[:, 3:], past_key_values=cache).logits
    exact = copy.deepcopy(model).double()(IDS).logits[:, 3:]
    assert_parity(found, out.logits[:, 3:], exact)
    assert all(gradient.dtype == torch.float32 for gradient in _backward(model, out.loss))


def test_meta_device_and_empty_batch() -> None:
    with torch.device("meta"):
        model = model_module.ImageGPTModel(ImageGPTConfig.preset("xl"))
        assert model(torch.zeros(1, 5, dtype=torch.long))[0].shape == (1, 5, 3072)
    assert 6.7e9 < model.num_parameters() < 6.9e9
    assert make()(IDS[:0]).logits.shape == (0, 8, 8)
    assert make(CLASSIFIER)(IDS[:0], attention_mask=torch.ones(0, 8)).logits.shape == (0, 3)


def test_embeddings() -> None:
    model = make()
    assert model.get_input_embeddings() is model.transformer.wte is model.base_model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    assert make(CLASSIFIER).get_output_embeddings() is None
    table, head = nn.Embedding(9, 32), nn.Linear(32, 8, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert (model.transformer.wte, model.lm_head) == (table, head)
    assert model.resize_token_embeddings(9) is model.resize_token_embeddings() is table


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
def test_the_start_of_a_sequence_stays_the_last_token(head: str) -> None:
    model = make(head)
    table, logits = model.get_input_embeddings().weight.clone(), model(IDS)[0]
    moved = torch.where(IDS == 8, 11, IDS)
    assert model.resize_token_embeddings(10, pad_to_multiple_of=4).weight.shape == (12, 32)
    assert (model.config.vocab_size, model.config.sos_token_id) == (12, 11)
    torch.testing.assert_close(model(moved)[0][..., : logits.shape[-1]], logits, rtol=0, atol=1e-6)
    model.resize_token_embeddings(9)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(model(IDS)[0], logits)
    with pytest.raises(ValueError, match="vocab_size"):
        model.resize_token_embeddings(1)


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
def test_what_trainers_ask(head: str) -> None:
    ours = make(head)
    fields = {name: getattr(ours.config, name) for name in ("n_layer", "n_positions", "vocab_size", "n_embd", "n_head")}
    theirs = getattr(transformers, head)(transformers.ImageGPTConfig(**fields, num_labels=3))
    for name in ("main_input_name", "base_model_prefix", "supports_gradient_checkpointing", "name_or_path"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for dtype in (torch.float32, torch.bfloat16):
        found = [model.to(dtype).get_memory_footprint(return_buffers=False) for model in (ours, theirs)]
        assert found[0] == found[1]  # transformers has the causal masks as buffers
    ours.register_buffer("extra", torch.zeros(3))
    assert ours.get_memory_footprint() == ours.get_memory_footprint(return_buffers=False) + 12
    assert ours.can_generate() == type(ours).can_generate() == hasattr(ours, "generate") == (head == CAUSAL)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    assert ours.tie_weights() is None
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("head", [BASE, CAUSAL, CLASSIFIER])
def test_inputs_that_want_a_gradient(head: str) -> None:
    """A frozen model with one trainable weight, under reentrant checkpointing, as adapters are trained."""
    model = make(head).train()
    model.requires_grad_(False)
    weight = model.base_model.h[0].mlp.c_fc.weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        weight = twin.base_model.h[0].mlp.c_fc.weight
        twin(IDS)[0].square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
        twin.disable_input_require_grads()
        twin.disable_input_require_grads()
        assert not twin.get_input_embeddings()._forward_hooks
        assert not twin.get_input_embeddings()(IDS).requires_grad
        twin.enable_input_require_grads()


@pytest.mark.parametrize("part", ["wte", "wpe", "all"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_decoder_follows_the_dtype_of_the_keys(part: str, autocast: torch.dtype | None) -> None:
    model = make()
    (model if part == "all" else getattr(model.transformer, part)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        decoder = ReferenceDecoder(model, 2, 8)
        want = model(IDS).logits
        got = torch.stack([decoder.prefill(IDS[:, :1]), *(decoder.step(IDS[:, t]) for t in range(1, 8))], dim=1)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=0.1, atol=0.1 * want.abs().max().item())
    size = memory.cache_bytes(model)
    assert size == 2 * 2 * 16 * 32 * (2 if part == "all" else 4)
    assert memory.cache_bytes(model.to("meta")) == size


def test_generates_with_only_one_table_in_another_dtype() -> None:
    model = make()
    model.transformer.wte.bfloat16()
    assert model.generate(IDS[:, :1], max_length=9, do_sample=False).shape == (2, 9)


def test_initial_weights() -> None:
    config = ImageGPTConfig(n_layer=8, n_embd=128, n_head=2, initializer_range=0.05)
    for name, p in model_module.ImageGPTForCausalImageModeling(config).named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif "ln_" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            expected = 0.05 / math.sqrt(16) if "c_proj" in name else 0.05
            assert abs(float(p.detach().std()) / expected - 1.0) < 0.05, name


# --- misuse --------------------------------------------------------------------------------------------------------

MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 8, 32)}, ValueError, "exactly one of input_ids"),
    ({"input_ids": torch.tensor(3)}, ValueError, "input_ids: expected .B, T., got a scalar"),
    ({"inputs_embeds": torch.zeros(2, 8, 31)}, ValueError, "inputs_embeds: expected .B, T, n_embd=32., got"),
    ({"inputs_embeds": torch.zeros(8, 32)}, ValueError, "inputs_embeds: expected"),
    ({"input_ids": torch.zeros(1, 17).long()}, ValueError, "17 positions exceed n_positions=16"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 7)}, ValueError, r"attention_mask: expected .* \(2, 8\), got"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)}, ValueError, "attention_mask: expected"),
    ({"input_ids": IDS, "position_ids": torch.zeros(2, 1).long()}, ValueError, "position_ids: expected"),
    ({"input_ids": IDS, "position_ids": torch.zeros(3, 8).long()}, ValueError, "position_ids: expected"),
    ({"input_ids": IDS, "token_type_ids": torch.zeros(2, 7).long()}, ValueError, "token_type_ids: expected"),
    ({"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 8, 32)}, ValueError, "add_cross_attention=True"),
    ({"input_ids": IDS, "encoder_attention_mask": torch.ones(2, 8)}, ValueError, "without encoder_hidden"),
    ({"input_ids": IDS, "past_key_values": ((IDS, IDS),)}, TypeError, "must be a cache .*, got tuple"),
    ({"input_ids": IDS, "labels": torch.zeros(2, 7).long()}, ValueError, r"labels: expected .* \(2, 8\), got \(2, 7\)"),
    ({"input_ids": IDS, "head_mask": torch.ones(2, 2)}, TypeError, "unexpected keyword argument 'head_mask'"),
    ({"input_ids": IDS, "num_logits_to_keep": 1}, TypeError, "unexpected keyword argument"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE, ids=range(len(MISUSE)))
def test_misuse(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(**arguments)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_are_not_broadcast(problem: str) -> None:
    model = make(CLASSIFIER, problem_type=problem)
    with pytest.raises(ValueError, match=rf"labels: expected \(2, 3\) for {problem}, got \(2,\)"):
        model(IDS, labels=torch.zeros(2))
    with pytest.raises(ValueError, match="labels: expected"):
        model(IDS, labels=torch.zeros(1, 3))


@torch.no_grad()
def test_a_mask_of_any_shape_is_of_the_image_behind_sos() -> None:
    model = make(CLASSIFIER, classify_with_sos=True)
    mask = torch.ones(IDS.shape, dtype=torch.int64)
    mask[0, :3] = 0
    want = model(IDS, attention_mask=mask).logits
    assert not torch.allclose(want, model(IDS).logits)
    embeds = model.transformer.wte(IDS)
    for same in (mask.bool(), mask[:, None, None], mask.flatten()):
        assert torch.equal(model(IDS, attention_mask=same).logits, want)
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=same).logits, want)
    with pytest.raises(ValueError, match=r"attention_mask: expected .* = \(2, 8\), got \(2, 9\)"):
        model(IDS, attention_mask=torch.ones(2, 9))


def test_unsupported_configurations() -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings=True is not supported"):
        make(tie_word_embeddings=True)
    with pytest.raises(TypeError, match="config must be an ImageGPTConfig, got dict"):
        model_module.ImageGPTModel({})
    with pytest.raises(ValueError, match="activation: name is 'gelo'"):
        make(activation_function="gelo")
    assert make(activation_function="relu2").transformer.h[0].mlp.activation in ops.ACTIVATIONS
