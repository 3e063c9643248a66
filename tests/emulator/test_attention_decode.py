"""What of attention_decode's kernels the emulator alone can show."""

import checks_attention_decode as checks
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


@pytest.mark.parametrize("scaled", [1, 2])
def test_bytes_of_8_bits(on: Kernels, scaled: int) -> None:
    checks.check_scaled_bytes(on, scaled)


def test_prefix_is_read_once(on: Kernels) -> None:
    checks.check_prefix_reads_once(on)


def test_huge_cache(on: Kernels) -> None:
    checks.check_huge("cpu")


def test_splits(emulated: Kernels) -> None:
    """About two blocks for a multiprocessor, and no part below 64 keys."""
    splits = emulated.module.attention_decode_splits
    assert [splits(blocks, 1024) for blocks in (1, 8, 16, 64, 200, 255, 256, 2048)] == [16, 16, 16, 5, 2, 2, 1, 1]
    assert [splits(8, keys) for keys in (1, 64, 65, 128, 129, 10**6)] == [1, 1, 2, 2, 3, 33]


@pytest.mark.parametrize("dim", [16, 48, 256])
def test_sizes_that_it_does_not_take(emulated: Kernels, dim: int) -> None:
    nowhere = dict.fromkeys(("q", "k", "v"), (0, 0, 0))
    nowhere |= dict.fromkeys(("k_cache", "v_cache", "position", "place"), (0, 0))
    with pytest.raises(RuntimeError, match="attention_decode: CUDA error: invalid argument"):
        emulated.module.attention_decode_cuda(
            **nowhere,
            starts=0,
            prefix=(0, 1, 0, 0, 0, 0),
            out=0,
            partial=(0, 1, 0),
            shape=(1, 1, 5, dim),
            scale=1.0,
            dtype=1,
            dependent=0,
            ring=False,
            cluster=False,
        )
