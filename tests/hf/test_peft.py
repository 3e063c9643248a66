"""PEFT's adapters on our models as on transformers': which modules they find, and what the adapted models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import ids, small

from igpt_fast import hf

LINEAR = ["c_attn", "c_fc", "c_proj"]
ADAPTERS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(target_modules=LINEAR, r=2),
    "DoRA": peft.LoraConfig(target_modules=LINEAR, r=2, use_dora=True),
    "IA3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["c_fc"]),
    "all": peft.LoraConfig(target_modules="all-linear", r=2),
}
PROMPTS: dict[str, Any] = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(1)
    found = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return found.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, tmp_path: Path) -> None:
    model = small()
    theirs = adapted(hf.to_transformers(small()), ADAPTERS[name])
    ours = adapted(model, ADAPTERS[name])
    tokens = ids(model, 2, 6)
    wanted = {key for key, value in theirs.named_parameters() if value.requires_grad}
    assert {key for key, value in ours.named_parameters() if value.requires_grad} == wanted
    assert len(wanted) >= 4 * 2
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    ours(tokens, labels=tokens.clamp(max=15)).loss.backward()
    assert all(value.grad is not None for value in ours.parameters() if value.requires_grad)
    before = ours(tokens).logits
    drawn = ours.generate(tokens, max_new_tokens=3)
    ours.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(small(), str(tmp_path)).eval()(tokens).logits, before)
    merged = ours.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(tokens).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(tokens, max_new_tokens=3), drawn)


@pytest.mark.filterwarnings("ignore:generate. prepare_inputs_for_generation")
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    model = small()
    theirs = adapted(hf.to_transformers(small()), PROMPTS[name])
    ours = adapted(model, PROMPTS[name])
    tokens = ids(model, 2, 6)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    ours(tokens, labels=tokens.clamp(max=15)).loss.backward()
    assert all(value.grad is not None for value in ours.parameters() if value.requires_grad)
    drawn = ours.generate(input_ids=tokens, max_new_tokens=4)
    assert torch.equal(drawn, theirs.generate(input_ids=tokens, max_new_tokens=4))
    assert not torch.equal(drawn, small().generate(tokens, max_new_tokens=4))


def test_an_adapter_of_the_model_itself() -> None:
    """transformers' own ``add_adapter``, which the models have as its kin."""
    model = small()
    tokens, before = ids(model, 2, 6), model(ids(model, 2, 6)).logits
    model.add_adapter(peft.LoraConfig(target_modules=LINEAR, r=2, init_lora_weights=False))
    assert not torch.equal(model(tokens).logits, before)
    model.disable_adapters()
    torch.testing.assert_close(model(tokens).logits, before)
