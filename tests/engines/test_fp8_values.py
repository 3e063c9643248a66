"""What cached values of 8 bits cost the bundled model, by their definition; the decoder: tests/emulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt_fast import DynamicCache, ImageGPTForCausalImageModeling, ops, reference
from igpt_fast.files import BUNDLED


class Rounding(DynamicCache):
    """Values as the cache of 8 bits has them: reading all at once through it is decoding one after another."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return super().update(
            key, reference.dequantize_values(*reference.quantize_values(value), value.dtype), layer_idx
        )


@torch.no_grad()
def nats(model: ImageGPTForCausalImageModeling, pixels: Tensor, cache: DynamicCache) -> float:
    """Nats/pixel of (N, T) tokens, each given those before it."""
    begin = torch.full_like(pixels[:, :1], model.config.sos_token_id)
    logits = model(torch.cat([begin, pixels[:, :-1]], dim=1), past_key_values=cache).logits
    return float(ops.cross_entropy(logits.float(), pixels))


def held_out(every: int) -> Tensor:
    with np.load(BUNDLED.parent / "emoji16.npz") as file:
        return torch.from_numpy(file["tokens"][file["heldout"]][::every].astype(np.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_per_pixel_of_held_out_emoji(dtype: torch.dtype) -> None:
    """The gate: rounding the values alone may change them as much as all of bfloat16 may (cpu/test_decoder.py)."""
    model = ImageGPTForCausalImageModeling.from_pretrained(BUNDLED, dtype=dtype).eval()
    pixels = held_out(8)
    want, got = nats(model, pixels, DynamicCache()), nats(model, pixels, Rounding())
    assert 0.8 < want < 1.5  # it is the trained model
    assert 0.0 < abs(got - want) < 0.002
