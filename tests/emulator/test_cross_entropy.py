"""The kernels of cross_entropy against the definition."""

import checks
import checks_cross_entropy
import pytest
import torch
from kernels import Kernels


@pytest.mark.parametrize(("rows", "k"), checks_cross_entropy.SHAPES)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_parity(kernels: Kernels, dtype: torch.dtype, rows: int, k: int) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks_cross_entropy.check_cross_entropy(kernels, dtype, rows, k)


@pytest.mark.parametrize("k", [512, 1032, 13])
def test_in_place(kernels: Kernels, k: int) -> None:
    """dlogits are logits."""
    checks_cross_entropy.check_cross_entropy(kernels, torch.bfloat16, 7, k, in_place=True)


def test_largest_k(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy(kernels, torch.bfloat16, 3, 65536, reductions=("mean",))
    checks_cross_entropy.check_cross_entropy(kernels, torch.float32, 2, 65535, reductions=("mean",))


def test_many_parts(kernels: Kernels) -> None:
    """More partial sums than the second kernel has threads, and blocks that have no row."""
    checks_cross_entropy.check_cross_entropy(kernels, torch.float32, 1025, 8, parts=300, reductions=("mean",))


def test_schedules(emulated: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_schedules(emulated)


def test_determinism(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_determinism(kernels)


def test_far_from_zero(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_far_from_zero(kernels)


def test_infinite_logits(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_infinite(kernels)


def test_bad_labels(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_bad_labels(kernels)


def test_nothing_counts(kernels: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_nothing_counts(kernels)


def test_coalescing(emulated: Kernels) -> None:
    checks_cross_entropy.check_cross_entropy_coalescing(emulated)


def test_parts(emulated: Kernels) -> None:
    parts = emulated.module.cross_entropy_parts
    assert [parts(rows) for rows in (0, 1, 4, 5, 4223, 4224, 2**31)] == [0, 1, 1, 2, 1056, 1056, 1056]


@pytest.mark.parametrize("k", [0, 65537])
def test_sizes_that_it_does_not_take(kernels: Kernels, k: int) -> None:
    logits, labels = torch.zeros(1, k, device=kernels.device), torch.zeros(1, dtype=torch.int64, device=kernels.device)
    with pytest.raises(RuntimeError, match="cross_entropy_fwd: CUDA error: invalid argument"):
        checks_cross_entropy.run(kernels, logits, labels, "mean", torch.ones((), device=kernels.device), 1)
