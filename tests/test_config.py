"""``ImageGPTConfig`` reads and writes the JSON of transformers, and refuses nonsense."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import igpt_fast
from igpt_fast import ImageGPTConfig
from igpt_fast.config import PRESETS

# What transformers itself writes about a file or a session, not about the network.
_ADDED = {"transformers_version", "architectures", "dtype", "_name_or_path"}


def _same_in_transformers(path: Path, config: ImageGPTConfig) -> None:
    theirs = transformers.ImageGPTConfig.from_pretrained(path)
    for name, value in config.to_dict().items():
        if name not in _ADDED:
            assert getattr(theirs, name) == value, name
    assert theirs.num_labels == config.num_labels


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_inner": 7, "activation_function": "gelu_new", "resid_pdrop": 0.0, "layer_norm_epsilon": 1e-6},
        {"num_labels": 5, "problem_type": "regression", "output_hidden_states": True},
        {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "use_cache": False},
        {"eos_token_id": [1, 2], "bos_token_id": 3, "pad_token_id": 0},
        {"n_classes": 3},
    ],
)
def test_both_ways_with_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=2, **fields)
    (tmp_path / "config.json").write_text(config.to_json_string())
    _same_in_transformers(tmp_path, config)

    theirs = transformers.ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=2, **fields)
    theirs.save_pretrained(tmp_path)
    back = ImageGPTConfig.from_json_file(tmp_path / "config.json")
    _same_in_transformers(tmp_path, back)
    assert back.extra["transformers_version"] == transformers.__version__


def test_defaults_are_those_of_transformers() -> None:
    theirs, ours = transformers.ImageGPTConfig(), ImageGPTConfig()
    for name in ours.to_dict():
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in (*theirs.to_dict(), *ImageGPTConfig.attribute_map, "name_or_path", "use_return_dict"):
        if name != "transformers_version":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.transformers_version, ours.torch_dtype) == (None, None)


def test_nothing_is_lost() -> None:
    data = {
        "model_type": "imagegpt",
        "hidden_size": 16,
        "n_head": 2,
        "task_specific": {"a": [1]},
        "torch_dtype": "float16",
    }
    config = ImageGPTConfig.from_dict(data)
    assert config.n_embd == config.hidden_size == 16
    assert config.task_specific == {"a": [1]}
    assert config.dtype == "float16"
    again = ImageGPTConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
    with pytest.raises(AttributeError, match="no_such"):
        _ = config.no_such


def test_labels_and_their_number_agree() -> None:
    data = ImageGPTConfig(id2label={0: "a", 1: "b", 2: "c"}).to_dict()
    assert ImageGPTConfig.from_dict(data).num_labels == 3
    assert ImageGPTConfig.from_dict(data, num_labels=3).id2label == {0: "a", 1: "b", 2: "c"}
    other = ImageGPTConfig.from_dict(data, num_labels=5)
    assert (other.num_labels, other.id2label) == (5, {i: f"LABEL_{i}" for i in range(5)})
    named = ImageGPTConfig.from_dict(data, id2label={0: "x", 1: "y"})
    assert (named.num_labels, named.to_dict()["label2id"]) == (2, {"x": 0, "y": 1})
    config = ImageGPTConfig.from_dict(data)
    config.num_labels = 4
    assert len(config.to_dict()["id2label"]) == 4
    config.id2label = {0: "x", 1: "y"}
    assert config.num_labels == 2


def test_labels_are_those_of_transformers() -> None:
    names = {0: "a", 1: "b", 2: "c"}
    for fields in ({}, {"num_labels": 4}, {"label2id": {"a": 0}}, {"id2label": names, "label2id": {"a": 0}}):
        ours, theirs = ImageGPTConfig(**fields), transformers.ImageGPTConfig(**fields)  # type: ignore[arg-type]
        for number in (None, ours.num_labels, 1, 3):
            if number is not None:
                ours.num_labels = theirs.num_labels = number
            for name in ("num_labels", "id2label", "label2id"):
                assert getattr(ours, name) == getattr(theirs, name), (fields, number, name)
        ours.id2label = theirs.id2label = {0: "x", 1: "y"}
        ours.id2label[2] = "z"
        theirs.id2label[2] = "z"
        assert ours.num_labels == theirs.num_labels == 3
    # transformers leaves the older label2id
    assert ImageGPTConfig(id2label=names).label2id == {"a": 0, "b": 1, "c": 2}
    ours.id2label = {0: "p"}
    assert (ours.label2id, ours.num_labels) == ({"p": 0}, 1)
    ours.id2label = None
    assert (ours.id2label, ours.label2id) == ({0: "LABEL_0"}, {"LABEL_0": 0})
    with pytest.warns(UserWarning, match="num_labels=5 gives way to the 3 of id2label"):
        assert ImageGPTConfig(num_labels=5, id2label=names).num_labels == 3
    for name in ("id2label", "label2id"):
        with pytest.raises(ValueError, match=name):
            ImageGPTConfig(**{name: ["a"]})  # type: ignore[arg-type]


def test_absurd_label_counts_cost_nothing() -> None:
    config = ImageGPTConfig(num_labels=1 << 24)
    assert config.num_labels == 1 << 24
    assert "id2label" not in vars(config)


def test_classes() -> None:
    plain, config = ImageGPTConfig(vocab_size=9), ImageGPTConfig(vocab_size=9, n_classes=3)
    assert (plain.n_classes, plain.n_colours, plain.sos_token_id) == (0, 8, 8)
    assert (config.n_classes, config.n_colours, config.sos_token_id) == (3, 5, 8)
    assert "n_classes" not in plain.to_dict()
    assert ImageGPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="n_classes"):
        config.update({"n_classes": 8})
    config.update({"n_classes": 0})
    assert config == plain


def test_presets() -> None:
    for name, fields in PRESETS.items():
        config = ImageGPTConfig.preset(name, n_positions=64)
        assert {key: getattr(config, key) for key in fields} == fields
        assert config.n_positions == 64
    with pytest.raises(ValueError, match="unknown preset 'xxl'"):
        ImageGPTConfig.preset("xxl")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n_embd": 10, "n_head": 4}, "divisible"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 10**9}, "n_layer"),
        ({"n_layer": "2"}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"n_inner": 0}, "n_inner"),
        ({"n_inner": 1.5}, "n_inner"),
        ({"resid_pdrop": 1.1}, "resid_pdrop"),
        ({"attn_pdrop": None}, "attn_pdrop"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
        ({"initializer_range": float("nan")}, "initializer_range"),
        ({"initializer_range": 1e300}, r"initializer_range is 1e\+300; want a number in \[0, 1e\+30\]"),
        ({"resid_pdrop": 10**400}, "resid_pdrop is 1000"),
        ({"resid_pdrop": 10**300}, r"resid_pdrop is 1000.*want a number in \[0, 1\]"),
        ({"resid_pdrop": True}, "resid_pdrop is True"),
        ({"n_inner": True}, "n_inner is True"),
        ({"task_specific_params": {"a": [{"b": float("inf")}]}}, "b is inf"),
        ({"pad_token_id": 10**9}, "pad_token_id is 1000000000; want an integer in -1"),
        ({"pad_token_id": [1]}, r"pad_token_id is \[1\]"),
        ({"bos_token_id": "0"}, "bos_token_id is '0'"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id is 2.5"),
        ({"id2label": {"9" * 4000: "x"}}, "a key of id2label is 9999"),
        ({"id2label": {"9" * 5000: "x"}}, "limit"),
        ({"id2label": {"x" * 400_000: "x"}}, "invalid literal"),
        ({"activation_function": ["\x1b" * 400_000]}, "activation_function must be a name"),
        ({"problem_type": "\x1b[31m" * 100_000}, "problem_type"),
        ({"model_type": ["x" * 99] * 9999}, "model_type"),
        ({"use_cache": {"a": "\n" * 9999}}, "use_cache"),
        ({"problem_type": "guess"}, "problem_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"use_cache": "yes"}, "use_cache"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"id2label": {}}, "num_labels"),
        ({"id2label": {"x": "y"}}, "invalid literal"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"id2label": 3}, "int"),
        ({"vocab_size": 9, "n_classes": 8}, r"n_classes is 8; want an integer in 0\.\.7"),
        *(({"n_classes": value}, "n_classes") for value in (-1, 1 << 60, 10**400, 2.0, True, "3", None, [1])),
    ],
)
def test_bad_files_name_file_and_field(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    wanted = rf"config\.json: not (a usable ImageGPT configuration|usable JSON): .*{reason}"
    with pytest.raises(ValueError, match=wanted) as caught:
        ImageGPTConfig.from_json_file(path)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 200_000, b"<html></html>"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: not usable JSON"):
        ImageGPTConfig.from_json_file(path)


def test_torch_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_layer": 3}')
    code = f"""
import sys
for name in ("torch", "numpy", "huggingface_hub"):
    sys.modules[name] = None
from igpt_fast.config import ImageGPTConfig
assert ImageGPTConfig.from_json_file({str(tmp_path / "config.json")!r}).n_layer == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="larger than 4 MiB"):
        ImageGPTConfig.from_json_file(path)


def test_unknown_keywords_are_kept() -> None:
    config = ImageGPTConfig(dtype="float16", no_such=1)  # type: ignore[call-arg]
    assert (config.no_such, config.extra) == (1, {"dtype": "float16", "no_such": 1})
    assert ("no_such" in config, "n_layer" in config, "other" in config) == (True, True, False)
    assert {"no_such", "n_layer"} <= set(config)
    del config.no_such
    assert not hasattr(config, "no_such")
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        ImageGPTConfig(model_type="gpt2")  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 8},
        {"n_embd": 16, "hidden_size": 32},
        {"dtype": "bfloat16", "architectures": ["ImageGPTModel"], "name_or_path": "some/model"},
        {"torch_dtype": "float16", "chunk_size_feed_forward": 2, "is_encoder_decoder": True},
        {"torch_dtype": "float16", "dtype": "float32"},
        {"num_labels": 3, "output_attentions": True, "return_dict": False},
    ],
)
def test_keywords_of_transformers(fields: dict[str, Any]) -> None:
    theirs = transformers.ImageGPTConfig(**fields)
    ours = ImageGPTConfig(**fields)
    copied = ImageGPTConfig(**theirs.to_dict())
    assert copied == ImageGPTConfig.of(theirs, "test") == ImageGPTConfig.from_dict(theirs.to_dict())
    assert copied.to_dict() == theirs.to_dict()
    for name in (*theirs.to_dict(), *ImageGPTConfig.attribute_map, "name_or_path", "num_labels"):
        if name not in ("dtype", "transformers_version"):
            assert getattr(ours, name) == getattr(copied, name) == getattr(theirs, name), name
    dtype = None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch.")
    assert ours.dtype == copied.dtype == ours.torch_dtype == dtype
    for twin in (copy.copy(copied), copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))):
        assert twin == copied
        assert repr(twin) == repr(copied)
        assert twin.hidden_size == copied.n_embd
    assert eval(repr(copied)) == copied
    changed = dataclasses.replace(copied, hidden_size=64)  # type: ignore[call-arg]
    assert changed.n_embd == 64
    assert dataclasses.replace(changed, n_embd=copied.n_embd) == copied


def test_attributes_are_set_as_in_transformers() -> None:
    ours, theirs = ImageGPTConfig(), transformers.ImageGPTConfig()
    values = {"hidden_size": 64, "num_labels": 3, "note": [1], "torch_dtype": torch.float16, "name_or_path": "x"}
    for config in (ours, theirs):
        config.update(values)
        config.n_layer = 5
    assert {**ours.to_dict(), **theirs.to_dict()} == theirs.to_dict()
    assert (ours.n_embd, ours.num_hidden_layers, ours.dtype, ours.note) == (64, 5, "float16", [1])
    before = copy.deepcopy(ours)
    for bad in ({"n_layer": 3, "n_embd": 30}, {"use_cache": 1}, {"note": 2, "model_type": "gpt2"}):
        with pytest.raises(ValueError):
            ours.update(bad)
        assert ours == before
    with pytest.raises(AttributeError):
        ours.head_dim = 3  # type: ignore[misc]
    assert (ours.use_return_dict, ImageGPTConfig(return_dict=False).use_return_dict) == (True, False)


def test_entries_keep_apart() -> None:
    data = {"hidden_size": 32, "n_embd": 16, "extra": {"n_layer": 1}, "dtype": None, "torch_dtype": "float16"}
    config = ImageGPTConfig.from_dict(data, n_embd=64, n_layer=2)
    assert (config.n_embd, config.n_layer, config.dtype) == (64, 2, "float16")
    assert config.to_dict()["extra"] == {"n_layer": 1}
    older: dict[str, Any] = {"pruned_heads": {}, "max_length": 20, "top_k": 50}  # of transformers 4
    assert ImageGPTConfig(**older).extra == older
    given = {"extra": {"a": [1]}}
    config = ImageGPTConfig(**given)  # type: ignore[arg-type]
    config.to_dict()["a"].append(2)
    config.dtype = "float16"
    assert given == {"extra": {"a": [1]}}


def test_save_and_load(tmp_path: Path) -> None:
    config = ImageGPTConfig(n_layer=3, num_labels=3, dtype="float16")  # type: ignore[call-arg]
    folder = tmp_path / "new" / "deep"
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert ImageGPTConfig.from_pretrained(folder) == config
    _same_in_transformers(folder, config)
    config.to_json_file(folder / "other.json")
    assert (folder / "other.json").read_bytes() == (folder / "config.json").read_bytes()
    assert ImageGPTConfig.from_json_file(str(folder / "other.json")) == config

    overrides: dict[str, Any] = {"hidden_size": 64, "num_labels": 5, "use_cache": False, "torch_dtype": "float32"}
    ours = ImageGPTConfig.from_pretrained(str(folder), **overrides)
    theirs = transformers.ImageGPTConfig.from_pretrained(folder, **overrides)
    for name in (*ImageGPTConfig.attribute_map, "n_layer", "num_labels", "id2label", "label2id", "use_cache"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.dtype == "float32"
    assert ImageGPTConfig.from_pretrained(tmp_path / "new", subfolder="deep") == config

    with pytest.raises(TypeError, match="unexpected keyword argument: no_such"):
        ImageGPTConfig.from_pretrained(folder, no_such=1)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ImageGPTConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: .*n_layer"):
        ImageGPTConfig.from_pretrained(folder, n_layer=0)
    before = (folder / "config.json").read_bytes()
    config.note = object()
    with pytest.raises(TypeError):
        config.save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == before
    with pytest.raises(FileExistsError):
        ImageGPTConfig().save_pretrained(folder / "config.json")


def test_load_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    ImageGPTConfig(n_layer=3).save_pretrained(repository / "snapshots" / ("0" * 40))
    load = ImageGPTConfig.from_pretrained
    assert load("some/model", cache_dir=tmp_path, local_files_only=True, n_head=4) == ImageGPTConfig(
        n_layer=3, n_head=4
    )
    with pytest.raises(FileNotFoundError, match="some/other"):
        load("some/other", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"])
def test_models_take_the_configuration_of_transformers(tmp_path: Path, name: str) -> None:
    cls = getattr(igpt_fast, name)
    small = {"vocab_size": 9, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3}
    theirs = transformers.ImageGPTConfig(**small)
    model = cls(theirs)
    assert model.config == ImageGPTConfig(**theirs.to_dict())
    assert all(part.config is model.config for part in model.modules() if hasattr(part, "config"))
    shapes = {key: value.shape for key, value in getattr(transformers, name)(theirs).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = cls.from_pretrained(tmp_path, config=theirs, resid_pdrop=0.5)
    assert (loaded.config.resid_pdrop, theirs.resid_pdrop, loaded.config.n_layer) == (0.5, 0.1, 2)
    for bad, told in (
        (transformers.GPT2Config(), r"transformers\..*GPT2Config"),
        (ImageGPTConfig, "type"),
        ({}, "dict"),
    ):
        with pytest.raises(TypeError, match=f"{name}: config must be an ImageGPTConfig, got {told}"):
            cls(bad)
        with pytest.raises(TypeError, match=f"from_pretrained: config must be an ImageGPTConfig, got {told}"):
            cls.from_pretrained(tmp_path, config=bad)


def test_what_is_used_and_what_is_not(tmp_path: Path) -> None:
    config = ImageGPTConfig(n_layer=3, note="kept")  # type: ignore[call-arg]
    config.save_pretrained(save_directory=tmp_path, push_to_hub=False)
    given: dict[str, Any] = {"return_unused_kwargs": True, "use_cache": False, "note": "new", "revision_of": 1}
    for load in (ImageGPTConfig.from_pretrained, transformers.ImageGPTConfig.from_pretrained):
        found, unused = load(pretrained_model_name_or_path=tmp_path, trust_remote_code=True, **given)
        assert (found.n_layer, found.use_cache, found.note) == (3, False, "new")
        assert unused == {"revision_of": 1}
    assert ImageGPTConfig.from_pretrained(tmp_path, note="other").note == "other"
    with pytest.raises(TypeError, match=r"multiple values|the same; give one"):
        ImageGPTConfig.from_pretrained(tmp_path, pretrained_model_name_or_path=tmp_path)
    for name, value in (("force_download", True), ("proxies", {"http": "x"})):
        with pytest.raises(ValueError, match=f"from_pretrained: {name}=.* is not offered: "):
            ImageGPTConfig.from_pretrained(tmp_path, **{name: value})
    assert config.to_diff_dict() == {"n_layer": 3, "note": "kept", "model_type": "imagegpt"}


def test_implementations_of_attention() -> None:
    assert "attn_implementation" not in ImageGPTConfig(attn_implementation="eager")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="attn_implementation can be 'eager' alone, got 'sdpa': the fastest kernel"):
        ImageGPTConfig(attn_implementation="sdpa")  # type: ignore[call-arg]
