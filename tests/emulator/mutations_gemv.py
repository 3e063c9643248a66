"""Known ways to be wrong in gemv.cu, gemv_rows.cu and gemv.cuh; see test_mutations.py."""

from collections.abc import Callable

import checks_gemv as checks
import torch
from compiling import Check, Mutation
from kernels import Kernels

from igpt_fast import backend


def on(*parts: Callable[[], None]) -> Check:
    """A check that runs the op on the kernels."""

    def check(kernels: Kernels) -> None:
        kernels.module.set_capability(90)  # clusters and dependent launches
        with backend.use_backend("auto"), backend.emulate(kernels.module):
            for part in parts:
                part()

    return check


def coalescing(kernels: Kernels) -> None:
    kernels.module.set_capability(90)
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        checks.check_coalescing(kernels)


def shapes(transposed: bool) -> Check:
    sizes = [(1, 520, 40), (3, 520, 48), (7, 1032, 24), (2, 4104, 8)]
    return on(*(lambda s=s: checks.check_shape("cpu", torch.bfloat16, *s, transposed) for s in sizes))


conv, linear, options = shapes(False), shapes(True), on(lambda: checks.check_options("cpu", False))
reach, rounding = on(lambda: checks.check_range("cpu")), on(lambda: checks.check_one_rounding("cpu"))
shared = on(lambda: checks.check_shape("cpu", torch.bfloat16, 3, 2056, 24, False))
slabs = on(lambda: checks.check_shape("cpu", torch.bfloat16, 1, 8232, 16, False))
digits = on(lambda: checks.check_digits_of_the_norm("cpu"))
dependent = on(lambda: checks.check_dependent("cpu"))
huge, slices = on(lambda: checks.check_huge("cpu")), on(lambda: checks.check_slices("cpu"))

many = on(*(lambda s=s: checks.check_shape("cpu", torch.bfloat16, *s, False) for s in [(17, 520, 24), (33, 4104, 8)]))
wide, reach_of_many = on(lambda: checks.check_options("cpu", True, 9)), on(lambda: checks.check_range("cpu", 9))


def coalescing_of_many(kernels: Kernels) -> None:
    kernels.module.set_capability(90)
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        checks.check_coalescing_of_many_rows(kernels)


GEMV, ROWS, COMMON = "cuda/gemv.cu", "cuda/gemv_rows.cu", "cuda/gemv.cuh"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("gemv_x_not_there", GEMV,
              "        __syncthreads();\n        for (int k = slab", "        for (int k = slab"),
     ("thread", "gemv")),
    (Mutation("gemv_slab_overwritten", GEMV,
              "            __syncthreads();  // the one before is still being read\n", ""), ("thread", "gemv")),
    (Mutation("gemv_factors_not_waited_for", GEMV,
              "        ptx::cp_async_wait<0>();\n        __syncthreads();", "        __syncthreads();"), shared),
    (Mutation("gemv_factors_not_there", GEMV,
              "        ptx::cp_async_wait<0>();\n        __syncthreads();", "        ptx::cp_async_wait<0>();"),
     ("thread", "gemv")),
    (Mutation("gemv_factors_of_the_first_slab", GEMV, "ask_factors<T>(p, factors, slab, slab_end)",
              "ask_factors<T>(p, factors, begin, begin + slab_end - slab)"), slabs),
    (Mutation("gemv_does_not_wait", GEMV, "    ptx::grid_dependency_wait();\n", ""), dependent),
    (Mutation("gemv_x_overwritten", GEMV, "    __syncthreads();  // x has been read\n", ""), ("thread", "gemv")),
    (Mutation("gemv_sums_not_there", GEMV, "    __syncthreads();\n    // A half", "    // A half"), ("thread", "gemv")),
    (Mutation("gemv_output_not_there", GEMV, "        __syncthreads();\n        return;", "        return;"),
     ("thread", "gemv")),
    (Mutation("gemv_block_not_begun", GEMV, "    ptx::cluster_wait();  // all blocks have begun\n", ""), shared),
    (Mutation("gemv_blocks_not_waited_for", GEMV,
              "    ptx::cluster_arrive();\n    ptx::cluster_wait();\n", ""), shared),
    (Mutation("gemv_order_among_blocks", GEMV, "    ptx::cluster_arrive();\n", "    ptx::cluster_arrive_relaxed();\n"),
     ("thread", "gemv")),
    (Mutation("gemv_to_its_own_block", GEMV, "ptx::store_cluster(to, 0, sum.x)", "store_shared(to, sum.x)"), shared),
    (Mutation("gemv_misses_a_block", GEMV, "s < p.splits; ++s", "s < p.splits - (p.splits > 2); ++s"), shared),
    (Mutation("gemv_misses_a_warp", GEMV, "w < kWarps; ++w", "w < kWarps - 1; ++w"), shared),
    (Mutation("gemv_next_not_taken", GEMV, "if (k + kStep < slab_end) multiply", "if (k < 0) multiply"), conv),
    (Mutation("gemv_rounded_norm", GEMV,
              "ptx::pack2<T>(low - had.x, high - had.y)", "ptx::pack2<T>(0.0f, 0.0f)"), digits),
    (Mutation("gemv_norm_of_a_share", GEMV,
              "k < p.n_in; k += kWarpSize * 8", "k < p.share; k += kWarpSize * 8"), shared),
    (Mutation("gemv_squares_in_half", GEMV, "square += to_float(vector.at[i]) * to_float(vector.at[i]);",
              "square = to_float(from_float<T>(square + to_float(vector.at[i]) * to_float(vector.at[i])));"), reach),
    (Mutation("gemv_x_out_of_place", GEMV, "(row ^ k / kChunk % kRows)", "row"), coalescing),
    (Mutation("gemv_weight_behind", COMMON, "from.k < from.end &&", "from.k < from.end + 8 &&"), ("address", "gemv")),
    (Mutation("gemv_columns_behind", COMMON, "8 * g < columns ? 8 * g : 0", "8 * g"), ("address", "gemv")),
    (Mutation("gemv_linear_columns_behind", COMMON, "8 * i < from.columns", "8 * i < from.columns + 8"),
     ("address", "gemv")),
    (Mutation("gemv_row_of_32_bits", COMMON, ": k * ld + tile", ": int64_t(unsigned(k) * unsigned(ld)) + tile"), huge),
    (Mutation("gemv_distance_of_rows", COMMON, "ld(p.ld), end", "ld(p.transposed ? p.n_in : p.n_out), end"), slices),
    (Mutation("gemv_other_half_of_k", COMMON, "vectors[2 * m + i % 2].at[2 * j + i / 2]",
              "vectors[2 * m + i % 2].at[2 * (1 - j) + i / 2]"), linear),
    (Mutation("gemv_column_of_conv", COMMON, ": 8 * g + 2 * m + half", ": 8 * g + m + 4 * half"), conv),
    (Mutation("gemv_x_beyond_the_end", GEMV, "row < p.rows && own < end;", "row < p.rows && own < end + 8;"), conv),
    (Mutation("gemv_row_not_there", GEMV, "row() < p.rows && tile", "tile"), ("address", "gemv")),
    (Mutation("gemv_no_activation", GEMV, "activate(p.activation, y.x + before.x)", "(y.x + before.x)"), options),
    (Mutation("gemv_sum_rounded", GEMV, "activate(p.activation, y.x + before.x)",
              "activate(p.activation, to_float(from_float<T>(y.x)) + before.x)"), rounding),
    (Mutation("gemv_sums_meet", COMMON, "kPitch = kColumns + 2", "kPitch = kColumns"), coalescing),
    (Mutation("gemv_rows_x_not_waited_for", ROWS,
              "    ptx::cp_async_wait<0>();\n    __syncthreads();\n", "    __syncthreads();\n"), many),
    (Mutation("gemv_rows_x_not_there", ROWS,
              "    __syncthreads();\n    if (!p.norm_weight) return;\n", "    if (!p.norm_weight) return;\n"),
     ("thread", "gemv")),
    (Mutation("gemv_rows_norm_not_there", ROWS,
              "end - begin, first);\n    __syncthreads();\n", "end - begin, first);\n"), ("thread", "gemv")),
    (Mutation("gemv_rows_slab_overwritten", ROWS, "if (slab > begin) __syncthreads();", ""), ("thread", "gemv")),
    (Mutation("gemv_rows_x_overwritten", ROWS,
              "        __syncthreads();  // x, or the sums before, have been read\n", ""), ("thread", "gemv")),
    (Mutation("gemv_rows_order_among_blocks", ROWS,
              "        ptx::cluster_arrive();\n", "        ptx::cluster_arrive_relaxed();\n"), ("thread", "gemv")),
    (Mutation("gemv_rows_block_not_begun", ROWS,
              "    if (!outbox.alone) ptx::cluster_wait();  // all blocks have begun\n", ""), many),
    (Mutation("gemv_rows_does_not_wait", ROWS, "    ptx::grid_dependency_wait();\n", ""), dependent),
    (Mutation("gemv_chunks_left_over", COMMON, "* split / p.splits * kChunk", "/ p.splits * split * kChunk"), many),
    (Mutation("gemv_rows_misses_a_block", ROWS, "s < p.splits; ++s", "s < p.splits - (p.splits > 2); ++s"), many),
    (Mutation("gemv_rows_of_another_block", ROWS, "unsigned(row / rows)", "unsigned(row / rows) ^ 1u"), many),
    (Mutation("gemv_rows_squares_of_a_slab", ROWS,
              ": load_shared(shared.squares + row) + sum", ": load_shared(shared.squares + row)"), many),
    (Mutation("gemv_rows_tiles_together", ROWS, "(first + i / kPairs) * kTile", "i / kPairs * kTile"), many),
    (Mutation("gemv_rows_x_beyond_the_end", ROWS, "p.n_in + begin + k, begin + k < end", "p.n_in + begin + k, true"),
     ("address", "gemv")),
    (Mutation("gemv_rows_range_of_half", ROWS,
              "kNarrow = std::is_same_v<T, __half>", "kNarrow = false"), reach_of_many),
    (Mutation("gemv_rows_power_stays", ROWS, "sum.x /= load_shared(shared.scales + row);", ""), reach_of_many),
    (Mutation("gemv_rows_lacks_residual", ROWS, "y.x += after.x;", ""), wide),
    (Mutation("gemv_rows_rows_meet", ROWS, "+ 63) / 64 * 64 + 32", "+ 63) / 64 * 64"), coalescing_of_many),
]  # fmt: skip
