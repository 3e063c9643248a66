"""The kernels of rms_norm and layer_norm against the definition."""

import checks
import pytest
import torch
from kernels import Kernels

NORMS = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])


@NORMS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rows", "n", "parts"), checks.NORM_SHAPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_parity(
    kernels: Kernels, dtype: torch.dtype, rows: int, n: int, parts: int, fused: bool, centred: bool
) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks.check_norm(kernels, dtype, rows, n, parts, fused, centred)


@NORMS
@pytest.mark.parametrize(("order", "seed"), checks.SCHEDULES)
@pytest.mark.parametrize("n", [72, 1032, 2048])
def test_schedules(emulated: Kernels, n: int, order: str, seed: int, centred: bool) -> None:
    checks.schedule(emulated, order, seed)
    torch.manual_seed(seed)
    checks.check_norm(emulated, torch.bfloat16, 7, n, 2, True, centred)


@pytest.mark.parametrize(("rows", "n", "parts"), checks.NORM_SHAPES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_dtypes_of_their_own(kernels: Kernels, narrow: torch.dtype, rows: int, n: int, parts: int) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks.check_norm_mixed(kernels, narrow, rows, n, parts)
    checks.check_norm_of_a_wide_weight(kernels, narrow, rows, n, parts)


@pytest.mark.parametrize(("order", "seed"), checks.SCHEDULES)
def test_schedules_of_dtypes_of_their_own(emulated: Kernels, order: str, seed: int) -> None:
    checks.schedule(emulated, order, seed)
    checks.check_norm_mixed(emulated, torch.bfloat16, 7, 1032, 2)


def test_layer_norm_has_one_dtype(kernels: Kernels) -> None:
    x, weight = torch.zeros(1, 64, device=kernels.device), torch.ones(64, device=kernels.device)
    with pytest.raises(RuntimeError, match="norm_fwd: CUDA error: invalid argument"):
        kernels.norm_fwd(x, weight, 1e-5, None, weight, dtype=torch.bfloat16)


@NORMS
@pytest.mark.parametrize("rows", [63, 65, 1023])
def test_many_rows(kernels: Kernels, rows: int, centred: bool) -> None:
    checks.check_norm(kernels, torch.bfloat16, rows, 64, 65, False, centred)


def test_range_of_float16(kernels: Kernels) -> None:
    checks.check_norm_range(kernels)


def test_layer_norm_far_from_zero(kernels: Kernels) -> None:
    checks.check_layer_norm_offset(kernels)


@NORMS
def test_determinism(kernels: Kernels, centred: bool) -> None:
    checks.check_norm_determinism(kernels, centred)


@NORMS
def test_coalescing(emulated: Kernels, centred: bool) -> None:
    checks.check_norm_coalescing(emulated, centred)
    checks.check_norm_mixed_coalescing(emulated)


@NORMS
def test_empty(kernels: Kernels, centred: bool) -> None:
    x, weight = torch.zeros(0, 64, device=kernels.device), torch.ones(64, device=kernels.device)
    assert kernels.norm_fwd(x, weight, 1e-5, None, weight if centred else None)[0].shape == (0, 64)
    assert not any(gradient.any() for gradient in kernels.norm_bwd(x, None, x, weight, 1e-5, centred=centred))


@pytest.mark.parametrize("n", [4, 12, 8200])
def test_sizes_that_it_does_not_take(kernels: Kernels, n: int) -> None:
    x, weight = torch.zeros(1, n, device=kernels.device), torch.ones(n, device=kernels.device)
    with pytest.raises(RuntimeError, match="norm_fwd: CUDA error: invalid argument"):
        kernels.norm_fwd(x, weight, 1e-5, None)
    with pytest.raises(RuntimeError, match="norm_bwd: CUDA error: invalid argument"):
        kernels.norm_bwd(x, None, x, weight, 1e-5, centred=True)
