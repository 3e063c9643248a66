"""A source distribution, and a wheel that is built from it without CUDA; both audited, and a picture drawn.

``make wheel``: they lie in dist/ then. What draws is a fresh environment in build/wheel, with nothing but the wheel and
what it requires, and a PATH without compilers; there the compiled module has to load, and to share torch's OpenMP. Then
it gets a wheel without a compiled module (``-C wheel.cmake=false``), as where no compiler can build it.
``TORCH_INDEX`` is an index to take torch from. Prints a table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE, DIST = ROOT / "build" / "wheel", ROOT / "dist"
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "cmake", "ninja")
# The module that runs, and the OpenMP libraries that the process has.
REPORT = """
import json, torch
from igpt_fast import backend
with open("/proc/self/maps") as file:
    openmp = {line.split()[-1] for line in file if "libgomp" in line or "libomp" in line}
print(json.dumps({"module": backend._C and backend._C.__file__, "openmp": sorted(openmp)}))
"""


def run(*command: object, **options: object) -> str:
    """Its standard output; what it says otherwise ends the check where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nfails with {done.returncode}:\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def say(what: str) -> None:
    print(f"wheel: {what}", file=sys.stderr, flush=True)


def build_source() -> Path:
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(DIST)!r}))"
    return DIST / run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]


def build_wheel(source: Path, folder: Path, *options: str) -> Path:
    """From the unpacked source distribution alone."""
    folder.mkdir(parents=True)
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-q")
    run(*command, *options, "-w", folder / "built", tree)
    (wheel,) = (folder / "built").glob("*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """As [tool.cibuildwheel] of pyproject.toml has it: the tag says how old a Linux may be."""
    before = set(DIST.glob("*.whl"))
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", DIST, wheel)
    (repaired,) = set(DIST.glob("*.whl")) - before
    return repaired


def install(wheel: Path, folder: Path) -> Path:
    """The programs of an environment that has nothing but the wheel and what it requires; another wheel goes first."""
    if folder.exists():
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
        return folder / "bin"
    run(sys.executable, "-m", "venv", folder)
    index = os.environ.get("TORCH_INDEX")
    command = (folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
    run(*command, *(["--extra-index-url", index] if index else []), wheel)
    found = [name for name in COMPILERS if shutil.which(name, path=str(folder / "bin"))]
    assert not found, f"{folder} has {', '.join(found)}"
    return folder / "bin"


def draw(programs: Path, name: str, backend: str) -> tuple[float, float]:
    """Seconds to a picture, the first time and the second: Python compiles what it imports once."""
    environment = {"PATH": str(programs), "HOME": os.environ.get("HOME", "/"), "IGPT_FAST_BACKEND": backend}
    # -B: no bytecode is left for the first picture.
    report = json.loads(run(programs / "python", "-B", "-W", "ignore", "-c", REPORT, cwd=HERE, env=environment))
    assert (report["module"] is not None) == (backend == "cpu"), report
    assert len(report["openmp"]) == 1, f"more than one OpenMP library, or none: {report['openmp']}"
    seconds = []
    for _ in range(2):
        picture = HERE / f"{name}.png"
        picture.unlink(missing_ok=True)
        begin = time.perf_counter()
        run(programs / "igpt", "sample", "-n", "1", "--seed", "0", "--out", picture, cwd=HERE, env=environment)
        seconds.append(time.perf_counter() - begin)
        assert picture.read_bytes().startswith(b"\x89PNG")
    return seconds[0], seconds[1]


def mebibytes(path: Path) -> str:
    return f"{path.stat().st_size / (1 << 20):.2f}"


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    for old in (*DIST.glob("igpt_fast-*.whl"), *DIST.glob("igpt_fast-*.tar.gz")):
        old.unlink()
    say("the source distribution")
    source = build_source()
    say("a wheel of it, without CUDA")
    wheel = repair(build_wheel(source, HERE / "compiled", "-C", "cmake.define.IGPT_CUDA=OFF"))
    say("a wheel of it, without a compiled module")
    plain = build_wheel(source, HERE / "plain", "-C", "wheel.cmake=false")
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel, plain)
    rows = [(source.name, mebibytes(source), "", "", "")]
    for path, backend in ((wheel, "cpu"), (plain, "reference")):
        say(f"a picture, by {path.name}")
        first, again = draw(install(path, HERE / "environment"), backend, backend)
        tag = path.stem.split("-", 2)[2]
        rows.append((path.name, mebibytes(path), tag, f"{first:.1f}", f"{again:.1f}"))
    print("| file | MiB | tag | first picture, s | the next, s |\n|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
