"""Known ways to be wrong, put into the kernels one by one: a check that passes without must fail with each of them.

They stand in mutations_*.py, beside the checks that find them.
"""

import os
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import checks
import compiling
import pytest
import torch
from compiling import Check, Mutation
from kernels import Kernels

MUTATIONS: list[tuple[Mutation, Check]] = [
    pair for path in sorted(Path(__file__).parent.glob("mutations_*.py")) for pair in import_module(path.stem).MUTATIONS
]


def test_names_are_unique() -> None:
    names = [mutation.name for mutation, _ in MUTATIONS]
    assert len(names) == len(set(names))


@pytest.mark.mutation
@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=[mutation.name for mutation, _ in MUTATIONS])
def test_is_found(mutation: Mutation, check: Check, emulated: Kernels) -> None:
    if isinstance(check, tuple):
        reason = compiling.sanitizer_unavailable(check[0])
        if reason is not None:
            pytest.skip(reason)
        done = compiling.run_driver(*check, mutation)
        assert done.returncode != 0, "survives"
        assert "ERROR: AddressSanitizer" in done.stderr or "data race" in done.stderr, done.stderr[-2000:]
        return
    torch.manual_seed(0)
    checks.schedule(emulated, "fifo", 0)
    check(emulated)
    mutant = compiling.build_emulated(mutation)
    # In a process of its own: hundreds of modules in one exhaust what the loader has for threads' variables.
    child = get_context("fork").Process(target=_exit_with_verdict, args=(check, mutant))
    child.start()
    child.join(300)
    assert not child.is_alive(), "the check does not end"
    assert child.exitcode != SURVIVES, "survives"
    assert child.exitcode == FOUND, f"exit code {child.exitcode}"


FOUND, SURVIVES = 42, 43


def _exit_with_verdict(check: Callable[[Kernels], None], path: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's others did not come along
    torch.manual_seed(0)
    try:
        check(Kernels(compiling.load(path, "_emulated"), "cpu"))
    except (AssertionError, RuntimeError):
        os._exit(FOUND)
    os._exit(SURVIVES)
