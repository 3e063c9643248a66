"""quantize's kernel against the definition, bit for bit."""

import checks
import pytest
import torch
from kernels import Kernels


@pytest.mark.parametrize("k", [1, 2, 255, 256, 257, 512, 600])
@pytest.mark.parametrize("n", [0, 1, 63, 97, 256, 257, 1023])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_parity(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks.check_quantize(kernels, dtype, n, k)


@pytest.mark.parametrize(("order", "seed"), checks.SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_schedules(emulated: Kernels, dtype: torch.dtype, order: str, seed: int) -> None:
    checks.schedule(emulated, order, seed)
    torch.manual_seed(seed)
    checks.check_quantize(emulated, dtype, 700, 600)


def test_near_ties(kernels: Kernels) -> None:
    checks.check_quantize_near_ties(kernels)


def test_coalescing(emulated: Kernels) -> None:
    checks.check_quantize_coalescing(emulated)
