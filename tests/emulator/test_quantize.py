"""quantize's and dequantize's kernels against the definition, bit for bit."""

import checks
import checks_quantize
import pytest
import torch
from kernels import Kernels

from igpt_fast import backend, ops

CHECKS = [
    checks_quantize.check_many_pixels,
    checks_quantize.check_not_numbers,
    checks_quantize.check_table_palettes,
    checks_quantize.check_table_full_lists,
    checks_quantize.check_table_last_index,
    checks_quantize.check_lookup,
    checks_quantize.check_dequantize,
    checks_quantize.check_dequantize_turns,
]
EMULATED_CHECKS = [
    checks.check_quantize_coalescing,
    checks_quantize.check_table_schedules,
    checks_quantize.check_table_stores,
    checks_quantize.check_lookup_schedules,
    checks_quantize.check_lookup_coalescing,
    checks_quantize.check_far_pixels,
    checks_quantize.check_dequantize_coalescing,
    checks_quantize.check_far_tokens,
]


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 255, 256, 257, 512, 600])
@pytest.mark.parametrize("n", [0, 1, 63, 97, 256, 257])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_parity(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks.check_quantize(kernels, dtype, n, k)


@pytest.mark.parametrize(("order", "seed"), checks.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_schedules(emulated: Kernels, dtype: torch.dtype, order: str, seed: int) -> None:
    checks.schedule(emulated, order, seed)
    torch.manual_seed(seed)
    checks.check_quantize(emulated, dtype, 300, 1100)


def test_near_ties(kernels: Kernels) -> None:
    checks.check_quantize_near_ties(kernels)


@pytest.mark.parametrize("check", CHECKS)
def test_check(kernels: Kernels, check) -> None:
    checks.schedule(kernels, "fifo", 0)
    check(kernels)


@pytest.mark.parametrize("check", EMULATED_CHECKS)
def test_emulated_check(emulated: Kernels, check) -> None:
    checks.schedule(emulated, "fifo", 0)
    check(emulated)


@pytest.mark.skipif(bool(backend.unavailable("cpu")), reason="no native CPU")
@pytest.mark.parametrize("kind", ["random", pytest.param("ties", marks=pytest.mark.gpu)])
def test_all_colours_as_the_cpu_has_them(kernels: Kernels, kind: str) -> None:
    """The same bits as the CPU twin for all of the 16.7 M colours."""
    clusters = checks_quantize.random_palette(512) if kind == "random" else checks_quantize.on_the_grid(512)
    checks.schedule(kernels, "fifo", 0)
    table = checks_quantize.build(kernels, clusters)
    code = torch.arange(1 << 24)
    x = torch.stack([code >> 16, code >> 8 & 255, code & 255], dim=1).to(torch.uint8)
    with backend.use_backend("cpu"):
        expected = ops.quantize(x, clusters)
    assert torch.equal(table[checks_quantize.entry(x)].long(), expected)


@pytest.mark.parametrize("token", [5, -6, 1 << 32])
def test_a_token_out_of_range_ends_the_launch(emulated: Kernels, token: int) -> None:
    """On a GPU it would end the context, as torch's indexing does, so only here."""
    for n in (3, 600):
        tokens = torch.zeros(n, dtype=torch.int64)
        tokens[2] = token
        with pytest.raises(RuntimeError, match="trap"):
            checks_quantize.dequantize(emulated, tokens, torch.zeros(5, 3))
