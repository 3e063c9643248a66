"""What is on its way between the host and a device."""

from collections.abc import Iterator

import torch

from igpt_fast.likelihood.transfer import Arriving, one_ahead, sent

CPU = torch.device("cpu")


def test_on_the_cpu_nothing_is_moved() -> None:
    x = torch.arange(4)
    assert sent(x, CPU) is x
    assert Arriving(x).get() is x


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
