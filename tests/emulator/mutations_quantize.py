"""Known ways to be wrong in quantize.cu; see test_mutations.py."""

import checks
import torch
from compiling import Check, Mutation
from kernels import Kernels


def quantize(kernels: Kernels) -> None:
    for dtype in (torch.uint8, torch.float32):
        checks.check_quantize(kernels, dtype, 300, 300)


def quantize_schedules(kernels: Kernels) -> None:
    for order, seed in checks.SCHEDULES:
        checks.schedule(kernels, order, seed)
        checks.check_quantize(kernels, torch.uint8, 700, 600)


QUANTIZE = "cuda/quantize.cu"
MUTATIONS: list[tuple[Mutation, Check]] = [
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
