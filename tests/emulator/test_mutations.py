"""Known ways to be wrong, put into the kernels one by one: a check that passes without must fail with each of them."""

from collections.abc import Callable

import checks
import compiling
import pytest
import torch
from compiling import Mutation
from kernels import Kernels


def norm(kernels: Kernels) -> None:
    for dtype, rows, n, parts, fused in [
        (torch.bfloat16, 9, 512, 2, True),
        (torch.bfloat16, 5, 1032, 2, True),
        (torch.bfloat16, 5, 72, 2, False),
        (torch.float32, 3, 1032, 2, True),
    ]:
        checks.check_norm(kernels, dtype, rows, n, parts, fused)


def norm_schedules(kernels: Kernels) -> None:
    for order, seed in checks.SCHEDULES:
        checks.schedule(kernels, order, seed)
        checks.check_norm(kernels, torch.bfloat16, 7, 1032, 2, True)


def quantize(kernels: Kernels) -> None:
    for dtype in (torch.uint8, torch.float32):
        checks.check_quantize(kernels, dtype, 300, 300)


def quantize_schedules(kernels: Kernels) -> None:
    for order, seed in checks.SCHEDULES:
        checks.schedule(kernels, order, seed)
        checks.check_quantize(kernels, torch.uint8, 700, 600)


# A check of checks.py or above, or (sanitizer, op) for a run of driver.cpp.
Check = Callable[[Kernels], None] | tuple[str, str]

PRIMITIVES, NORM, QUANTIZE = "cuda/primitives.cuh", "cuda/norm.cu", "cuda/quantize.cu"
WARP_LOOP = "for (int lane = kWarpSize / 2; lane > 0; lane /= 2)"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("block_sum_no_barrier", PRIMITIVES, "    __syncthreads();\n", ""), norm_schedules),
    (Mutation("block_sum_no_barrier_race", PRIMITIVES, "    __syncthreads();\n", ""), ("thread", "norm")),
    (Mutation("warp_sum_half_a_warp", PRIMITIVES, WARP_LOOP, WARP_LOOP.replace("/ 2;", "/ 4;", 1)), norm),
    (Mutation("warp_sum_misses_a_step", PRIMITIVES, "lane > 0;", "lane > 1;"), norm),
    (Mutation("block_sum_misses_a_warp", PRIMITIVES, "w < kWarps;", "w < kWarps - 1;"), norm),
    (Mutation("block_sum_one_place", PRIMITIVES, "scratch + N * warp + i", "scratch + N * warp"), norm),
    (Mutation("norm_one_scratch", NORM, "turn ^= 1;", ""), ("thread", "norm")),
    (Mutation("norm_row_bound", NORM, "if (row >= p.rows) return;", "if (row > p.rows) return;"), ("address", "norm")),
    (Mutation("norm_scratch_size", NORM, "4 * S::kWarps", "4 * S::kWarps - 1"), ("address", "norm")),
    (Mutation("norm_low_statistics", NORM, "square[0] += h.get(v, e) * h.get(v, e);",
              "square[0] = to_float(from_float<T>(square[0] + h.get(v, e) * h.get(v, e)));"), checks.check_norm_range),
    (Mutation("norm_sum_of_squares_in_half", NORM, "rsqrtf(square[0] / float(n) + p.eps)",
              "rsqrtf(to_float(from_float<T>(square[0])) / float(n) + p.eps)"), checks.check_norm_range),
    (Mutation("norm_wrong_eps", NORM, "sums[0] / float(n) + p.eps", "sums[0] / float(n) + p.eps * 1e5f"), norm),
    (Mutation("norm_slope", NORM, "scale * scale * (sums[1]", "scale * (sums[1]"), norm),
    (Mutation("norm_no_dsum", NORM, "if (p.dsum) {", "if (p.dsum == p.x) {"), norm),
    (Mutation("norm_partial_no_barrier", NORM, "    if constexpr (S::kTeams > 1) {\n        __syncthreads();",
              "    if constexpr (S::kTeams > 1) {"), ("thread", "norm")),
    (Mutation("norm_dweight_no_barrier", NORM, "store_shared(scratch + threadIdx.x, sum);\n    __syncthreads();",
              "store_shared(scratch + threadIdx.x, sum);"), ("thread", "norm")),
    (Mutation("norm_dweight_misses_a_part", NORM, "part < p.parts;", "part < p.parts - 1;"), norm),
    (Mutation("norm_too_much_shared_memory", NORM, "S::kWarps == 1 ? 0 :", "S::kWarps == 1 ? 1 << 20 :"), norm),
    (Mutation("norm_strided_vectors", NORM, "(threadIdx.x % S::kTeamThreads + v * S::kTeamThreads) * V::kSize",
              "(threadIdx.x % S::kTeamThreads * S::kVectors + v) * V::kSize"), checks.check_norm_coalescing),
    (Mutation("quantize_tie", QUANTIZE, "if (d < best) {\n            best = d;\n            index = k;",
              "if (d <= best) {\n            best = d;\n            index = k;"), quantize),
    (Mutation("quantize_tie_of_bytes", QUANTIZE, "if (d < best) {\n            best = d;\n            limit",
              "if (d <= best) {\n            best = d;\n            limit"), quantize),
    (Mutation("quantize_float32_bytes", QUANTIZE, "limit = float(d) * 1.001f + 1e-5f", "limit = float(d) * 0.999f"),
     checks.check_quantize_near_ties),
    (Mutation("quantize_first_barrier", QUANTIZE, "            __syncthreads();\n            for (int j = threadIdx.x",
              "            for (int j = threadIdx.x"), ("thread", "quantize")),
    (Mutation("quantize_second_barrier", QUANTIZE, "    __syncthreads();\n            for (int j = 0; j < count",
              "    for (int j = 0; j < count"), quantize_schedules),
    (Mutation("quantize_bound", QUANTIZE, "if (i < p.n) store", "if (i <= p.n) store"), ("address", "quantize")),
    (Mutation("quantize_load_bound", QUANTIZE, "if (i < p.n) pixel", "if (i <= p.n) pixel"), ("address", "quantize")),
    (Mutation("quantize_early_exit", QUANTIZE, "        Pixel pixel;\n",
              "        if (i >= p.n) return;\n        Pixel pixel;\n"), quantize),
    (Mutation("quantize_tile", QUANTIZE, "min(kTile, p.k - first)", "min(kTile, p.k - first - 1)"), quantize),
]  # fmt: skip


@pytest.mark.mutation
@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=[mutation.name for mutation, _ in MUTATIONS])
def test_is_found(mutation: Mutation, check: Check, emulated: Kernels) -> None:
    if isinstance(check, tuple):
        reason = compiling.sanitizer_unavailable(check[0])
        if reason is not None:
            pytest.skip(reason)
        done = compiling.run_driver(*check, mutation)
        assert done.returncode != 0, "survives"
        assert "ERROR: AddressSanitizer" in done.stderr or "data race" in done.stderr, done.stderr[-2000:]
        return
    torch.manual_seed(0)
    checks.schedule(emulated, "fifo", 0)
    check(emulated)
    torch.manual_seed(0)
    mutant = Kernels(compiling.emulated(mutation), "cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant)
