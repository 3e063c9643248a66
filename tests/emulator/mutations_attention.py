"""Known ways to be wrong in the attention kernels; see test_mutations.py."""

import checks_attention as attention
import torch
from compiling import Check, Mutation
from kernels import Kernels


def narrow(kernels: Kernels) -> None:
    """What head dimension 32 shows: two rows to 128 bytes of shared memory, blocks of 128 rows."""
    attention.check(kernels, torch.bfloat16, 32, 130, 131, "both", rows=128)
    attention.check(kernels, torch.bfloat16, 32, 64, 65, "", rows=64)


def starts(kernels: Kernels) -> None:
    attention.check(kernels, torch.bfloat16, 32, 130, 130, "starts", rows=128)


def schedules(kernels: Kernels) -> None:
    attention.check_schedules(kernels, 32, 128)


COMMON, FORWARD, BACKWARD = (f"cuda/attention_{part}.cuh" for part in ("common", "fwd", "bwd"))
WAIT = "        ptx::cp_async_wait<0>();\n"
BARRIER = "        __syncthreads();  // this tile is there, and nobody reads the one before\n"
DQ, DKV = "        const uint32_t here = kv_tiles + tile;", "        const uint32_t here = q_tiles + tile;"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("attention_no_wait", FORWARD, WAIT, ""), narrow),
    (Mutation("attention_no_barrier", FORWARD, BARRIER, ""), ("thread", "attention")),
    (Mutation("attention_dq_no_wait", BACKWARD, WAIT + BARRIER + DQ, BARRIER + DQ), narrow),
    (Mutation("attention_dq_no_barrier", BACKWARD, BARRIER + DQ, DQ), ("thread", "attention")),
    (Mutation("attention_dkv_no_barrier", BACKWARD, BARRIER + DKV, DKV), schedules),
    (Mutation("attention_dkv_one_place_for_terms", BACKWARD, "(tile ? kTile : 0)", "(tile ? 0 : 0)"),
     ("thread", "attention")),
    (Mutation("attention_result_over_rows_in_use", COMMON, "    __syncwarp();  // all lanes have read", "    // "),
     ("thread", "attention")),
    (Mutation("attention_result_read_too_early", COMMON, "    __syncwarp();  // and have written", "    // "),
     ("thread", "attention")),
    (Mutation("attention_sees_the_next_key", FORWARD, "own_row(r, i) - n0 + 1)", "own_row(r, i) - n0 + 2)"), narrow),
    (Mutation("attention_dq_sees_the_next_key", BACKWARD, "own_row(r, i) - n0 + 1)", "own_row(r, i) - n0 + 2)"),
     narrow),
    (Mutation("attention_dkv_is_not_seen_by_its_own_query", BACKWARD, "bits_from(own + own_row(r, i) - i0)",
              "bits_from(own + own_row(r, i) - i0 + 1)"), narrow),
    (Mutation("attention_mask_of_the_wrong_columns", COMMON, "(n % 4 * 8) & 2", "(n % 4 * 8) & 1"), narrow),
    (Mutation("attention_fragments_in_wrong_order", COMMON, "offset(lane / 16 * 8 + lane % 8, lane / 8 % 2)",
              "offset(lane % 16, lane / 16)"), narrow),
    (Mutation("attention_weights_in_wrong_order", COMMON, "&p[r][2 * k + i / 2][i % 2 * 2]",
              "&p[r][2 * k + i % 2][i / 2 * 2]"), narrow),
    (Mutation("attention_not_rescaled", FORWARD, "out[r][d][2 * i + 1] *= before;", ""), narrow),
    (Mutation("attention_maximum_of_half_a_row", FORWARD, "top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));", ""),
     narrow),
    (Mutation("attention_lse_in_powers_of_2", FORWARD, "+ log2f(x)) * kLn2", "+ log2f(x))"), narrow),
    (Mutation("attention_wrong_delta", BACKWARD, "delta += __shfl_xor_sync(kFullMask, delta, 2);", ""), narrow),
    (Mutation("attention_lse_of_a_query_without_keys", BACKWARD, "make_float2(kNoKey, 0.0f) : make_float2(lse",
              "make_float2(lse, 0.0f) : make_float2(lse"), attention.check_poison),
    (Mutation("attention_delta_of_a_query_without_keys", BACKWARD, "make_float2(kNoKey, 0.0f) : make_float2(lse",
              "make_float2(kNoKey, delta) : make_float2(lse"), attention.check_poison),
    (Mutation("attention_gradient_of_hidden_keys", BACKWARD, "scale[r][i] = is_shown ? shape.scale : 0.0f;",
              "scale[r][i] = shape.scale;"), starts),
    (Mutation("attention_hidden_keys_of_the_wrong_tile", BACKWARD, "row >= kTile ? shown[R - 1]",
              "row < 0 ? shown[R - 1]"), starts),
    (Mutation("attention_dq_not_scaled", BACKWARD, "factor[r][0] = factor[r][1] = shape.scale;",
              "factor[r][0] = factor[r][1] = 1.0f;"), narrow),
    (Mutation("attention_no_zero_fill", COMMON, "bits & 1 ? 16 : 0", "bits & 1 ? 16 : 16"), attention.check_poison),
    (Mutation("attention_writes_behind_the_end", COMMON, "if (first + row < end)", "if (first + row <= end)"),
     ("address", "attention")),
    (Mutation("attention_terms_behind_the_end", BACKWARD, "if (query >= shape.t_q) return",
              "if (query > shape.t_q) return"), ("address", "attention")),
    (Mutation("attention_swizzle_conflict", COMMON, "row / 2 % 4", "row % 4"), attention.check_access),
    (Mutation("attention_no_swizzle", COMMON, "? row % 8 :", "? 0 :"), attention.check_access),
    (Mutation("attention_skips_a_tile", FORWARD, "if (n0 > last + 16 * R - 1)", "if (n0 >= last + 16 * R - 1)"),
     narrow),
    (Mutation("attention_dkv_skips_a_tile", BACKWARD, "if (i0 + kTile - 1 < own)", "if (i0 + kTile - 1 <= own)"),
     narrow),
    (Mutation("attention_never_skips", FORWARD, "if (n0 > last + 16 * R - 1)", "if (n0 > end)"),
     attention.check_skipping),
    (Mutation("attention_skips_too_much_padding", BACKWARD, "const int begin = max(0, keys.start - past);",
              "const int begin = max(0, keys.start);"), narrow),
    (Mutation("attention_hidden_keys_at_the_beginning_are_not_skipped", COMMON, "if (!mask) return;", "return;"),
     attention.check_poison),
    (Mutation("attention_skips_the_first_shown_key", COMMON, "__ffsll(static_cast<long long>(shown)) - 1",
              "__ffsll(static_cast<long long>(shown))"), narrow),
    (Mutation("attention_offset_of_31_bits", COMMON, "batch * tensor.batch + head * tensor.head + row * position",
              "(batch * tensor.batch & 0x7fffffff) + head * tensor.head + row * position"), attention.check_huge),
    (Mutation("attention_last_group", COMMON, "min(order.group, order.pairs - first)", "order.group"),
     attention.check_order),
    (Mutation("attention_groups_of_unequal_size", COMMON, "(pairs + groups - 1) / groups)};",
              "groups > 1 ? fitting : pairs)};"), attention.check_order),
]  # fmt: skip
