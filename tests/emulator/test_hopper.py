"""hopper.cuh: each function against the PTX manual, on the emulator and on a Hopper GPU; what the emulator reports."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import compiling
import conformance
import pytest
import torch
from conformance import NVCC, SCHEDULES, TYPES, Run
from torch import Tensor

SOURCE = Path(__file__).parent / "conformance_hopper.cu"
# A by descriptor or in registers, and which dimension of A and B is the inner one.
FORMS = ["ss_k_k", "ss_k_mn", "ss_mn_k", "ss_mn_mn", "rs_k_k", "rs_k_mn"]


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return compiling.probes("probes_hopper", "conformance_hopper.cu")


# ---- every function, right ----------------------------------------------------------------------------------


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_compiles(tmp_path: Path) -> None:
    """Without ptxas's advice that it had to serialize products (C75xx)."""
    said = conformance.nvcc("90a", SOURCE, tmp_path / "conformance.o", "-c")
    assert "C75" not in said, said


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if NVCC is None:
        pytest.skip("no nvcc")
    if conformance.architecture() != "90a":
        pytest.skip("the GPU is no Hopper")
    path = tmp_path_factory.mktemp("conformance") / "conformance_hopper.so"
    conformance.nvcc("90a", SOURCE, path, "-shared")
    return path


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest) -> Callable[[int], Run]:
    """Gives what runs a kernel of conformance_hopper.cu for an N of wgmma."""
    if request.param == "emulated":
        probes = request.getfixturevalue("probes")
        return lambda size: conformance.on_emulator(probes, size)
    path = request.getfixturevalue("library")
    return lambda size: conformance.on_gpu(path, "igpt_conformance_hopper", size)


def test_mbarriers(runner: Callable[[int], Run]) -> None:
    x = torch.randn(5, 8, 32)
    assert torch.equal(runner(0)("mbarriers", torch.full_like(x, torch.nan), x), x.flip(2))


def test_bulk_load(runner: Callable[[int], Run]) -> None:
    x = conformance.words(5, 64, 4)
    spans = [[0, 64], [63, 1], [5, 17], [8, 8], [1, 63]]
    out = runner(0)("bulk_load", torch.full((5, 65, 4), -1, dtype=torch.int32), x, torch.tensor(spans).int())
    for case, (first, count) in enumerate(spans):
        rows = torch.arange(64)[:, None]
        assert torch.equal(out[case, :64], torch.where((rows >= first) & (rows < first + count), x[case], 0))
    assert torch.equal(out[:, 64], x[:, 0])


def swizzled(tile: Tensor) -> Tensor:
    """(n, rows, 64) of 16 bits, rows of 128 bytes, as they are in shared memory."""
    n, rows, _ = tile.shape
    pieces = tile.reshape(n, rows, 8, 8)
    order = torch.arange(8)[None, :] ^ (torch.arange(rows)[:, None] % 8)
    return torch.gather(pieces, 2, order[None, :, :, None].expand(n, rows, 8, 8)).reshape(n, rows, 64)


@pytest.mark.parametrize("name", ["tma_load", "tma_load_swizzled"])
def test_tma_load(runner: Callable[[int], Run], name: str) -> None:
    """Boxes of 64 x 2 x 6 x 1, inside the tensor, over its borders on either side, and outside."""
    x = torch.randint(1, 2**15, (3, 7, 5, 72)).to(torch.int16)
    starts = [[0, 0, 0, 0], [8, 3, 1, 2], [16, 2, 0, 1], [-8, 0, 0, 1], [40, 4, 3, 1], [0, -1, -2, 0], [0, 0, 0, 3]]
    out = runner(0)(name, torch.full((len(starts), 12, 64), -1, dtype=torch.int16), x, torch.tensor(starts).int())
    wide = torch.zeros(3 + 2, 7 + 12, 5 + 4, 72 + 128, dtype=torch.int16)
    wide[1:-1, 6:-6, 2:-2, 64:-64] = x
    boxes = [wide[d + 1, c + 6 : c + 12, b + 2 : b + 4, a + 64 : a + 128] for a, b, c, d in starts]
    expected = torch.stack(boxes).reshape(-1, 12, 64)
    assert torch.equal(out, swizzled(expected) if name.endswith("swizzled") else expected)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [64, 96, 128])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TYPES)
def test_wgmma(runner: Callable[[int], Run], name: str, form: str, size: int, accumulate: bool) -> None:
    """64 products, exact in fp32, are added: each loses at most a unit of the greatest."""
    n = 2
    a, b = torch.randn(n, 64, 64).to(TYPES[name]), torch.randn(n, size, 64).to(TYPES[name])
    c = torch.randn(n, 64, size)
    _, major_a, major_b = form.split("_")
    stored = [m if major == "k" else m.transpose(1, 2).contiguous() for m, major in ((a, major_a), (b, major_b))]
    if accumulate:
        stored.append(c)
    out = runner(size)(f"{name}_{form}", torch.full((n, 64, size), torch.nan), *stored)
    terms = a.double(), b.double().transpose(1, 2)
    exact, magnitude = terms[0] @ terms[1], terms[0].abs() @ terms[1].abs()
    if accumulate:
        exact, magnitude = exact + c, magnitude + c.abs()
    assert ((out.double() - exact).abs() <= 65 * 2.0**-23 * magnitude).all()


@pytest.mark.gpu
def test_gpu_and_emulator_agree(library: Path, probes: ModuleType) -> None:
    """But for the order in which products are added."""
    for name, dtype in TYPES.items():
        a, b, c = torch.randn(8, 64, 64).to(dtype), torch.randn(8, 96, 64).to(dtype), torch.randn(8, 64, 96)
        runs = conformance.on_emulator(probes, 96), conformance.on_gpu(library, "igpt_conformance_hopper", 96)
        ours, theirs = (run(f"{name}_ss_k_k", torch.zeros_like(c), a, b, c) for run in runs)
        magnitude = a.float().abs() @ b.float().abs().transpose(1, 2) + c.abs()
        assert ((ours - theirs).abs() <= 65 * 2.0**-23 * magnitude).all(), name


# ---- what the emulator reports ------------------------------------------------------------------------------


def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()


def matmul(probes: ModuleType, name: str) -> bool:
    """Whether a product through a ring of tiles comes out right."""
    a, b = operands()
    out = torch.full((64, 64), torch.nan)
    probes.run(name, a.data_ptr(), b.data_ptr(), out.data_ptr())
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return bool(((out.double() - exact).abs() <= 257 * 2.0**-24 * magnitude).all())


def test_matmul(probes: ModuleType) -> None:
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        probes.reset_counters()
        assert matmul(probes, "matmul")
        counted = probes.counters()
        assert counted["wgmma"] == 4 * 4 * 4
        assert (counted["tile_copies"], counted["tile_bytes"]) == (8, 8 * 8192)
        assert matmul(probes, "fence_of_stores")


HERE_CPP = r".*probes_hopper.cpp:\d+"
FAULTS = [
    ("no_wgmma_fence", f"wgmma at {HERE_CPP}: no wgmma_fence since the start"),
    ("no_fence_of_second_group", f"wgmma at {HERE_CPP}: no wgmma_fence since the start, or the last wgmma_commit"),
    ("announces_too_few", r"the mbarrier at shared address \d+ gets 2 bytes more than were announced"),
    ("announces_too_many", r"the mbarrier at shared address \d+ lacks 0 of 1 arrivals and 2 bytes"),
    ("no_fence_of_barriers", f"tma_load_4d at {HERE_CPP}: no mbarrier_fence_init has followed mbarrier_init"),
    ("three_warps", f"not all warps of a warpgroup reach wgmma_ss at {HERE_CPP}"),
    ("lanes_disagree", f"wgmma at {HERE_CPP}: the lanes of a warp have different descriptors"),
    ("wrong_stride", f"wgmma at {HERE_CPP}: a stride that is not a multiple of 1024"),
    ("no_swizzle", "unsupported in the emulator: a descriptor without the 128-byte swizzle"),
    ("base_offset", "unsupported in the emulator: a descriptor with a base offset"),
    ("unaligned_tile", rf"tma_load_4d at {HERE_CPP}: shared address \d+: not aligned to 1024; thread \(0, 0, 0\)"),
    ("unaligned_coordinate", f"tma_load_4d at {HERE_CPP}: the innermost coordinate is 4, not a multiple of 16 bytes"),
    ("unaligned_operand", rf"wgmma at {HERE_CPP}: an operand at shared address \d+, which is not the start of a"),
    ("operand_past_the_end", f"wgmma at {HERE_CPP}: shared address .*outside the block's"),
    ("tile_past_the_end", f"tma_load_4d at {HERE_CPP}: shared address .*outside the block's"),
    ("writes_accumulators", rf"wgmma at {HERE_CPP}: lane \d+ has written to its accumulators before"),
    ("barrier_overwritten", f"mbarrier_wait at {HERE_CPP}: no mbarrier is there"),
    ("barrier_never_initialised", f"(mbarrier_wait|mbarrier_expect_tx) at {HERE_CPP}: no mbarrier is there"),
    ("never_waited_for_tile", "the block ends without having waited for its tma_load_4d"),
    (
        "no_fence_of_stores",
        rf"wgmma at {HERE_CPP}: it reads what thread 3 has written, without a fence_async_shared behind it",
    ),
    (
        "no_fence_of_async_copies",
        rf"wgmma at {HERE_CPP}: it reads what thread 7 has written, without a fence_async_shared behind it",
    ),
    ("too_many_arrivals", f"mbarrier_arrive at {HERE_CPP}: the phase has all its arrivals"),
]


@pytest.mark.parametrize("order", ["fifo", "random", "skewed"])
@pytest.mark.parametrize(("name", "message"), FAULTS, ids=[name for name, _ in FAULTS])
def test_faults_are_errors(probes: ModuleType, name: str, message: str, order: str) -> None:
    probes.set_schedule(order, 1)
    with pytest.raises(RuntimeError, match=message):
        matmul(probes, name)
    assert matmul(probes, "matmul")  # and the next launch is not the worse for it


@pytest.mark.parametrize(
    "name",
    [
        "no_wait_for_tile",
        "wrong_parity",
        "tile_over_one_in_use",
        "no_barrier_behind_them",
        "warps_disagree",
        "wrong_step",
        "wrong_major",
    ],
)
def test_faults_are_found(probes: ModuleType, name: str) -> None:
    """In the result, or by an error: under one of the schedules."""
    found = 0
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        try:
            found += not matmul(probes, name)
        except RuntimeError:
            found += 1
    assert found > 0, "survives"


@pytest.mark.parametrize("name", ["no_wgmma_wait", "no_commit"])
def test_accumulators_are_nan_until_waited_for(probes: ModuleType, name: str) -> None:
    a, b = operands()
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        out = torch.zeros(64, 64)
        probes.run(name, a.data_ptr(), b.data_ptr(), out.data_ptr())
        assert out.isnan().all()


BULK_FAULTS = [
    ("unaligned_source", f"bulk_load at {HERE_CPP}: the source is not aligned to 16"),
    ("ragged_size", f"bulk_load at {HERE_CPP}: 24 bytes, not a multiple of 16"),
    ("of_nothing", f"bulk_load at {HERE_CPP}: 0 bytes, not a multiple of 16"),
    ("unaligned_place", rf"bulk_load at {HERE_CPP}: shared address \d+: not aligned to 16"),
    ("place_past_the_end", f"bulk_load at {HERE_CPP}: shared address .*outside the block's"),
    ("unfenced_barrier", f"bulk_load at {HERE_CPP}: no mbarrier_fence_init has followed mbarrier_init"),
    ("more_than_announced", r"the mbarrier at shared address \d+ gets 16 bytes more than were announced"),
    ("less_than_announced", r"the mbarrier at shared address \d+ lacks 0 of 1 arrivals and 16 bytes"),
    ("bulk_never_waited_for", "the block ends without having waited for its bulk_load"),
]


@pytest.mark.parametrize(("name", "message"), BULK_FAULTS, ids=[name for name, _ in BULK_FAULTS])
def test_faults_of_bulk_copies_are_errors(probes: ModuleType, name: str, message: str) -> None:
    a, out = torch.ones(36), torch.zeros(32)
    with pytest.raises(RuntimeError, match=message):
        probes.run_bulk(name, a.data_ptr(), out.data_ptr())
    probes.run_bulk("bulk", a.data_ptr(), out.data_ptr())
    assert torch.equal(out, a[:32])


def test_a_bulk_copy_is_nan_until_it_is_waited_for(probes: ModuleType) -> None:
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        a, out = torch.ones(36), torch.zeros(32)
        probes.run_bulk("bulk_read_at_once", a.data_ptr(), out.data_ptr())
        assert out.isnan().all()


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"offset": 2}, False),
        ({"sizes": [64, 0, 1, 1]}, False),
        ({"strides": [120, 1280, 1280]}, False),
        ({"box": [4, 8, 1, 1]}, False),
        ({"box": [128, 8, 1, 1]}, False),
        ({"box": [128, 8, 1, 1], "swizzled": False}, True),
        ({"box": [64, 257, 1, 1]}, False),
    ],
)
def test_tensor_maps_are_checked(probes: ModuleType, change: dict, good: bool) -> None:
    base = torch.zeros(64 * 10 + 64)
    default = {"offset": 0, "sizes": [64, 10, 1, 1], "strides": [128, 1280, 1280], "box": [64, 8, 1, 1]}
    case = {**default, "swizzled": True, **change}
    arguments = base.data_ptr() + case.pop("offset"), case["sizes"], case["strides"], case["box"], case["swizzled"]
    assert probes.tensor_map(*arguments) is good


@pytest.mark.parametrize(
    ("sanitizer", "name", "found"),
    [
        ("thread", "tile", False),
        ("thread", "tile_over_one_in_use", True),
        ("thread", "tile_before_barriers_are_there", True),
        ("thread", "product", False),
        ("thread", "product_without_barrier", True),
        ("thread", "product_overwritten", True),
        ("thread", "bulk", False),
        ("thread", "bulk_over_one_in_use", True),
        ("address", "bulk", False),
        ("address", "bulk_past_the_end", True),
        ("address", "tile", False),
        ("address", "tile_past_the_end", True),
    ],
)
def test_sanitizers(sanitizer: str, name: str, found: bool) -> None:
    reason = compiling.unavailable() or compiling.sanitizer_unavailable(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    conformance.check_race(sanitizer, "races_hopper", name, found)
