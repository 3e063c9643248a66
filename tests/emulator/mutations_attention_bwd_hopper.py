"""Known ways to be wrong in the backward of attention for Hopper; see test_mutations.py."""

import checks_attention as attention
import torch
from checks import SCHEDULES, schedule
from checks_attention import HOPPER
from compiling import Check, Mutation
from kernels import Kernels


def under_schedules(kernels: Kernels, d: int, t_q: int, t_k: int) -> None:
    """Parity whatever the order of the threads and of the copies."""
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        attention.check(kernels, torch.bfloat16, d, t_q, t_k, "", HOPPER, b=1)
    schedule(kernels, "fifo", 0)


def narrow(kernels: Kernels) -> None:
    """Both rings are filled again; own tiles in registers."""
    under_schedules(kernels, 64, 330, 335)


def wide(kernels: Kernels) -> None:
    """Two panels, and no registers for own tiles."""
    under_schedules(kernels, 96, 330, 335)


def few(kernels: Kernels) -> None:
    """No tile is filled; the diagonal goes through every one."""
    attention.check(kernels, torch.bfloat16, 64, 97, 130, "starts", HOPPER)
    attention.check(kernels, torch.bfloat16, 64, 128, 129, "", HOPPER)


def full(kernels: Kernels) -> None:
    """Two whole panels, and no registers for own tiles, nor for dv beside dS."""
    under_schedules(kernels, 128, 330, 335)


def heads(kernels: Kernels) -> None:
    """Heads of a packed projection beside those of an upstream gradient that is not."""
    attention.check(kernels, torch.bfloat16, 64, 65, 66, "", HOPPER, h=3)


def poison(kernels: Kernels) -> None:
    attention.check_poison(kernels, HOPPER)


BWD, LAUNCHER = "cuda/attention_bwd_hopper.cuh", "cuda/attention.cu"
LEAVE = "        leave(at.empty(j % F::kStages));\n"
S_WAIT = """        ptx::wgmma_wait<1>();  // the next S is there, and all before; dP goes on
        ptx::fence_registers(flat(sums.s));
"""
END = "    ptx::fence_registers(flat(sums.dx));\n    ptx::fence_registers(flat(sums.dv));\n}\n"
BARRIER = "    ptx::named_barrier_sync(1 + group, kGroupThreads);  // the own tiles are read no more\n"
MUTATIONS: list[tuple[Mutation, Check]] = [
    (Mutation("bwd_hopper_no_wait_for_own_tiles", BWD, "if (work.tiles > 0) ptx::mbarrier_wait(at.own_full(), 0);", ""),
     narrow),
    (Mutation("bwd_hopper_writes_over_own_tiles_on_their_way", BWD, "if (work.tiles > 0) ptx::mbarrier_wait(",
              "if (begin < end) ptx::mbarrier_wait("), ("thread", "attention")),
    (Mutation("bwd_hopper_no_wait_for_the_first_tile", BWD, "    ptx::mbarrier_wait(at.full(begin), 0);\n", ""),
     narrow),
    (Mutation("bwd_hopper_no_wait_for_the_next_tile", BWD, "if (j + 1 < end) ptx::mbarrier_wait(",
              "if (j > end) ptx::mbarrier_wait("), narrow),
    (Mutation("bwd_hopper_parity_of_the_next_tile", BWD, "(j + 1) / F::kStages % 2", "0"), narrow),
    (Mutation("bwd_hopper_left_too_early", BWD, S_WAIT + LEAVE, LEAVE + S_WAIT), wide),
    (Mutation("bwd_hopper_never_left", BWD, LEAVE, ""), narrow),
    (Mutation("bwd_hopper_tiles_of_others_are_never_left", BWD,
              "for (int j = 0; j < begin; ++j) leave(at.empty(j));", ""), lambda k: under_schedules(k, 64, 330, 330)),
    (Mutation("bwd_hopper_fills_a_place_in_use", BWD, "if (j >= F::kStages) ptx::mbarrier_wait(",
              "if (j > 9 * F::kStages) ptx::mbarrier_wait("), wide),
    (Mutation("bwd_hopper_parity_of_an_empty_place", BWD, "(j / F::kStages - 1) % 2", "j / F::kStages % 2"), wide),
    (Mutation("bwd_hopper_waits_for_warpgroups_without_rows", BWD, "at.init_barriers(work.groups)",
              "at.init_barriers(F::kGroups)"), lambda k: under_schedules(k, 64, 300, 300)),
    (Mutation("bwd_hopper_announces_rows_that_it_does_not_copy", BWD, "2 * work.groups * F::kBytes",
              "2 * F::kGroups * F::kBytes"), lambda k: under_schedules(k, 64, 1, 1)),
    (Mutation("bwd_hopper_scores_read_too_early", BWD, S_WAIT, ""), narrow),
    (Mutation("bwd_hopper_dp_read_too_early", BWD, "ptx::wgmma_wait<F::kDvGoesOn>();", "ptx::wgmma_wait<2>();"),
     narrow),
    (Mutation("bwd_hopper_sums_read_too_early", BWD, "    ptx::wgmma_wait<0>();\n" + END,
              "    ptx::wgmma_wait<1>();\n" + END), narrow),
    (Mutation("bwd_hopper_is_not_seen_by_its_own_query", BWD, "column < limit :", "column <= limit :"), few),
    (Mutation("bwd_hopper_sees_the_next_key", BWD, ": column > limit)", ": column > limit + 1)"), few),
    (Mutation("bwd_hopper_masks_too_few_tiles_of_queries", BWD, "warp_row + 15 > n0", "warp_row + 14 > n0"),
     lambda k: attention.check(k, torch.bfloat16, 64, 66, 80, "", HOPPER)),
    (Mutation("bwd_hopper_masks_too_few_tiles_of_keys", BWD, "warp_row < n0 + kTile - 1", "warp_row < n0 + kTile - 2"),
     lambda k: attention.check(k, torch.bfloat16, 64, 66, 80, "", HOPPER)),
    (Mutation("bwd_hopper_terms_of_the_other_query", BWD, "(e % 2 ? two.y : two.x)", "(e % 2 ? two.x : two.y)"), few),
    (Mutation("bwd_hopper_terms_of_the_other_row", BWD, ": rows[e / 2]);", ": rows[e % 2]);"), few),
    (Mutation("bwd_hopper_lse_for_delta", BWD, "at.lse(j % F::kStages) + kTile", "at.lse(j % F::kStages)"), few),
    (Mutation("bwd_hopper_terms_of_the_next_tile", BWD, "work.first + j * kTile + i * kWarpSize + lane);",
              "work.first + (j + 1) * kTile + i * kWarpSize + lane);"), few),
    (Mutation("bwd_hopper_does_not_wait_for_terms", BWD, "ptx::mbarrier_init(full(i), F::kOfKeys ? 2 : 1);",
              "ptx::mbarrier_init(full(i), 1);"), narrow),
    (Mutation("bwd_hopper_terms_before_all_are_there", BWD,
              "            __syncwarp();\n            if (lane == 0) ptx::mbarrier_arrive",
              "            if (lane == 0) ptx::mbarrier_arrive"), ("thread", "attention")),
    (Mutation("bwd_hopper_terms_over_those_in_use", BWD, "            wait_for_place(at, j - 1);\n", ""), narrow),
    (Mutation("bwd_hopper_queries_begin_too_late", BWD, "max(0, max(start, own0) - past)", "max(start, own0)"), few),
    (Mutation("bwd_hopper_queries_that_see_no_key", BWD, "max(0, max(start, own0) - past)", "max(0, own0 - past)"),
     poison),
    (Mutation("bwd_hopper_keys_begin_at_the_first", BWD, "            first = start;\n", "            first = 0;\n"),
     poison),
    (Mutation("bwd_hopper_gradient_of_hidden_keys", BWD, "bool is_shown = row >= work.start;", "bool is_shown = true;"),
     few),
    (Mutation("bwd_hopper_gradient_of_a_query_without_keys", BWD, "is_shown = terms.x != kNoKey;", "is_shown = true;"),
     poison),
    (Mutation("bwd_hopper_skips_a_tile_of_queries", BWD, "own0 + group * kTile - past - first)",
              "own0 + group * kTile + 63 - past - first)"), lambda k: attention.check(k, torch.bfloat16, 64, 97, 130,
                                                                                   "starts", HOPPER)),
    (Mutation("bwd_hopper_skips_a_tile_of_keys", BWD, "tiles_before(own0 + (group + 1) * kTile + past)",
              "tiles_before(own0 + (group + 1) * kTile - 1 + past)"), few),
    (Mutation("bwd_hopper_never_skips_queries", BWD, "min(tiles, max(0, own0", "0 * min(tiles, max(0, own0"),
     attention.check_hopper_skipping),
    (Mutation("bwd_hopper_never_skips_keys", BWD, "min(tiles, tiles_before(own0 +", "max(tiles, tiles_before(own0 +"),
     attention.check_hopper_skipping),
    (Mutation("bwd_hopper_hidden_keys_are_multiplied", BWD, "own0 + F::kRows <= start ? 0 :",
              "own0 + F::kRows <= -1 ? 0 :"), attention.check_hopper_skipping),
    (Mutation("bwd_hopper_result_over_rows_in_use", BWD, BARRIER, ""), ("thread", "attention")),
    (Mutation("bwd_hopper_dv_is_scaled", BWD, "one[r][i] = is_shown ? 1.0f", "one[r][i] = is_shown ? shape.scale"),
     few),
    (Mutation("bwd_hopper_dp_of_full_tiles_read_too_early", BWD, "ptx::wgmma_wait<F::kDvGoesOn>();",
              "ptx::wgmma_wait<1>();"), full),
    (Mutation("bwd_hopper_dp_of_the_first_own_tile", BWD, "begin_scores<T, F>(dp, own + F::kBytes, y)",
              "begin_scores<T, F>(dp, own, y)"), full),
    (Mutation("bwd_hopper_second_own_tile_is_not_loaded", BWD, "    sums.second.load();\n", ""), narrow),
    (Mutation("bwd_hopper_stores_into_the_first_head", BWD, "head_of<T>(tensor, block.batch, block.head)",
              "head_of<T>(tensor, block.batch, 0)"), heads),
    (Mutation("bwd_hopper_heads_of_dout_as_those_of_q", BWD, "make_map(&args.dout, params.dout,",
              "make_map(&args.dout, {params.dout.data, params.dout.batch, params.q.head, params.dout.position},"),
     heads),
    (Mutation("bwd_hopper_one_group_of_pairs", BWD, "make_order(shape, tiles_of(rows, F::kRows), others * F::D * 4)",
              "make_order(shape, tiles_of(rows, F::kRows), others)"), attention.check_order_of_the_backward),
    (Mutation("bwd_hopper_takes_any_dout", LAUNCHER, "has_tensor_map(p.dout, p.shape, p.shape.t_q) &&", ""),
     attention.check_hopper_is_chosen),
    (Mutation("bwd_hopper_where_others_are_asked_for", LAUNCHER, "!p.portable &&", ""),
     attention.check_hopper_is_chosen),
]  # fmt: skip
