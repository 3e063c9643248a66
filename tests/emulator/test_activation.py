"""The kernels of the activations against the definition."""

import checks
import checks_activation
import pytest
import torch
from kernels import Kernels


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "n", "parts"), checks_activation.SHAPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_parity(kernels: Kernels, dtype: torch.dtype, rows: int, n: int, parts: int, with_bias: bool) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks_activation.check_activation(kernels, dtype, rows, n, parts, with_bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_in_place(kernels: Kernels, dtype: torch.dtype, with_bias: bool) -> None:
    """out is x and dx is dout."""
    checks_activation.check_activation(kernels, dtype, 35, 264, 3, with_bias, in_place=True)


def test_many_rows(kernels: Kernels) -> None:
    """Each thread has several turns down its columns. Without bias: test_huge.py."""
    checks_activation.check_activation(kernels, torch.bfloat16, 1025, 48, 2, with_bias=True)


def test_rounds_once(kernels: Kernels) -> None:
    checks_activation.check_activation_rounds_once(kernels)


def test_schedules(emulated: Kernels) -> None:
    checks_activation.check_activation_schedules(emulated)


def test_determinism(kernels: Kernels) -> None:
    checks_activation.check_activation_determinism(kernels)


def test_far_out(kernels: Kernels) -> None:
    checks_activation.check_activation_far_out(kernels)


def test_coalescing(emulated: Kernels) -> None:
    checks_activation.check_activation_coalescing(emulated)


def test_empty(kernels: Kernels) -> None:
    x, bias = torch.zeros(0, 64, device=kernels.device), torch.ones(64, device=kernels.device)
    _, _, dbias = checks_activation.run(kernels, 0, x, bias, x, parts=0)
    assert torch.equal(dbias, torch.zeros_like(bias))


def test_parts(emulated: Kernels) -> None:
    """As many as fill a GPU together with the columns, and few enough that their sums do not count."""
    parts = emulated.module.activation_bwd_parts
    assert parts(0, 64) == 0
    assert parts(1, 64) == parts(64, 8192) == 1
    assert parts(16384, 2048) == 66
    assert parts(2**31, 8) <= 65535


@pytest.mark.parametrize("n", [4, 12])
def test_sizes_that_it_does_not_take(kernels: Kernels, n: int) -> None:
    x = torch.zeros(1, n, device=kernels.device)
    with pytest.raises(RuntimeError, match="activation_fwd: CUDA error: invalid argument"):
        checks_activation.run(kernels, 0, x, None, x)
