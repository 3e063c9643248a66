"""Compiles csrc/cpu and its binding for tests: some instruction sets, a mistake, a sanitizer, tiles in software.

Each source has the flags that CMake gives it; objects and what is linked lie where compiling.py has its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from compiling import (
    CACHE,
    COMPILER,
    ROOT,
    SANITIZERS,
    Mutation,
    Tree,
    alone,
    compiler_version,
    link,
    python_flags,
    run,
)

NATIVE = ROOT / "tests" / "native"


@functools.cache
def configured() -> Path:
    """A folder that CMake was run in, for the CPU alone; nothing is built there."""
    import pybind11

    lists = (ROOT / "CMakeLists.txt").read_bytes() + (ROOT / "igpt_fast" / "__init__.py").read_bytes()
    key = hashlib.sha256(lists + f"{ROOT}\0{sys.executable}\0{compiler_version()}".encode()).hexdigest()[:20]
    folder = CACHE / f"configured-{key}"
    with alone(folder):
        if not (folder / "compile_commands.json").exists():
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            cmake = shutil.which("cmake", path=path)
            assert cmake is not None, "cmake is not installed"
            options = ["IGPT_CUDA=OFF", "CMAKE_EXPORT_COMPILE_COMMANDS=ON", f"CMAKE_CXX_COMPILER={COMPILER}"]
            options += [f"pybind11_DIR={pybind11.get_cmake_dir()}", f"Python_EXECUTABLE={sys.executable}"]
            run(cmake, "-S", ROOT, "-B", folder, *(f"-D{option}" for option in options))
    return folder


@functools.cache
def commands() -> dict[str, tuple[str, ...]]:
    """Of each source below csrc the flags that CMake gives it, less those of optimisation, paths and linking."""
    found = {}
    for entry in json.loads((configured() / "compile_commands.json").read_text("utf-8")):
        flags = re.findall(r"(?<= )-(?!flto|fno-fat)[mfD]\S+", entry["command"])
        found[str(Path(entry["file"]).relative_to(ROOT / "csrc"))] = tuple(flags)
    return found


def software_tiles_unavailable() -> str:
    """Why tests/native/tiles.h does not run here; empty when it does."""
    from igpt_fast import backend

    if backend._C is not None and dict(backend._C.cpu_isas()).get("avx512_bf16"):
        return ""
    return "the twin's products are AVX-512's, of bf16, which the processor lacks"


def with_software_tiles() -> Tree:
    """A copy of the sources whose tile unit is tests/native/tiles.h."""
    twin, csrc = NATIVE / "tiles.h", ROOT / "csrc"
    digest = hashlib.sha256(twin.read_bytes())
    for path in sorted(csrc.rglob("*.*")):
        digest.update(str(path).encode() + path.read_bytes())
    tree = Tree()
    tree.csrc = CACHE / f"tiles-{digest.hexdigest()[:20]}" / "csrc"
    with alone(tree.csrc.parent):
        if not tree.csrc.exists():
            partial = tree.csrc.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(csrc, partial)
            shutil.copy(twin, partial / "cpu" / "bodies" / "simd" / "tiles.h")
            partial.rename(tree.csrc)
    return tree


def build(
    levels: Sequence[str],
    *,
    mutation: Mutation | None = None,
    software_tiles: bool = False,
    sanitizer: str = "",
    program: str = "",
) -> Path:
    """The module ``_C`` without CUDA, or a program of tests/native.

    Args:
        levels: The instruction sets it has, of isa/*.cpp, all taken for supported; the last is chosen.
        mutation: A change of a source, for the last level and for the drivers; what it touches is not optimised.
        software_tiles: The level amx runs by tests/native/tiles.h.
        sanitizer: A key of ``SANITIZERS``; with "thread", tests/native/gomp.cpp stands for OpenMP's library.
        program: The stem of a source in tests/native that has a main.
    """
    plain = with_software_tiles() if software_tiles else Tree()
    changed = Tree(mutation) if mutation else plain
    if mutation and software_tiles:
        shutil.copy(NATIVE / "tiles.h", changed.csrc / "cpu" / "bodies" / "simd" / "tiles.h")
    instrument = SANITIZERS.get(sanitizer, ())
    as_they_are: list[tuple[Path, tuple[str, ...]]] = []
    touched: list[tuple[Path, tuple[str, ...]]] = []

    def add(source: str | Path, *flags: str, may_change: bool = True) -> None:
        if mutation and may_change and changed.mutated in changed.closure(changed.csrc / source):
            touched.append((changed.csrc / source, (*flags, *instrument, "-O0", "-w")))
        else:
            as_they_are.append((plain.csrc / source, (*flags, *instrument, "-O1" if sanitizer else "-O2")))

    for name, flags in commands().items():
        if name == "cpu/isa/choice.cpp":
            every = ",".join(f"{{&{level}_ops,true}}" for level in levels)
            add(NATIVE / "choice.cpp", *flags, f"-DIGPT_LEVELS={every}")
        elif name.startswith("cpu/isa/"):
            level = Path(name).stem
            if level in {"generic", *levels}:
                here = [flag for flag in flags if not (software_tiles and flag.startswith("-mamx"))]
                add(name, *here, may_change=level == levels[-1])
        elif name.startswith("cpu/"):
            add(name, *flags)
        elif not program:
            info = f"-I{configured() / 'include'}"
            # With classes of its own, also in a process that has imported the module as it was installed.
            apart = '-DPYBIND11_BUILD_ABI="_of_a_test"'
            as_they_are.append((plain.csrc / name, (*flags, *python_flags(), info, apart)))
    for extra in [program] * bool(program) + ["gomp"] * (sanitizer == "thread"):
        add(NATIVE / f"{extra}.cpp")
    objects = plain.objects(as_they_are) + changed.objects(touched)
    options = (*instrument, *(() if sanitizer == "thread" else ("-fopenmp",)))
    if program:
        return link(objects, program, *options)
    return link(objects, f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "-shared", *options)
