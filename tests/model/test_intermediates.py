"""forward_intermediates: equal to what transformers' hidden states give by hand, of no more blocks and no more memory
than it says, wherever forward itself works, and errors for what it cannot mean.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import small_models
import torch
import transformers
from small_models import ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_fast import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

LAYERS = 4


def small(dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    return small_models.small(dtype, **{"head": ImageGPTModel, "n_layer": LAYERS, **fields})


def by_hand(model: Any, tokens: Tensor, norm: bool = True) -> list[Tensor]:
    """(B, T, n_embd) of the paper's layers 0 .. L, from transformers' hidden states."""
    sizes = {name: getattr(model.config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    theirs = transformers.ImageGPTModel(transformers.ImageGPTConfig(**sizes)).eval().to(model.dtype)
    theirs.load_state_dict(model.state_dict())
    last: list[Tensor] = []
    theirs.ln_f.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    states = theirs(tokens, output_hidden_states=True).hidden_states
    if not norm:
        return [*states[:-1], last[0]]
    return [*(block.ln_1(state) for block, state in zip(theirs.h, states, strict=False)), states[-1]]


class Blocks:
    """Counts the blocks that run, in order."""

    def __init__(self, model: Any) -> None:
        self.run: list[int] = []
        for i, block in enumerate(model.base_model.h):
            block.register_forward_hook(lambda *_, i=i: self.run.append(i))


# ---- What is what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@torch.no_grad()
def test_equal_to_transformers_states_and_norms_by_hand(norm: bool) -> None:
    model = small()
    tokens = ids(model, 3, 12)
    want = by_hand(model, tokens, norm)
    every = model.forward_intermediates(tokens, pool=None, norm=norm, embedding=True)
    assert len(every) == LAYERS + 1
    torch.testing.assert_close(every, want)
    torch.testing.assert_close(model.forward_intermediates(tokens, norm=norm), [x.mean(1) for x in want[1:]])
    bands = [torch.stack([part.mean(1) for part in x.chunk(4, 1)], 1) for x in want[1:]]  # (B, 4, n_embd) each
    torch.testing.assert_close(model.forward_intermediates(tokens, norm=norm, bands=4), bands)


@pytest.mark.parametrize(
    ("indices", "wanted"),
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (3, [1, 2, 3]),
        ([0], [0]),
        ([-1], [3]),
        ((1, -2), [1, 2]),
        (range(1, 4), [1, 2, 3]),
        (np.arange(2), [0, 1]),
        (np.int64(2), [2, 3]),
        (torch.tensor([1, 3]), [1, 3]),
    ],
    ids=str,
)
@torch.no_grad()
def test_indices_mean_what_they_mean_in_timm(indices: Any, wanted: list[int]) -> None:
    model = small()
    tokens = ids(model, 2, 6)
    every = model.forward_intermediates(tokens)
    got = model.forward_intermediates(tokens, indices)
    assert len(got) == len(wanted)
    assert all(torch.equal(feature, every[i]) for feature, i in zip(got, wanted, strict=True))


@torch.no_grad()
def test_as_timm_returns_it() -> None:
    model = small()
    tokens = ids(model, 2, 6)
    last, features = model.forward_intermediates(tokens, [1], pool=None, norm=False, intermediates_only=False)
    torch.testing.assert_close(last, model.ln_f(features[0]))
    last, features = model.forward_intermediates(tokens, 1, pool=None, stop_early=False, intermediates_only=False)
    assert torch.equal(last, features[0])
    assert torch.equal(last, model(tokens).last_hidden_state)


@pytest.mark.parametrize("head", [ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification])
@torch.no_grad()
def test_every_class_and_shape_of_ids(head: type) -> None:
    model = small(head=head)
    tokens = ids(model, 4, 6)
    want = model.base_model.forward_intermediates(tokens, bands=3)
    got = model.forward_intermediates(tokens, bands=3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0].shape == (4, 3, 48)
    one = model.forward_intermediates(tokens[1], bands=3)[2]
    torch.testing.assert_close(one, want[2][1])
    assert [x.shape for x in model.forward_intermediates(tokens[1], 2)] == [(48,)] * 2
    assert model.forward_intermediates(tokens[1], 1, pool=None)[0].shape == (6, 48)
    assert model.forward_intermediates(tokens.view(2, 2, 6), 1)[0].shape == (2, 2, 48)
    for pool, shape in (("mean", (0, 48)), (None, (0, 6, 48))):
        empty = model.forward_intermediates(tokens[:0], pool=pool, embedding=True)
        assert [x.shape for x in empty] == [shape] * (LAYERS + 1)


@torch.no_grad()
def test_pooled_in_float32() -> None:
    """The mean of what the layers give in bfloat16, itself rounded to no more than float32; dtypes of all."""
    model = small(torch.bfloat16)
    tokens = ids(model, 2, 80)
    states, pooled = (model.forward_intermediates(tokens, pool=pool) for pool in (None, "mean"))
    for state, mean in zip(states, pooled, strict=True):
        assert (state.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(mean.double(), state.double().mean(1), rtol=1e-5, atol=1e-6)
    assert small().forward_intermediates(tokens)[0].dtype == torch.float64


# ---- What it costs ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_block_runs_behind_the_last_one_wanted() -> None:
    model = small(head=ImageGPTForCausalImageModeling)
    tokens, blocks = ids(model, 1, 4), Blocks(model)
    for arguments, run in (
        ({"indices": [1]}, 2),
        ({"indices": [0, 2]}, 3),
        ({"indices": [-1]}, LAYERS),
        ({"indices": [], "embedding": True}, 0),
        ({"indices": [0], "stop_early": False}, LAYERS),
    ):
        blocks.run.clear()
        model.forward_intermediates(tokens, **arguments)
        assert blocks.run == list(range(run)), arguments


@pytest.mark.clock
@torch.no_grad()
def test_a_layer_costs_its_part_of_the_pass() -> None:
    model = small(torch.float32, n_layer=8, n_embd=128, n_positions=256)
    tokens = ids(model, 4, 256)

    def seconds(call: Any) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    layers = (0, 1, 2)
    calls = [lambda: model(tokens, use_cache=False)]
    calls += [lambda layer=layer: model.forward_intermediates(tokens, [layer]) for layer in layers]
    rounds = [[seconds(call) for call in calls] for _ in range(12)][1:]
    whole, *parts = (min(times) for times in zip(*rounds, strict=True))
    for layer, part in zip(layers, parts, strict=True):
        assert part <= (1.5 * (layer + 1) + 0.5) / 8 * whole, (layer, part / whole)  # to the end it were all of it


class Living(TorchDispatchMode):
    """The most bytes of results that live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.views: Counter[int] = Counter()  # of each memory
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                self._count(memory.data_ptr(), memory.nbytes(), 1)
                weakref.finalize(tensor, self._count, memory.data_ptr(), memory.nbytes(), -1)
        return out

    def _count(self, place: int, count: int, change: int) -> None:
        before = self.views[place]
        self.views[place] += change
        self.now += count * ((self.views[place] > 0) - (before > 0))
        self.most = max(self.most, self.now)


def most_bytes(layers: int, **arguments: Any) -> int:
    model = small(torch.float32, n_layer=layers)
    tokens = ids(model, 4, 80)
    with torch.no_grad(), Living() as living:
        model.forward_intermediates(tokens, **arguments)
    return living.most


def test_memory_does_not_grow_with_the_layers() -> None:
    """But for the features themselves; states of all positions would be 80 times as large."""
    few, many = most_bytes(2), most_bytes(12)
    feature, states = 4 * 48 * 4, 4 * 80 * 48 * 4
    assert few > 2 * states  # it sees something
    assert many - few <= 10 * feature
    assert most_bytes(12, pool=None) - most_bytes(2, pool=None) >= 9 * states  # and would see this


# ---- Where forward works, it does ----------------------------------------------------------------------------


def test_gradients_and_checkpointing() -> None:
    model = small(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    tokens = ids(model, 2, 6)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        sum(x.square().sum() for x in model.forward_intermediates(tokens, [0, 2], bands=2)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    assert "h.2.mlp.c_proj.weight" in want
    assert "h.3.ln_1.weight" in want  # the norm behind block 2
    assert not any(name.startswith(("h.3.attn", "ln_f")) for name in want)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), want)
    with torch.no_grad():
        want_means = [x.mean(1) for x in by_hand(model, tokens)[1:]]
        torch.testing.assert_close(model.forward_intermediates(tokens), want_means)
        model.eval()
        assert model.forward_intermediates(tokens)[0].grad_fn is None
    with torch.inference_mode():
        assert model.forward_intermediates(tokens)[0].is_inference()


@torch.no_grad()
def test_autocast() -> None:
    model = small(torch.float32)
    tokens = ids(model, 2, 6)
    want = model.forward_intermediates(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.forward_intermediates(tokens)
    assert {x.dtype for x in got} == {torch.float32}
    assert not torch.equal(got[-1], want[-1])
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_bidirectional_models() -> None:
    model = small(bidirectional=True)
    tokens = ids(model, 1, 6)
    (want,) = model.forward_intermediates(tokens, [1], pool=None)
    tokens[0, -1] = (tokens[0, -1] + 1) % 16
    (got,) = model.forward_intermediates(tokens, [1], pool=None)
    assert not torch.equal(got[0, 0], want[0, 0])  # it sees the last position
    torch.testing.assert_close(model.forward_intermediates(tokens)[-1], model(tokens).last_hidden_state.mean(1))


@torch.no_grad()
def test_blocks_are_called_as_forward_calls_them() -> None:
    """A wrapper's own block, and hooks that change what passes."""
    model = small()
    tokens = ids(model, 2, 6)
    model.h[1].register_forward_hook(lambda _, args, out: (out[0] * 2, *out[1:]))
    model.h[2].mlp = nn.Sequential(model.h[2].mlp)
    got = model.forward_intermediates(tokens, pool=None, norm=False)
    want = model(tokens, output_hidden_states=True).hidden_states[1:]
    assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1], strict=True))
    assert torch.equal(model.ln_f(got[-1]), want[-1])


@torch.no_grad()
def test_compiles_whole() -> None:
    model = small(torch.float32, n_layer=2)
    tokens = ids(model, 2, 6)
    compiled = torch.compile(lambda t: model.forward_intermediates(t, bands=2), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model.forward_intermediates(tokens, bands=2))


# ---- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": 0}, r"indices is 0; want an integer in 1\.\.4"),
        ({"indices": 5}, r"indices is 5; want an integer in 1\.\.4"),
        ({"indices": -1}, r"indices is -1; want"),
        ({"indices": True}, r"indices is True; want"),
        ({"indices": 1.0}, r"indices is 1\.0; want"),
        ({"indices": "1"}, r"indices is '1'; want"),
        ({"indices": [4]}, r"indices is 4; want an integer in -4\.\.3"),
        ({"indices": [-5]}, r"indices is -5; want"),
        ({"indices": [0.5]}, r"indices is 0\.5; want"),
        ({"indices": torch.tensor([0.5])}, r"indices is 0\.5; want"),
        ({"indices": [2, 1]}, r"indices: expected ascending blocks, each once, got \[2, 1\]"),
        ({"indices": [3, -1]}, r"each once, got \[3, 3\]"),
        ({"indices": []}, "indices: none are given"),
        ({"pool": "max"}, r"pool is 'max'; want \"mean\" or None"),
        ({"bands": 4}, r"bands is 4; want a number that divides the 6 positions"),
        ({"bands": 0}, r"bands is 0; want"),
        ({"bands": 2, "pool": None}, r"bands is 2 and pool is None"),
    ],
    ids=str,
)
def test_what_it_cannot_mean(arguments: dict[str, Any], message: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(ids(model, 2, 6), **arguments)


def test_ids_that_forward_does_not_take() -> None:
    model = small()
    for tokens, message in (
        (torch.tensor(3), "got a scalar"),
        (torch.zeros(1, 81, dtype=torch.int64), "81 positions exceed"),
        (torch.zeros(2, 0, dtype=torch.int64), "the 0 positions"),
        (None, "exactly one of input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(tokens)
