"""Known ways to be wrong in norm.cu and primitives.cuh; see test_mutations.py."""

import checks
import torch
from compiling import Check, Mutation
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


PRIMITIVES, NORM = "cuda/primitives.cuh", "cuda/norm.cu"
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
]  # fmt: skip
