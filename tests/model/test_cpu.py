"""Training under autocast on the CPU's kernels: loss, gradients, recomputation, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from implementations import Implementation, isas_of
from tolerance import Tensors, compare, randomise, tokens

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend

pytestmark = pytest.mark.skipif(not isas_of("causal_attention"), reason="no kernel for this processor")
BF16 = torch.bfloat16


def make() -> ImageGPTForCausalImageModeling:
    """With sequences so long that every op of a block has a kernel."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 530, "vocab_size": 41}
    model = ImageGPTForCausalImageModeling(
        ImageGPTConfig(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ).train()
    randomise(model, 0)
    return model


def training_step(model: ImageGPTForCausalImageModeling, seed: int = 1) -> Tensors:
    ids = tokens(model.config, 2, 523, seed=seed)
    with torch.autocast("cpu", BF16, enabled=model.dtype == torch.float32):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"loss": loss.detach(), **dict(zip(names, found, strict=True))}


def several(model: ImageGPTForCausalImageModeling) -> Tensors:
    """Of four inputs together: the error of a single number is a matter of luck."""
    steps = [training_step(model, seed) for seed in range(4)]
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def test_loss_and_gradients(native_cpu: Implementation) -> None:
    model = make()
    native_cpu.module.reset_counters()
    ours = several(model)
    calls = native_cpu.module.counters()
    for name, count in {"causal_attention_fwd_cpu": 2, "causal_attention_bwd_cpu": 2, "norm_bwd_cpu": 5}.items():
        assert calls[name] == 4 * count, calls
    with backend.use_backend("reference"):
        plain, exact = several(model), several(copy.deepcopy(model).double())
    failed = {name: r for name in exact if not (r := compare(ours[name], plain[name], exact[name])).passed}
    assert not failed, failed


def test_the_norms_of_the_blocks_write_what_the_products_read(native_cpu: Implementation) -> None:
    """The same bits as by a conversion afterwards; what the network gives out stays wide."""
    model, seen = make(), []
    for block in model.transformer.h:
        block.ln_1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ids = tokens(model.config, 2, 523)
    with torch.autocast("cpu", BF16), torch.no_grad():
        out = model.transformer(ids, output_hidden_states=True, use_cache=False)
    assert seen == [BF16, BF16]
    assert all(x.dtype == torch.float32 for x in out.hidden_states)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_bits(native_cpu: Implementation, reentrant: bool) -> None:
    model, results = make(), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        ids = tokens(model.config, 2, 523)
        with torch.autocast("cpu", BF16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled(native_cpu: Implementation) -> None:
    """One whole graph with the kernels in it."""
    model = make()
    ids = tokens(model.config, 2, 523)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in (model, compiled):
        native_cpu.module.reset_counters()
        with torch.autocast("cpu", BF16), backend.compiled_ops("opaque"):
            loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        assert native_cpu.module.counters()["causal_attention_bwd_cpu"] == 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
