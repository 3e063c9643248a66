"""The bridge to transformers: the same logits, one storage, the same mode, dtype and configuration, both ways."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import igpt_fast
from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt_fast.hf import bridge as hf

CLASSES = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]
# Heads of 16: transformers before 5 divided by the integer part of the root of their size.
FIELDS: dict[str, Any] = {"vocab_size": 9, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2, "num_labels": 3}
TOKENS = torch.tensor([[8, 0, 4, 7], [8, 1, 2, 3]])


def ours(cls: Any = ImageGPTForCausalImageModeling, **fields: Any) -> Any:
    torch.manual_seed(0)
    return fill(cls(ImageGPTConfig(**{**FIELDS, **fields})))


def theirs(name: str = "ImageGPTForCausalImageModeling", **fields: Any) -> Any:
    torch.manual_seed(0)
    return fill(getattr(transformers, name)(transformers.ImageGPTConfig(**{**FIELDS, **fields})))


def fill(model: Any) -> Any:
    """Every parameter random, biases and norms too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def output(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=TOKENS, output_hidden_states=True)
    return result.hidden_states[-1] if getattr(result, "logits", None) is None else result.logits


def check_twins(one: Any, other: Any) -> None:
    """One storage, and the same of everything else."""
    parameters = dict(other.named_parameters())
    assert dict(one.named_parameters()).keys() == parameters.keys()
    for name, value in one.named_parameters():
        assert value.data_ptr() == parameters[name].data_ptr(), name
        assert value.is_set_to(parameters[name]), name
        assert value is not parameters[name], name
        assert (value.dtype, value.requires_grad) == (parameters[name].dtype, parameters[name].requires_grad), name
    assert {module.training for module in other.modules()} == {one.training}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False, "activation_function": "gelu_new", "n_inner": 24, "layer_norm_epsilon": 1e-2},
    ],
)
def test_the_same_numbers_both_ways(cls: Any, fields: dict[str, Any]) -> None:
    mine = ours(cls, **fields)
    there = hf.to_transformers(mine)
    assert type(there) is getattr(transformers, cls.__name__)
    check_twins(mine, there)
    torch.testing.assert_close(output(there), output(mine), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(there), output(hf.from_transformers(there)), rtol=1e-4, atol=1e-4)
    yours = theirs(cls.__name__, **fields)
    here = hf.from_transformers(yours)
    assert type(here) is cls
    check_twins(yours, here)
    torch.testing.assert_close(output(here), output(yours), rtol=1e-4, atol=1e-4)
    assert here.config.to_dict() == {**ImageGPTConfig.of(yours.config, "test").to_dict(), "dtype": "float32"}
    for name, value in mine.config.to_dict().items():
        assert getattr(there.config, name) == value or name in ("dtype", "transformers_version"), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_mode_and_frozen_parameters(dtype: torch.dtype) -> None:
    for model, turn in ((ours(), hf.to_transformers), (theirs(), hf.from_transformers)):
        model.to(dtype).train()
        model.transformer.wpe.weight.requires_grad_(False)
        twin = turn(model)
        check_twins(model, twin)
        assert twin.dtype == dtype
        assert twin.training
        assert twin.config.dtype in (dtype, str(dtype).removeprefix("torch."))
    mask = hf.to_transformers(ours().to(dtype)).transformer.h[1].attn.bias
    assert torch.equal(mask, theirs().transformer.h[1].attn.bias)


@pytest.mark.parametrize(("make", "turn"), [(ours, hf.to_transformers), (theirs, hf.from_transformers)])
def test_a_step_of_training_shows_in_both(make: Callable, turn: Callable) -> None:
    model = make(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    twin = turn(model)
    before = output(model), output(twin)  # what either of them keeps of the weights is kept now
    for trained, other in ((model, twin), (twin, model)):
        trained.train()
        trained(input_ids=TOKENS, labels=TOKENS.clamp(max=7)).loss.backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
        trained.zero_grad()
        after = output(model.eval()), output(twin.eval())
        torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after[0], before[0], rtol=1e-2, atol=1e-2)
        before = after


def test_moving_one_leaves_the_other() -> None:
    model = ours()
    wanted = output(model)
    hf.to_transformers(model).to(torch.bfloat16)
    assert model.dtype == torch.float32
    assert torch.equal(output(model), wanted)


def test_no_memory_and_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of a model on the meta device is one, too: nothing but the masks is ever allocated."""
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = ImageGPTForCausalImageModeling(ImageGPTConfig(**FIELDS)).to(dtype)
        twin = hf.to_transformers(model)
        assert all(value.is_meta for value in (*twin.parameters(), *twin.buffers()))
    model = ours()
    torch.set_rng_state(before)
    hf.from_transformers(hf.to_transformers(model))
    assert torch.equal(torch.get_rng_state(), before)
    masks = {layer.attn.bias.data_ptr() for layer in hf.to_transformers(model).transformer.h}
    assert len(masks) == 1


def test_beam_search_through_the_bridge() -> None:
    model, context = ours(), torch.tensor([[8], [8]])
    beams = hf.to_transformers(model).generate(context, num_beams=2, max_length=9, do_sample=False)
    assert beams.shape == (2, 9)
    assert torch.equal(beams[0], beams[1])
    greedy = hf.to_transformers(model).generate(context[:1], max_length=9, do_sample=False)
    assert torch.equal(greedy, model.generate(context[:1], max_length=9))

    @torch.no_grad()
    def likelihood(tokens: Tensor) -> float:
        logits = torch.log_softmax(model(tokens[:, :-1]).logits, -1)
        return float(logits.gather(2, tokens[:, 1:, None]).sum())

    assert likelihood(beams[:1]) >= likelihood(greedy)


def test_classes_are_not_drawn() -> None:
    model = ours(n_classes=3)
    with torch.no_grad():
        model.lm_head.weight[5:] *= 20.0
    twin = hf.to_transformers(model)
    assert twin.config.n_classes == 3
    drawn = twin.generate(torch.tensor([[6]]), do_sample=True, num_return_sequences=50, max_length=9)
    assert int(drawn[:, 1:].max()) < 5
    back = hf.from_transformers(twin)
    assert (back.config.n_classes, back.config.n_colours) == (3, 5)
    assert hf.to_transformers(ours()).generation_config.suppress_tokens is None


def test_configurations_are_copies() -> None:
    model = ours()
    twin = hf.to_transformers(model)
    twin.config.resid_pdrop, twin.config.id2label[0] = 0.9, "changed"
    assert (model.config.resid_pdrop, model.config.id2label[0]) == (0.1, "LABEL_0")


def test_what_is_refused() -> None:
    model, other = ours(), theirs()
    with pytest.raises(
        TypeError, match=r"to_transformers: model is a transformers\..*; want one of igpt_fast\.model's"
    ):
        hf.to_transformers(other)
    with pytest.raises(TypeError, match=r"from_transformers: model is a igpt_fast\.model.*; want one of transformers"):
        hf.from_transformers(model)
    with pytest.raises(TypeError, match="Linear"):
        hf.from_transformers(torch.nn.Linear(2, 2))
    other.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        hf.from_transformers(other)
    model.transformer.h[0].attn.c_attn.register_parameter("lora", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn\.lora"):
        hf.to_transformers(model)
    del model.transformer.h[0].attn.c_attn.lora
    model.transformer.wte = torch.nn.Embedding(12, 32)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        hf.to_transformers(model)


def test_transformers_is_imported_by_the_first_call() -> None:
    code = """
import sys
import igpt_fast
from igpt_fast import hf
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
calls = [("bridge", call) for call in (hf.to_transformers, hf.from_transformers)]
calls += [("accelerate", call) for call in (hf.accelerate, hf.restore, hf.accelerated)]
for module, call in calls:
    try:
        call(None)
    except ImportError as error:
        assert str(error) == f"igpt_fast.hf.{module} needs transformers: pip install 'igpt_fast[hf]'", error
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert igpt_fast.hf.bridge is hf


def test_a_problem_type_that_transformers_files_may_not_have() -> None:
    config = ImageGPTConfig(n_layer=1, n_embd=8, n_head=1, num_labels=1, problem_type="single_label_classification")
    assert hf.to_transformers(igpt_fast.ImageGPTForImageClassification(config)).config.problem_type is not None
