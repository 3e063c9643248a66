"""Quantizers on our models, through ``hf.linear_layers``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import ids, small
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from igpt_fast import hf
from igpt_fast.model.layers import Conv1D


def test_the_same_model_of_linear_layers(tmp_path: Path) -> None:
    model, plain = small(), small()
    before = model.transformer.h[0].attn.c_attn
    assert hf.linear_layers(model) is model
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert model.transformer.h[0].attn.c_attn.weight.data_ptr() == before.weight.data_ptr()
    tokens = ids(model, 2, 6)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.generate(tokens, max_new_tokens=4), plain.generate(tokens, max_new_tokens=4))
    with pytest.raises(
        ValueError, match=r"save_pretrained: transformer.h.0.attn.c_attn.weight is \(144, 48\), .*wants"
    ):
        model.save_pretrained(tmp_path)


def test_torchao() -> None:
    model, plain = hf.linear_layers(small()), small()
    quantize_(model, Int8WeightOnlyConfig())
    kinds = [
        type(module.weight).__name__ for name, module in model.named_modules() if name.endswith(("c_attn", "c_fc"))
    ]
    assert len(kinds) == 4
    assert "Parameter" not in kinds
    tokens = ids(model, 2, 6)
    found, wanted = model(tokens).logits, plain(tokens).logits
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert model.generate(tokens, max_new_tokens=3).shape == (2, 9)
