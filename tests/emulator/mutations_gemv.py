"""Known ways to be wrong in gemv.cu; see test_mutations.py."""

from collections.abc import Callable

import checks_gemv as checks
import torch
from compiling import Check, Mutation
from kernels import Kernels

from igpt_fast import backend


def on(*parts: Callable[[], None]) -> Check:
    """A check that runs the op on the kernels."""

    def check(kernels: Kernels) -> None:
        with backend.use_backend("auto"), backend.emulate(kernels.module):
            for part in parts:
                part()

    return check


def coalescing(kernels: Kernels) -> None:
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        checks.check_coalescing(kernels)


def shapes(transposed: bool) -> Check:
    sizes = [(1, 520, 40), (3, 520, 48), (7, 1032, 24), (2, 4104, 8)]
    return on(*(lambda s=s: checks.check_shape("cpu", torch.bfloat16, *s, transposed) for s in sizes))


conv, linear, options = shapes(False), shapes(True), on(lambda: checks.check_options("cpu", False))
reach, rounding = on(lambda: checks.check_range("cpu")), on(lambda: checks.check_one_rounding("cpu"))
huge, slices = on(lambda: checks.check_huge("cpu")), on(lambda: checks.check_slices("cpu"))

GEMV = "cuda/gemv.cu"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("gemv_shares_exchanged", GEMV, "first += upper ? kHalf : 0;", "first += upper ? 0 : kHalf;"), conv),
    (Mutation("gemv_shares_twice", GEMV, "            alone &= !upper;\n", ""), ("thread", "gemv")),
    (Mutation("gemv_slab_overwritten", GEMV, "if (slab > 0) __syncthreads();", ""), ("thread", "gemv")),
    (Mutation("gemv_sums_not_there", GEMV, "    __syncthreads();\n    output.finish", "    output.finish"),
     ("thread", "gemv")),
    (Mutation("gemv_mean_over_a_slab", GEMV, "square / float(p.n_in)", "square / float(L::kSlab)"), conv),
    (Mutation("gemv_squares_of_one_warp", GEMV, "w < kWarps; ++w) square", "w < 1; ++w) square"), conv),
    (Mutation("gemv_squares_in_half", GEMV, "square += values[i] * values[i];",
              "square = to_float(from_float<typename L::T>(square + values[i] * values[i]));"), reach),
    (Mutation("gemv_x_out_of_place", GEMV, "x + place(k + i) + row", "x + (k + i) * kRows + row"), conv),
    (Mutation("gemv_weight_behind", GEMV, "if (row >= p.n_in || column", "if (column"), ("address", "gemv")),
    (Mutation("gemv_columns_behind", GEMV, "k >= p.n_in || column >= p.n_out", "k >= p.n_in"), ("address", "gemv")),
    (Mutation("gemv_row_of_32_bits", GEMV, "row * p.ld + column;", "unsigned(row) * unsigned(p.ld) + column;"), huge),
    (Mutation("gemv_distance_of_rows", GEMV, "(column + c) * p.ld + k;", "(column + c) * int64_t(p.n_in) + k;"),
     slices),
    (Mutation("gemv_warps_of_another_column", GEMV, "in_tile / L::kWide * splits;", "in_tile / L::kWide;"), linear),
    (Mutation("gemv_misses_a_split", GEMV, "s < splits;", "s < splits - (splits > 2);"), linear),
    (Mutation("gemv_second_half", GEMV, "<const float4*>(half + kSlab / 2)",
              "<const float4*>(half + kSlab / 2 * (row < 2))"), linear),
    (Mutation("gemv_no_activation", GEMV, "activate(p.activation, y + bias)", "y + bias"), options),
    (Mutation("gemv_sum_rounded", GEMV, "activate(p.activation, y + bias)",
              "activate(p.activation, to_float(from_float<T>(y)) + bias)"), rounding),
    (Mutation("gemv_rows_of_x_meet", GEMV, "kSlab + 32 / kRows", "kSlab"), coalescing),
    (Mutation("gemv_next_not_taken", GEMV, "            now = next;\n", ""), conv),
]  # fmt: skip
