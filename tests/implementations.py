"""Which implementation of an op a test runs on; the fixtures are in conftest.py."""

from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Implementation:
    """One of an op's implementations, which is on while a test runs. Its tensors belong on ``device``."""

    name: str  # "reference", "emulated" or "cuda"
    device: str
    module: ModuleType | None = None  # the emulated one

    def schedule(self, order: str, seed: int = 0) -> None:
        """Chooses the order of execution, where there is a choice."""
        if self.module is not None:
            self.module.set_schedule(order, seed)
