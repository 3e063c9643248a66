"""What is on its way between the host and a device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from igpt_fast.likelihood import transfer
from igpt_fast.likelihood.transfer import Arriving, one_ahead, sent

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_moved() -> None:
    x = torch.arange(4)
    assert sent(x, CPU) is x
    assert Arriving(x).get() is x


def test_to_a_gpu_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, or the copy would wait; but for what is large."""
    said: list[Any] = []

    def pinned(x: torch.Tensor) -> torch.Tensor:
        said.append(x.is_contiguous())
        return x

    def to(x: torch.Tensor, *place: Any, **how: Any) -> torch.Tensor:
        said.append((*place, how))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(transfer, "_MOST_PINNED", 48)
    gpu, x = torch.device("cuda"), torch.arange(12, dtype=torch.int32).view(3, 4).T
    assert torch.equal(sent(x, gpu), x)
    assert said == [True, (gpu, {"non_blocking": True})]
    sent(torch.zeros(13, dtype=torch.int32), gpu)
    assert said[2:] == [(gpu, {})]


def test_one_is_begun_before_the_last_is_looked_at() -> None:
    """On a GPU alone."""
    for device, ahead in ((torch.device("cuda"), 1), (CPU, 0)):
        for count in range(4):
            begun: list[int] = []

            def items(count: int = count, begun: list[int] = begun) -> Iterator[int]:
                for i in range(count):
                    begun.append(i)
                    yield i

            found = []
            for i in one_ahead(items(), device):
                found.append(i)
                assert len(begun) == min(count, i + 1 + ahead)
            assert found == list(range(count))
