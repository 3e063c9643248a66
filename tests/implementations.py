"""Which implementation of an op a test runs on; the fixtures are in conftest.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from igpt_fast import backend

ISAS = [name for name, supported in backend._C.cpu_isas() if supported] if backend._C else []


def isas_of(op: str) -> list[str]:
    """The instruction sets of this machine that have kernels of an op for the CPU's tensors."""
    return ISAS if "cpu" in backend.OPS[op].native else []


class Counting(Protocol):
    """A module that counts its launches: the emulated one, or ``CountedModule``."""

    def reset_counters(self) -> None: ...
    def counters(self) -> dict[str, int]: ...


class CountedModule:
    """The compiled module, and how often a function of an op's CPU kernels (``*_cpu``) was called."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._calls: Counter[str] = Counter()

    def reset_counters(self) -> None:
        self._calls.clear()

    def counters(self) -> dict[str, int]:
        return {"launches": self._calls.total(), **self._calls}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not name.endswith("_cpu"):
            return value

        def counted(**arguments: Any) -> Any:
            self._calls[name] += 1
            return value(**arguments)

        return counted


@dataclass(frozen=True)
class Implementation:
    """One of an op's implementations, which is on while a test runs. Its tensors belong on ``device``."""

    name: str  # "reference", "cpu", "emulated" or "cuda"
    device: str
    module: Any = None  # a ``Counting`` one, of "cpu" and "emulated"

    def schedule(self, order: str, seed: int = 0) -> None:
        """Chooses the order of execution of the emulated kernels."""
        if self.name == "emulated":
            self.module.set_schedule(order, seed)
