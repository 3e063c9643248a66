"""What all tests share: GPU tests skip with a reason, threads are bounded, seeds are fixed."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# For tolerance.py, compiling.py and such: the importlib mode leaves sys.path alone.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "emulator"))
sys.path.insert(0, str(Path(__file__).parent / "ops"))
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import compiling
import pytest
import torch
from implementations import Implementation

from igpt_fast import backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of the mutations run every Nth only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mutations = [item for item in items if item.get_closest_marker("mutation")]
    left_out = set(mutations) - set(mutations[:: config.getoption("--every")])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    reason = backend.unavailable("cuda")
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return compiling.emulated()


@pytest.fixture
def emulation(emulated_module: ModuleType) -> Iterator[Implementation]:
    """The CUDA kernels serve the tensors of the CPU."""
    emulated_module.set_schedule("fifo", 0)
    with backend.use_backend("auto"), backend.emulate(emulated_module):
        yield Implementation("emulated", "cpu", emulated_module)


@pytest.fixture(params=["reference", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The definition, the kernels on the emulator, the kernels on a GPU."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulation")
        return
    device = "cuda" if request.param == "cuda" else "cpu"
    with backend.use_backend(request.param):
        yield Implementation(request.param, device)
