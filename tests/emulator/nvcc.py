"""Compiles csrc/cuda with nvcc as the build does, once for all tests; keeps what it made in build/nvcc.

A folder there is named after the hash of everything that goes into it, as in compiling.py: a change compiles again
the sources that it touches. What nvcc did not finish, or refused, is not kept: another run asks it again.

A build for ``ARCHITECTURES`` alone that has ``CMAKE_CUDA_COMPILER_LAUNCHER=python3;tests/emulator/nvcc.py`` (the whole
path) takes its objects from here, so that build and tests compile the kernels once (.ci/run).
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import compiling

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CACHE = compiling.ROOT / "build" / "nvcc"
CUDA = compiling.ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "86", "89", "90a")  # the -real ones of cmake/find_cuda.cmake
# What CMake says with IGPT_WERROR, word for word.
FLAGS = (
    *("-DIGPT_SM_90A", "-O3", "-DNDEBUG", "-std=c++17"),
    *(f"--generate-code=arch=compute_{arch},code=[sm_{arch}]" for arch in ARCHITECTURES),
    *("-Xcompiler=-fPIC", "-Xptxas=--warn-on-spills", "-Xcompiler=-Wall,-Wextra"),
    *("-Werror=all-warnings", "-Xcompiler=-Werror"),
)


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel for one architecture."""

    registers: int
    shared: int  # bytes, static
    stack: int  # bytes a thread
    spill_stores: int
    spill_loads: int
    max_threads: int  # of __launch_bounds__


@dataclass(frozen=True)
class Compiled:
    """One source: whether nvcc took it, what it said, and the folder: kernel.o, a .ptx and a .cubin an architecture."""

    source: Path
    folder: Path
    output: str
    success: bool
    seconds: float  # of one core


@functools.cache
def version() -> str:
    assert NVCC is not None
    return re.search(r"V(\d+\.\d+\.\d+)", compiling.run(NVCC, "--version").stdout).group(1)  # type: ignore[union-attr]


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if NVCC is None:
        return "no nvcc"
    if shutil.which("c++filt") is None:
        return "no c++filt (binutils)"
    return None if CUDA.is_dir() else "the tests run outside the repository"


def sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


@functools.cache
def _own_flags() -> dict[str, tuple[str, ...]]:
    """The options that CMakeLists.txt gives to single files."""
    text = (compiling.ROOT / "CMakeLists.txt").read_text("utf-8")
    found = re.findall(r"set_source_files_properties\(([^)]*\.cu[^)]*?)PROPERTIES COMPILE_OPTIONS ([^)\s]+)\)", text)
    return {Path(file).name: tuple(flags.strip('"').split(";")) for files, flags in found for file in files.split()}


def compile_one(source: Path) -> Compiled:
    assert NVCC is not None
    command = [NVCC, *FLAGS, *_own_flags().get(source.name, ()), "-Xptxas=-v"]
    digest = hashlib.sha256("\0".join([version(), compiling.compiler_version(), *command]).encode())
    for file in compiling.Tree().closure(source):
        if file.parent == CUDA:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = CACHE / f"{source.stem}-{digest.hexdigest()[:20]}"
    with compiling.alone(folder):
        failed = None if _finished(folder) else _compile(command, source, folder)
    if failed is not None:
        return failed
    _, seconds = (folder / "status").read_text().split()
    return Compiled(source, folder, (folder / "output").read_text("utf-8"), True, float(seconds))


def _finished(folder: Path) -> bool:
    return folder.exists() and (folder / "status").read_text().startswith("0 ")


def _compile(command: list[str], source: Path, folder: Path) -> Compiled | None:
    """Makes the folder; else says what went wrong."""
    partial = folder.with_suffix(".partial")
    for path in (partial, folder):  # of a run that was killed
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [*command, "--keep", "--keep-dir", str(partial), "-c", str(source), "-o", str(partial / "kernel.o")]
    with (partial / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    if process.returncode:  # refused, or killed
        said = f"{(partial / 'output').read_text('utf-8')}\nnvcc ended with {process.returncode}"
        shutil.rmtree(partial)
        return Compiled(source, folder, said, False, seconds)
    (partial / "status").write_text(f"0 {seconds:.1f}")
    for path in partial.iterdir():
        if path.suffix not in (".ptx", ".cubin", ".o", ""):
            path.unlink()
    partial.rename(folder)
    return None


@functools.cache
def compile_all() -> tuple[Compiled, ...]:
    """All sources, side by side, the longest of the last time first."""
    before: dict[str, float] = {}
    for path in CACHE.glob("*/status"):
        if path.parent.suffix == ".partial":  # of another process, or one that was killed
            continue
        before[path.parent.name.rsplit("-", 1)[0]] = float(path.read_text().split()[1])
    order = sorted(sources(), key=lambda path: -before.get(path.stem, path.stat().st_size / 1000))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        return tuple(sorted(pool.map(compile_one, order), key=lambda compiled: compiled.source.name))


# What CMake adds for each object: its place, and that of its dependencies.
PLACES = ("-MT", "-MF", "-x", "-c", "-o")


def launch(command: list[str]) -> int:
    """What CMake asks of nvcc: a kernel's object from ``compile_one``, if it is asked for with the flags of the tests.

    Args:
        command: nvcc and its arguments.

    Returns: nvcc's exit status; 2, with the reason, if the flags are others.
    """
    places = {word: command[i + 1] for i, word in enumerate(command) if word in PLACES}
    if Path(places.get("-c", "")).resolve().parent != CUDA:  # a trial of CMake's
        return subprocess.run(command, check=False).returncode
    source, target = Path(places["-c"]).resolve(), Path(places["-o"])
    rest = {"-forward-unknown-to-host-compiler", "-MD", *PLACES, *places.values()}
    asked, known = set(command) - rest, {NVCC, *FLAGS, *_own_flags().get(source.name, ())}
    if asked != known:
        print(f"nvcc.py: {source.name}: CMake alone says {asked - known}, the tests alone {known - asked}")
        return 2
    compiled = compile_one(source)
    if not compiled.success:
        print(compiled.output)
        return 1
    shutil.copyfile(compiled.folder / "kernel.o", target)
    Path(places["-MF"]).write_text(f"{places['-MT']}: {' '.join(map(str, compiling.Tree().closure(source)))}\n")
    return 0


# ---- Names --------------------------------------------------------------------------------------------------


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> readable, without namespaces, arguments and what differs between compilers and machines."""
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def short(name: str) -> str:
    """``void igpt::cuda::(anonymous namespace)::f<igpt::cuda::g<4> >(Params)`` -> ``f<g<4>>``."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name)
    name = re.sub(r"\((\w[\w ]*)\)(-?\d+|true|false)", r"\2", name)  # (int)4, (bool)1
    name = name[: name.index("(")] if "(" in name else name
    return name.replace("> >", ">>").replace("> >", ">>").strip()


def family(name: str) -> str:
    """The template that a kernel is an instance of."""
    return name.partition("<")[0]


# ---- What ptxas and the PTX say -----------------------------------------------------------------------------

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
BOUNDS = re.compile(r"^(?:\.\w+ )*\.entry (\w+)\(.*?\)\s*(?:\.maxntid (\d+), (\d+), (\d+))?", re.MULTILINE | re.DOTALL)


def resources(compiled: Compiled) -> dict[str, dict[str, Resources]]:
    """Kernel -> architecture -> resources. A function that is not inlined counts with the kernel it follows."""
    found: dict[tuple[str, str], Resources] = {}
    bounds = _bounds(compiled)
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", compiled.output)[1:]:
        mangled, arch = ENTRY.search(part).groups()  # type: ignore[union-attr]
        registers, shared = USED.search(part).groups()  # type: ignore[union-attr]
        frames = [tuple(map(int, frame)) for frame in FRAME.findall(part)]
        stack, stores, loads = (max(column) for column in zip(*frames, strict=True))
        found[mangled, arch] = Resources(int(registers), int(shared or 0), stack, stores, loads, bounds[mangled])
    names = demangle([mangled for mangled, _ in found])
    table: dict[str, dict[str, Resources]] = {}
    for (mangled, arch), values in sorted(found.items(), key=lambda item: (names[item[0][0]], item[0][1])):
        row = table.setdefault(names[mangled], {})
        assert arch not in row, f"two kernels are called {names[mangled]}"
        row[arch] = values
    return table


def _bounds(compiled: Compiled) -> dict[str, int]:
    bounds: dict[str, int] = {}
    for path in compiled.folder.glob("*.ptx"):
        for name, *sizes in BOUNDS.findall(path.read_text("utf-8")):
            bounds[name] = int(sizes[0]) * int(sizes[1]) * int(sizes[2]) if sizes[0] else 1024
    return bounds


# ---- Machine code -------------------------------------------------------------------------------------------


@functools.cache
def nvdisasm() -> str | None:
    """NVIDIA's disassembler: of the toolkit, or of the package nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(Path(NVCC or "").parent))
    for package in () if found else ("nvidia.cu13", "nvidia.cuda_nvdisasm"):
        try:
            spec = importlib.util.find_spec(package)
        except ImportError:
            continue
        for folder in spec.submodule_search_locations or () if spec else ():
            found = found or shutil.which("nvdisasm", path=f"{folder}/bin")
    return found


SASS = re.compile(r"^\.text\.(\w+):|^[ \t]+/\*[0-9a-f]{4,}\*/[ \t]+(?:@!?U?P\w+ )?([A-Z][^;\n]*?)[ \t]*;", re.MULTILINE)


@functools.lru_cache(maxsize=32)  # those of one architecture, which one test after another reads
def code(compiled: Compiled, arch: str) -> dict[str, list[str]]:
    """Kernel -> its instructions in their order, without predicates: ``LDG.E.128 R4, desc[UR4][R2.64]``."""
    program = nvdisasm()
    assert program is not None
    (cubin,) = compiled.folder.glob(f"*compute_{arch}*.cubin")
    listing = compiled.folder / f"{cubin.stem}.sass"
    if not listing.exists():
        partial = listing.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(compiling.run(program, cubin).stdout, "utf-8")
        partial.replace(listing)
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for section, instruction in SASS.findall(listing.read_text("utf-8")):
        if section:
            current = found.setdefault(section, [])
        else:
            current.append(instruction)
    names = demangle(list(found))
    return {names[mangled]: lines for mangled, lines in found.items()}


def instructions(compiled: Compiled, arch: str) -> dict[str, Counter[str]]:
    """Kernel -> instruction with its modifiers, such as LDG.E.128 -> how often it stands there."""
    return {name: Counter(line.split()[0] for line in lines) for name, lines in code(compiled, arch).items()}


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
