"""Known ways to be wrong in sample.cu, bitonic.cuh and philox.cuh; see test_mutations.py."""

import checks_sample
import torch
from compiling import Check, Mutation
from kernels import Kernels


def draws(kernels: Kernels) -> None:
    for k in (63, 512):
        checks_sample.check_draws(kernels, torch.float32, 6, k)


def next_step(kernels: Kernels) -> None:
    checks_sample.check_next(kernels, torch.bfloat16, 24, False)


def step(kernels: Kernels) -> None:
    checks_sample.check_step(kernels, torch.bfloat16)


SAMPLE, SORT, PHILOX = "cuda/sample.cu", "cuda/bitonic.cuh", "cuda/philox.cuh"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("sample_top_k_ties", SAMPLE, "score[i] < threshold ?", "score[i] <= threshold ?"),
     checks_sample.check_ties),
    (Mutation("sample_top_k", SAMPLE, "i == top_k - 1", "i == top_k"), draws),
    (Mutation("sample_top_k_zeros", SAMPLE, "~__float_as_uint(0.0f - score[i])", "~__float_as_uint(-score[i])"), draws),
    (Mutation("sample_boundary", SAMPLE, "cumulative[i] <= target", "cumulative[i] < target"),
     checks_sample.check_boundaries),
    (Mutation("sample_top_p_boundary", SAMPLE, "sums[i] - ordered[i] < top_p", "sums[i] - ordered[i] <= top_p"),
     checks_sample.check_boundaries),
    (Mutation("sample_top_p_shortest", SAMPLE, "sums[i] - ordered[i] < top_p", "sums[i] < top_p"), draws),
    (Mutation("sample_min_p", SAMPLE, "score[i] < min_score ?", "score[i] <= min_score ?"),
     checks_sample.check_min_p),
    (Mutation("sample_min_p_weights", SAMPLE, "score[i] < min_score ?", "weight[i] < min_score ?"), draws),
    (Mutation("sample_before_warp", SAMPLE, "if (w < warp) before", "if (w <= warp) before"), draws),
    (Mutation("sample_scan", SAMPLE, "if (lane >= distance) sum", "if (lane > distance) sum"), draws),
    (Mutation("sample_nan", SAMPLE, "x[i] != x[i] ? INFINITY : x[i])", "x[i])"), checks_sample.check_edges),
    (Mutation("sample_infinity", SAMPLE, "if (!(fabsf(peak) < INFINITY)) return 0;", ""), checks_sample.check_edges),
    (Mutation("sample_greedy_zero", SAMPLE, "x[i] + 0.0f)", "x[i])"), checks_sample.check_ties),
    (Mutation("sample_greedy_nan", SAMPLE, "x[i] != x[i] ? 0xffffffffu : ", ""), checks_sample.check_edges),
    (Mutation("sample_temperature", SAMPLE, "(x[i] - peak) / temperature", "x[i] / temperature"),
     checks_sample.check_edges),
    (Mutation("sample_position", SAMPLE, "next = index + 1;", "next = index;"), next_step),
    (Mutation("sample_positions", SAMPLE, "p.position_stride * row", "0 * row"), next_step),
    (Mutation("sample_last_position", SAMPLE, "next < p.n_positions", "next <= p.n_positions"), ("address", "sample")),
    (Mutation("sample_does_not_wait", SAMPLE, "    ptx::grid_dependency_wait();\n", ""), checks_sample.check_dependent),
    (Mutation("sample_stream_of_the_first_row", SAMPLE, "p.streams + row", "p.streams"), checks_sample.check_numbers),
    (Mutation("sample_logprob_temperature", SAMPLE, "double(expf(x[i] - peak))",
              "double(expf((x[i] - peak) / 0.8f))"), step),
    (Mutation("sample_logprob_logit", SAMPLE, "first_id() + i == token ? x[i]",
              "first_id() + i == token - 1 ? x[i]"), step),
    (Mutation("sample_logprob_nan", SAMPLE, "return NAN;", "return 0.0f;"),
     checks_sample.check_step_edges),
    (Mutation("sample_logprob_greedy", SAMPLE, "if (!greedy || p.logprobs) peak", "if (!greedy) peak"),
     checks_sample.check_step_edges),
    (Mutation("sample_offset", SAMPLE, "index = position + offset, next", "index = position + 0 * offset, next"), step),
    (Mutation("sample_column", SAMPLE, "index - setting(p, 0, &SampleSettings::first) : 0", "index : 0"), step),
    (Mutation("sample_column_end", SAMPLE, "column >= p.columns", "column > p.columns"), step),
    (Mutation("sample_columns", SAMPLE, "int64_t(blockIdx.x) * p.columns", "int64_t(blockIdx.x)"), step),
    (Mutation("sample_advance", SAMPLE, "store_global(p.position + row,", "store_global(p.position,"), step),
    (Mutation("sample_settings_order", SAMPLE, "p.top_p, &SampleSettings::top_p",
              "p.top_p, &SampleSettings::temperature"), step),
    (Mutation("sample_kept_written", SAMPLE, "__syncthreads();\n    const uint32_t kept", "const uint32_t kept"),
     ("thread", "sample")),
    (Mutation("sample_threshold_written", SAMPLE, "    __syncthreads();\n    const float threshold",
              "    const float threshold"), ("thread", "sample")),
    (Mutation("sample_row_end", SAMPLE, "id < k ? to_float", "id <= k ? to_float"), ("address", "sample")),
    (Mutation("sample_vectors", SAMPLE, "p.vector = p.k % kOwn == 0 &&", "p.vector ="), checks_sample.check_batches),
    (Mutation("sample_row_offset", SAMPLE, "int64_t(blockIdx.x) * p.row_stride", "int64_t(blockIdx.x) * p.k"),
     checks_sample.check_batches),
    (Mutation("sample_sort_before", SORT, "    __syncthreads();\n#pragma", "\n#pragma"), ("thread", "sample")),
    (Mutation("sample_sort_after", SORT, "keys[i]);\n                __syncthreads();", "keys[i]);"),
     ("thread", "sample")),
    (Mutation("sample_sort_direction", SORT, "sort_pair(keys[1], keys[3], descending)",
              "sort_pair(keys[1], keys[3], true)"), draws),
    (Mutation("sample_sort_last", SORT, "size <= kKeys", "size < kKeys"), draws),
    (Mutation("sample_philox_key", PHILOX, "k1 += 0xBB67AE85u", "k1 += 0xBB67AE86u"), checks_sample.check_numbers),
    (Mutation("sample_philox_stream", PHILOX, "uint32_t(s >> 32), seed", "0, seed"), checks_sample.check_numbers),
    (Mutation("sample_philox_rounds", PHILOX, "round < 10", "round < 9"), checks_sample.check_numbers),
]  # fmt: skip
