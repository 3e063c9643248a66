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
