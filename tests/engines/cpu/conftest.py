"""The compiled engines of the CPU serve the tests of this folder, whatever the environment asks for."""

from collections.abc import Iterator

import pytest
import torch

from igpt_fast import backend


@pytest.fixture(autouse=True)
def _on_auto() -> Iterator[None]:
    with backend.use_backend("auto"):
        yield


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
