"""rms_norm's kernels against the definition."""

import checks
import pytest
import torch
from kernels import Kernels


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rows", "n", "parts"), checks.NORM_SHAPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_parity(kernels: Kernels, dtype: torch.dtype, rows: int, n: int, parts: int, fused: bool) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks.check_norm(kernels, dtype, rows, n, parts, fused)


@pytest.mark.parametrize(("order", "seed"), checks.SCHEDULES)
@pytest.mark.parametrize("n", [72, 1032, 2048])
def test_schedules(emulated: Kernels, n: int, order: str, seed: int) -> None:
    checks.schedule(emulated, order, seed)
    torch.manual_seed(seed)
    checks.check_norm(emulated, torch.bfloat16, 7, n, 2, fused=True)


@pytest.mark.parametrize("rows", [63, 65, 1023])
def test_many_rows(kernels: Kernels, rows: int) -> None:
    checks.check_norm(kernels, torch.bfloat16, rows, 64, 65, fused=False)


def test_range_of_float16(kernels: Kernels) -> None:
    checks.check_norm_range(kernels)


def test_determinism(kernels: Kernels) -> None:
    checks.check_norm_determinism(kernels)


def test_coalescing(emulated: Kernels) -> None:
    checks.check_norm_coalescing(emulated)


def test_empty(kernels: Kernels) -> None:
    x, weight = torch.zeros(0, 64, device=kernels.device), torch.ones(64, device=kernels.device)
    assert kernels.rms_norm_fwd(x, weight, 1e-5, None)[0].shape == (0, 64)
    assert not kernels.rms_norm_bwd(x, None, x, weight, 1e-5)[1].any()


@pytest.mark.parametrize("n", [4, 12, 8200])
def test_sizes_that_it_does_not_take(kernels: Kernels, n: int) -> None:
    x, weight = torch.zeros(1, n, device=kernels.device), torch.ones(n, device=kernels.device)
    with pytest.raises(RuntimeError, match="rms_norm: CUDA error: invalid argument"):
        kernels.rms_norm_fwd(x, weight, 1e-5, None)
