"""ptx.cuh: each function against the PTX manual, on the emulator and on a GPU; what the emulator reports."""

from pathlib import Path
from types import ModuleType

import compiling
import conformance
import pytest
import torch
from conformance import NVCC, SCHEDULES, TYPES, Run, words
from torch import Tensor

SOURCE = Path(__file__).parent / "conformance.cu"


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return compiling.probes("probes_ptx", "conformance.cu")


# ---- every function, right ----------------------------------------------------------------------------------


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_nvcc_compiles(architecture: str, tmp_path: Path) -> None:
    conformance.nvcc(architecture, SOURCE, tmp_path / "conformance.o", "-c")


@pytest.fixture(scope="module")
def on_emulator(probes: ModuleType) -> Run:
    return conformance.on_emulator(probes)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if NVCC is None:
        pytest.skip("no nvcc")
    library = tmp_path_factory.mktemp("conformance") / "conformance.so"
    conformance.nvcc(conformance.architecture(), SOURCE, library, "-shared")
    return conformance.on_gpu(library, "igpt_conformance")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a kernel of conformance.cu; ``out`` says how many cases there are."""
    return request.getfixturevalue("on_emulator" if request.param == "emulated" else "on_gpu")


@pytest.mark.parametrize("name", TYPES)
def test_mma(run: Run, name: str) -> None:
    """Products are exact in fp32 and 17 terms are added: each loses at most a unit of the greatest."""
    n = 20
    a, b = torch.randn(n, 16, 16).to(TYPES[name]), torch.randn(n, 16, 8).to(TYPES[name])
    c = torch.randn(n, 16, 8) * torch.tensor([0.0, 1.0, 100.0, 1e4]).repeat(n // 4)[:, None, None]
    out = run(f"mma_{name}", torch.full((n, 16, 8), torch.nan), a, b, c)
    exact = a.double() @ b.double() + c.double()
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    assert ((out.double() - exact).abs() <= 17 * 2.0**-23 * size).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(run: Run, transposed: bool) -> None:
    n = 7
    a = torch.randint(-(2**15), 2**15, (n, 32, 8)).to(torch.int16)
    out = run("ldmatrix_x4" + "_trans" * transposed, words(n, 32, 4), a)
    m = a.reshape(n, 4, 8, 8)
    m = m.transpose(2, 3) if transposed else m
    # (n, matrix, lane / 4, lane % 4, half) -> (n, lane, matrix, half)
    expected = m.reshape(n, 4, 32, 2).transpose(1, 2).contiguous()
    assert torch.equal(out, expected.view(torch.int32)[..., 0])


def test_cp_async(run: Run) -> None:
    n = 5
    a = torch.randint(0, 256, (n, 3, 64, 16), dtype=torch.uint8)
    count = torch.randint(0, 17, (n, 3, 64), dtype=torch.int32)
    out = run("cp_async", torch.full_like(a, 0x55), a, count)
    assert torch.equal(out, a * (torch.arange(16) < count[..., None]))


def test_cp_async4(run: Run) -> None:
    a = words(5, 64)
    assert torch.equal(run("cp_async4", torch.zeros_like(a), a), a.flip(1))


def exp2_inputs(n: int) -> Tensor:
    x = torch.randn(n, 64) * 20
    x[0, :12] = torch.tensor([0.0, -0.0, 1.0, -1.0, 127.5, 128.0, -126.0, -126.5, -150.0, 1e-40, torch.inf, -torch.inf])
    x[0, 12] = torch.nan
    return x


def test_exp2_approx(run: Run) -> None:
    """Within 2^-22 of the result by the PTX manual; results below the normal numbers are zero."""
    x = exp2_inputs(40)
    out = run("exp2_approx", torch.full_like(x, torch.nan), x)
    exact = torch.exp2(x.double())
    tiny = torch.finfo(torch.float32).tiny
    exact = torch.where(exact > torch.finfo(torch.float32).max, torch.inf, torch.where(exact < tiny, 0.0, exact))
    assert out[0, 12].isnan()
    ok = (out.double() == exact) | ((out.double() - exact).abs() <= 2.0**-22 * exact)
    ok[0, 12] = True
    assert ok.all(), x[~ok]


@pytest.mark.parametrize("name", TYPES)
def test_pack_and_unpack(run: Run, name: str) -> None:
    n = 40
    x = words(n, 64, 2).view(torch.float32)  # of every size; NaN and infinity among them
    x[: n // 2] = torch.randn(n // 2, 64, 2)
    packed = run(f"pack2_{name}", words(n, 64), x)
    expected = x.to(TYPES[name])
    ours = packed[..., None].view(TYPES[name])
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))
    wide = run(f"unpack2_{name}", torch.zeros(n, 64, 2), packed)
    assert torch.equal(wide.nan_to_num(7), ours.float().nan_to_num(7))


def test_named_barriers(run: Run) -> None:
    x = torch.randn(9, 64)
    assert torch.equal(run("named_barriers", torch.full_like(x, torch.nan), x), x.flip(1))


def test_hints_change_nothing(run: Run) -> None:
    x = torch.randn(3, 64)
    assert torch.equal(run("hints", torch.full_like(x, torch.nan), x), x)


@pytest.mark.gpu
def test_gpu_and_emulator_agree(on_gpu: Run, on_emulator: Run) -> None:
    """Bit for bit, but for the approximation (2^-22) and the order in which mma adds."""
    n = 50
    for name in ("pack2_bf16", "pack2_f16"):
        x = words(n, 64, 2).view(torch.float32)
        ours, theirs = on_emulator(name, words(n, 64), x), on_gpu(name, words(n, 64), x)
        assert torch.equal(ours, theirs), name
    x = exp2_inputs(n)[1:]
    ours, theirs = (run("exp2_approx", torch.full_like(x, torch.nan), x) for run in (on_emulator, on_gpu))
    assert ((ours - theirs).abs() <= 2.0**-22 * ours).all()
    for name, dtype in TYPES.items():
        a, b = torch.randn(n, 16, 16).to(dtype), torch.randn(n, 16, 8).to(dtype)
        c = torch.randn(n, 16, 8)
        ours, theirs = (run(f"mma_{name}", torch.zeros(n, 16, 8), a, b, c) for run in (on_emulator, on_gpu))
        size = a.float().abs() @ b.float().abs() + c.abs()
        assert ((ours - theirs).abs() <= 17 * 2.0**-23 * size).all(), name


# ---- what the emulator reports ------------------------------------------------------------------------------


def run_probe(
    probes: ModuleType, name: str, threads: int = 64, shared_bytes: int = 1024, grid: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Tensor]:
    source, out = torch.arange(256.0), torch.zeros(256)
    probes.run(name, source.data_ptr(), out.data_ptr(), threads, shared_bytes, *grid)
    return source, out


HERE_CPP = r".*probes_ptx.cpp:\d+"
FAULTS = [
    ("copy_never_waited_for", f"cp.async at {HERE_CPP}: its thread ends without having waited for it; thread"),
    ("copy_never_committed", f"cp.async at {HERE_CPP}: its thread ends without having waited for it; thread"),
    ("copy_to_a_misaligned_place", rf"cp.async at {HERE_CPP}: shared address \d+: not aligned to 16; thread \("),
    ("copy_from_a_misaligned_place", f"cp.async at {HERE_CPP}: the source is not aligned to 16"),
    ("copy_past_the_end", f"cp.async at {HERE_CPP}: shared address 2176 and 16 bytes: outside the block's 1024, which"),
    ("copy_to_address_zero", f"cp.async at {HERE_CPP}: shared address 0 and 16 bytes: outside"),
    ("copy_of_17_bytes", f"cp.async at {HERE_CPP}: 17 bytes, not 0 to 16"),
    ("address_of_global_memory", f"shared_address at {HERE_CPP}: the pointer is not into shared memory"),
    ("matrices_past_the_end", rf"ldmatrix.x4 at {HERE_CPP}: .*outside the block's 1024.*; thread \((31|63), 0, 0\)"),
    ("matrices_misaligned", f"ldmatrix.x4.trans at {HERE_CPP}: shared address 1160: not aligned to 16"),
    ("matrices_with_missing_lanes", f"deadlock: .*62 threads waiting in ldmatrix.x4 at {HERE_CPP}"),
    ("matrices_two_ways", f"lanes of a warp disagree: ldmatrix.x4(.trans)? at {HERE_CPP} against ldmatrix.x4"),
    ("mma_with_missing_lanes", f"deadlock: .*32 threads waiting in mma.m16n8k16.bf16 at {HERE_CPP}"),
    ("mma_of_two_types", r"lanes of a warp disagree: mma.m16n8k16.(bf)?16 at|disagree: mma.m16n8k16.f16 at"),
    ("barrier_zero", f"bar.sync at {HERE_CPP}: barrier 0, not 1 to 15"),
    ("barrier_sixteen", f"bar.arrive at {HERE_CPP}: barrier 16, not 1 to 15"),
    ("barrier_of_part_of_a_warp", f"bar.sync at {HERE_CPP}: 48 threads, not whole warps of the block"),
    ("barrier_of_too_many", f"bar.sync at {HERE_CPP}: 96 threads, not whole warps of the block"),
    ("barrier_of_two_counts", f"barrier 1 of (64|96) threads, but of (96|64) at {HERE_CPP}"),
    ("barrier_by_lane", f"bar.sync at {HERE_CPP}: the lanes of a warp name different barriers"),
    ("barrier_in_half_a_warp", f"deadlock: .*32 threads waiting in bar.sync at {HERE_CPP}"),
    (
        "barrier_that_one_warp_misses",
        f"deadlock: .*32 threads waiting in named barrier 3 at {HERE_CPP}.*at named barrier 3 32 of 64 threads",
    ),
    ("barriers_crossed", "at named barrier 1 32 of 64 threads have arrived; at named barrier 2 32 of 64"),
]


@pytest.mark.parametrize("order", ["fifo", "random", "skewed"])
@pytest.mark.parametrize(("name", "message"), FAULTS, ids=[name for name, _ in FAULTS])
def test_faults_are_errors(probes: ModuleType, name: str, message: str, order: str) -> None:
    probes.set_schedule(order, 1)
    with pytest.raises(RuntimeError, match=message):
        run_probe(probes, name, threads=96 if name == "barrier_of_two_counts" else 64)
    source, out = run_probe(probes, "copy")  # and the next launch is not the worse for it
    assert torch.equal(out, source)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", "source"),
        ("copy_with_an_empty_group", "source"),
        ("copy_without_wait", "nan"),
        ("copy_without_commit", "nan"),
        ("copy_waits_for_too_few", "nan"),
        ("copy_of_a_source_that_changes", "changed"),
    ],
)
def test_copies_are_there_when_waited_for(probes: ModuleType, name: str, expected: str) -> None:
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        _, out = run_probe(probes, name)
        if expected == "nan":
            assert out.isnan().all()
        else:
            assert torch.equal(out, torch.full((256,), -1.0) if expected == "changed" else torch.arange(256.0))


def test_a_copy_needs_a_barrier_before_others_use_it(probes: ModuleType) -> None:
    probes.set_schedule("skewed", 1)
    _, out = run_probe(probes, "copy_without_a_barrier")
    assert out[:64].isnan().any()


def test_schedules_differ_where_a_named_barrier_is_missing(probes: ModuleType) -> None:
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        assert torch.equal(run_probe(probes, "exchange")[1][:64], torch.arange(63.0, -1.0, -1.0))
    probes.set_schedule("skewed", 1)
    assert run_probe(probes, "exchange_without_a_barrier")[1].isnan().sum() == 32


def test_mma_carries_nan(probes: ModuleType) -> None:
    """Row g of A is poisoned in lanes 4g to 4g + 3: so are rows 0 to 7 of the result, and no others."""
    _, out = run_probe(probes, "mma_of_poison", threads=32)
    assert out[:128].reshape(32, 4)[:, :2].isnan().all()
    assert out[:128].reshape(32, 4)[:, 2:].eq(0).all()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tile_of_matrices_swizzled", {"ldmatrix": 1, "ldmatrix_wavefronts": 4, "mma": 0}),
        ("tile_of_matrices_plain", {"ldmatrix": 1, "ldmatrix_wavefronts": 32}),
        ("tile_of_copies_swizzled", {"async_copies": 32, "load_sectors": 16, "load_bytes": 512, "shared_conflicts": 0}),
        ("tile_of_copies_plain", {"async_copies": 32, "shared_wavefronts": 32, "shared_conflicts": 28}),
        ("mma_of_poison", {"mma": 1, "collectives": 1}),
        ("exchange", {"barriers": 1}),
    ],
)
def test_counters(probes: ModuleType, name: str, wanted: dict[str, int]) -> None:
    probes.reset_counters()
    run_probe(probes, name, threads=64 if name == "exchange" else 32)
    counted = probes.counters()
    assert {key: counted[key] for key in wanted} == wanted


def matmul(probes: ModuleType, name: str) -> bool:
    """Whether a tiled product comes out right."""
    torch.manual_seed(0)
    a, b = torch.randn(32, 128).bfloat16(), torch.randn(128, 32).bfloat16()
    operands = torch.cat([a.flatten(), b.flatten()])
    out = torch.full((32, 32), torch.nan)
    probes.run(name, operands.data_ptr(), out.data_ptr(), 64, 8192, 1, 1)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return bool(((out.double() - exact).abs() <= 129 * 2.0**-24 * size).all())


def test_matmul(probes: ModuleType) -> None:
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        probes.reset_counters()
        assert matmul(probes, "matmul")
        counted = probes.counters()
        assert counted["mma"] == 2 * 4 * (128 // 16)
        assert counted["ldmatrix_wavefronts"] == 4 * counted["ldmatrix"] == 4 * 2 * 3 * (128 // 16)
        assert counted["shared_conflicts"] == 0
        assert counted["load_sectors"] * 32 == counted["load_bytes"] == 2 * 32 * 128 * 2


@pytest.mark.parametrize(
    "bug", ["no_wait", "no_commit", "wait_for_one_less", "no_barrier_before_use", "no_barrier_after_use"]
)
def test_matmul_without_something(probes: ModuleType, bug: str) -> None:
    found = 0
    for order, seed in SCHEDULES:
        probes.set_schedule(order, seed)
        try:
            found += not matmul(probes, f"matmul_{bug}")
        except RuntimeError as error:
            assert "cp.async" in str(error)  # noqa: PT017
            found += 1
    assert found > 0, "survives"


def test_some_blocks_of_a_launch(probes: ModuleType) -> None:
    grid = (2**31 - 1, 3)
    last = grid[0] * grid[1] - 1
    try:
        probes.set_blocks(last - 2, 10)
        _, out = run_probe(probes, "marks_its_block", threads=1, grid=grid)
        assert out.nonzero().flatten().tolist() == sorted((last - i) % 256 for i in range(3))
        with pytest.raises(RuntimeError, match=r"set_blocks chose blocks from \d+; the launch has 3"):
            run_probe(probes, "marks_its_block", grid=(3, 1))
        with pytest.raises(RuntimeError, match="set_blocks chose no block"):
            probes.set_blocks(0, 0)
    finally:
        probes.set_blocks()
    _, out = run_probe(probes, "marks_its_block", grid=(20, 2))
    assert out.sum() == 40


@pytest.mark.parametrize(
    ("sanitizer", "name", "found"),
    [
        ("thread", "copy", False),
        ("thread", "copy_without_barrier", True),
        ("thread", "copy_again", False),
        ("thread", "copy_again_without_barrier", True),
        ("thread", "matrices", False),
        ("thread", "matrices_without_barrier", True),
        ("thread", "named_barrier", False),
        ("thread", "named_barrier_too_late", True),
        ("thread", "named_barrier_arrival", True),
        ("address", "source", False),
        ("address", "source_past_the_end", True),
    ],
)
def test_sanitizers(sanitizer: str, name: str, found: bool) -> None:
    reason = compiling.unavailable() or compiling.sanitizer_unavailable(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    conformance.check_race(sanitizer, "races", name, found)
