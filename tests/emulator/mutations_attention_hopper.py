"""Known ways to be wrong in the forward of attention for Hopper; see test_mutations.py."""

import checks_attention as attention
import torch
from checks import SCHEDULES, schedule
from checks_attention import HOPPER
from compiling import Check, Mutation
from kernels import Kernels


def under_schedules(kernels: Kernels, d: int, t_q: int, t_k: int, mask: str) -> None:
    """Parity whatever the order of the threads and of the copies."""
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        attention.check(kernels, torch.bfloat16, d, t_q, t_k, mask, HOPPER, b=1)
    schedule(kernels, "fifo", 0)


def narrow(kernels: Kernels) -> None:
    """A ring that is filled again, without a warpgroup that loads."""
    under_schedules(kernels, 64, 130, 460, "")


def wide(kernels: Kernels) -> None:
    """Two panels, three warpgroups and one that loads, more than one turn of the ring."""
    under_schedules(kernels, 96, 130, 460, "")


def padded(kernels: Kernels) -> None:
    attention.check(kernels, torch.bfloat16, 64, 130, 460, "starts", HOPPER)


def poison(kernels: Kernels) -> None:
    attention.check_poison(kernels, HOPPER)


def huge(kernels: Kernels) -> None:
    attention.check_huge(kernels, HOPPER)


HOPPER_FWD, SHARED, LAUNCHER = "cuda/attention_fwd_hopper.cuh", "cuda/attention_hopper.cuh", "cuda/attention.cu"
K_DONE = "        leave(at.k_empty(k_stage));\n"
V_DONE = "        leave(at.v_empty(v_stage));\n"
S_WAIT = "        ptx::wgmma_wait<1>();  // S is there, out goes on\n        ptx::fence_registers(flat(rows.s));\n"
O_WAIT = "        ptx::wgmma_wait<0>();\n        ptx::fence_registers(flat(rows.out));\n"
BARRIER = "    ptx::named_barrier_sync(1 + group, kGroupThreads);  // the queries are read no more\n"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("hopper_no_wait_for_queries", HOPPER_FWD, "if (work.tiles > 0) ptx::mbarrier_wait(at.q_full(), 0);", ""),
     narrow),
    (Mutation("hopper_no_wait_for_keys", HOPPER_FWD, "if (j + 1 < tiles) ptx::mbarrier_wait(",
              "if (false) ptx::mbarrier_wait("), narrow),
    (Mutation("hopper_no_wait_for_the_second_keys", HOPPER_FWD, "if (tiles > 1) ptx::mbarrier_wait(",
              "if (false) ptx::mbarrier_wait("), narrow),
    (Mutation("hopper_no_wait_for_values", HOPPER_FWD,
              "        ptx::mbarrier_wait(at.v_full(v_stage), v_parity);\n", ""), narrow),
    (Mutation("hopper_parity_of_the_values", HOPPER_FWD, "v_parity = j / F::kStages % 2;", "v_parity = 0;"), narrow),
    (Mutation("hopper_keys_left_too_early", HOPPER_FWD, S_WAIT + K_DONE, K_DONE + S_WAIT), wide),
    (Mutation("hopper_values_left_too_early", HOPPER_FWD, O_WAIT + V_DONE, V_DONE + O_WAIT), wide),
    (Mutation("hopper_keys_never_left", HOPPER_FWD, K_DONE, ""), narrow),
    (Mutation("hopper_fills_a_place_in_use", HOPPER_FWD, "if (j >= F::kStages) ptx::mbarrier_wait(empty,",
              "if (j > 9 * F::kStages) ptx::mbarrier_wait(empty,"), wide),
    (Mutation("hopper_parity_of_an_empty_place", HOPPER_FWD, "(j / F::kStages - 1) % 2", "j / F::kStages % 2"), wide),
    (Mutation("hopper_waits_for_warpgroups_without_queries", HOPPER_FWD, "at.init_barriers(work.groups)",
              "at.init_barriers(F::kGroups)"), lambda k: under_schedules(k, 64, 1, 460, "")),
    (Mutation("hopper_announces_queries_that_it_does_not_copy", HOPPER_FWD, "work.groups * F::kQBytes",
              "F::kGroups * F::kQBytes"), lambda k: under_schedules(k, 64, 1, 64, "")),
    (Mutation("hopper_scores_read_too_early", HOPPER_FWD, S_WAIT, ""), narrow),
    (Mutation("hopper_weights_rounded_too_early", HOPPER_FWD, O_WAIT, "        rows.round();\n" + O_WAIT), narrow),
    (Mutation("hopper_out_scaled_too_early", HOPPER_FWD, O_WAIT + V_DONE + "        rows.rescale();\n",
              "        rows.rescale();\n" + O_WAIT + V_DONE), narrow),
    (Mutation("hopper_out_is_not_rescaled", HOPPER_FWD, "out[0][d][e] *= before[e / 2];",
              "out[0][d][e] *= 1.0f;"), narrow),
    (Mutation("hopper_out_is_rescaled_by_the_other_row", HOPPER_FWD, "before[e / 2];", "before[e % 2];"), narrow),
    (Mutation("hopper_sees_the_next_key", HOPPER_FWD, "8 * n + e % 2 > own", "8 * n + e % 2 > 1 + own"), narrow),
    (Mutation("hopper_masks_too_few_tiles", HOPPER_FWD, "- n0 < F::kKeys - 1)", "- n0 < F::kKeys - 2)"),
     lambda k: under_schedules(k, 64, 129, 191, "")),
    (Mutation("hopper_skips_a_tile", HOPPER_FWD, "work.tiles_before(q0 + kTile + work.past)",
              "work.tiles_before(q0 + kTile - 1 + work.past)"), lambda k: under_schedules(k, 64, 64, 129, "")),
    (Mutation("hopper_never_skips", HOPPER_FWD, "work.tiles_before(q0 + kTile + work.past)", "work.tiles"),
     attention.check_hopper_skipping),
    (Mutation("hopper_skips_no_padding", HOPPER_FWD, "first = Keys(shape, block.batch).start;", "first = 0;"), poison),
    (Mutation("hopper_copies_hidden_keys", HOPPER_FWD, "first = Keys(shape, block.batch).start;",
              "first = Keys(shape, block.batch).start / kTile * kTile;"), poison),
    (Mutation("hopper_tiles_begin_at_the_first_key", HOPPER_FWD, "work.first + j * F::kKeys, work.block",
              "j * F::kKeys, work.block"), padded),
    (Mutation("hopper_second_panel_of_the_values", SHARED, "ptx::swizzled_operand(v, F::kKeyPanel, 8",
              "ptx::swizzled_operand(v, F::kKeyPanel * F::kPanels, 8"), wide),
    (Mutation("hopper_second_panel_of_the_keys", SHARED, "i / 4 * F::kKeyPanel + i",
              "i / 4 * F::kPanels * F::kKeyPanel + i"), wide),
    (Mutation("hopper_weights_are_not_fenced", SHARED, "ptx::fence_registers(p[i]);\n    ptx::wgmma_fence();\n",
              "ptx::fence_registers(p[i]);\n"), narrow),
    (Mutation("hopper_result_over_queries_in_use", HOPPER_FWD, BARRIER, ""), ("thread", "attention")),
    (Mutation("hopper_stride_of_31_bits", SHARED, "size == 1 ? 16 : 2 * stride",
              "size == 1 ? 16 : 2 * (stride & 0x7fffffff)"), huge),
    (Mutation("hopper_stride_of_a_single_element", SHARED, "size == 1 ? 16 : 2 * stride",
              "size == 0 ? 16 : 2 * stride"),
     attention.check_hopper_is_chosen),
    (Mutation("hopper_takes_a_stride_of_0", LAUNCHER, "stride > 0 &&", "stride >= 0 &&"),
     attention.check_hopper_is_chosen),
    (Mutation("hopper_takes_a_key_mask", LAUNCHER, "shape.key_mask == nullptr &&", ""),
     lambda k: attention.check(k, torch.bfloat16, 64, 65, 130, "keys", HOPPER)),
    (Mutation("hopper_on_another_gpu", LAUNCHER, "major == 9 &&", "major >= 8 &&"), attention.check_hopper_is_chosen),
]  # fmt: skip
