"""The backends of the kernel tests: emulated on every machine, cuda where there is a GPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for compiling.py, kernels.py and checks.py

import compiling
from kernels import Kernels

from igpt_fast import backend


@pytest.fixture(scope="session")
def emulated() -> Kernels:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Kernels(compiling.emulated(), "cpu")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        assert backend._C is not None
        return Kernels(backend._C, "cuda")
    return request.getfixturevalue("emulated")
