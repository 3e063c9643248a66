"""Folders written here load in transformers and the other way round, bit for bit; what does not fit is refused."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt_fast.checkpoint.names import trunk_shapes

CLASSES = [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS: dict[str, Any] = {"vocab_size": 9, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3}


def tiny(cls: Any = ImageGPTForCausalImageModeling, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A small model, every parameter random (biases and norms too)."""
    model = cls(ImageGPTConfig(**{**FIELDS, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(dtype)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def rewrite(folder: Path, **changed: Tensor | None) -> None:
    """Replaces (or, with ``None``, removes) tensors of ``model.safetensors``; dots in names written as ``__``."""
    state = load_file(folder / "model.safetensors")
    for name, value in changed.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **fields}))


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], value) for name, value in want.items())


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved causal model."""
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fields", [{}, {"n_inner": 24, "n_layer": 1, "vocab_size": 5, "n_positions": 3}])
def test_the_table_of_names_is_the_model(cls: Any, fields: dict[str, Any]) -> None:
    config = ImageGPTConfig(**{**FIELDS, **fields})
    with torch.device("meta"):
        state = cls(config).state_dict()
    heads = {"lm_head.weight": (config.vocab_size - 1, 16), "score.weight": (3, 16)}
    plain = {name.removeprefix("transformer."): tuple(value.shape) for name, value in state.items()}
    assert {name: shape for name, shape in plain.items() if name not in heads} == dict(trunk_shapes(config))
    assert all(shape == heads[name] for name, shape in plain.items() if name in heads)


@pytest.mark.parametrize("shard", ["5GB", "5KB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_ours_in_transformers(tmp_path: Path, cls: Any, dtype: torch.dtype, shard: str) -> None:
    model = tiny(cls, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "5KB")
    theirs, report = getattr(transformers, cls.__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(theirs.state_dict(), model.state_dict())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [cls.__name__]
    assert config.dtype == dtype
    assert config.num_labels == 3
    assert_same(cls.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_model_with_classes_in_transformers(tmp_path: Path) -> None:
    model = tiny(n_classes=3).eval()
    model.save_pretrained(tmp_path)
    assert ImageGPTForCausalImageModeling.from_pretrained(tmp_path).config.n_classes == 3
    theirs, report = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor([[6, 0, 4], [8, 1, 2]])  # the second class, and none
    torch.testing.assert_close(theirs(input_ids=tokens).logits, model(tokens).logits)
    assert ImageGPTConfig.of(theirs.config, "test").n_classes == 3
    set_config(tmp_path, n_classes=8)
    with pytest.raises(ValueError, match=r"config\.json: .*n_classes is 8; want an integer in 0\.\.7"):
        ImageGPTForCausalImageModeling.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "5KB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_theirs_here(tmp_path: Path, cls: Any, dtype: torch.dtype, shard: str) -> None:
    theirs = getattr(transformers, cls.__name__)(transformers.ImageGPTConfig(**FIELDS)).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cls.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was initialised in vain
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())
    assert_same(model.state_dict(), theirs.state_dict())
    # ... and back: what transformers wrote into config.json survives.
    model.save_pretrained(tmp_path / "again")
    old, new = (json.loads((place / "config.json").read_text()) for place in (tmp_path, tmp_path / "again"))
    assert old == {name: new[name] for name in old}


def test_auto_model(folder: Path) -> None:
    assert type(transformers.AutoModel.from_pretrained(folder)) is transformers.ImageGPTModel


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bin(tmp_path: Path, dtype: torch.dtype, sharded: bool, legacy: bool) -> None:
    model = tiny(dtype=dtype)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = dict(model.state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)  # as in the published files
    state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    parts = [dict(list(state.items())[i::2]) for i in range(2)] if sharded else [state]
    names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    if sharded:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(ImageGPTForCausalImageModeling.from_pretrained(tmp_path).state_dict(), model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"no weights: none of model\.safetensors, model\.safetensors\.index"):
        ImageGPTForCausalImageModeling.from_pretrained(tmp_path, use_safetensors=True)


def test_order_of_preference(folder: Path) -> None:
    other = tiny(vocab_size=9)
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    load = ImageGPTForCausalImageModeling.from_pretrained
    assert_same(load(folder, use_safetensors=False).state_dict(), other.state_dict())
    assert_same(load(folder).state_dict(), load_file(folder / "model.safetensors"))


def test_a_base_model_from_a_head_and_back(tmp_path: Path) -> None:
    causal = tiny()
    causal.save_pretrained(tmp_path / "causal")
    base = ImageGPTModel.from_pretrained(tmp_path / "causal")
    assert_same(base.state_dict(), causal.transformer.state_dict())
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"model\.safetensors: lacks lm_head\.weight: newly initialised") as caught:
        back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "base")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert back.newly_initialized == ("lm_head.weight",)
    assert base.newly_initialized == causal.newly_initialized == ()
    back.save_pretrained(tmp_path / "back")
    assert ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "back").newly_initialized == ()
    assert_same(back.transformer.state_dict(), base.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_classifier_from_a_causal_model(folder: Path, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"score\.weight: newly initialised") as caught:
        model = ImageGPTForImageClassification.from_pretrained(folder, num_labels=4000, dtype=dtype)
    assert len(caught) == 1
    assert model.config.num_labels == model.num_labels == 4000
    assert model.score.weight.shape == (4000, 16)
    assert model.score.weight.dtype == dtype
    assert 0.019 < model.score.weight.float().std() < 0.021
    assert model.score.weight.requires_grad


def test_a_head_of_another_size(tmp_path: Path) -> None:
    tiny(ImageGPTForImageClassification).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: score\.weight: shape \(3, 16\), .* wants \(7, 16\)"):
        ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match=r"score\.weight is \(3, 16\) and not \(7, 16\): newly"):
        model = ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (7, 16)
    assert model.newly_initialized == ("score.weight",)


@pytest.mark.parametrize(
    ("ours", "fields"),
    [
        (ImageGPTForImageClassification, {"num_labels": 7}),
        (ImageGPTForCausalImageModeling, {"n_positions": 5, "vocab_size": 12}),
    ],
)
def test_other_sizes_side_by_side(tmp_path: Path, ours: Any, fields: dict[str, int]) -> None:
    """transformers makes the same weights anew, keeps the same ones, and reports them alike."""
    tiny(ours).save_pretrained(tmp_path)
    how = {"ignore_mismatched_sizes": True, "output_loading_info": True, **fields}
    with pytest.warns(UserWarning, match="newly initialised"):
        model, told = ours.from_pretrained(tmp_path, **how)
    theirs, reported = getattr(transformers, ours.__name__).from_pretrained(tmp_path, **how)
    wanted = {(key, tuple(old), tuple(new)) for key, old, new in reported["mismatched_keys"]}
    assert told["mismatched_keys"] == wanted
    assert {key for key, *_ in wanted} == set(model.newly_initialized)
    assert told["missing_keys"] == reported["missing_keys"] == set()
    own = model.state_dict()
    for key, value in theirs.state_dict().items():
        assert own[key].shape == value.shape
        assert torch.equal(own[key], value) == (key not in model.newly_initialized), key


@pytest.mark.parametrize("fields", [{"n_positions": 5}, {"n_inner": 24}, {"vocab_size": 12}, {"n_embd": 32}])
def test_other_sizes_are_made_anew(folder: Path, fields: dict[str, int]) -> None:
    stored = load_file(folder / "model.safetensors")
    with pytest.warns(UserWarning, match="newly initialised") as caught:
        model = ImageGPTForCausalImageModeling.from_pretrained(folder, ignore_mismatched_sizes=True, **fields)
    new = [name for name, value in model.state_dict().items() if value.shape != stored[name].shape]
    assert model.newly_initialized == tuple(new)
    assert len(caught) == 1
    assert all(name.removeprefix("transformer.") in str(caught[0].message) for name in new)
    assert "transformer.wpe.weight" in new if "n_positions" in fields else new
    std = model.config.initializer_range
    for name, value in model.state_dict().items():
        if name not in new:
            assert torch.equal(value, stored[name]), name
        elif name.endswith(".bias") or "ln_" in name:
            assert torch.equal(value, torch.full_like(value, "ln_" in name)), name
        else:
            expected = std / 2 if name.endswith("c_proj.weight") else std  # sqrt(2 n_layer) is 2
            assert 0.7 * expected < value.std() < 1.3 * expected, name


def test_other_sizes_have_a_bound(folder: Path) -> None:
    absurd = {"n_positions": 1 << 24, "n_embd": 1 << 24, "ignore_mismatched_sizes": True}
    with pytest.raises(ValueError, match=r"lacks \w+\.weight, and the configuration claims"):
        ImageGPTForCausalImageModeling.from_pretrained(folder, **absurd)


@pytest.mark.parametrize("stored", DTYPES)
def test_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    model = tiny(dtype=stored)
    model.save_pretrained(tmp_path)
    theirs = transformers.ImageGPTForCausalImageModeling
    ours = ImageGPTForCausalImageModeling
    for entry in ("as saved", None, "float16"):
        data = json.loads((tmp_path / "config.json").read_text())
        if entry != "as saved":
            data.pop("dtype", None)
            data |= {"dtype": entry} if entry else {}
            (tmp_path / "config.json").write_text(json.dumps(data))
        for wanted in (None, "auto", "float32", torch.bfloat16, "float64"):
            given = {} if wanted is None else {"dtype": wanted}
            got = ours.from_pretrained(tmp_path, **given)
            assert_same(got.state_dict(), theirs.from_pretrained(tmp_path, **given).state_dict())
            assert got.config.dtype == str(got.dtype).removeprefix("torch.")
    assert ours.from_pretrained(tmp_path, torch_dtype="float64").dtype == torch.float64


def test_config_and_overrides(folder: Path) -> None:
    load = ImageGPTForCausalImageModeling.from_pretrained
    model = load(folder, resid_pdrop=0.5, use_cache=False)
    assert (model.config.resid_pdrop, model.config.use_cache) == (0.5, False)
    assert model.transformer.h[0].mlp.dropout.p == 0.5
    config = ImageGPTConfig(**FIELDS, embd_pdrop=0.25)
    (folder / "config.json").unlink()
    model = load(folder, config=config, attn_pdrop=0.75)
    assert (model.config.embd_pdrop, model.config.attn_pdrop, config.attn_pdrop) == (0.25, 0.75, 0.1)
    with pytest.raises(ValueError, match="variant='fp16' is not offered: give the name of another folder"):
        load(folder, variant="fp16")
    with pytest.raises(TypeError, match="no_such"):
        load(folder, no_such=True)
    with pytest.raises(TypeError, match="must be an ImageGPTConfig, got dict"):
        load(folder, config={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not both"):
        load(folder, config=config, dtype="auto", torch_dtype="auto")
    for bad in ("int8", torch.int32, 16):
        with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
            load(folder, config=config, dtype=bad)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(folder)


def test_the_model_does_not_depend_on_the_file(folder: Path) -> None:
    model = ImageGPTForCausalImageModeling.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert_same(model.state_dict(), before)


def test_saving_over_an_older_save(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for shard in ("5KB", "5GB", "2KB", "5KB", "5GB"):
        model = tiny(n_layer=1 if shard == "2KB" else 2)
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert_same(ImageGPTForCausalImageModeling.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize("shard", ["5KB", "5GB"])
def test_a_failed_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str) -> None:
    import safetensors.torch

    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    original, calls = safetensors.torch.save_file, []

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        calls.append(filename)
        if len(calls) == (3 if shard == "5KB" else 1):
            Path(filename).write_bytes(b"half")
            raise OSError("No space left on device")
        original(tensors, filename, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny().save_pretrained(tmp_path, max_shard_size=shard)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def lay_out(folder: Path, layout: str, model: nn.Module) -> None:
    """The weights of a model, in one of the four layouts or in all of them."""
    state = dict(model.state_dict())
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    for suffix, stem, write in [("safetensors", "model", save_file), ("bin", "pytorch_model", torch.save)]:
        if layout in (f"{stem}.{suffix}", "all"):
            write(state, folder / f"{stem}.{suffix}")
        if layout in (f"{stem}.{suffix}.index.json", "all"):
            names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
            for name, half in zip(names, halves, strict=True):
                write(half, folder / name)
            weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = [
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "all"),
]


@pytest.mark.parametrize("shard", ["5KB", "5GB"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_that_is_cut_anywhere_is_the_old_model_or_the_new_one(tmp_path: Path, layout: str, shard: str) -> None:
    """... or none: never a mixture, nor an older model than the folder held before."""
    old, new = tiny(), tiny()
    stale = tiny() if layout == "all" else None
    folder = tmp_path / "model"
    load = ImageGPTForCausalImageModeling.from_pretrained
    outcomes = []
    for cut in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder)
        if layout != "model.safetensors":
            (folder / "model.safetensors").unlink()
        lay_out(folder, layout, stale or old)
        if stale:
            save_file(dict(old.state_dict()), folder / "model.safetensors")
        (folder / "notes.bin").write_text("mine")
        left = [cut]

        def step(original: Any, left: list[int] = left) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return original(*arguments, **options)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", step(Path.replace))
            patch.setattr(Path, "unlink", step(Path.unlink))
            with contextlib.suppress(Killed):
                new.save_pretrained(folder, max_shard_size=shard)
        if shard == "5KB" and layout == "model.safetensors":
            there = {path.name for path in folder.iterdir() if path.name.startswith("model")}
            assert there == {"model.safetensors"} or "model.safetensors" not in there, "shards beside the old file"
        try:
            got = load(folder).state_dict()
        except FileNotFoundError:
            outcomes.append("none")
        else:
            which = [name for name, model in (("old", old), ("new", new)) if same(got, model.state_dict())]
            assert len(which) == 1, f"a mixture, or a stale model, after {cut} steps"
            outcomes += which
        if left[0]:
            break
    order = {"old": 0, "none": 1, "new": 2}
    assert outcomes == sorted(outcomes, key=order.__getitem__)
    assert (outcomes[0], outcomes[-1]) == ("old", "new")
    for use_safetensors in (True, None):
        assert_same(load(folder, use_safetensors=use_safetensors).state_dict(), new.state_dict())
    with pytest.raises(FileNotFoundError):
        load(folder, use_safetensors=False)
    assert (folder / "notes.bin").exists()
    assert not [path.name for path in folder.iterdir() if path.name.startswith("pytorch_model")]


@pytest.mark.parametrize("shard", ["5KB", "5GB"])
def test_a_full_disk_names_the_file(tmp_path: Path, shard: str) -> None:
    resource = pytest.importorskip("resource")
    model = tiny()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            model.save_pretrained(tmp_path, max_shard_size=shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", Path(caught.value.filename).name)
    assert not list(tmp_path.iterdir())


def test_save_arguments(tmp_path: Path) -> None:
    model = tiny()
    average = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "new" / "deep", state_dict=average)
    assert_same(ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "new" / "deep").state_dict(), average)
    average.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"differs from the model in lm_head\.weight"):
        model.save_pretrained(tmp_path / "x", state_dict=average)
    for bad in ("5 parsecs", 0, -3):
        with pytest.raises(ValueError, match=r"Unit|max_shard_size"):
            model.save_pretrained(tmp_path / "x", max_shard_size=bad)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "file")
    assert not (tmp_path / "x").exists()
    assert "architectures" not in model.config.extra  # saving leaves the model as it was


def test_arguments_of_trainers(tmp_path: Path) -> None:
    model = tiny()
    assert model.name_or_path == ""
    with pytest.raises(ValueError, match="safe_serialization=False is not supported; no pickles"):
        model.save_pretrained(tmp_path / "model", safe_serialization=False)
    model.save_pretrained(tmp_path / "model", is_main_process=False, state_dict={})  # where FSDP has it empty
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model", is_main_process=True, safe_serialization=True)
    load = ImageGPTForCausalImageModeling.from_pretrained
    for low in (None, True, False):
        again = load(tmp_path / "model", low_cpu_mem_usage=low, output_loading_info=False)
        assert_same(again.state_dict(), model.state_dict())
        assert again.name_or_path == str(tmp_path / "model")
    again, told = load(pretrained_model_name_or_path=tmp_path / "model", output_loading_info=True)
    assert told == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    with pytest.warns(UserWarning, match="newly initialised"):
        _, told = ImageGPTForImageClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert (told["missing_keys"], told["unexpected_keys"]) == ({"score.weight"}, {"lm_head.weight"})
    again.save_pretrained(save_directory=tmp_path / "named", push_to_hub=False, save_function=print)
    with pytest.raises(ValueError, match="save_pretrained: push_to_hub=True is not offered: call huggingface_hub"):
        again.save_pretrained(tmp_path / "named", push_to_hub=True)


def test_hub_cache_offline(tmp_path: Path, folder: Path) -> None:
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    model = ImageGPTForCausalImageModeling.from_pretrained("some/model", cache_dir=tmp_path / "cache")
    assert model.name_or_path == "some/model"
    assert_same(model.state_dict(), load_file(folder / "model.safetensors"))
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="some/model: no weights"):
        ImageGPTForCausalImageModeling.from_pretrained("some/model", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["some/model", "no-such-folder", "/no/such/folder"])
def test_no_such_model_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such folder") as caught:
        ImageGPTModel.from_pretrained(name, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


# --- what does not fit -------------------------------------------------------------------------------------------


def refused(folder: Path, reason: str, cls: Any = ImageGPTForCausalImageModeling, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        cls.from_pretrained(folder, **arguments)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_missing_weights(folder: Path) -> None:
    rewrite(folder, transformer__h__1__ln_2__weight=None)
    refused(folder, r"model\.safetensors: lacks h\.1\.ln_2\.weight \(layers in the file: 2, .*: 2\)")
    refused(folder, r"lacks h\.1\.ln_2\.weight", strict=False)


def test_unknown_weights(folder: Path) -> None:
    rewrite(folder, **{f"strange{i:02}": torch.ones(1) for i in range(20)})
    refused(folder, r"does not know: strange00, .*strange07 and 12 more")
    with pytest.warns(UserWarning, match=r"strange07 and 12 more: dropped"):
        ImageGPTForCausalImageModeling.from_pretrained(folder, strict=False)


def test_a_layer_too_many(folder: Path) -> None:
    set_config(folder, n_layer=1)
    refused(folder, r"does not know: h\.1\.attn\.c_attn\.bias")


def test_a_tensor_without_numbers_and_of_an_absurd_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["lm_head.weight"] |= {"shape": [0, (1 << 64) - 1], "data_offsets": [0, 0]}
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    end, body = 0, b""
    for name in names:
        first, last = header[name]["data_offsets"]
        body += content[8 + size + first : 8 + size + last]
        header[name]["data_offsets"] = [end, end + last - first]
        end += last - first
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    refused(folder, r"lm_head\.weight: shape \(0, 18446744073709551615\)|not a usable safetensors file")
    with pytest.warns(UserWarning, match="newly initialised"):
        ImageGPTForImageClassification.from_pretrained(folder)


def test_a_name_twice(folder: Path) -> None:
    rewrite(folder, wte__weight=torch.ones(9, 16))
    refused(folder, r"holds both wte\.weight and transformer\.wte\.weight")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(16, 9), r"model\.safetensors: wte\.weight: shape \(16, 9\), the configuration wants \(9, 16\)"),
        (torch.ones(9, 16, 1), r"wte\.weight: shape \(9, 16, 1\)"),
        (torch.ones(0, 16), r"wte\.weight: shape \(0, 16\)"),
        (torch.ones([1] * 60), r"wte\.weight: shape \(1, 1, 1, 1, 1, 1, \.\.\.\), the configuration"),
        (torch.ones(9, 16, dtype=torch.int64), r"wte\.weight: dtype I64; wanted one of float64, float32"),
        (torch.ones(9, 16, dtype=torch.bool), r"wte\.weight: dtype BOOL"),
        (torch.ones(9, 16, dtype=torch.complex64), r"wte\.weight: dtype C64"),
        (torch.full((9, 16), float("nan")), r"wte\.weight: holds NaN or infinity"),
        (torch.cat([torch.ones(143), torch.tensor([float("-inf")])]).view(9, 16), r"wte\.weight: holds NaN or inf"),
        (torch.cat([torch.ones(143), torch.tensor([float("nan")])]).view(9, 16).half(), r"wte\.weight: holds NaN"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_bad_tensors(folder: Path, value: Tensor, reason: str, pickled: bool) -> None:
    rewrite(folder, transformer__wte__weight=value)
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        reason = reason.replace(r"model\.safetensors", r"pytorch_model\.bin").replace("I64", "int64")
        reason = reason.replace("BOOL", "bool").replace("C64", "complex64")
    refused(folder, reason, use_safetensors=not pickled)


def test_values_too_large_for_the_wanted_dtype(folder: Path) -> None:
    rewrite(folder, lm_head__weight=torch.full((8, 16), 1e6))
    refused(folder, r"lm_head\.weight: holds values too large for float16", dtype="float16")
    assert ImageGPTForCausalImageModeling.from_pretrained(folder, dtype="bfloat16").lm_head.weight[0, 0] > 9e5


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"n_layer": 1 << 24}, r"lacks h\.2\.ln_1\.weight, .* and more \(layers in the file: 2, .*: 16777216\)"),
    ({"n_embd": 1 << 24}, r"wte\.weight: shape \(9, 16\), the configuration wants \(9, 16777216\)"),
    ({"n_positions": 1 << 24}, r"wpe\.weight: shape"),
    ({"vocab_size": 1 << 24}, r"wte\.weight: shape"),
    ({"n_inner": 1 << 24}, r"h\.0\.mlp\.c_fc\.weight: shape"),
    ({"n_layer": 10**12}, r"config\.json: .*n_layer"),
    ({"dtype": "float8"}, r"config\.json: dtype must be 'auto' or one of"),
    ({"num_labels": 1 << 24, "id2label": None}, r"lacks score\.weight, and the configuration claims \(16777216, 16"),
]


def test_memory(tmp_path: Path, folder: Path) -> None:
    """Absurd configurations cost nothing; a good load takes the model once, plus a part of the mapped file."""
    for i, (fields, _) in enumerate(ABSURD):
        shutil.copytree(folder, tmp_path / str(i))
        set_config(tmp_path / str(i), **fields)
    with torch.device("meta"):
        model = ImageGPTModel(ImageGPTConfig(n_embd=512, n_layer=8)).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path / "good")
    code = f"""
import re
from igpt_fast import ImageGPTForImageClassification, ImageGPTModel
import safetensors.torch, huggingface_hub
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
ImageGPTModel.from_pretrained({str(folder)!r})  # what torch itself loads on first use
before = peak()
for i in range({len(ABSURD)}):
    try:
        ImageGPTForImageClassification.from_pretrained({str(tmp_path)!r} + f"/{{i}}")
    except ValueError as error:
        print(error)
print(peak() - before)
before = peak()
model = ImageGPTModel.from_pretrained({str(tmp_path / "good")!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    *messages, absurd, good = done.stdout.splitlines()
    assert len(messages) == len(ABSURD), messages
    for message, (_, reason) in zip(messages, ABSURD, strict=True):
        assert re.search(reason, message), message
    assert int(absurd) < 50e6
    assert size < int(good) < 2.2 * size


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """safetensors makes its file private, whatever the umask."""
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_in_a_block_of_the_meta_device(folder: Path) -> None:
    load = ImageGPTForCausalImageModeling.from_pretrained
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match="weights go nowhere; give device"):
            load(folder)
        model = load(folder, device="cpu")
    assert_same(model.state_dict(), load(folder).state_dict())


def test_weights_in_place_of_files(folder: Path) -> None:
    load, state, config = ImageGPTForCausalImageModeling.from_pretrained, tiny().state_dict(), tiny().config
    model, info = load(None, config=config, state_dict=state, output_loading_info=True, device_map="cpu")
    assert_same(model.state_dict(), state)
    assert not any(info.values())
    assert (model.name_or_path, model.training, config.extra.get("dtype")) == ("", False, None)
    model.lm_head.weight.data.zero_()
    assert state["lm_head.weight"].any()  # a copy
    assert_same(load(folder, state_dict=state).state_dict(), state)
    half = load(None, config=ImageGPTConfig(**FIELDS, dtype="bfloat16"), state_dict=state)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="state_dict: lacks score.weight: newly initialised"):
        ImageGPTForImageClassification.from_pretrained(folder, state_dict=state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": None}, ValueError, "name_or_path, or config and state_dict, are wanted"),
        ({"state_dict": None}, ValueError, "name_or_path, or config and state_dict, are wanted"),
        (
            {"state_dict": {"wte.weight": 1}},
            ValueError,
            "^state_dict: not a state dict: entry wte.weight is",
        ),
        ({"dtype": "float16", "torch_dtype": "float16"}, TypeError, "not both"),
        ({"ln_f": torch.ones(16).long()}, ValueError, r"^state_dict: ln_f\.weight: dtype int64; wanted"),
        ({"ln_f": torch.full((16,), float("nan"))}, ValueError, r"^state_dict: ln_f\.weight: holds NaN"),
        ({"ln_f": torch.ones(16, device="meta")}, ValueError, r"ln_f\.weight: not an ordinary tensor"),
        ({"ln_f": torch.ones(15)}, ValueError, r"^state_dict: ln_f\.weight: shape \(15,\)"),
    ],
)
def test_weights_in_place_of_files_are_checked(arguments: Any, error: type[Exception], message: str) -> None:
    arguments = {"config": tiny().config, "state_dict": tiny().state_dict(), **arguments}
    if "ln_f" in arguments:
        arguments["state_dict"]["transformer.ln_f.weight"] = arguments.pop("ln_f")
    with pytest.raises(error, match=message):
        ImageGPTForCausalImageModeling.from_pretrained(None, **arguments)


def test_the_file_of_generate_is_read_first_and_small(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"x": "y" * (1 << 20)}))
    rewrite(folder, transformer__ln_f__weight=torch.full((16,), float("nan")))
    refused(folder, r"generation_config\.json: not usable JSON: larger than 1 MiB")
    rewrite(folder, transformer__ln_f__weight=torch.ones(16))
    ImageGPTModel.from_pretrained(folder)  # which does not generate


def test_what_is_newly_initialised_is_as_a_new_model_has_it() -> None:
    config = ImageGPTConfig(**{**FIELDS, "n_embd": 48, "add_cross_attention": True})
    new = ImageGPTForCausalImageModeling(config).state_dict()
    other = {name: torch.ones(*value.shape, 1) for name, value in new.items()}
    load = ImageGPTForCausalImageModeling.from_pretrained
    with pytest.warns(UserWarning, match="newly initialised"):
        got = load(None, config=config, state_dict=other, ignore_mismatched_sizes=True).state_dict()
    assert got.keys() == new.keys()
    for name, value in new.items():
        assert got[name].shape == value.shape
        if value.std() == 0:
            assert torch.equal(got[name], value), name
        else:
            assert 0.8 < got[name].std() / value.std() < 1.25, name
