"""accelerate on our models: prepared, saved, and run with weights that are kept elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from small_models import ids, small

import igpt_fast


def same(found: Any, wanted: Any) -> None:
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_prepared_and_saved(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = small()
    tokens = ids(model, 2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    accelerator.backward(prepared(tokens, labels=tokens.clamp(max=15)).loss)
    optimizer.step()
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    same(igpt_fast.ImageGPTForCausalImageModeling.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded(place: str, tmp_path: Path) -> None:
    plain, model = small(), small()
    tokens = ids(model, 2, 6)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path / "disk"), execution_device="cpu")
    assert next(model.parameters()).is_meta
    assert model.device.type == "cpu"
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.forward_intermediates(tokens, [0])[0], plain.forward_intermediates(tokens, [0])[0])
    assert torch.equal(model.generate(tokens, max_new_tokens=4), plain.generate(tokens, max_new_tokens=4))
    drawn = {"do_sample": True, "seed": 3, "max_new_tokens": 4}
    assert torch.equal(model.generate(**drawn), plain.generate(**drawn))
    model.save_pretrained(tmp_path / "saved")
    same(igpt_fast.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "saved"), plain)


def test_device_maps(tmp_path: Path) -> None:
    plain = small()
    plain.save_pretrained(tmp_path)
    tokens = ids(plain, 2, 6)
    load = igpt_fast.ImageGPTForCausalImageModeling.from_pretrained
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        same(load(tmp_path, device_map=device_map), plain)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.h.0": "cpu"}
    places |= {"transformer.h.1": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    model = load(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == places
    assert model.transformer.h[1].mlp.c_fc.weight.is_meta
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=4), plain.generate(tokens, max_new_tokens=4))
    with pytest.raises(TypeError, match="device, or device_map"):
        load(tmp_path, device_map="cpu", device="cpu")


@pytest.mark.parametrize(("device_map", "low"), [("auto", False), ("balanced", False), ("balanced_low_0", True)])
def test_strategies(device_map: str, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def balanced(model: Any, max_memory: Any, no_split_module_classes: Any, low_zero: bool) -> Any:
        asked.append((dict(max_memory), no_split_module_classes, low_zero))
        return max_memory

    monkeypatch.setattr(accelerate.utils, "get_balanced_memory", balanced)
    small().save_pretrained(tmp_path)
    load = igpt_fast.ImageGPTForCausalImageModeling.from_pretrained
    load(tmp_path, device_map=device_map, max_memory=(memory := {"cpu": "1GB"}))
    load(tmp_path, device_map="sequential")
    assert asked == [(memory, ["ImageGPTBlock"], low)]
    assert memory == {"cpu": "1GB"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {}}, "want the names of modules"),
        ({"device_map": {0: "cpu"}}, "want the names of modules"),
        ({"device_map": {"": "disk"}}, "would go to the disk: give offload_folder"),
        ({"device_map": "auto", "max_memory": {"cpu": "1KB"}}, "would go to the disk: give offload_folder"),
        ({"device_map": "foo"}, "want a device, one of auto, .* got 'foo'"),
        ({"device_map": "disk"}, "want a device, .* got 'disk'"),
        ({"device_map": ["cpu"]}, "want a device, .* got"),
        ({"device_map": True}, "want a device, .* got True"),
        ({"device_map": -1}, "want a device, .* got -1"),
        ({"device_map": {"transformer": "cpu", "lm_head": "foo"}}, "want a device, .* got 'foo'"),
        ({"device_map": {"transformer": "cpu"}}, r"has no place for lm_head\.weight"),
        ({"max_memory": {"cpu": "1GB"}}, "want a device, .* got None"),
    ],
)
def test_device_maps_that_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    """Before any weight is read: one of these would not be."""
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + b"\xff" * 64)  # NaN
    with pytest.raises(ValueError, match=f"^from_pretrained: device_map: .*{message}"):
        igpt_fast.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, **arguments)


def test_everything_on_the_disk_and_a_folder_for_nothing(tmp_path: Path) -> None:
    plain = small()
    plain.save_pretrained(tmp_path / "model")
    small(seed=1).save_pretrained(tmp_path / "other")
    load, tokens = igpt_fast.ImageGPTForCausalImageModeling.from_pretrained, ids(plain, 2, 6)
    load(tmp_path / "other", device_map={"": "disk"}, offload_folder=tmp_path / "offload")  # which is no more
    model = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert model.lm_head.weight.is_meta
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not hasattr(load(tmp_path / "model", offload_folder=tmp_path / "none"), "hf_device_map")
