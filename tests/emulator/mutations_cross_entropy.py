"""Known ways to be wrong in cross_entropy.cu; see test_mutations.py."""

import checks_cross_entropy
import torch
from compiling import Check, Mutation
from kernels import Kernels


def cross_entropy(kernels: Kernels) -> None:
    for dtype, rows, k in [
        (torch.bfloat16, 5, 512),
        (torch.bfloat16, 7, 1032),
        (torch.float32, 70, 13),
        (torch.bfloat16, 3, 26),
    ]:
        checks_cross_entropy.check_cross_entropy(kernels, dtype, rows, k)


LOSS = "cuda/cross_entropy.cu"
LABEL = "        const int64_t label = load_global(p.labels + row);\n        float"  # of the forward
FAR, INFINITE = (
    checks_cross_entropy.check_cross_entropy_far_from_zero,
    checks_cross_entropy.check_cross_entropy_infinite,
)
BAD, NOTHING = (
    checks_cross_entropy.check_cross_entropy_bad_labels,
    checks_cross_entropy.check_cross_entropy_nothing_counts,
)
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("cross_entropy_no_largest", LOSS, "        largest = warp_max(largest);\n", "        largest = 0.0f;\n"),
     FAR),
    (Mutation("cross_entropy_own_largest", LOSS, "        largest = warp_max(largest);\n", ""), cross_entropy),
    (Mutation("cross_entropy_one_log_sum_exp", LOSS, "statistics.first - statistics.second)",
              "(statistics.first + statistics.second))"), FAR),
    (Mutation("cross_entropy_no_rescale", LOSS, "sum *= exponential<T>(largest - base(next));", ""), cross_entropy),
    (Mutation("cross_entropy_no_merge", LOSS, "warp_sum(sum * exponential<T>(largest - base(all)))", "warp_sum(sum)"),
     cross_entropy),
    (Mutation("cross_entropy_minus_infinity", LOSS, "largest == -INFINITY ? 0.0f : largest", "largest"), INFINITE),
    (Mutation("cross_entropy_ignored_counts", LOSS, "            count += 1.0f;\n        }",
              "        }\n        count += 1.0f;"),
     cross_entropy),
    (Mutation("cross_entropy_bad_label_is_zero", LOSS, "loss = NAN;", "loss = 0.0f;"), BAD),
    (Mutation("cross_entropy_label_k", LOSS, "label >= 0 && label < p.k", "label >= 0 && label <= p.k"), BAD),
    (Mutation("cross_entropy_bad_label_has_gradient", LOSS, "label < 0 || label >= p.k)", "label < 0)"), BAD),
    (Mutation("cross_entropy_label_in_32_bits", LOSS,
              LABEL, "        const int label = int(load_global(p.labels + row));\n        float"), BAD),
    (Mutation("cross_entropy_ignored_gradient", LOSS, "if (label == p.ignore_index || label < 0", "if (label < -100"),
     cross_entropy),
    (Mutation("cross_entropy_mean_of_none_is_zero", LOSS, "sums[0] / sums[1] :", "sums[0] / fmaxf(sums[1], 1.0f) :"),
     NOTHING),
    (Mutation("cross_entropy_no_onehot", LOSS, "(start + e == label ? 1.0f : 0.0f)", "0.0f"), cross_entropy),
    (Mutation("cross_entropy_one_scale", LOSS, "(p.for_each ? row : 0)", "0"), cross_entropy),
    (Mutation("cross_entropy_no_divisor", LOSS, "p.count ? load_global(p.count) : 1.0f", "1.0f"), cross_entropy),
    (Mutation("cross_entropy_misses_parts", LOSS, "part < p.parts;", "part < p.parts - 1;"), cross_entropy),
    (Mutation("cross_entropy_no_barrier", LOSS, "    __syncthreads();\n    if (threadIdx.x > 0)",
              "    if (threadIdx.x > 0)"),
     ("thread", "cross_entropy")),
    (Mutation("cross_entropy_no_barrier_schedules", LOSS, "    __syncthreads();\n    if (threadIdx.x > 0)",
              "    if (threadIdx.x > 0)"), checks_cross_entropy.check_cross_entropy_schedules),
    (Mutation("cross_entropy_vector_bound", LOSS, "if (start < k) x[v]", "if (start <= k) x[v]"),
     ("address", "cross_entropy")),
    (Mutation("cross_entropy_row_bound", LOSS,
              "row < p.rows; row += stride) {\n" + LABEL, "row <= p.rows; row += stride) {\n" + LABEL),
     ("address", "cross_entropy")),
    (Mutation("cross_entropy_vectors_where_none_fit", LOSS, "if (k % kSize == 0) return f(Streamed<T, Vector<T>>())",
              "if (k % 2 == 0) return f(Streamed<T, Vector<T>>())"), cross_entropy),
    (Mutation("cross_entropy_strided_vectors", LOSS,
              "const int start = (lane + v * kWarpSize) * V::kSize;\n            if (start < k)",
              "const int start = (lane * kVectors + v) * V::kSize;\n            if (start < k)"),
     checks_cross_entropy.check_cross_entropy_coalescing),
]  # fmt: skip
