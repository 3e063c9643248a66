"""The compiled engines of the CPU serve the tests of this folder, whatever the environment asks for."""

from collections.abc import Iterator

import pytest
import torch
from implementations import ISAS

from igpt_fast import backend


@pytest.fixture(autouse=True)
def _on_auto() -> Iterator[None]:
    with backend.use_backend("auto"):
        yield


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# The bodies of avx512_vnni are those of avx512.
LEVELS = [(isa, dtype) for isa in ISAS if isa != "avx512_vnni" for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(params=LEVELS, ids=[f"{isa}-{str(dtype)[6:]}" for isa, dtype in LEVELS])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of a model, for each of the tables of kernels that this machine runs."""
    assert backend._C is not None
    isa, before = request.param[0], backend._C.cpu_isa()
    assert backend._C.select_cpu_isa(isa)
    yield request.param[1]
    assert backend._C.select_cpu_isa(before)
