"""Known ways to be wrong in activation.cu; see test_mutations.py."""

import checks_activation
import torch
from compiling import Check, Mutation
from kernels import Kernels


def activation(kernels: Kernels) -> None:
    for dtype, rows, n, parts in [(torch.bfloat16, 67, 264, 2), (torch.float32, 9, 72, 1)]:
        for with_bias in (False, True):
            checks_activation.check_activation(kernels, dtype, rows, n, parts, with_bias)


ACTIVATION = "cuda/activation.cu"
FAR_OUT = checks_activation.check_activation_far_out
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("activation_slope", ACTIVATION, "kSlope = 1.702f", "kSlope = 1.7f"), activation),
    (Mutation("activation_cubic", ACTIVATION, "kLinear * 0.044715f", "kLinear * 0.0447f"), activation),
    (Mutation("activation_density", ACTIVATION, "exponential<T>(-0.5f * z * z)", "exponential<T>(-z * z)"), activation),
    (Mutation("activation_cancelling_slope", ACTIVATION, "e * r * r}", "r * (1.0f - r)}"), activation),
    (Mutation("activation_overflowing_exponential", ACTIVATION, "exponential<T>(-fabsf(x))", "exponential<T>(x)"),
     FAR_OUT),
    (Mutation("activation_overflowing_square", ACTIVATION, "fminf(z * z, 1e6f)", "z * z"), FAR_OUT),
    (Mutation("activation_bias_rounded", ACTIVATION,
              "z = to_float(piece[u].at[e]) + to_float(bias.at[e]);\n                const",
              "z = to_float(from_float<T>(to_float(piece[u].at[e]) + to_float(bias.at[e])));\n                const"),
     checks_activation.check_activation_rounds_once),
    (Mutation("activation_dbias_of_rounded", ACTIVATION, "dbias[e] += gradient;",
              "dbias[e] = to_float(from_float<T>(dbias[e] + gradient));"),
     checks_activation.check_activation_rounds_once),
    (Mutation("activation_row_bound", ACTIVATION, "if (row + u * step < p.rows) piece",
              "if (row + u * step <= p.rows) piece"),
     ("address", "activation")),
    (Mutation("activation_vector_bound", ACTIVATION, "if (first + u * kThreads < vectors) piece",
              "if (first + u * kThreads <= vectors) piece"), ("address", "activation")),
    (Mutation("activation_column_bound", ACTIVATION, "if (column >= across) return;", "if (column > across) return;"),
     ("address", "activation")),
    (Mutation("activation_early_exit", ACTIVATION, "if (threadIdx.x >= kWidth || column >= n) return;",
              "if (threadIdx.x >= kWidth) return;"), ("address", "activation")),
    (Mutation("activation_no_barrier", ACTIVATION, "    __syncthreads();\n    const int64_t column",
              "    const int64_t column"), ("thread", "activation")),
    (Mutation("activation_no_barrier_schedules", ACTIVATION, "    __syncthreads();\n    const int64_t column",
              "    const int64_t column"), checks_activation.check_activation_schedules),
    (Mutation("activation_one_warp_less", ACTIVATION, "w < kRowsAtOnce; ++w", "w < kRowsAtOnce - 1; ++w"), activation),
    (Mutation("activation_conflicts", ACTIVATION, "threadIdx.x % 8 >= 4", "threadIdx.x % 8 >= 8"),
     checks_activation.check_activation_coalescing),
    (Mutation("activation_scratch_size", ACTIVATION, "kThreads * kSize * sizeof(float)",
              "(kThreads * kSize - 1) * sizeof(float)"), ("address", "activation")),
]  # fmt: skip
