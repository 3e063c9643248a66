"""Models that the CUDA decoder serves, and what a decoder makes of them."""

from __future__ import annotations

import torch
from tolerance import randomise, tokens
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling
from igpt_fast.engines.decoder import Decoder

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 70, "vocab_size": 41}


def make(device: str, dtype: torch.dtype = torch.bfloat16, **fields: object) -> ImageGPTForCausalImageModeling:
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**{**SIZES, **fields}))
    randomise(model, 0)
    return model.to(device, dtype).eval()


@torch.no_grad()
def read(decoder: Decoder, ids: Tensor, primer: int, copies: int = 1) -> Tensor:
    """(B, T - primer + 1, K) logits: of a primer, whose rows are the first of each ``copies``, and step by step."""
    logits = [decoder.prefill(ids[::copies, :primer]).repeat_interleave(copies, dim=0)]
    if copies > 1:
        decoder.fork(copies)
    logits += [decoder.step(column) for column in ids[:, primer:].unbind(1)]
    return torch.stack(logits, dim=1)


def shared(rows: int, copies: int, length: int, primer: int, config: ImageGPTConfig) -> Tensor:
    """(rows * copies, length) tokens; copies that follow each other share the first ``primer``."""
    ids = tokens(config, rows * copies, length)
    ids[:, :primer] = ids[::copies, :primer].repeat_interleave(copies, dim=0)
    return ids
