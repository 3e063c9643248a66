"""Runs tests of the compiled CPU part on AArch64 under qemu, at every level of NEON.

``make check-arm``: a foreign Debian (debootstrap, unpacked and never booted), torch's own wheel for AArch64, and ``_C``
from the cross compiler, all in build/arm; then pytest under ``qemu-aarch64-static``. What is missing of Debian's
packages is installed where that is allowed. Tests that start another interpreter are skipped: it would be one of this
machine's. A file of tests is a process, as many at once as there are processors. Arguments are pytest's, in place of
the tests below. All of them take half an hour or more; first, ``--every 4`` runs a fourth of each file (``make
check-arm EVERY=4``).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "arm"
TREE, SITE, DEBS, BUILT = HERE / "tree", HERE / "site", HERE / "debs", HERE / "cmake"
SUFFIX = ".cpython-311-aarch64-linux-gnu.so"
QEMU = "qemu-aarch64-static"
# Programs, and the packages of Debian that have them.
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    QEMU: "qemu-user-static",
    "debootstrap": "debootstrap",
    "dpkg-deb": "dpkg",
}
DEBIAN = ("--arch=arm64", "--variant=minbase", "--include=python3,libgomp1,libpython3.11-dev", "bookworm")
# Torch 2.8 is the last whose wheel on PyPI for AArch64 has no CUDA and takes 100 MB.
TORCH = (
    "torch==2.8.0",
    "filelock",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
)
OTHERS = (
    "numpy<2.4",
    "pytest!=9.2.0",
    "hypothesis",
    "pillow",
    "safetensors",
    "huggingface_hub",
    "tqdm",
    "tyro",
    "scipy",
    "transformers",
)
# A processor's tests meet its newest level alone: the others are those of the processors below it, and no AArch64 is
# without NEON. None of ours uses SVE, by which torch computes where there is any.
NEWEST = "max,sve=off"
ENGINES = "tests/engines/cpu"
LEVELS = (f"{ENGINES}/test_forward.py", f"{ENGINES}/test_decoder.py", "tests/ops/test_elementwise_cpu.py")
TESTS = {
    NEWEST: (
        *LEVELS,
        "tests/ops/test_quantize.py",
        "tests/ops/test_sample.py",
        "tests/sampling/test_speculation.py",
        "tests/ops/test_causal_attention_cpu.py",
        "tests/model/test_product.py",
        *(f"{ENGINES}/{path.name}" for path in sorted((ROOT / ENGINES).glob("test_*.py")) if "tiles" not in path.name),
    ),
    "cortex-a76": LEVELS,  # without bf16
    "cortex-a72": LEVELS,  # without dot products
}


def run(*command: object, **options: object) -> None:
    subprocess.run(list(map(str, command)), check=True, **options)  # type: ignore[call-overload]


def install_programs() -> None:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"check-arm needs {', '.join(missing)} (Debian's names), and only root may install them")
    run("apt-get", "update", "-q")
    run("apt-get", "install", "-qy", "--no-install-recommends", *missing)


def once(folder: Path, make: object) -> None:
    """Makes a folder whole or not at all: ``done`` in it says that it is whole."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make()  # type: ignore[operator]
        (folder / "done").touch()


def unpack_debian() -> None:
    shutil.rmtree(DEBS, ignore_errors=True)
    run("debootstrap", "--download-only", *DEBIAN, DEBS, "http://deb.debian.org/debian", stdout=subprocess.DEVNULL)
    TREE.mkdir(parents=True)
    for package in sorted((DEBS / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, TREE)


def install_wheels() -> None:
    platforms = [f"--platform=manylinux{version}_aarch64" for version in ("_2_28", "_2_27", "2014", "_2_17")]
    options = (*platforms, "--python-version=3.11", "--implementation=cp", "--only-binary=:all:", "--upgrade", "-q")
    # Its requirements are those of the machine that asks, CUDA among them.
    for wheels in (("--no-deps", *TORCH), OTHERS):
        run(sys.executable, "-m", "pip", "install", *options, "--target", SITE, *wheels)


def build() -> Path:
    """The file of the module."""
    import pybind11

    headers = TREE / "usr" / "include"
    flags = f"-idirafter {headers}"
    definitions = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "CMAKE_CXX_FLAGS": flags,
        "Python_INCLUDE_DIR": headers / "python3.11",
        "Python_EXECUTABLE": sys.executable,
        "PYTHON_MODULE_EXTENSION": SUFFIX,
        "PYTHON_MODULE_DEBUG_POSTFIX": "",
        "PYTHON_IS_DEBUG": "OFF",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "IGPT_CUDA": "OFF",
        "IGPT_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in definitions.items()]
    run("cmake", "-S", ROOT, "-B", BUILT, "-G", "Ninja", *options, stdout=subprocess.DEVNULL)
    run("cmake", "--build", BUILT, stdout=subprocess.DEVNULL)
    return BUILT / f"_C{SUFFIX}"


def emulated(cpu: str, module: Path, *arguments: str) -> bool:
    """Whether the tests pass under qemu; what pytest says of them is printed at once."""
    python = TREE / "usr" / "bin" / "python3.11"
    environment = {"PYTHONPATH": f"{ROOT}:{SITE}", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = (QEMU, "-cpu", cpu, "-L", TREE, python, __file__, "--inside", module, *arguments)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=False, text=True, **both)
    print(f"check-arm: {cpu}, one of {' '.join(arguments)}\n{done.stdout}", end="", flush=True)
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    every, arguments = (arguments[1], arguments[2:]) if arguments[:1] == ["--every"] else ("1", arguments)
    install_programs()
    once(TREE, unpack_debian)
    once(SITE, install_wheels)
    module = build()
    tests = {cpu: [arguments] if arguments else [[test] for test in tests] for cpu, tests in TESTS.items()}
    jobs = list(dict.fromkeys((cpu, *some) for cpu, lists in tests.items() for some in lists))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = dict(zip(jobs, pool.map(lambda job: emulated(job[0], module, every, *job[1:]), jobs), strict=True))
    failed = [" ".join(job) for job, right in passed.items() if not right]
    print(f"check-arm: {'failed: ' + '; '.join(failed) if failed else 'passed on ' + ', '.join(TESTS)}")
    return int(bool(failed))


def inside(path: Path, arguments: list[str]) -> int:
    """Under qemu: the module from where it was built, and pytest."""
    import importlib.util

    import pytest
    import torch  # noqa: F401 # whose OpenMP is the one that runs

    import igpt_fast

    spec = importlib.util.spec_from_file_location("igpt_fast._C", path)
    assert spec is not None
    assert spec.loader is not None
    igpt_fast._C = sys.modules["igpt_fast._C"] = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]
    spec.loader.exec_module(sys.modules["igpt_fast._C"])
    import implementations

    implementations.ISAS[:-1] = []
    begin = subprocess.Popen.__init__

    def start(self: subprocess.Popen, command: Any, *others: Any, **options: Any) -> None:  # type: ignore[type-arg]
        if command[0] == sys.executable:
            pytest.skip("starts another interpreter, which would be one of this machine's")
        begin(self, command, *others, **options)

    subprocess.Popen.__init__ = start  # type: ignore[method-assign]
    every, *arguments = arguments

    class Some:
        @staticmethod
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            """Part of what -k and -m leave, not in step with how parameters alternate."""
            count = -(-len(items) // int(every))
            items[:] = [items[i] for i in sorted(random.Random(0).sample(range(len(items)), count))]

    return int(pytest.main(["-p", "no:cacheprovider", "--durations=5", *arguments], plugins=[Some()]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
