"""What of gemv's kernels the emulator alone can show."""

import checks_gemv as checks
import pytest
from kernels import Kernels

from igpt_fast import backend


@pytest.fixture
def on(emulated: Kernels):
    """The emulated kernels serve the op."""
    checks.schedule(emulated, "fifo", 0)
    with backend.use_backend("auto"), backend.emulate(emulated.module):
        yield emulated


def test_determinism(on: Kernels) -> None:
    checks.check_determinism(on)


def test_coalescing(on: Kernels) -> None:
    checks.check_coalescing(on)


def test_huge_weight(on: Kernels) -> None:
    checks.check_huge("cpu")


@pytest.mark.parametrize(("rows", "n_in", "n_out", "dtype"), [(9, 8, 8, 1), (1, 12, 8, 1), (1, 8, 4, 1), (1, 8, 8, 0)])
def test_sizes_that_it_does_not_take(emulated: Kernels, rows: int, n_in: int, n_out: int, dtype: int) -> None:
    with pytest.raises(RuntimeError, match="gemv: CUDA error: invalid argument"):
        emulated.module.gemv_cuda(*[0] * 6, n_out, rows, n_in, n_out, False, 1e-5, -1, dtype, 0, 0)
