"""Known ways to be wrong, put into csrc/cpu one by one: the check of each passes without and fails with it.

Of a mutation the files that include it are compiled, for one instruction set; all else is compiled already.
"""

import dataclasses
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import compiling
import compiling_cpu
import pytest
import torch
from implementations import CountedModule, Implementation
from mutations_cpu import MUTATIONS, Known

from igpt_fast import backend

FOUND, SURVIVES = "found", "survives"
# Who writes beyond its memory may also be ended by the system.
EXIT_CODES = {42: FOUND, 43: SURVIVES, -signal.SIGSEGV: FOUND, -signal.SIGABRT: FOUND, -signal.SIGBUS: FOUND}


def test_every_mutation_has_its_place() -> None:
    """Once in the sources, as they are now, and under a name of its own."""
    for known in MUTATIONS:
        known.mutation.apply((compiling.ROOT / "csrc" / known.mutation.file).read_text("utf-8"))
    assert len({known.mutation.name for known in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.mutation
@pytest.mark.parametrize("known", MUTATIONS, ids=lambda known: known.mutation.name)
def test_is_found(known: Known) -> None:
    race = isinstance(known.check, str)
    reason = backend.native_reason or compiling.unavailable()
    reason = reason or (compiling.sanitizer_unavailable("thread") if race else None)
    reason = reason or (compiling_cpu.software_tiles_unavailable() if known.software_tiles else None)
    if reason:
        pytest.skip(reason)
    levels = tuple(dict.fromkeys(("generic", known.level)))
    if isinstance(known.check, str):
        name = "pool" if known.check == "pool" else "threads"
        program = compiling_cpu.build(
            levels, mutation=known.mutation, software_tiles=known.software_tiles, sanitizer="thread", program=name
        )
        done = compiling.run_sanitized(program, known.check)
        assert done.returncode != 0, "survives"
        assert "data race" in done.stderr, done.stderr[-2000:]
        return
    plain = compiling_cpu.build(levels, software_tiles=known.software_tiles)
    assert verdict(known, plain) == SURVIVES, "the check fails without the mutation"
    mutated = compiling_cpu.build(levels, mutation=known.mutation, software_tiles=known.software_tiles)
    assert verdict(known, mutated) == FOUND


def verdict(known: Known, module: Path) -> str:
    """What the check says of a module, in a process of its own: hundreds of modules in one exhaust the loader."""
    child = get_context("fork").Process(target=_exit_with_verdict, args=(known, module))
    child.start()
    child.join(300)
    if child.is_alive():
        child.kill()
    return EXIT_CODES.get(child.exitcode or 0, f"exit code {child.exitcode}")


def _exit_with_verdict(known: Known, path: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's others did not come along
    torch.manual_seed(0)
    module = CountedModule(compiling.load(path, "_C"))
    backend._C = module  # type: ignore[assignment]
    backend.OPS.update(
        {name: dataclasses.replace(op, least_cpu=0, least_queries_cpu=0) for name, op in backend.OPS.items()}
    )
    assert callable(known.check)
    try:
        with backend.use_backend("auto"):
            known.check(Implementation("cpu", "cpu", module))
    except (AssertionError, RuntimeError):
        os._exit(42)
    except BaseException:
        import traceback

        traceback.print_exc()
    else:
        os._exit(43)
    os._exit(1)
