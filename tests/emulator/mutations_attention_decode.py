"""Known ways to be wrong in attention_decode's kernels; see test_mutations.py."""

from collections.abc import Callable

import checks_attention_decode as checks
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


def counted(part: Callable[[Kernels], None]) -> Check:
    def check(kernels: Kernels) -> None:
        with backend.use_backend("auto"), backend.emulate(kernels.module):
            part(kernels)

    return check


positions = on(
    lambda: checks.check_positions("cpu", torch.bfloat16, 64),
    lambda: checks.check_positions("cpu", torch.float16, 96, starts=True),
)
long = on(lambda: checks.check_long("cpu"))
prefixes = on(*(lambda some=some: checks.check_prefix("cpu", torch.bfloat16, 96, *some) for some in checks.PREFIXES))
scaled = on(
    lambda: checks.check_positions("cpu", torch.bfloat16, 64, scaled=True),
    lambda: checks.check_positions("cpu", torch.float16, 96, starts=True, scaled=True),
)
both = on(*(lambda dim=dim: checks.check_positions("cpu", torch.bfloat16, dim, scaled=2) for dim in (64, 96)))
codes = on(
    lambda: checks.check_codes("cpu", torch.bfloat16, 32), lambda: checks.check_quantizing("cpu", torch.bfloat16, 128)
)
dependent = on(lambda: checks.check_dependent("cpu"))
parts_dependent = on(lambda: checks.check_dependent("cpu", 300))
huge, outside = on(lambda: checks.check_huge("cpu")), on(lambda: checks.check_outside("cpu"))
reads_once = counted(checks.check_prefix_reads_once)
THREAD, ADDRESS = ("thread", "attention_decode"), ("address", "attention_decode")

SHARED, OWN, PREFIX = (f"cuda/attention_decode{name}" for name in (".cuh", ".cu", "_prefix.cu"))
VECTORS, MERGE = "cuda/attention_decode_vectors.cuh", "cuda/attention_decode_merge.cu"
E4M3 = "cuda/e4m3.cuh"
BARRIER = "    __syncthreads();\n"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("decode_minus_infinity", SHARED, "m == -INFINITY ? 0.0f : m;", "m;"), positions),
    (Mutation("decode_does_not_wait", OWN, "ptx::grid_dependency_wait();  // before every", "// before every"),
     dependent),
    (Mutation("decode_merge_does_not_wait", MERGE, "    ptx::grid_dependency_wait();\n", ""), parts_dependent),
    (Mutation("decode_starts_of_no_row", SHARED, "p.starts ? ptx::load_past_l1(p.starts + row) : 0", "0"), positions),
    (Mutation("decode_sees_itself_always", SHARED, "sees_it = own_start <= position;", "sees_it = true;"), positions),
    (Mutation("decode_position_of_each_row", SHARED, "row * p.position_step", "row"), ADDRESS),
    (Mutation("decode_behind_the_cache", SHARED, "position < p.positions;", "position <= p.positions;"), ADDRESS),
    (Mutation("decode_starts_without_prefix", SHARED, "start - p.prefix;", "start;"), prefixes),
    (Mutation("decode_part_too_short", SHARED, "(share + kKeys - 1) / kKeys * kKeys", "share / kKeys * kKeys"), long),
    (Mutation("decode_writes_beside", VECTORS, "int64_t(position) * L::kDim",
              "int64_t(position / 2 * 2) * L::kDim"), positions),
    (Mutation("decode_reads_what_it_writes", OWN, "has_new ? own.position :", "has_new ? own.position + 1 :"),
     positions),
    (Mutation("decode_last_split_has_the_key", OWN, "split == own.parts - 1;", "split == p.splits - 1;"), positions),
    (Mutation("decode_loads_two_more", OWN, "            if (key < end) {\n                k[u]",
              "            if (key < end + 2) {\n                k[u]"), positions),
    (Mutation("decode_scaled_loads_two_more", VECTORS, "L::kTogether == 1 || key < end)",
              "L::kTogether == 1 || key < end + 2)"), scaled),
    (Mutation("decode_scale_of_the_other", VECTORS, "weights[L::kTogether - 1] * scales[L::kTogether - 1]",
              "weights[L::kTogether - 1] * scales[0]"), scaled),
    (Mutation("decode_scale_hides_infinity", VECTORS, "largest < 0x7f800000u ?", "largest <= 0x7f800000u ?"), codes),
    (Mutation("decode_scale_of_nothing", VECTORS, "of_all == 0.0f ? 0u : to_e4m3", "to_e4m3"), codes),
    (Mutation("decode_scale_of_a_lane", VECTORS, "other = __shfl_xor_sync(kFullMask, largest, lane)",
              "other = largest"), scaled),
    (Mutation("decode_second_value_is_stored", VECTORS, "if (which(i) == 0) store_global", "store_global"), THREAD),
    (Mutation("decode_key_scale_forgotten", OWN, "sum *= k.scales[0];", "sum *= 1.0f;"), both),
    (Mutation("decode_key_scale_of_the_values", OWN, "? p.k_scale + first", "? p.v_scale + first"), both),
    (Mutation("decode_scale_beside", OWN, "store_global(caches.key_scales + own.position,",
              "store_global(caches.key_scales + own.position / 2 * 2,"), both),
    (Mutation("decode_new_key_without_its_scale", VECTORS, "n == 0 ? of_all : 0.0f", "n == 0 ? 1.0f : 0.0f"), both),
    (Mutation("decode_new_key_twice", OWN, "threadIdx.x >= S::kLanes) return;",
              "threadIdx.x >= 2 * S::kLanes) return;"), both),
    (Mutation("e4m3_first_twice", E4M3, "from_e4m3(codes >> 8)", "from_e4m3(codes)"), codes),
    (Mutation("e4m3_ties_upwards", E4M3, "0x7ffffu + (size >> 20 & 1u)", "0x80000u"), codes),
    (Mutation("e4m3_small_ones_are_normal", E4M3, "size < 0x3c800000u", "size < 0x3c000000u"), codes),
    (Mutation("e4m3_nan_is_480", E4M3, "size == kNaNE4M3 ? NAN : moved", "moved"), codes),
    (Mutation("decode_sum_not_rescaled", OWN, "        l *= factor;\n", ""), long),
    (Mutation("decode_score_misses_a_step", OWN, "lane < S::kLanes; lane *= 2) sum",
              "lane < S::kLanes / 2; lane *= 2) sum"), positions),
    (Mutation("decode_no_barrier", OWN, BARRIER, ""), THREAD),
    (Mutation("decode_merge_misses_a_part", MERGE, "p.prefix_splits + own.parts;", "slots_of(p) - 1;"), long),
    (Mutation("decode_no_nan", SHARED, "!valid ? NAN :", "!valid ? 0.0f :"), outside),
    (Mutation("decode_nothing_seen", SHARED, "l == 0.0f ? 0.0f : sum / l", "sum / l"), positions),
    (Mutation("decode_row_of_32_bits", OWN, "offset(p.k_cache, first * S::kDim",
              "offset(p.k_cache, unsigned(first) * unsigned(S::kDim)"), huge),
    (Mutation("decode_key_of_32_bits", VECTORS, "offset(cache, int64_t(key) *",
              "offset(cache, unsigned(key) *"), huge),
    (Mutation("decode_unsplit_needs_a_merge", OWN, "slots_of(p) == 1) {", "slots_of(p) == 0) {"), ADDRESS),
    (Mutation("decode_prefix_one_start", PREFIX, "key >= starts[e / 2]", "key >= starts[0]"), prefixes),
    (Mutation("decode_prefix_keys_swapped", PREFIX, "low_halves(v0, v1)", "low_halves(v1, v0)"), prefixes),
    (Mutation("decode_prefix_rows_behind", PREFIX, "if (g + 8 * half < place.rows) words", "words"), ADDRESS),
    (Mutation("decode_prefix_keys_behind", PREFIX, "if (key < end) wide", "if (key < end + 8) wide"), ADDRESS),
    (Mutation("decode_prefix_no_barrier", PREFIX, BARRIER, ""), THREAD),
    (Mutation("decode_prefix_lanes", PREFIX, "    l += __shfl_xor_sync(kFullMask, l, 2);\n", ""), prefixes),
    (Mutation("decode_prefix_columns", PREFIX, "64 * S::kWide + 4 * at;", "64 * S::kWide + 8 * at % 32;"), prefixes),
    (Mutation("decode_prefix_one_slot", PREFIX, "slots.at(place.split)", "slots.at(0)"), prefixes),
    (Mutation("decode_prefix_reads_the_hidden", PREFIX, "first = max(first, place.begin);", "first = place.begin;"),
     prefixes),
    (Mutation("decode_prefix_maximum", PREFIX, "largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));", ""),
     prefixes),
    (Mutation("decode_prefix_tile_twice", PREFIX, "kWarps * S::kTile) {", "kWarps / 2 * S::kTile) {"), reads_once),
]  # fmt: skip
