"""The key/value caches: growth, views, and every misuse."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

from igpt_fast import DynamicCache, StaticCache


def static(**changes: int) -> StaticCache:
    shape = {"n_layer": 2, "batch_size": 3, "n_head": 2, "max_length": 8, "head_dim": 4, **changes}
    return StaticCache(*shape.values(), dtype=torch.float32, device="cpu")


def pair(t: int, b: int = 3, h: int = 2, d: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(b, h, t, d).to(dtype), torch.randn(b, h, t, d).to(dtype)


@pytest.mark.parametrize("make", [DynamicCache, static])
def test_both_return_what_was_put_in(make: type) -> None:
    cache = make()
    assert cache.get_seq_length() == 0
    given = [[pair(t) for t in (1, 5, 2)] for _ in range(2)]
    for step, length in enumerate((1, 6, 8)):
        for layer in range(2):
            found = cache.update(*given[layer][step], layer)
            for i in range(2):
                assert torch.equal(found[i], torch.cat([given[layer][s][i] for s in range(step + 1)], dim=2))
        assert cache.get_seq_length() == length


def test_dynamic_cache_is_free_at_first_and_differentiable() -> None:
    cache = DynamicCache()
    key, value = pair(3)
    key.requires_grad_()
    assert cache.update(key, value, 0)[0] is key
    cache.update(*pair(1), 0)[0].sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key))


def test_static_cache_returns_views_of_its_buffer() -> None:
    cache = static()
    first = cache.update(*pair(3), 0)[0]
    assert cache.update(*pair(1), 0)[0].data_ptr() == first.data_ptr()
    assert first.shape == (3, 2, 3, 4)


def test_static_cache_does_not_hand_out_unwritten_memory() -> None:
    cache = static()
    cache._keys.fill_(float("nan"))
    cache._values.fill_(float("nan"))
    for found in cache.update(*pair(5), 1):
        assert found.isfinite().all()


def test_static_cache_wider_than_the_keys() -> None:
    """Under autocast an fp32 model makes bf16 keys; they come back as they were."""
    cache = static()
    key, value = pair(3, dtype=torch.bfloat16)
    found = cache.update(key, value, 0)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)


@pytest.mark.parametrize("make", [DynamicCache, static])
@pytest.mark.parametrize("wrong", [{"b": 1}, {"h": 1}, {"d": 1}])
def test_another_shape_is_refused_not_broadcast(make: type, wrong: dict[str, int]) -> None:
    cache = make()
    cache.update(*pair(2), 0)
    with pytest.raises(ValueError, match=r"made for \(batch, heads, head_dim\) = \(3, 2, 4\), got"):
        cache.update(*pair(1, **wrong), 0)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("make", [DynamicCache, static])
def test_key_and_value_must_match(make: type) -> None:
    with pytest.raises(ValueError, match=r"want \(B, H, T, D\) twice"):
        make().update(pair(2)[0], pair(3)[0], 0)
    with pytest.raises(ValueError, match=r"want \(B, H, T, D\) twice"):
        make().update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 0)


def test_dynamic_cache_misuse() -> None:
    cache = DynamicCache()
    with pytest.raises(ValueError, match="layer 1 arrives before layer 0"):
        cache.update(*pair(2), 1)
    cache.update(*pair(2), 0)
    with pytest.raises(TypeError, match=r"holds torch.float32, got torch.float64"):
        cache.update(*pair(2, dtype=torch.float64), 0)


def test_static_cache_misuse() -> None:
    cache = static()
    with pytest.raises(ValueError, match="9 positions do not fit into max_length=8"):
        cache.update(*pair(9), 0)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="made for 2 layers, got layer 2"):
        cache.update(*pair(1), 2)
    with pytest.raises(TypeError, match=r"made for torch.float32, got torch.float64"):
        cache.update(*pair(1, dtype=torch.float64), 0)
    key, value = pair(1)
    with pytest.raises(ValueError, match="not differentiable"):
        cache.update(key.requires_grad_(), value, 0)
    with torch.no_grad():
        cache.update(key, value, 0)


@pytest.mark.parametrize("make", [DynamicCache, static])
def test_copies_are_independent(make: type) -> None:
    cache = make()
    cache.update(*pair(2), 0)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin.update(*pair(3), 0)
        assert (twin.get_seq_length(), cache.get_seq_length()) == (5, 2)


@pytest.mark.parametrize("make", [DynamicCache, static])
def test_lengths_by_layer(make: type) -> None:
    cache = make()
    cache.update(*pair(2), 0)
    cache.update(*pair(2), 1)
    cache.update(*pair(3), 0)
    assert [cache.get_seq_length(layer_idx=i) for i in (0, 1, 2)] == [5, 2, 0]
    assert len(cache) == 2


def test_length_is_the_number_of_layers_as_in_transformers() -> None:
    ours, theirs = DynamicCache(), transformers.DynamicCache()
    for layer in range(3):
        assert len(ours) == len(theirs) == layer
        key, value = pair(2)
        ours.update(key, value, layer)
        theirs.update(key, value, layer)
    for (key, value), other in zip(ours, theirs, strict=True):
        assert torch.equal(key, other[0])
        assert torch.equal(value, other[1])


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("chosen", [[2, 0, 2], [1], [0, 0, 1, 2]])
def test_images_are_chosen_as_in_transformers(method: str, chosen: list[int]) -> None:
    ours, theirs = DynamicCache(), transformers.DynamicCache()
    for cache in (ours, theirs):
        getattr(cache, method)(torch.tensor(chosen))  # nothing there yet
    pairs = [pair(3), pair(3)]
    for layer, (key, value) in enumerate(pairs):
        ours.update(key, value, layer)
        theirs.update(key, value, layer)
    for cache in (ours, theirs):
        getattr(cache, method)(torch.tensor(chosen))
    for layer, (key, value) in enumerate(pairs):
        assert torch.equal(ours.keys[layer], key[chosen])
        assert torch.equal(ours.keys[layer], theirs.layers[layer].keys)
        assert torch.equal(ours.values[layer], value[chosen])
        assert torch.equal(ours.values[layer], theirs.layers[layer].values)
    if method == "batch_select_indices":
        ours.batch_select_indices(torch.arange(len(chosen)) == 0)
        assert torch.equal(ours.keys[0], pairs[0][0][chosen[:1]])


def test_static_cache_is_reordered_in_place() -> None:
    cache = static()
    pairs = [pair(3), pair(3)]
    where = [cache.update(*pairs[layer], layer)[0].data_ptr() for layer in range(2)]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for layer in range(2):
        new = pair(1)
        found = cache.update(*new, layer)
        assert found[0].data_ptr() == where[layer]
        for i in range(2):
            assert torch.equal(found[i], torch.cat([pairs[layer][i][[2, 0, 0]], new[i]], dim=2))
    with pytest.raises(ValueError, match=r"made for batch 3, got \(2,\) indices"):
        cache.reorder_cache(torch.tensor([0, 1]))


OLD = """
import torch, warnings
register = torch.export.register_dataclass
torch.export.register_dataclass = lambda *args, **more: (warnings.warn("old", FutureWarning), register(*args, **more))
import igpt_fast
igpt_fast.Pipeline
"""


@pytest.mark.parametrize("program", ["import igpt_fast; igpt_fast.Pipeline", OLD], ids=["this torch", "torch 2.6"])
def test_loading_warns_of_nothing(program: str) -> None:
    """Nor where torch warns of what it calls itself, as 2.6 does."""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
