"""The emulator's record of launches, and by it: which kernels the cases of the GPU checks reach."""

import itertools
import shutil
from types import ModuleType

import nvcc
import pytest
import resources
import torch
from cases import CASES
from implementations import Implementation
from run_cases import MORE

from igpt_fast import ops

pytestmark = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("c++filt") is None, reason="binutils are not installed"
)


def test_launches_are_written_down_and_do_not_run(emulation: Implementation) -> None:
    module = emulation.module
    assert module is not None
    x, weight = torch.ones(6, 64), torch.ones(64)
    module.reset_counters()
    module.start_recording()
    ops.rms_norm(x, weight)
    ((kernel, blocks, threads, shared),) = module.stop_recording()
    assert module.counters()["launches"] == 0
    assert resources.symbols(module)[kernel].startswith("norm_fwd_kernel<")
    assert (blocks, threads, shared) == (2, 128, 0)  # four one-warp teams
    assert torch.allclose(ops.rms_norm(x, weight), torch.ones(6, 64))
    assert module.counters()["launches"] == 1
    assert module.stop_recording() == []


def families(module: ModuleType) -> set[str]:
    """The templates of all kernels."""
    return {nvcc.family(name) for name in resources.symbols(module).values() if nvcc.family(name).endswith("_kernel")}


def test_the_cases_reach_every_kernel(emulation: Implementation) -> None:
    """What compute-sanitizer watches on a GPU, tests/ops/run_cases.py, leaves no kernel out."""
    module = emulation.module
    assert module is not None
    names, reached = resources.symbols(module), set()
    for case, capability in itertools.product((*CASES, *MORE), (80, 90)):
        module.set_capability(capability)
        module.start_recording()
        try:
            case.run(case.on("cpu"))
        finally:
            launches = module.stop_recording()
            module.set_capability(80)
        assert launches, f"{case.name} launches nothing"
        reached |= {nvcc.family(names[kernel]) for kernel, *_ in launches}
    assert families(module) - reached == set()
