"""Index arithmetic beyond 2^31 elements: memory that nobody touches costs nothing, and only the last blocks run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernels import Kernels
from torch import Tensor

from igpt_fast import reference

BEYOND = 2**31 + 2**12


@contextmanager
def last_blocks(kernels: Kernels, total: int, count: int = 1) -> Iterator[None]:
    """Of the ``total`` blocks of a launch only the last ``count`` run."""
    kernels.module.set_blocks(total - count, count)
    try:
        yield
    finally:
        kernels.module.set_blocks()


def lazily(*shape: int, dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # the system promises no more memory than it has
        pytest.skip(str(error))


def test_rms_norm(emulated: Kernels) -> None:
    n = 1024
    rows = BEYOND // n
    x, out, weight = (lazily(*shape, dtype=torch.bfloat16) for shape in ((rows, n), (rows, n), (n,)))
    x[-4:] = torch.randn(4, n)
    weight.normal_()
    with last_blocks(emulated, rows // 4):
        emulated.module.rms_norm_fwd_cuda(x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr(), rows, n, 1e-5, 1, 0, 0)
    exact = reference.rms_norm(x[-4:].double(), weight.double(), 1e-5)
    assert torch.allclose(out[-4:].double(), exact, rtol=1e-2, atol=1e-6)
