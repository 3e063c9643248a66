"""Training of both libraries side by side: from the same weights, on the same tokens, the same losses all the way.

What single steps cannot show: an error that is too small to be seen in one, or that only the optimizer sees.
"""

from __future__ import annotations

import torch
from tolerance import assert_parity, make_trio
from torch import nn

STEPS = 50
SIZES = {"n_layer": 2, "n_positions": 48, "vocab_size": 17, "n_embd": 64, "n_head": 2}


def ramps(batch: int, length: int, seed: int) -> torch.Tensor:
    """Tokens that go up by one or two from pixel to pixel: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (batch, length), generator=generator)
    return steps.cumsum(dim=1) % (SIZES["vocab_size"] - 1)


def training(model: nn.Module) -> torch.Tensor:
    """(STEPS,) the loss of every step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        tokens = ramps(4, SIZES["n_positions"], step)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_same_losses_as_transformers() -> None:
    ours, theirs, exact = map(training, make_trio("ImageGPTForCausalImageModeling", torch.float32, **SIZES))
    assert exact[-5:].mean() < 0.7 * exact[:5].mean(), "nothing is learned"
    assert_parity(ours, theirs, exact)
