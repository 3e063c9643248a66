"""What of gemv's kernels the emulator alone can show."""

import checks_gemv as checks
import pytest
import torch
from kernels import Kernels

from igpt_fast import backend, ops


@pytest.fixture
def on(emulated: Kernels):
    """The emulated kernels serve the op, on a device with clusters."""
    checks.schedule(emulated, "fifo", 0)
    emulated.module.set_capability(90)
    with backend.use_backend("auto"), backend.emulate(emulated.module):
        yield emulated
    emulated.module.set_capability()


def test_determinism(on: Kernels) -> None:
    checks.check_determinism(on)


def test_coalescing(on: Kernels) -> None:
    checks.check_coalescing(on)


def test_coalescing_of_many_rows(on: Kernels) -> None:
    checks.check_coalescing_of_many_rows(on)


@pytest.mark.parametrize(
    ("n_in", "n_out", "transposed", "blocks"),
    [
        (1024, 4096, False, 2 * 64),  # four would be more than run at once
        (1536, 4608, False, 2 * 72),
        (1536, 6144, False, 2 * 96),
        (2048, 512, False, 8 * 8),
        (512, 2048, False, 2 * 32),  # a warp has one chunk
        (8, 64, False, 1),
        (1024, 4096, True, 64),
        (4096, 512, True, 8 * 8),
        (4096, 64 * 225, False, 225),
    ],
)
def test_blocks_that_share_n_in(on: Kernels, n_in: int, n_out: int, transposed: bool, blocks: int) -> None:
    x, weight = torch.empty(1, n_in).bfloat16(), torch.empty(n_in, n_out).bfloat16()
    on.module.start_recording()
    ops.gemv(x, torch.empty(n_out, n_in).bfloat16().T if transposed else weight)
    ((_, launched, *_),) = on.module.stop_recording()
    assert launched == blocks


@pytest.mark.parametrize(
    ("n_in", "n_out", "blocks"), [(512, 2048, 4 * 32), (2048, 512, 8 * 8), (1536, 4608, 2 * 72), (1536, 6144, 2 * 96)]
)
def test_blocks_of_many_rows(on: Kernels, n_in: int, n_out: int, blocks: int) -> None:
    for rows in (9, 64):
        on.module.start_recording()
        ops.gemv(torch.empty(rows, n_in).bfloat16(), torch.empty(n_in, n_out).bfloat16())
        ((_, launched, *_),) = on.module.stop_recording()
        assert launched == blocks


def test_no_clusters_below_sm_90(on: Kernels) -> None:
    on.module.set_capability(80)
    for rows in (1, 9):
        on.module.start_recording()
        ops.gemv(torch.empty(rows, 2048).bfloat16(), torch.empty(2048, 512).bfloat16())
        ((_, launched, *_),) = on.module.stop_recording()
        assert launched == 8


def test_huge_weight(on: Kernels) -> None:
    checks.check_huge("cpu")


@pytest.mark.parametrize(("rows", "n_in", "n_out", "dtype"), [(65, 8, 8, 1), (1, 12, 8, 1), (1, 8, 4, 1), (1, 8, 8, 0)])
def test_sizes_that_it_does_not_take(emulated: Kernels, rows: int, n_in: int, n_out: int, dtype: int) -> None:
    with pytest.raises(RuntimeError, match="gemv: CUDA error: invalid argument"):
        emulated.module.gemv_cuda(
            **dict.fromkeys(("x", "bias", "norm_weight", "residual", "out"), 0),
            weight=(0, n_out),
            rows=rows,
            n_in=n_in,
            n_out=n_out,
            transposed=False,
            eps=1e-5,
            activation=-1,
            dtype=dtype,
            dependent=0,
            place=(0, 0),
        )
