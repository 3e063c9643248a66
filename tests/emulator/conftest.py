"""The backends of the kernel tests: emulated on every machine, cuda where there is a GPU."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from kernels import Kernels

from igpt_fast import backend


@pytest.fixture
def emulated(emulated_module: ModuleType) -> Kernels:
    return Kernels(emulated_module, "cpu")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        assert backend._C is not None
        return Kernels(backend._C, "cuda")
    return request.getfixturevalue("emulated")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the CUDA kernels serve: emulated on the CPU, as of sm_90 but without graphs, or on a GPU."""
    if request.param == "emulated":
        module = request.getfixturevalue("emulation").module
        module.set_capability(90)
        yield "cpu"
        module.set_capability()
    else:
        with backend.use_backend("auto"):
            yield "cuda"
