"""``generate`` of what only transformers does, by its own code on our model; and its settings that ask for nothing."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_models import ids, small
from torch import Tensor

from igpt_fast import hf, keywords
from igpt_fast.model.settings import asks_for_nothing


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


STRATEGIES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams sampled": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "repetition": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "end token": {"eos_token_id": 3},
    "no cache": {"use_cache": False},
    "suppressed": {"suppress_tokens": [1, 2, 3, 4, 5]},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "a set of settings": {"generation_config": transformers.GenerationConfig(num_beams=2, max_new_tokens=6)},
}


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_only_transformers_does(model: Any, name: str) -> None:
    bridge = hf.to_transformers(model)
    options = {"max_new_tokens": 6, "pad_token_id": 0, **STRATEGIES[name]}
    if "generation_config" in options:
        del options["max_new_tokens"]
    context = ids(model, 1 if name == "prompt lookup" else 2, 5)
    drawn = []
    for each in (model, bridge):
        torch.manual_seed(0)
        drawn.append(each.generate(context, **({"top_k": 0} if "do_sample" in options else {}), **options))
    if isinstance(drawn[0], Tensor):
        assert torch.equal(*drawn)
    else:
        assert torch.equal(drawn[0].sequences, drawn[1].sequences)
        for ours, theirs in zip(drawn[0].scores, drawn[1].scores, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert [len(step) for step in drawn[0].attentions] == [len(step) for step in drawn[1].attentions]


@pytest.mark.filterwarnings("ignore:generate")
def test_objects_of_transformers(model: Any) -> None:
    class Told(transformers.generation.streamers.BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    context = ids(model, 1, 4)
    wanted = model.generate(context, max_new_tokens=5)
    assert torch.equal(model.generate(context, max_new_tokens=5, streamer=Told()), wanted)
    assert Told.tokens == [*wanted[0].tolist(), -1]
    never = [lambda tokens, scores: torch.full_like(scores, -1.0).index_fill(1, torch.tensor([7]), 1.0)]
    assert set(model.generate(context, max_new_tokens=5, logits_processor=never)[0, 4:].tolist()) == {7}
    assistant = small(seed=1)
    assert torch.equal(model.generate(context, max_new_tokens=5, assistant_model=assistant), wanted)
    hidden = torch.tensor([[0, 1, 1, 1]])
    theirs = hf.to_transformers(model).generate(context, max_new_tokens=5, attention_mask=hidden)
    assert torch.equal(model.generate(context, max_new_tokens=5, attention_mask=hidden), theirs)


def test_a_warning_says_so_once(model: Any) -> None:
    context = ids(model, 1, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model.generate(context, max_new_tokens=2, num_beams=2, length_penalty=0.5, early_stopping=True)
    found = [str(each.message) for each in told if "generate: early_stopping, num_beams" in str(each.message)]
    assert len(found) == 1


def test_what_is_ours_alone_does_not_mix(model: Any) -> None:
    with pytest.raises(TypeError, match="generate: seed cannot be combined with num_beams, which transformers does"):
        model.generate(num_beams=2, do_sample=True, seed=1)


@pytest.mark.parametrize("value", [3, False, None])
def test_what_nobody_knows(model: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^generate\(\) got an unexpected keyword argument: do_smaple, num_beamz$"):
        model.generate(do_smaple=value, num_beamz=value, max_new_tokens=1)


def test_every_setting_is_known() -> None:
    assert {*transformers.GenerationConfig().to_dict(), "top_h"} <= keywords.SETTINGS.keys()
    options = [*inspect.signature(transformers.GenerationMixin.generate).parameters][1:-1]
    small().generate(max_new_tokens=1, **dict.fromkeys({*options, "tokenizer", "position_ids"}))


def test_settings_that_ask_for_nothing(model: Any) -> None:
    context = ids(model, 2, 5)
    neutral: dict[str, Any] = {"num_beams": 1, "pad_token_id": 0, "eos_token_id": None, "streamer": None}
    neutral |= {"synced_gpus": False, "repetition_penalty": 1.0, "logits_processor": [], "bad_words_ids": None}
    neutral |= {"stopping_criteria": transformers.StoppingCriteriaList(), "generation_config": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model.generate(context, max_length=9)
        assert torch.equal(model.generate(context, max_length=np.int64(9), **neutral), wanted)
    known = {*inspect.signature(type(model).generate).parameters, "transformers_version"}
    for name, value in transformers.GenerationConfig().to_dict().items():
        assert asks_for_nothing(name, value) or name in known, name


def test_generation_config(model: Any, tmp_path: Any) -> None:
    model = small()
    context = ids(model, 1, 4)
    model.generation_config.max_new_tokens = 3
    assert model.generate(context).shape == (1, 7)
    assert model.generate(context, max_length=6).shape == (1, 6)
    model.generation_config.top_k, model.generation_config.do_sample = 1, True
    assert torch.equal(model.generate(context), model.generate(context, do_sample=False))
    model.save_pretrained(tmp_path)
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert theirs.generation_config.max_new_tokens == 3
    again = type(model).from_pretrained(tmp_path)
    assert again.generate(context).shape == (1, 7)
    assert again.generation_config.to_diff_dict() == theirs.generation_config.to_diff_dict()
    given = transformers.GenerationConfig(max_new_tokens=2)
    assert again.generate(context, given).shape == (1, 6)


CLASSES = {"vocab_size": 21, "n_classes": 4}  # of the tokens 0 to 19, the last four


@pytest.mark.filterwarnings("ignore:generate")
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_guidance_is_the_same_by_transformers(options: dict[str, Any]) -> None:
    model, context = small(**CLASSES), torch.tensor([[17, 3, 4, 5], [18, 6, 7, 8]])
    for negative in ({}, {"negative_prompt_ids": torch.tensor([[20, 1, 1, 1]])}):
        settings = {"guidance_scale": 3.0, "max_new_tokens": 20, **options, **negative}
        dictionary = model.generate(context, return_dict_in_generate=True, **settings)
        assert torch.equal(dictionary.sequences, model.generate(context, **settings))
    model.generation_config.guidance_scale = 3.0
    with pytest.raises(ValueError, match="num_beams"):  # whose beams transformers mixes up
        model.generate(context, num_beams=2)
    with pytest.raises(ValueError, match="negative_prompt_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 48), max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:generate")
def test_classes_are_never_drawn() -> None:
    model, context = small(**CLASSES), torch.tensor([[17, 3, 4, 5]])
    model.generation_config = transformers.GenerationConfig(do_sample=True)
    model.lm_head.weight.data[16:] *= 20
    for suppressed in ([], [1, 2]):
        drawn = model.generate(context, num_beams=2, suppress_tokens=suppressed)[0, 4:].tolist()
        assert {*drawn} <= {*range(16)} - {*suppressed}


@pytest.mark.filterwarnings("ignore:generate")
def test_a_set_of_settings_is_as_these_as_arguments(model: Any) -> None:
    context = ids(model, 1, 4)
    for settings in ({"num_beams": 2}, {"do_sample": True, "num_beams": 2}, {"max_time": 100.0}):
        drawn = []
        for given in (settings, {"generation_config": transformers.GenerationConfig(**settings)}):
            torch.manual_seed(0)
            drawn.append(model.generate(context, **given))
        assert drawn[0].shape == (1, 81)
        assert torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore:generate")
def test_a_length_replaces_the_lengths_before() -> None:
    model = small()
    context = ids(model, 1, 4)
    short = transformers.GenerationConfig(max_new_tokens=5)
    for beams in ({}, {"num_beams": 2}):
        model.generation_config = transformers.GenerationConfig(max_length=30)
        assert model.generate(context, generation_config=short, **beams).shape == (1, 9)
        model.generation_config = short
        assert model.generate(context, max_length=6, **beams).shape == (1, 6)
        given = transformers.GenerationConfig(max_length=7)
        assert model.generate(context, generation_config=given, **beams).shape == (1, 7)


def test_a_file_of_settings(tmp_path: Any) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"

    def load(**entries: Any) -> Any:
        file.write_text(json.dumps(entries))
        return type(model).from_pretrained(tmp_path)

    wanted = model.generate(max_new_tokens=3)
    foreign = {"attention_mask": [1, 0], "input_ids": [1], "foo": 1, "seed": 5, "to_dict": 1, "eos_token_id": -1}
    for object_too in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = load(**foreign, max_new_tokens=3)
            assert not object_too or again.generation_config.max_new_tokens == 3
            assert torch.equal(again.generate(), wanted)
        again.save_pretrained(tmp_path)
        assert json.loads(file.read_text())["foo"] == 1
    for name, bad in (
        ("do_sample", "no"),
        ("top_k", 2.5),
        ("max_length", True),
        ("suppress_tokens", ["a"]),
        ("suppress_tokens", 1),
    ):
        with pytest.raises(ValueError, match=rf"generation_config\.json: {name} is .*; want "):
            load(**{name: bad})
    assert load(temperature=1, eos_token_id=[3, 4], top_p=None).generation_config.temperature == 1


def test_yes_and_no(model: Any) -> None:
    for name in ("do_sample", "use_cache"):
        with pytest.raises(ValueError, match=f"generate: {name} is 'no'; want True or False"):
            model.generate(**{name: "no"})


@pytest.mark.filterwarnings("ignore:generate")
def test_a_negative_end_token_is_none(model: Any) -> None:
    context, model = ids(model, 2, 4), small(eos_token_id=-1)
    wanted = small().generate(context, num_beams=2, max_new_tokens=5)
    assert torch.equal(model.generate(context, num_beams=2, max_new_tokens=5), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(context, max_new_tokens=5, eos_token_id=[-1])


def test_without_transformers() -> None:
    """Ours does not load it, and says what is missing where only it would do."""
    code = """
import sys
import igpt_fast
config = igpt_fast.ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
model = igpt_fast.ImageGPTForCausalImageModeling(config)
model.generate(max_length=4, num_beams=1)
list(model.named_modules())
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
assert not hasattr(model, "generation_config")
try:
    model.generation_config
except AttributeError as error:
    assert str(error) == "generation_config needs transformers: pip install 'igpt_fast[hf]'", error
else:
    raise AssertionError
try:
    model.generate(num_beams=2)
except ImportError as error:
    assert str(error) == "generate: num_beams needs transformers: pip install 'igpt_fast[hf]'", error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
