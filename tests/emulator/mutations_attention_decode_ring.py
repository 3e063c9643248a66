"""Known ways to be wrong in attention_decode's ring; see test_mutations.py."""

from collections.abc import Callable

import checks_attention_decode as checks
import torch
from compiling import Check, Mutation
from kernels import Kernels

from igpt_fast import backend


def by_rings(kernels: Kernels) -> None:
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        for ring in checks.RINGS:
            with checks.by_ring(kernels.module, *ring):
                for scaled in (0, 2):
                    checks.check_positions("cpu", torch.bfloat16, 64, starts=True, scaled=scaled)
                    checks.check_long("cpu", scaled=scaled)


def prefixes(kernels: Kernels) -> None:
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        for multiprocessors in (2, 132):  # few blocks, and clusters
            with checks.by_ring(kernels.module, multiprocessors, True):
                checks.check_prefix("cpu", torch.bfloat16, 64, 2, 10, 65)


def huge(kernels: Kernels) -> None:
    with backend.use_backend("auto"), backend.emulate(kernels.module), checks.by_ring(kernels.module, 132, False):
        checks.check_huge("cpu")


def served(check: Callable[[Kernels], None]) -> Check:
    def on(kernels: Kernels) -> None:
        with backend.use_backend("auto"), backend.emulate(kernels.module):
            check(kernels)

    return on


def dependent(kernels: Kernels) -> None:
    with checks.by_ring(kernels.module, 132, False):
        checks.check_dependent("cpu")


THREAD, ADDRESS = ("thread", "attention_decode_ring"), ("address", "attention_decode_ring")
RING, LANES = "cuda/attention_decode_ring.cuh", "cuda/attention_decode_lanes.cuh"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("ring_stage_filled_while_it_is_read", RING, "__syncwarp();  // the stage has been read", ""), THREAD),
    (Mutation("ring_parity_stays", RING, "parity ^= 1;", ""), by_rings),
    (Mutation("ring_announces_whole_tiles", RING, "barrier, count * (S::K", "barrier, S::kTile * (S::K"), by_rings),
    (Mutation("ring_announces_keys_alone", RING, "count * (S::K::kBytes + S::V::kBytes)", "count * S::K::kBytes"),
     by_rings),
    (Mutation("ring_scale_of_another", RING, "p.v_scale + first + lane", "p.v_scale + first + lane / 2"), by_rings),
    (Mutation("ring_key_scale_of_the_value", RING, "p.k_scale + first + lane", "p.v_scale + first + lane"), by_rings),
    (Mutation("ring_scales_of_whole_tiles", RING, "scales && lane < count", "scales && lane < S::kTile"), ADDRESS),
    (Mutation("ring_keys_of_another_head", RING, "int64_t(ahead.row_head) * p.positions",
              "int64_t(ahead.row_head / 2 * 2) * p.positions"), by_rings),
    (Mutation("ring_keys_of_32_bits", RING, "+ first * S::K::kBytes;", "+ unsigned(first) * unsigned(S::K::kBytes);"),
     huge),
    (Mutation("ring_waits_for_a_group_less", RING, "<S::kStages - 1>", "<S::kStages>"), by_rings),
    (Mutation("ring_does_not_wait", RING, "    ptx::grid_dependency_wait();\n", ""), served(dependent)),
    (Mutation("ring_scales_before_the_wait", RING, "fill(p, tile, !tile)", "fill(p, tile, tile)"),
     served(checks.check_scales_in_time)),
    (Mutation("ring_below_sm_90", "cuda/attention_decode.cu", "p.ring && has_ring()", "p.ring"),
     served(checks.check_without_ring)),
    (Mutation("ring_cluster_without_room", RING, "unsigned(p.splits)) >= p.splits", "unsigned(p.splits)) >= 0"),
     served(checks.check_cluster_without_room)),
    (Mutation("ring_lanes_do_not_meet", RING, "<S::kStages - 1>();\n        __syncwarp();", "<S::kStages - 1>();"),
     THREAD),
    (Mutation("ring_position_of_the_first_row", RING, "if (p.position_step || p.starts) own", "if (p.starts) own"),
     prefixes),
    (Mutation("ring_reads_what_it_writes", RING, "has_new() ? own.position :", "has_new() ? own.position + 1 :"),
     by_rings),
    (Mutation("ring_sums_over_sums_in_use", RING, "__syncthreads();  // those of the item before have been read", ""),
     THREAD),
    (Mutation("ring_inbox_without_the_prefix", RING, "own.valid ? p.prefix_splits + own.parts : 0", "own.parts"),
     prefixes),
    (Mutation("ring_reads_behind_a_tile", LANES, "V::kBytes, key < count)",
              "V::kBytes, key <= count)"), by_rings),
    (Mutation("ring_new_key_by_every_group", RING, "if (threadIdx.x >= S::kLanes) return;",
              "if (threadIdx.x >= 2 * S::kLanes) return;"), by_rings),
    (Mutation("ring_does_not_see_itself", RING, "if (!own.sees_it) return;", ""), by_rings),
]  # fmt: skip
