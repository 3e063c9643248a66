"""What all tests share: GPU tests skip with a reason, threads are bounded, seeds are fixed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for tolerance.py: the importlib mode leaves sys.path alone
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from igpt_fast import backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = backend.unavailable("cuda")
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
