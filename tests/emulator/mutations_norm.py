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


def layer_norm(kernels: Kernels) -> None:
    for dtype, rows, n, parts, fused in [
        (torch.bfloat16, 9, 512, 2, True),
        (torch.bfloat16, 5, 1032, 2, False),
        (torch.float32, 3, 72, 2, True),
    ]:
        checks.check_norm(kernels, dtype, rows, n, parts, fused, centred=True)


def norm_mixed(kernels: Kernels) -> None:
    for narrow, n in ((torch.bfloat16, 1032), (torch.float16, 72)):
        checks.check_norm_mixed(kernels, narrow, 5, n, 2)
        checks.check_norm_of_a_wide_weight(kernels, narrow, 5, n, 2)


def norm_coalescing(kernels: Kernels) -> None:
    for centred in (False, True):
        checks.check_norm_coalescing(kernels, centred)


def norm_schedules(kernels: Kernels) -> None:
    for order, seed in checks.SCHEDULES:
        checks.schedule(kernels, order, seed)
        checks.check_norm(kernels, torch.bfloat16, 7, 1032, 2, True)


PRIMITIVES, NORM, COLUMNS = "cuda/primitives.cuh", "cuda/norm.cu", "cuda/columns.cuh"
WARP_LOOP = "for (int lane = kWarpSize / 2; lane > 0; lane /= 2)"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("block_sum_no_barrier", PRIMITIVES, "    __syncthreads();\n", ""), norm_schedules),
    (Mutation("block_sum_no_barrier_race", PRIMITIVES, "    __syncthreads();\n", ""), ("thread", "norm")),
    (Mutation("warp_sum_half_a_warp", PRIMITIVES, WARP_LOOP, WARP_LOOP.replace("/ 2;", "/ 4;", 1)), norm),
    (Mutation("warp_sum_misses_a_step", PRIMITIVES, "lane > 0;", "lane > 1;"), norm),
    (Mutation("block_sum_misses_a_warp", PRIMITIVES, "w < kWarps;", "w < kWarps - 1;"), norm),
    (Mutation("block_sum_one_place", PRIMITIVES, "scratch + N * warp + i", "scratch + N * warp"), norm),
    (Mutation("norm_one_scratch", NORM,
              "turn ^= 1;\n        if constexpr (kCentred) shift", "if constexpr (kCentred) shift"),
     ("thread", "norm")),
    (Mutation("norm_row_bound", NORM, "if (row >= p.rows) return;", "if (row > p.rows) return;"), ("address", "norm")),
    (Mutation("norm_scratch_size", NORM, "2 * Means<S, kCentred>::kSums", "Means<S, kCentred>::kSums"),
     ("address", "norm")),
    (Mutation("norm_low_statistics", NORM, "- mean[0];\n        sums[0] += c * c;",
              "- mean[0];\n        sums[0] = to_float(from_float<__half>(sums[0] + c * c));"), checks.check_norm_range),
    (Mutation("norm_sum_of_squares_in_half", NORM, "rsqrtf(sums[0] / float(n)",
              "rsqrtf(to_float(from_float<__half>(sums[0])) / float(n)"), checks.check_norm_range),
    (Mutation("norm_wrong_eps", NORM, "rsqrtf(mean.square + p.eps)", "rsqrtf(mean.square + p.eps * 1e5f)"), norm),
    (Mutation("norm_slope", NORM, "scale * scale * mean.product", "scale * mean.product"), norm),
    (Mutation("norm_no_dsum", NORM, "if (p.dsum) {", "if (p.dsum == p.x) {"), norm),
    (Mutation("norm_partial_no_barrier", NORM, "    if constexpr (S::kTeams > 1) {\n        __syncthreads();",
              "    if constexpr (S::kTeams > 1) {"), ("thread", "norm")),
    (Mutation("norm_dweight_no_barrier", COLUMNS, "store_shared(scratch + threadIdx.x, sum);\n    __syncthreads();",
              "store_shared(scratch + threadIdx.x, sum);"), ("thread", "norm")),
    (Mutation("norm_dweight_misses_a_part", COLUMNS, "part < p.parts;", "part < p.parts - 1;"), norm),
    (Mutation("norm_too_much_shared_memory", NORM, "S::kWarps == 1 ? 0 : (", "S::kWarps == 1 ? 1 << 20 : ("), norm),
    (Mutation("norm_strided_vectors", NORM, "(threadIdx.x % S::kTeamThreads + v * S::kTeamThreads) * V::kSize",
              "(threadIdx.x % S::kTeamThreads * S::kVectors + v) * V::kSize"), norm_coalescing),
    (Mutation("norm_conflicts", NORM, "threadIdx.x % 8 >= 4", "threadIdx.x % 8 >= 8"), norm_coalescing),
    (Mutation("norm_swapped_address", NORM, "(swap ? (e + V4::kSize) % kSize : e)", "e"), norm),
    (Mutation("norm_second_barrier", NORM, "if constexpr (S::kTeams > 1) __syncthreads();  // the scratch", "// the"),
     ("thread", "norm")),
    (Mutation("norm_two_sums_one_place", NORM, "team_sum<S>(mean, scratch + 2 * S::kWarps);",
              "team_sum<S>(mean, scratch);"),
     ("thread", "norm")),
    (Mutation("norm_scratch_of_one_sum", NORM, "(kCentred ? 3 : 1) * S::kWarps", "S::kWarps"), ("address", "norm")),
    (Mutation("norm_not_centred", NORM, "h = sums[0] / float(n);", "h = 0.0f;"), checks.check_layer_norm_offset),
    (Mutation("norm_no_shift", NORM, "shift = sums[2] / float(n)", "shift = 0.0f"), checks.check_layer_norm_offset),
    (Mutation("norm_no_mean_of_gradient", NORM, "* slope - mean.g)", "* slope)"), layer_norm),
    (Mutation("norm_no_bias", NORM, "if (p.bias) y += bias.get(v, e);", ""), layer_norm),
    (Mutation("norm_dbias_place", NORM, "(int64_t(gridDim.x) + blockIdx.x) * n", "int64_t(blockIdx.x) * n"),
     layer_norm),
    (Mutation("norm_second_column_sum", COLUMNS, "int64_t(blockIdx.y) * p.parts * p.n", "0"), layer_norm),
    (Mutation("norm_mixed_half_as_bfloat16", NORM, "if (dtype == DType::bf16) return __uint_as_float",
              "if (dtype != DType::f32) return __uint_as_float"), norm_mixed),
    (Mutation("norm_mixed_unsettled_gradient", NORM, "        dout.settle(n, p.out_dtype);\n", ""), norm_mixed),
    (Mutation("norm_mixed_sum_is_not_rounded", NORM, "        h.round(n, p.dtype);\n", ""), norm_mixed),
    (Mutation("norm_mixed_no_gradient_of_the_branch", NORM, "if (p.dbranch) dout", "if (!p.dbranch) dout"), norm_mixed),
    (Mutation("norm_mixed_wide_branch", NORM, "dout.store(p.dbranch, row, n, p.x_dtype)",
              "dout.store(p.dbranch, row, n, p.dtype)"), ("address", "norm")),
    (Mutation("norm_mixed_wide_out", NORM, "h.store(p.out, row, n, p.out_dtype)", "h.store(p.out, row, n, p.dtype)"),
     ("address", "norm")),
    (Mutation("norm_mixed_weight_of_the_stream", NORM, "dispatch_dtype(p.weight_dtype, [&]",
              "dispatch_dtype(p.dtype, [&]"),
     norm_mixed),
    (Mutation("norm_mixed_strided", NORM, "const Four*>(from + start(v))", "const Four*>(from + start(v) % 512 * 2)"),
     checks.check_norm_mixed_coalescing),
]  # fmt: skip
