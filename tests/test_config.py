"""``ImageGPTConfig`` reads and writes the JSON of transformers, and refuses nonsense."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igpt_fast import ImageGPTConfig
from igpt_fast.config import PRESETS

# What transformers itself writes about a file or a session, not about the network.
_ADDED = {"transformers_version", "architectures", "dtype", "_name_or_path"}


def _same_in_transformers(path: Path, config: ImageGPTConfig) -> None:
    transformers = pytest.importorskip("transformers")
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
    ],
)
def test_both_ways_with_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=2, **fields)
    (tmp_path / "config.json").write_text(config.to_json_string())
    _same_in_transformers(tmp_path, config)

    theirs = transformers.ImageGPTConfig(vocab_size=9, n_positions=8, n_embd=16, n_layer=2, n_head=2, **fields)
    theirs.save_pretrained(tmp_path)
    back = ImageGPTConfig.from_json_file(tmp_path / "config.json")
    _same_in_transformers(tmp_path, back)
    assert back.extra["transformers_version"] == transformers.__version__


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.ImageGPTConfig(), ImageGPTConfig()
    for name in ours.to_dict():
        assert getattr(ours, name) == getattr(theirs, name) or name in ("id2label", "label2id"), name
    for name in ImageGPTConfig.attribute_map:
        assert getattr(ours, name) == getattr(theirs, name)


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
    assert (other.num_labels, other.id2label) == (5, None)
    named = ImageGPTConfig.from_dict(data, id2label={0: "x", 1: "y"})
    assert (named.num_labels, named.to_dict()["label2id"]) == (2, {"x": 0, "y": 1})
    config = ImageGPTConfig.from_dict(data)
    config.num_labels = 4
    assert len(config.to_dict()["id2label"]) == 4
    config.id2label = {0: "x", 1: "y"}
    assert config.num_labels == 2


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
        ({"problem_type": "guess"}, "problem_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"use_cache": "yes"}, "use_cache"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"id2label": {}}, "num_labels"),
        ({"id2label": {"x": "y"}}, "invalid literal"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"id2label": 3}, "int"),
    ],
)
def test_bad_files_name_file_and_field(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"config\.json: not a usable ImageGPT configuration: .*{reason}"):
        ImageGPTConfig.from_json_file(path)


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="larger than 4 MiB"):
        ImageGPTConfig.from_json_file(path)


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="no_such"):
        ImageGPTConfig(no_such=1)  # type: ignore[call-arg]
