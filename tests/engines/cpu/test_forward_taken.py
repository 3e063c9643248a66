"""What the compiled forward pass takes on its way: states and means behind any of the layers, and no layer beyond."""

import functools
import time
from typing import Any

import pytest
import small_models
import torch
from implementations import ISAS
from small_models import ids
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import ImageGPTModel, backend
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu.forward import Taken

if backend._C is None:
    pytest.skip(backend.native_reason, allow_module_level=True)
pytestmark = pytest.mark.usefixtures("without_gradients")

small = functools.partial(small_models.small, head=ImageGPTModel, n_layer=3)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass, whether the compiled module ran it."""
    seen: list[bool] = []
    run = forwards.run

    def watched(*args: Any, **keywords: Any) -> Any:
        states = run(*args, **keywords)
        seen.append(states is not None)
        return states

    monkeypatch.setattr(forwards, "run", watched)
    return seen


def everything(model: ImageGPTModel, tokens: Tensor, **arguments: Any) -> list[Tensor]:
    last, features = model.forward_intermediates(tokens, embedding=True, intermediates_only=False, **arguments)
    return [last, *features]


def assert_right(model: ImageGPTModel, tokens: Tensor, calls: list[bool], **arguments: Any) -> None:
    got = everything(model, tokens, **arguments)
    with backend.use_backend("reference"):
        plain = everything(model, tokens, **arguments)
    double = ImageGPTModel(model.config).eval().double()
    double.load_state_dict(model.state_dict())
    exact = everything(double, tokens, **arguments)
    assert calls[-3:] == [True, False, False]
    for i, (value, theirs, wanted) in enumerate(zip(got, plain, exact, strict=True)):
        assert (value.dtype, value.shape) == (theirs.dtype, theirs.shape)
        assert_parity(value, theirs, wanted, f"{i} of {len(got)} {arguments}")


# Widths that fill no tile; heads that share one.
CONFIGS = {"plain": {}, "wide": {"n_embd": 144, "n_inner": 56}, "narrow": {"n_embd": 16, "n_head": 1}}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_layers(fields: dict[str, Any], norm: bool, dtype: torch.dtype, calls: list[bool]) -> None:
    model = small(dtype, **fields)
    for batch, length, bands in ((1, 80, 5), (2, 33, 3), (3, 32, 1), (2, 70, 70)):
        tokens = ids(model, batch, length)
        assert_right(model, tokens, calls, norm=norm, bands=bands)
        assert_right(model, tokens, calls, norm=norm, pool=None)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("indices", [[], [0], [1], [2], [0, 1]])
def test_stops_where_it_is_told_to(indices: list[int], norm: bool, calls: list[bool]) -> None:
    """With the last states of what has run, which have another norm; and the same numbers as of a whole pass."""
    model = small(torch.bfloat16)
    tokens = ids(model, 2, 40)
    for arguments in ({"bands": 4}, {"pool": None}):
        assert_right(model, tokens, calls, norm=norm, indices=indices, **arguments)
        every = model.forward_intermediates(tokens, embedding=True, norm=norm, **arguments)
        stopped = model.forward_intermediates(tokens, indices, embedding=True, norm=norm, **arguments)
        want = [every[0], *(every[i + 1] for i in indices)]
        assert all(torch.equal(a, b) for a, b in zip(stopped, want, strict=True))


def test_threads_and_batches_do_not_change_the_result(dtype: torch.dtype, calls: list[bool]) -> None:
    """Bit by bit: teams of threads, more threads than there are columns, batches in several turns."""
    assert backend._C is not None
    best = backend._C.cpu_isa() == ISAS[-1]
    turns = [({"n_positions": 1000}, 3, 1000)] if best else []
    for fields, batch, length in (({}, 1, 20), ({}, 3, 70), *turns):
        model = small(dtype, **fields)
        tokens = ids(model, batch, length)
        for arguments in ({"bands": 10}, {"norm": False}, {"pool": None}, {"indices": [0]})[: 1 if length > 70 else 4]:
            want = everything(model, tokens, **arguments)
            for threads in (2, 3, 5) if best else (3,):
                torch.set_num_threads(threads)
                got = everything(model, tokens, **arguments)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            torch.set_num_threads(1)
            alone = [everything(model, row[None], **arguments) for row in tokens]
            assert all(torch.equal(torch.cat(a), b) for a, b in zip(zip(*alone, strict=True), want, strict=True))
    assert all(calls)


def test_means_are_of_their_own_positions(dtype: torch.dtype, calls: list[bool]) -> None:
    """What is no number reaches the bands that see it, of its own sequence."""
    model = small(dtype, vocab_size=18)
    tokens = ids(model, 3, 40) % 17
    want = model.forward_intermediates(tokens, bands=4)
    tokens[1, 13] = 17
    model.wte.weight[17] = torch.nan
    got = model.forward_intermediates(tokens, bands=4)
    for after, before in zip(got, want, strict=True):
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert torch.equal(after[1, 0], before[1, 0])
        assert after[1, 1:].isnan().all()
    assert all(calls)


def test_nothing_but_what_is_asked_for_is_written() -> None:
    model = small(torch.bfloat16)
    tokens = ids(model, 2, 40)
    states = forwards.run(model, tokens, Taken([1], 1, True, 4, False))
    assert states is not None
    assert (states.last, states.keys, states.values) == (None, None, None)
    assert states.taken is not None
    assert (states.taken.shape, states.taken.dtype) == ((1, 2, 4, 48), torch.float32)
    kept = model.forward_intermediates(tokens)[0]
    assert kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_means(default: torch.dtype) -> None:
    model = small(torch.bfloat16)
    tokens = ids(model, 2, 40)
    want = forwards.run(model, tokens, Taken([1], 2, True, 4, False))
    torch.set_default_dtype(default)
    try:
        got = forwards.run(model, tokens, Taken([1], 2, True, 4, False))
    finally:
        torch.set_default_dtype(torch.float32)
    assert want is not None
    assert got is not None
    assert torch.equal(got.taken, want.taken)


@pytest.mark.clock
def test_a_layer_costs_its_part_of_the_pass() -> None:
    model = small(torch.bfloat16, n_layer=8, n_embd=256, n_head=4, n_positions=128)
    tokens = ids(model, 4, 128)

    def seconds(call: Any) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    layers = (0, 1, 2)
    calls = [lambda: model(tokens, use_cache=False)]
    calls += [lambda layer=layer: model.forward_intermediates(tokens, [layer]) for layer in layers]
    rounds = [[seconds(call) for call in calls] for _ in range(8)][1:]
    whole, *parts = (min(times) for times in zip(*rounds, strict=True))
    for layer, part in zip(layers, parts, strict=True):
        assert part <= (1.5 * (layer + 1) + 0.5) / 8 * whole, (layer, part / whole)  # to the end it were all of it


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 4}, "forward: 4 layers of 3"),
        ({"layers": -1}, "forward: -1 layers of 3"),
        ({"layers": 1}, "behind none of them"),
        ({"taken": [2, 1]}, "behind none of them"),
        ({"taken": [-1]}, "behind none of them"),
        ({"bands": 3}, "forward: 3 bands of 40 positions"),
        ({"bands": 0}, "forward: 0 bands"),
    ],
    ids=str,
)
def test_sizes_that_it_refuses(changed: dict[str, Any], message: str) -> None:
    model = small(torch.bfloat16)
    tokens, means = ids(model, 1, 40), torch.zeros(1, 1, 4, 48)
    model(tokens)
    native = forwards._passes[forwards.packed_weights(model, None, None)]
    asked: dict[str, Any] = {"tokens": tokens.data_ptr(), "batch": 1, "length": 40, "last": 0, "keys": 0, "values": 0}
    asked |= {"layers": 3, "taken": [2], "normed": True, "states": 0, "bands": 4, "means": means.data_ptr()}
    with pytest.raises(ValueError, match=message):
        native.run(**asked | changed, threads=1)
    native.run(**asked, threads=1)
    assert means.any()
