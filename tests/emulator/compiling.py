"""Compiles csrc/cuda and csrc/emulator with the host compiler; keeps what it made in build/emulator.

An object file is named after the hash of everything that goes into it: its source, the headers that it includes, the
compiler and its flags. So a change compiles again what it touches and nothing else.
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
FLAGS = ("-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}
MACROS = {"": (), "address": ("-DIGPT_ASAN",), "thread": ("-DIGPT_TSAN",)}


def run(*command: object, ok: bool = True, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=timeout)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Keeps other processes of the tests, which run in parallel, from making the same file at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def compiler_version() -> str:
    return run(COMPILER, "--version").stdout


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if not COMPILER:
        return "no C++ compiler"
    if not (ROOT / "csrc" / "emulator").is_dir():
        return "the tests run outside the repository"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


@dataclass(frozen=True)
class Mutation:
    """One change of one line of a source below csrc: a known way to be wrong."""

    name: str
    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.name}: {self.old!r} is {text.count(self.old)} times in {self.file}"
        return text.replace(self.old, self.new)


# What has to find a mutation: a check that takes Kernels, or (sanitizer, op) for a run of the driver.
Check = Callable[[Any], None] | tuple[str, str]


class Tree:
    """The sources, as they are or with a mutation, which lives in a copy of csrc."""

    def __init__(self, mutation: Mutation | None = None) -> None:
        self.csrc = ROOT / "csrc"
        self.mutated: Path | None = None
        if mutation is None:
            return
        target = CACHE / "mutants" / mutation.name / "csrc"
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(self.csrc, target)
        path = target / mutation.file
        path.write_text(mutation.apply(path.read_text("utf-8")), "utf-8")
        self.csrc, self.mutated = target, path.resolve()

    def optimise(self, path: Path) -> str:
        """What a mutation changes runs once: most of its time is the compiler's. All else is compiled already."""
        return "-O0" if self.mutated in self.closure(path) else "-O1"

    def closure(self, path: Path) -> list[Path]:
        """A source and all files of the repository that it includes."""
        seen: list[Path] = []
        todo = [path]
        while todo:
            file = todo.pop().resolve()
            if file in seen:
                continue
            seen.append(file)
            for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text("utf-8"), re.MULTILINE):
                for folder in (file.parent, self.csrc / "emulator" / "include", self.csrc / "emulator", self.csrc):
                    if (folder / name).is_file():
                        todo.append(folder / name)
                        break
        return seen

    def compile(self, path: Path, *flags: str) -> Path:
        includes = [self.csrc / "emulator" / "include", self.csrc / "emulator", self.csrc]
        command = [COMPILER, *FLAGS, *flags]
        digest = hashlib.sha256("\0".join([compiler_version(), *command]).encode())
        for file in self.closure(path):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        target = CACHE / f"{path.stem}-{digest.hexdigest()[:20]}.o"
        with alone(target):
            if not target.exists():
                partial = target.with_suffix(f".{os.getpid()}.partial")
                run(*command, *(f"-I{folder}" for folder in includes), "-x", "c++", "-c", path, "-o", partial)
                partial.replace(target)
        return target

    def objects(self, sources: Sequence[tuple[Path, tuple[str, ...]]]) -> list[Path]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
            return list(pool.map(lambda item: self.compile(item[0], *item[1]), sources))

    def kernels(self) -> list[Path]:
        return sorted((self.csrc / "cuda").glob("*.cu"))

    def sources(self, sanitizer: str = "") -> list[tuple[Path, tuple[str, ...]]]:
        """The kernels, instrumented, and the emulator, which is not: what it does is not the kernels' doing.

        With a sanitizer they are not optimised: compiling costs more than what runs, and three times as much with -O1.
        """
        emulator = [
            self.csrc / "emulator" / f"{name}.cpp"
            for name in ("emulator", "meetings", "accesses", "fibre", "counters", "ptx", "record", "hopper", "wgmma")
        ]
        instrument = SANITIZERS.get(sanitizer, ())
        return [
            (path, ("-O0" if sanitizer else self.optimise(path), "-Wno-unknown-pragmas", *instrument))
            for path in self.kernels()
        ] + [(path, ("-O2", *MACROS[sanitizer])) for path in emulator]


def link(objects: Sequence[Path], name: str, *flags: str) -> Path:
    """Links into a file named after its objects."""
    digest = hashlib.sha256("\0".join([*flags, *(path.name for path in objects)]).encode()).hexdigest()[:20]
    target = CACHE / digest / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        run(COMPILER, *flags, *objects, "-o", partial)
        partial.replace(target)
    return target


def python_flags() -> tuple[str, ...]:
    import pybind11

    return ("-O0", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))


def load(path: Path, name: str) -> ModuleType:
    """Imports a compiled module from a file, beside others of its name.

    pybind11 gives the module that it has when it is asked for one of the same full name again.
    """
    name = f"{path.parent.name}.{name}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(name, None)
    return module


def build_emulated(mutation: Mutation | None = None) -> Path:
    """The file of the module _emulated: the CUDA functions of _C for tensors of the CPU."""
    tree = Tree(mutation)
    sources = tree.sources()
    sources += [
        (tree.csrc / "bind" / "cuda.cpp", python_flags()),
        (tree.csrc / "emulator" / "module.cpp", python_flags()),
    ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return link(tree.objects(sources), f"_emulated{suffix}", "-shared")


def emulated() -> ModuleType:
    """See ``build_emulated``; imported."""
    return load(build_emulated(), "_emulated")


def probes(name: str = "probes", *others: str) -> ModuleType:
    """Small kernels with known faults; see probes.cpp. ``others``: further sources beside it."""
    tree = Tree()
    sources = [item for item in tree.sources() if item[0].suffix == ".cpp"]
    sources.append((HERE / f"{name}.cpp", ("-Wno-unknown-pragmas", *python_flags())))
    sources += [(HERE / other, ("-O0", "-Wno-unknown-pragmas")) for other in others]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return load(link(tree.objects(sources), f"_{name}{suffix}", "-shared"), f"_{name}")


def driver(sanitizer: str, mutation: Mutation | None = None) -> Path:
    """The program of driver*.cpp, which runs all kernels, under a sanitizer."""
    tree = Tree(mutation)
    sources = tree.sources(sanitizer)
    sources += [(path, ("-O1", *SANITIZERS[sanitizer])) for path in sorted(HERE.glob("driver*.cpp"))]
    return link(tree.objects(sources), "driver", *SANITIZERS[sanitizer])


@functools.cache
def sanitizer_unavailable(sanitizer: str) -> str | None:
    """Why a sanitizer does not work here: not installed, or the system lays memory out in a way that it refuses."""
    program = CACHE / f"trial-{sanitizer}"
    with alone(program):
        source = program.with_suffix(".cpp")
        source.write_text("int main() { return 0; }\n")
        done = run(COMPILER, *SANITIZERS[sanitizer], source, "-o", program, ok=False)
        if done.returncode == 0:
            done = run(*launcher(), program, ok=False)
    return None if done.returncode == 0 else f"-fsanitize={sanitizer}: {(done.stdout + done.stderr).strip()[-200:]}"


@functools.cache
def launcher() -> tuple[str, ...]:
    """Before a sanitized program: without random addresses, where that is allowed. TSan does not bear many of them."""
    command = ("setarch", "-R")
    works: Callable[[], bool] = lambda: run(*command, "true", ok=False).returncode == 0  # noqa: E731
    return command if shutil.which("setarch") and works() else ()


def races(sanitizer: str, name: str = "races") -> Path:
    """The program of races.cpp, or its like: kernels with faults that a sanitizer has to find."""
    sources = [item for item in Tree().sources(sanitizer) if item[0].suffix == ".cpp"]
    sources.append((HERE / f"{name}.cpp", ("-O1", "-Wno-unknown-pragmas", *SANITIZERS[sanitizer])))
    return link(Tree().objects(sources), name, *SANITIZERS[sanitizer])


def run_driver(sanitizer: str, op: str, mutation: Mutation | None = None) -> subprocess.CompletedProcess[str]:
    brief = ("brief",) if sanitizer == "thread" else ()
    return run_sanitized(driver(sanitizer, mutation), op, *brief)


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:ignore_interceptors_accesses=1",
    }
    environment = ["env", *(f"{name}={value}" for name, value in options.items())]
    return run(*environment, *launcher(), program, *arguments, ok=False)
