"""All of csrc/cpu compiles with clang++ without a warning, without OpenMP, for x86-64 and for AArch64."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLANG = shutil.which("clang++")
# As CMakeLists.txt has them where there is no OpenMP, which is another package of clang's.
FLAGS = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-ffp-contract=off")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository"),
    pytest.mark.skipif(CLANG is None, reason="clang++ is not installed (Debian: clang)"),
]


def sources(text: str) -> dict[Path, tuple[str, ...]]:
    """Those of CMakeLists.txt with the flags of each, without what `set` names stand for."""
    listed = re.findall(r"csrc/cpu/[\w/]+\.cpp", text)
    lists: dict[str, list[str]] = {}
    for name, flags in re.findall(r"^  set\((\w+) (.*-m.*)\)$", text, re.MULTILINE):
        lists[name] = [flag for word in flags.split() for flag in lists.get(word.strip("${}"), [word])]
    own = dict(re.findall(r'set_source_files_properties\((\S+) PROPERTIES COMPILE_OPTIONS\s+"([^"]*)"', text))
    found = {}
    for name in dict.fromkeys(listed):
        flags = own.get(name, "")
        found[ROOT / name] = tuple(
            lists[flags.strip("${}")] if flags.startswith("${") else filter(None, flags.split(";"))
        )
    return found


def test_compiles_without_a_warning() -> None:
    found = sources((ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert set(found) == set((ROOT / "csrc" / "cpu").rglob("*.cpp"))
    assert "-mamx-tile" in found[ROOT / "csrc/cpu/isa/amx.cpp"]
    every = {path for path, flags in found.items() if not flags}
    arm = {path for path, flags in found.items() if "-DIGPT_NEON" in flags}
    cross = shutil.which("aarch64-linux-gnu-g++") is not None  # whose headers it takes
    jobs = [(path, found[path], "-DIGPT_X86") for path in sorted(found.keys() - arm)]
    jobs += [
        (path, found[path], "--target=aarch64-linux-gnu", "-DIGPT_AARCH64") for path in sorted(arm | every) if cross
    ]

    def compile(job: tuple[Path, tuple[str, ...], str]) -> str:
        path, flags, *machine = job
        command = [CLANG, *FLAGS, "-Wno-unknown-pragmas", *machine, *flags, "-I", ROOT / "csrc", path]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        errors = [text for text in pool.map(compile, jobs) if text]
    assert not errors, "\n".join(errors)
