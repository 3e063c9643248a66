"""The results of the models: dicts as transformers' are, for whatever walks over them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt_fast.model.outputs import BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput, ModelOutput

CLASSES = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]
LOSS, LOGITS = torch.tensor(1.0), torch.arange(6.0).view(2, 3)


@pytest.fixture(params=["ours", "transformers"])
def kind(request: pytest.FixtureRequest) -> Any:
    """The class here, and the one whose behaviour it has."""
    if request.param == "ours":
        return CausalImageModelingOutput
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    return CausalLMOutputWithCrossAttentions


def test_a_dict_of_what_is_set(kind: Any) -> None:
    output = kind(logits=LOGITS)
    assert isinstance(output, dict)
    assert list(output) == list(output.keys()) == ["logits"]
    assert len(output) == 1
    assert output.loss is None
    assert "loss" not in output
    assert output.get("loss", 3) == 3
    assert output.logits is output["logits"] is output[0] is output.to_tuple()[0] is dict(output)["logits"]
    assert output[:1] == (LOGITS,)
    with pytest.raises(KeyError):
        output["loss"]
    with pytest.raises(IndexError):
        output[1]


def test_attributes_and_keys_are_one(kind: Any) -> None:
    output = kind(logits=LOGITS)
    output["loss"] = LOSS
    assert output.loss is LOSS
    output.logits = LOSS
    assert output["logits"] is LOSS
    assert output.to_tuple() == (LOSS, LOSS)
    assert output["loss"] is output[1]
    output.anything = 5  # is no field
    assert list(output) == ["logits", "loss"]


@pytest.mark.parametrize("form", [dict, lambda items: iter(list(items)), list])
def test_made_from_pairs(kind: Any, form: Any) -> None:
    output = kind(form({"logits": LOGITS, "loss": LOSS}.items()))
    assert list(output) == ["logits", "loss"]
    assert output.loss is LOSS
    assert output[0] is LOGITS


def test_nothing_is_taken_out(kind: Any) -> None:
    output = kind(loss=LOSS, logits=LOGITS)
    for name, arguments in (("pop", ("loss",)), ("update", ({"loss": LOSS},)), ("setdefault", ("loss", LOSS))):
        with pytest.raises(Exception, match=kind.__name__):
            getattr(output, name)(*arguments)
    with pytest.raises(Exception, match=kind.__name__):
        del output["loss"]
    assert list(output) == ["loss", "logits"]


def test_copies(kind: Any) -> None:
    output = kind(loss=LOSS, logits=LOGITS, hidden_states=(LOGITS, LOGITS))
    for twin in (copy.copy(output), copy.deepcopy(output), output.copy(), pickle.loads(pickle.dumps(output))):
        assert type(twin) is kind
        assert list(twin) == ["loss", "logits", "hidden_states"]
        assert twin.logits is twin["logits"]
        assert torch.equal(twin.logits, LOGITS)
        twin.logits = None
        assert output.logits is LOGITS


def test_pytree(kind: Any) -> None:
    output = kind(loss=LOSS, logits=LOGITS, hidden_states=(LOGITS, LOGITS))
    leaves, spec = pytree.tree_flatten(output)
    assert [id(leaf) for leaf in leaves] == [id(LOSS), id(LOGITS), id(LOGITS), id(LOGITS)]
    twin = pytree.tree_unflatten([leaf * 2 for leaf in leaves], spec)
    assert type(twin) is kind
    assert list(twin) == list(output)
    assert torch.equal(twin[1], LOGITS * 2)


def test_none_takes_the_key_away() -> None:
    output = CausalImageModelingOutput(loss=LOSS, logits=LOGITS)
    output.loss = None
    assert list(output) == ["logits"]
    output["logits"] = None
    assert output.to_tuple() == ()
    with pytest.raises(KeyError, match="CausalImageModelingOutput has no field 'colour'"):
        output["colour"] = LOSS
    with pytest.raises(KeyError, match="no field 'colour'"):
        CausalImageModelingOutput({"colour": LOSS})


@pytest.mark.parametrize("kind", [BaseModelOutput, CausalImageModelingOutput, ImageClassificationOutput])
def test_a_first_field_that_is_no_pairs_stays(kind: type[ModelOutput]) -> None:
    for value in (LOSS, 1.0, "text", {0: "batch"}, [1, 2], (LOSS, LOGITS)):
        output = kind(value)
        assert output[0] is value
        assert len(output) == 1


# --- DataParallel ----------------------------------------------------------------------------------------------------


def model_of(cls: Any) -> Any:
    fields = {"vocab_size": 9, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3}
    return cls(ImageGPTConfig(**fields)).eval()


@pytest.mark.parametrize("cls", CLASSES)
def test_gather(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DataParallel joins the results of its replicas; the caches too, of which one is there by default."""

    def joined(device: Any, dim: int, *tensors: Tensor) -> Tensor:
        return torch.cat([tensor[None] if tensor.ndim == 0 else tensor for tensor in tensors], dim)

    monkeypatch.setattr(scatter_gather.Gather, "apply", joined)
    model, ids = model_of(cls), torch.randint(8, (4, 6))
    arguments: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    labels = {ImageGPTForCausalImageModeling: ids, ImageGPTForImageClassification: torch.arange(4) % 3}.get(cls)
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        given = {} if labels is None else {"labels": labels[half]}
        parts.append(model(ids[half], **given, **arguments))
    given = {} if labels is None else {"labels": labels}
    whole = model(ids, **given, **arguments)
    got = scatter_gather.gather(parts, "cpu")
    assert type(got) is type(whole)
    assert list(got) == list(whole)
    torch.testing.assert_close(got[1 if labels is not None else 0], whole[1 if labels is not None else 0])
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(got[name], whole[name])
    torch.testing.assert_close(got.past_key_values.keys, whole.past_key_values.keys)
    torch.testing.assert_close(got.past_key_values.values, whole.past_key_values.values)
    if labels is not None:
        assert got.loss.shape == (2,)
        torch.testing.assert_close(got.loss.mean(), whole.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", CLASSES)
def test_data_parallel(cls: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("DataParallel gathers with two devices or more")
    model, ids = model_of(cls).cuda(), torch.randint(8, (4, 6), device="cuda")
    got = nn.DataParallel(model)(ids)
    torch.testing.assert_close(got[0], model(ids)[0])
