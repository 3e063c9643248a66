"""Known ways to be wrong, put into the kernels one by one: a check that passes without must fail with each of them.

They stand in mutations_*.py, beside the checks that find them.
"""

import functools
import os
import signal
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

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


def test_every_mutation_has_its_place() -> None:
    """Once in the sources, as they are now."""
    for mutation, _ in MUTATIONS:
        mutation.apply((compiling.ROOT / "csrc" / mutation.file).read_text("utf-8"))


@pytest.mark.mutation
@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=[mutation.name for mutation, _ in MUTATIONS])
def test_is_found(mutation: Mutation, check: Check) -> None:
    reason = compiling.unavailable()
    if reason is None and isinstance(check, tuple):
        reason = compiling.sanitizer_unavailable(check[0])
    if reason is not None:
        pytest.skip(reason)
    if isinstance(check, tuple):
        done = compiling.run_driver(*check, mutation)
        assert done.returncode != 0, "survives"
        assert "ERROR: AddressSanitizer" in done.stderr or "data race" in done.stderr, done.stderr[-2000:]
        return
    assert passes_without(check), "the check fails without the mutation"
    assert verdict(check, compiling.build_emulated(mutation)) == FOUND


@functools.cache  # many mutations have the same check
def passes_without(check: Callable[[Kernels], None]) -> bool:
    return verdict(check, compiling.build_emulated()) == SURVIVES


FOUND, SURVIVES = "found", "survives"
# Who writes beyond its memory may also be ended by the system.
EXIT_CODES = {42: FOUND, 43: SURVIVES, -signal.SIGSEGV: FOUND, -signal.SIGABRT: FOUND, -signal.SIGBUS: FOUND}


def verdict(check: Callable[[Kernels], None], module: Path) -> str:
    """What a check says of a module, in a process of its own: hundreds of modules in one exhaust the loader."""
    child = get_context("fork").Process(target=_exit_with_verdict, args=(check, module))
    child.start()
    child.join(300)
    if child.is_alive():
        child.kill()
    return EXIT_CODES.get(child.exitcode or 0, f"exit code {child.exitcode}")


def _exit_with_verdict(check: Callable[[Kernels], None], path: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's others did not come along
    torch.manual_seed(0)
    try:
        check(Kernels(compiling.load(path, "_emulated"), "cpu"))
    except (AssertionError, RuntimeError):
        os._exit(42)
    os._exit(43)
