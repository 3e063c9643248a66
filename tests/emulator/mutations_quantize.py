"""Known ways to be wrong in quantize.cu, quantize_table.cu and dequantize.cu; see test_mutations.py."""

import checks
import checks_quantize
import torch
from compiling import Check, Mutation
from kernels import Kernels


def quantize(kernels: Kernels) -> None:
    for dtype in (torch.uint8, torch.float32):
        checks.check_quantize(kernels, dtype, 300, 300)


def quantize_schedules(kernels: Kernels) -> None:
    for order, seed in checks.SCHEDULES:
        checks.schedule(kernels, order, seed)
        checks.check_quantize(kernels, torch.float32, 140, 600)


BRUTE, SHARED = "cuda/quantize.cu", "cuda/quantize.cuh"
TABLE, BACK = "cuda/quantize_table.cu", "cuda/dequantize.cu"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("quantize_tie", BRUTE, "if (least < best)", "if (least <= best)"), quantize),
    (Mutation("quantize_first_of_group", BRUTE, "int i = 0;\n        while", "int i = 1;\n        while"), quantize),
    (Mutation("quantize_last_group", BRUTE, "make_float4(NAN, NAN, NAN, NAN)", "make_float4(0, 0, 0, 0)"), quantize),
    (Mutation("quantize_group_of_tile", BRUTE, "        group = -1;\n", ""), quantize_schedules),
    (Mutation("quantize_tie_of_bytes", SHARED, "if (distance < best)", "if (distance <= best)"), quantize),
    (Mutation("quantize_float32_bytes", SHARED, "float(distance) * 1.001f + 1e-5f", "float(distance) * 0.999f"),
     checks.check_quantize_near_ties),
    (Mutation("quantize_overflow", SHARED, "return !(distance > limit);", "return distance < limit;"),
     checks_quantize.check_not_numbers),
    (Mutation("quantize_tile_before", BRUTE, "if (first > 0) __syncthreads();", ""), ("thread", "quantize")),
    (Mutation("quantize_tile_filled", BRUTE, "count, tile);\n        __syncthreads();", "count, tile);"),
     ("thread", "quantize")),
    (Mutation("quantize_bound", BRUTE, "if (i < here) store", "if (i <= here) store"), ("address", "quantize")),
    (Mutation("quantize_staged", BRUTE, "3 * here, staged", "3 * here - 1, staged"), quantize),
    (Mutation("quantize_four_pixels", BRUTE, "store_global(p.out + base + i", "store_global(p.out + base + (i ^ 128)"),
     checks_quantize.check_many_pixels),
    (Mutation("table_bound", TABLE, "* 1.0001f + 1e-5f", "* 0.8f"), checks_quantize.check_table_palettes),
    (Mutation("table_box", TABLE, "half(0.5f *", "half(0.3f *"), checks_quantize.check_table_palettes),
    (Mutation("table_order", TABLE, "if (w < warp) at", "if (w > warp) at"), checks_quantize.check_table_full_lists),
    (Mutation("table_turn", TABLE, "turn ^= 1", "turn ^= 0"), ("thread", "quantize")),
    (Mutation("table_list_written", TABLE, "__syncthreads();\n            colours", "colours"), ("thread", "quantize")),
    (Mutation("table_full_list", TABLE, "size > kList - kThreads ||", "size > 4 * kList ||"),
     ("address", "quantize")),
    (Mutation("table_last_index", TABLE, "unsigned(nearest[1].index) << 16", "unsigned(nearest[1].index) << 15"),
     checks_quantize.check_table_palettes),
    (Mutation("table_layout", TABLE, "(line & 2) * 2 + place % 4", "(line & 2) * 2 + place / 4"),
     checks_quantize.check_table_palettes),
    (Mutation("lookup_bytes", TABLE, "entry(c >> 8 & 255, c >> 16 & 255,", "entry(c >> 16 & 255, c >> 8 & 255,"),
     checks_quantize.check_lookup),
    (Mutation("lookup_pairs", TABLE, "lane % 2 ? odd : even", "lane % 2 ? even : odd"), checks_quantize.check_lookup),
    (Mutation("lookup_signed", TABLE, "int64_t(pair >> 16)", "int64_t(int(pair) >> 16)"), checks_quantize.check_lookup),
    (Mutation("lookup_staged", TABLE, "    __syncwarp();\n", ""), ("thread", "quantize")),
    (Mutation("lookup_rest", TABLE, "i = lane; i < p.n - base", "i = lane; i <= p.n - base"), ("address", "quantize")),
    (Mutation("lookup_stores", TABLE, "2 * kWarpSize * half) + lane;", "2 * kWarpSize * half) + (lane * 3 & 31);"),
     checks_quantize.check_lookup),
    (Mutation("dequantize_half", BACK, "rintf(127.5f * (x + 1.0f))", "floorf(127.5f * (x + 1.0f) + 0.5f)"),
     checks_quantize.check_dequantize),
    (Mutation("dequantize_clip", BACK, "fminf(fmaxf(rintf(127.5f * (x + 1.0f)), 0.0f), 255.0f)",
              "fmaxf(rintf(127.5f * (x + 1.0f)), 0.0f)"), checks_quantize.check_dequantize),
    (Mutation("dequantize_from_the_end", BACK, "if (token < 0) token += k;", ""), checks_quantize.check_dequantize),
    (Mutation("dequantize_exchange", BACK, "odd ? a1 : b1", "odd ? b1 : a1"), checks_quantize.check_dequantize),
    (Mutation("dequantize_words", BACK, "c[1] >> 8 | c[2] << 16", "c[1] >> 8 | c[2] << 8"),
     checks_quantize.check_dequantize),
    (Mutation("dequantize_staged", BACK, "    __syncwarp();\n    for", "    for"), ("thread", "dequantize")),
    (Mutation("dequantize_turn", BACK, "    __syncwarp();  // before", "    // before"), ("thread", "dequantize")),
    (Mutation("dequantize_palette", BACK, "colours);\n    __syncthreads();", "colours);"), ("thread", "dequantize")),
    (Mutation("dequantize_bound", BACK, "p.n - base >= kWarpTokens", "p.n - base >= kWarpTokens - 1"),
     ("address", "dequantize")),
    (Mutation("dequantize_stride", BACK, "base += stride", "base += stride + kWarpTokens"),
     checks_quantize.check_dequantize_turns),
]  # fmt: skip
