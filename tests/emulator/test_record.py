"""The emulator's record of launches, and by it: which kernels the cases of the GPU checks reach."""

import itertools
import re
import shutil
from collections.abc import Iterable
from types import ModuleType

import nvcc
import pytest
import resources
import torch
from cases import CASES, Case
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


def reached_by(module: ModuleType, case: Case, capability: int) -> set[str]:
    """The kernels that a case launches on such a device."""
    names = resources.symbols(module)
    module.set_capability(capability)
    module.start_recording()
    try:
        case.run(case.on("cpu"))
    finally:
        launches = module.stop_recording()
        module.set_capability()
    assert launches, f"{case.name} launches nothing"
    return {names[kernel] for kernel, *_ in launches}


def test_the_cases_reach_every_kernel(emulation: Implementation) -> None:
    """What compute-sanitizer watches on a GPU, tests/ops/run_cases.py, leaves no kernel out."""
    module = emulation.module
    assert module is not None
    reached: set[str] = set()
    for case, capability in itertools.product((*CASES, *MORE), (80, 90)):
        reached |= {nvcc.family(name) for name in reached_by(module, case, capability)}
    assert families(module) - reached == set()


def test_the_cases_reach_hopper_at_every_head_dimension(emulation: Implementation) -> None:
    """On such a device they launch attention's kernels for it, of every size that there is, in one dtype at least."""
    module = emulation.module
    assert module is not None

    def sizes(names: Iterable[str]) -> set[str]:
        return {size for name in names if "hopper_kernel<" in name for size in re.findall(r"Hopper\w+<.*?>", name)}

    found = [reached_by(module, case, 90) for case in CASES if case.op.startswith("causal_attention")]
    assert len(wanted := sizes(resources.symbols(module).values())) == 9, wanted
    assert sizes(itertools.chain(*found)) == wanted
