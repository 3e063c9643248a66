"""Compiled models met by many batch sizes and lengths: a few graphs serve them all, as of transformers' classes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension  # with setuptools, before other code has found Python's own distutils
from implementations import Implementation
from tolerance import assert_parity
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

from igpt_fast import ImageGPTConfig, backend, model

HEADS = ["ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"]
# 16 x 60 is work for the CPU's kernels, which the others are not.
SHAPES = [(3, 8), (5, 16), (16, 60), (1, 40), (2, 1)]
SIZES = {"n_layer": 1, "n_positions": 70, "vocab_size": 9, "n_embd": 32, "n_head": 2, "num_labels": 3}


def small(head: str) -> Any:
    return getattr(model, head)(ImageGPTConfig(**SIZES)).eval()


def graphs(network: nn.Module, dynamic: bool | None, past: int, backend: str) -> int:
    """How many graphs the shapes ask for; every result is the eager one's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch, length in SHAPES:
        ids, before = torch.randint(8, (batch, length)), torch.randint(8, (batch, past))
        with torch.no_grad():
            caches = [network(before, use_cache=True).past_key_values if past else None for _ in range(2)]
            want = network(ids, past_key_values=caches[0], use_cache=True)
            found = compiled(ids, past_key_values=caches[1], use_cache=True)
        torch.testing.assert_close(found[0], want[0], atol=1e-4, rtol=1e-4)
        assert found.past_key_values.get_seq_length() == past + length
    return counter.frame_count


@pytest.mark.parametrize(
    ("head", "past", "dynamic", "backend"),
    [
        *((head, 0, True, "aot_eager") for head in HEADS),
        (HEADS[1], 4, True, "eager"),
        (HEADS[1], 0, None, "eager"),
        (HEADS[1], 4, None, "eager"),
    ],
)
def test_no_more_graphs_than_of_transformers(head: str, past: int, dynamic: bool | None, backend: str) -> None:
    """Whose classes take 3 to 5 for these shapes: a length or a batch of 1 has a graph of its own for a compiler."""
    assert graphs(small(head), dynamic, past, backend) <= 5


@pytest.mark.soak
def test_training_with_inductor_at_two_lengths() -> None:
    """Machine code of one graph, forward and backward."""
    eager = small(HEADS[1])
    ours = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for batch, length in ((3, 8), (5, 33)):
        ids = torch.randint(8, (batch, length))
        for network, call in ((eager, eager), (ours, compiled)):
            network.zero_grad()
            call(ids, labels=ids, use_cache=False).loss.backward()
        for want, found in zip(eager.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found.grad, want.grad, atol=1e-5, rtol=1e-4)


def ops_of_ours(network: nn.Module, ids: Tensor) -> set[str]:
    """What of ``igpt_fast`` stands in the graph that a compiler is given, forward alone."""
    found: set[str] = set()

    def look(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes if "igpt_fast" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(network, backend=look, fullgraph=True)(ids, labels=ids, use_cache=False)
    return {name.split(".")[1] for name in found}


FUSED = {"rms_norm", "add_rms_norm", "quick_gelu", "cross_entropy"}


@pytest.mark.parametrize("fused", [True, False])
def test_what_can_be_fused_is_seen_by_the_compiler(emulation: Implementation, fused: bool) -> None:
    """Where kernels are there, attention alone is a call of ours, unless somebody asks for the others."""
    network = getattr(model, HEADS[1])(ImageGPTConfig(**{**SIZES, "n_embd": 64})).eval().bfloat16()
    with nullcontext() if fused else backend.compiled_ops("opaque"):
        found = ops_of_ours(network, torch.randint(8, (2, 8)))
    assert found == {"causal_attention_packed"} | (set() if fused else FUSED)


@pytest.mark.parametrize("how", ["plain", pytest.param("opaque", marks=pytest.mark.soak)])  # a build each
def test_training_under_autocast_with_inductor(how: Any) -> None:
    """Gradients by the rule, one graph, and nothing is compiled again for another batch."""
    network = getattr(model, HEADS[1])(ImageGPTConfig(**{**SIZES, "n_embd": 64})).eval()
    exact, batches = copy.deepcopy(network).double(), torch.randint(8, (4, 16, 60))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, backend=counter, fullgraph=True)

    def gradients(call: Any, of: nn.Module, enabled: bool = True) -> list[Tensor]:
        found = []
        for ids in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = call(ids, labels=ids, use_cache=False).loss
            found.append(torch.autograd.grad(loss, list(of.parameters())))
        return [torch.stack(group) for group in zip(*found, strict=True)]

    with backend.compiled_ops(how):
        ours = gradients(compiled, network)
    assert counter.frame_count == 1
    with backend.use_backend("reference"):
        theirs, wanted = gradients(network, network), gradients(exact, exact, enabled=False)
    for triple, (name, _) in zip(zip(ours, theirs, wanted, strict=True), network.named_parameters(), strict=True):
        assert_parity(*triple, name)
