"""Whole models on the CUDA kernels, emulated: forward, loss and backward against the reference."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from implementations import Implementation
from tolerance import Tensors, compare, gradients, outputs, randomise, tokens

from igpt_fast import DynamicCache, ImageGPTConfig, ImageGPTForCausalImageModeling, backend

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 70, "vocab_size": 41}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
Quantities = Callable[[ImageGPTForCausalImageModeling], Tensors]


def make(dtype: torch.dtype, **fields: object) -> ImageGPTForCausalImageModeling:
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**{**SIZES, **NO_DROPOUT, **fields}))
    randomise(model, 0)
    return model.to(dtype).eval()


def assert_agrees(emulation: Implementation, model: ImageGPTForCausalImageModeling, quantities: Quantities) -> int:
    """On the kernels, against the reference in the same dtype and in float64. Returns the number of launches."""
    assert emulation.module is not None
    emulation.module.reset_counters()
    ours = quantities(model)
    launches = emulation.module.counters()["launches"]
    with backend.use_backend("reference"):
        plain, exact = quantities(model), quantities(copy.deepcopy(model).double())
    assert emulation.module.counters()["launches"] == launches, "the reference ran a kernel"
    assert ours.keys() == plain.keys() == exact.keys()
    results = {name: compare(ours[name], plain[name], exact[name]) for name in exact}
    failed = {name: result for name, result in results.items() if not result.passed}
    assert not failed, failed
    return launches


@pytest.mark.parametrize("fields", [{}, {"activation_function": "gelu"}, {"n_embd": 96, "n_head": 1, "n_inner": 64}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_and_backward(emulation: Implementation, dtype: torch.dtype, fields: dict[str, object]) -> None:
    model = make(dtype, **fields)
    ids = tokens(model.config, 2, 67)

    def quantities(model: ImageGPTForCausalImageModeling) -> Tensors:
        return outputs(model, input_ids=ids, output_attentions=False, use_cache=False) | gradients(
            model, input_ids=ids, labels=ids
        )

    # In each layer two norms, attention and activation, and the last norm: forward twice, backward once; the loss.
    assert assert_agrees(emulation, model, quantities) >= (2 * 4 + 1) * 3 + 2


def test_left_padding(emulation: Implementation) -> None:
    """Hidden positions reach nothing, and a row of its own length is as if alone."""
    model = make(torch.bfloat16)
    ids, lengths = tokens(model.config, 3, 66), torch.tensor([66, 1, 40])
    mask = torch.arange(66) >= 66 - lengths[:, None]

    def quantities(model: ImageGPTForCausalImageModeling) -> Tensors:
        found = gradients(model, input_ids=ids, labels=ids.masked_fill(~mask, -100), attention_mask=mask)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found | {"logits": logits.masked_fill(~mask[..., None], 0.0)}

    assert assert_agrees(emulation, model, quantities) > 20


def test_behind_a_cache(emulation: Implementation) -> None:
    """Prefill in two pieces, then one position: the queries are the last of the keys."""
    model = make(torch.bfloat16)
    ids = tokens(model.config, 2, 68)

    def quantities(model: ImageGPTForCausalImageModeling) -> Tensors:
        cache = DynamicCache()
        with torch.no_grad():
            pieces = [model(input_ids=piece, past_key_values=cache).logits for piece in ids.split([3, 64, 1], dim=1)]
        return {"logits": torch.cat(pieces, dim=1)}

    assert assert_agrees(emulation, model, quantities) > 20


def test_autocast(emulation: Implementation) -> None:
    """The gradients of several inputs together: the largest error of a single one is a matter of luck."""
    model = make(torch.float32)
    inputs = [tokens(model.config, 2, 33, seed=seed) for seed in range(6)]

    def quantities(model: ImageGPTForCausalImageModeling) -> Tensors:
        found: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for ids in inputs:
            with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            for name, gradient in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                found[name].append(gradient)
        return {name: torch.stack(gradients) for name, gradients in found.items()}

    assert assert_agrees(emulation, model, quantities) > 10


def test_compiled(emulation: Implementation) -> None:
    """torch.compile sees whole graphs, forward and backward, with the kernels in them."""
    model = make(torch.bfloat16)
    ids = tokens(model.config, 1, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = model(input_ids=ids, labels=ids, use_cache=False)
    expected = torch.autograd.grad(eager.loss, model.parameters())
    assert emulation.module is not None
    emulation.module.reset_counters()
    with backend.compiled_ops("opaque"):
        result = compiled(input_ids=ids, labels=ids, use_cache=False)
    got = torch.autograd.grad(result.loss, model.parameters())
    assert emulation.module.counters()["launches"] > 15
    assert torch.equal(result.logits, eager.logits)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_training_steps(emulation: Implementation) -> None:
    """A few steps of AdamW on the kernels bring the loss down as they do on the reference."""

    def train() -> list[float]:
        model = make(torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = tokens(model.config, 2, 24)
        losses = []
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = train()
    with backend.use_backend("reference"):
        plain = train()
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 0.05 * (plain[0] - plain[-1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_keeps_the_choice(emulation: Implementation, reentrant: bool) -> None:
    """Blocks are computed again in the backward, on a GPU in torch's own thread, by what computed them before."""
    assert emulation.module is not None
    model = make(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(model.config, 2, 9)
    with backend.use_backend("reference"):
        loss = model(input_ids=ids, labels=ids).loss
    emulation.module.reset_counters()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert emulation.module.counters()["launches"] == 0
    assert all(parameter.grad is not None for parameter in model.transformer.h.parameters())
