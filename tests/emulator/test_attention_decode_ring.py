"""attention_decode through the ring, with many blocks and few, within clusters or not."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Literal

import checks_attention_decode as checks
import pytest
import torch
from kernels import Kernels

from igpt_fast import backend, ops
from igpt_fast.ops.dispatch import HEAD_DIMS

rings = pytest.mark.parametrize("ring", checks.RINGS, ids=str)


@pytest.fixture
def module(device: str, request: pytest.FixtureRequest) -> ModuleType | None:
    """The emulated one, where the kernels run there."""
    return request.getfixturevalue("emulated").module if device == "cpu" else None


@pytest.fixture
def on(emulated: Kernels) -> Iterator[Kernels]:
    """The emulated kernels serve the op."""
    checks.schedule(emulated, "fifo", 0)
    with backend.use_backend("auto"), backend.emulate(emulated.module):
        yield emulated


@rings
@pytest.mark.parametrize("scaled", [0, 1, 2])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_positions(device: str, module: ModuleType | None, dim: int, scaled: int, ring: tuple[int, bool]) -> None:
    dtype = torch.bfloat16 if ring[1] else torch.float16
    with checks.by_ring(module, *ring):
        checks.check_positions(device, dtype, dim, True, scaled)


@rings
def test_everything_else(device: str, module: ModuleType | None, ring: tuple[int, bool]) -> None:
    """Long caches, prefixes, positions outside, values that are no numbers, more rows than blocks."""
    scaled = 0 if ring[0] == 2 else 2
    with checks.by_ring(module, *ring):
        checks.check_long(device, scaled=scaled)
        checks.check_nan_stays(device, 2, scaled)
        checks.check_prefix(device, torch.bfloat16, 64, 2, 10, 65, scaled)
        checks.check_outside(device)
        checks.check_many_blocks(device)
        checks.check_positions(device, torch.float32, 64)  # straight into registers


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_code(device: str, module: ModuleType | None, dim: int) -> None:
    with checks.by_ring(module, 2, True):
        checks.check_codes(device, torch.float16, dim)


def test_what_is_kept_in_8_bits(device: str, module: ModuleType | None) -> None:
    with checks.by_ring(module, 132, False):
        checks.check_quantizing(device, torch.bfloat16, 128)


def test_the_same_bits(on: Kernels) -> None:
    checks.check_ring_bits(on)


def test_blocks_of_a_cluster_that_are_ahead(on: Kernels) -> None:
    checks.check_ring_ahead(on)


def test_bytes(on: Kernels) -> None:
    checks.check_ring_bytes(on)


@pytest.mark.parametrize(
    "check", [checks.check_without_ring, checks.check_cluster_without_room, checks.check_scales_in_time]
)
def test_check(on: Kernels, check: Callable[[Kernels], None]) -> None:
    check(on)


@rings
def test_huge_cache(on: Kernels, ring: tuple[int, bool]) -> None:
    with checks.by_ring(on.module, *ring):
        checks.check_huge("cpu")


@pytest.mark.parametrize("how", ["late", "early"])
def test_dependent_launches_give_the_same_bits(
    device: str, module: ModuleType | None, how: Literal["late", "early"]
) -> None:
    made = checks.case(device, torch.bfloat16, 64, 300, 320, 1)
    for ring in (False, True):
        results = []
        for dependent in ("none", how):
            with backend.launching(backend.Launching(dependent, ring)):
                results.append(made.op()[0])
        assert torch.equal(*results)


def test_splits(emulated: Kernels) -> None:
    """As few parts as nine tenths of the multiprocessors have work for, none below 64 keys; a cluster's 2, 4, 8."""
    splits = partial(emulated.module.attention_decode_splits, ring=True)
    assert splits(64, 1024) == emulated.module.attention_decode_splits(64, 1024) == 5  # below sm_90
    sizes = [1, 8, 16, 24, 64, 128, 160, 256, 2048]
    with checks.by_ring(emulated.module, 132, False):
        assert [splits(blocks, 1024) for blocks in sizes] == [16, 16, 8, 16, 2, 1, 4, 1, 1]
        assert [splits(8, keys) for keys in (1, 64, 65, 128, 129, 10**6)] == [1, 1, 2, 2, 3, 15]
        assert [splits(blocks, 1024, cluster=True) for blocks in (1, 8, 16, 160)] == [8, 8, 8, 4]
        assert [splits(8, keys, cluster=True) for keys in (129, 320, 448)] == [2, 4, 4]
    with checks.by_ring(emulated.module, 108, False):
        assert [splits(blocks, 1024) for blocks in (8, 64, 256)] == [8, 8, 2]


def test_keys_of_a_launch_that_may_still_run_are_not_read(emulated: Kernels) -> None:
    """They are read before the wait: between two steps everything has to end."""
    new = torch.randn(3, 1, 1, 64).bfloat16().unbind()
    state = *torch.zeros(2, 1, 1, 128, 64).bfloat16().unbind(), torch.tensor(64, dtype=torch.int32)
    how = backend.Launching("early", ring=True)
    emulated.module.set_capability(90)
    try:
        with backend.use_backend("auto"), backend.emulate(emulated.module), backend.launching(how):
            emulated.module.synchronize()
            ops.attention_decode(*new, *state)
            state[2].add_(1)
            emulated.module.synchronize()
            ops.attention_decode(*new, *state)
            state[2].add_(1)
            with pytest.raises(RuntimeError, match=r"a load at .* before grid_dependency_wait, of what"):
                ops.attention_decode(*new, *state)
    finally:
        emulated.module.set_capability()
