"""sample's kernel: its draws against the definition, its numbers bit for bit."""

import sysconfig

import checks
import checks_sample
import compiling
import pytest
import torch
from kernels import Kernels

from igpt_fast import reference


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 1), (3, 2), (5, 63), (20, 512), (4, 513), (4, 1024)])
def test_draws(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks_sample.check_draws(kernels, dtype, n, k)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("n_embd", [5, 64, 1032])
@pytest.mark.parametrize("shared_position", [True, False])
def test_next(kernels: Kernels, dtype: torch.dtype, n_embd: int, shared_position: bool) -> None:
    checks.schedule(kernels, "fifo", 0)
    checks_sample.check_next(kernels, dtype, n_embd, shared_position)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_step(kernels: Kernels, dtype: torch.dtype) -> None:
    for order, seed in checks.SCHEDULES if kernels.device == "cpu" else [("fifo", 0)]:
        checks.schedule(kernels, order, seed)
        checks_sample.check_step(kernels, dtype)


@pytest.mark.parametrize(
    "check",
    [
        checks_sample.check_step_edges,
        checks_sample.check_ties,
        checks_sample.check_edges,
        checks_sample.check_boundaries,
        checks_sample.check_min_p,
        checks_sample.check_numbers,
        checks_sample.check_batches,
    ],
)
def test_check(kernels: Kernels, check) -> None:
    checks.schedule(kernels, "fifo", 0)
    check(kernels)


@pytest.mark.parametrize(
    "check",
    [
        checks_sample.check_schedules,
        checks_sample.check_accesses,
        checks_sample.check_far_rows,
        checks_sample.check_dependent,
    ],
)
def test_emulated_check(emulated: Kernels, check) -> None:
    checks.schedule(emulated, "fifo", 0)
    check(emulated)


def test_philox_bit_for_bit() -> None:
    """The kernel's generator: the published vectors, and the definition at random keys and counters."""
    if (reason := compiling.unavailable()) is not None:
        pytest.skip(reason)
    tree = compiling.Tree()
    sources = [item for item in tree.sources() if item[0].suffix == ".cpp"]
    sources.append((compiling.HERE / "philox_probe.cpp", ("-Wno-unknown-pragmas", *compiling.python_flags())))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    probe = compiling.load(compiling.link(tree.objects(sources), f"_philox{suffix}", "-shared"), "_philox")
    assert probe.word(0, 0, 0, 0, 0) == 0x6627E8D5
    assert probe.word(*[0xFFFFFFFF] * 4, (1 << 64) - 1) == 0x408F276D
    assert probe.word(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0x299F31D0_A4093822) == 0xD16CFE09
    counters = torch.randint(0, 1 << 32, (500, 4))
    for i, key in enumerate((0, 1, 1 << 32, 0xFEDCBA9876543210, (1 << 64) - 1)):
        part = counters[100 * i : 100 * i + 100]
        words = [probe.word(*counter, key) for counter in part.tolist()]
        assert words == reference.philox(part, key)[:, 0].tolist()
        streams, position = part[:, 0] << 20, part[:, 1] >> 4
        numbers = [probe.uniform(key, *pair) for pair in zip(streams.tolist(), position.tolist(), strict=True)]
        assert numbers == reference.uniform_at(key, streams, position).tolist()
