"""The emulator itself: what it reports, what its schedules do, the 16-bit types, the counters."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import compiling
import pytest
import torch

SCHEDULES = ["fifo", "random", "skewed"]


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return compiling.probes()


def run(probes: ModuleType, name: str, threads: int = 64, shared_bytes: int = 0) -> torch.Tensor:
    out = torch.zeros(64)
    probes.run(name, out.data_ptr(), threads, shared_bytes)
    return out


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_in_a_branch", r"deadlock: 32 threads ended .*; 32 threads waiting in __syncthreads at .*probes.cpp"),
        ("barriers_at_two_places", r"barrier divergence: __syncthreads at .*probes.cpp:\d+ against .*probes.cpp:\d+"),
        ("lanes_that_are_missing", r"deadlock: .*31 threads waiting in __syncwarp at .*probes.cpp"),
        ("lane_outside_its_mask", r"__syncwarp at .*: the calling lane is not in its mask; thread \(\d+, 0, 0\)"),
        ("lanes_that_disagree", r"the lanes of a warp disagree: __shfl_"),
        ("reads_a_lane_that_is_not_there", r"__shfl_sync at .*: reads lane 20, which does not take part"),
        ("misaligned", r"a misaligned access of 8 bytes; thread \(\d+, 0, 0\) of block \(0, 0, 0\)"),
    ],
)
def test_faults_are_errors(probes: ModuleType, name: str, message: str, order: str) -> None:
    probes.set_schedule(order, 1)
    with pytest.raises(RuntimeError, match=message):
        run(probes, name)
    assert run(probes, "shuffles").all()  # and the next launch is not the worse for it


# Launches one after another, of which those with a + are dependent: what the last one is told, if anything.
EARLY = r"a load at .*probes.cpp:\d+ before grid_dependency_wait, of what a launch writes that may not have ended"
CHAINS = [
    ("stores +stores_late", None),
    ("stores +stores", r"a store at .*probes.cpp:\d+ before grid_dependency_wait; thread \(\d+, 0, 0\)"),
    ("+one_block_waits", r"ends without grid_dependency_wait; thread \(\d+, 0, 0\) of block \(1, 0, 0\)"),
    ("one_block_waits", None),
    ("+one_thread_waits", r"a store at .*probes.cpp:\d+ before grid_dependency_wait; thread \(\d+, 0, 0\)"),
    ("+one_thread_waits_for_all", None),
    ("+loads", None),
    ("stores +loads", EARLY),
    ("stores loads", None),
    ("+stores_late +loads", EARLY),
    # Between them one that waits: before it lets the next one begin, or behind, in one block or in all.
    ("stores +waits +loads", None),
    ("stores +hurries +loads", EARLY),
    ("stores +hurries +hurries +loads", EARLY),
    ("stores +hurries +waits +loads", None),
    ("stores +one_block_hurries +loads", None),
    ("stores hurries +loads", None),
]


@pytest.fixture
def hopper(probes: ModuleType) -> Iterator[ModuleType]:
    """The probes on a device that has dependent launches."""
    probes.set_capability(90)
    yield probes
    probes.set_capability()


def test_below_sm_90_no_launch_is_dependent(probes: ModuleType) -> None:
    out = torch.zeros(64)
    probes.run_dependent("stores", out.data_ptr(), False)
    probes.run_dependent("loads", out.data_ptr(), True)


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize(("chain", "message"), CHAINS, ids=[chain for chain, _ in CHAINS])
def test_dependent_launches_wait(hopper: ModuleType, chain: str, message: str | None, order: str) -> None:
    probes = hopper
    probes.set_schedule(order, 1)
    probes.synchronize()
    out = torch.zeros(64)
    *before, last = ((name.lstrip("+"), out.data_ptr(), name.startswith("+")) for name in chain.split())
    for launch in before:
        probes.run_dependent(*launch)
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        probes.run_dependent(*last)
    probes.synchronize()
    probes.run_dependent("loads", out.data_ptr(), True)


@pytest.mark.parametrize(("threads", "shared_bytes"), [(0, 0), (1025, 0), (32, 227 * 1024 + 1)])
def test_limits(probes: ModuleType, threads: int, shared_bytes: int) -> None:
    with pytest.raises(RuntimeError, match="a launch outside the limits"):
        run(probes, "every_bank", threads, shared_bytes)


@pytest.mark.parametrize("order", SCHEDULES)
def test_warp_functions(probes: ModuleType, order: str) -> None:
    probes.set_schedule(order, 1)
    assert run(probes, "shuffles").all()


def test_shared_memory_is_poisoned(probes: ModuleType) -> None:
    assert run(probes, "poison", shared_bytes=256).isnan().all()


def test_schedules_differ_where_a_barrier_is_missing(probes: ModuleType) -> None:
    expected = torch.arange(63, -1, -1).float()
    results = {}
    for order in SCHEDULES:
        probes.set_schedule(order, 1)
        assert torch.equal(run(probes, "exchange", shared_bytes=256), expected)
        results[order] = run(probes, "exchange_without_a_barrier", shared_bytes=256)
    assert results["skewed"].isnan().sum() == 32  # the first warp reads before the other has begun


def test_counters(probes: ModuleType) -> None:
    for name, what, number in [
        ("same_bank", "shared_conflicts", 2 * 31),
        ("every_bank", "shared_conflicts", 0),
        ("every_other_float", "store_sectors", 8),
    ]:
        probes.reset_counters()
        run(probes, name, shared_bytes=4096)
        assert probes.counters()[what] == number, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(probes: ModuleType, dtype: torch.dtype) -> None:
    """Every 16-bit number, half-way between neighbours, beside that, and random bits: as torch has it."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    wide = torch.empty(65536)
    getattr(probes, f"from_{str(dtype)[6:]}")(every.data_ptr(), wide.data_ptr(), 65536)
    assert torch.equal(wide.nan_to_num(7.0), every.float().nan_to_num(7.0))
    finite = wide[wide.isfinite()].sort().values
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    noise = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32).view(torch.float32)
    around = [torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (-1, 1)]
    values = torch.cat([wide, middle, *around, noise])
    ours = torch.empty(len(values), dtype=dtype)
    getattr(probes, f"to_{str(dtype)[6:]}")(values.data_ptr(), ours.data_ptr(), len(values))
    assert torch.equal(ours.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(ours[known].view(torch.int16), values.to(dtype)[known].view(torch.int16))
