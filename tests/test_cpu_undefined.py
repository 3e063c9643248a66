"""The plain level of csrc/cpu under the undefined-behaviour sanitizer, with numbers that are not finite."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-O0",
    "-ffp-contract=off",
    "-fopenmp",
    "-fsanitize=undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository"),
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
]


def test_numbers_that_are_not_finite_are_defined(tmp_path: Path) -> None:
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    listed = re.search(r"add_library\(igpt_cpu STATIC(.*?)\)", text, re.DOTALL)
    assert listed is not None
    sources = [ROOT / name for name in (*listed.group(1).split(), "tests/native/portable.cpp")]

    def compile(source: Path) -> Path:
        target = tmp_path / f"{source.parent.name}-{source.stem}.o"
        command = [COMPILER, *FLAGS, "-I", ROOT / "csrc", "-c", source, "-o", target]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    program = tmp_path / "portable"
    subprocess.run(list(map(str, [COMPILER, *FLAGS, *objects, "-o", program])), check=True, timeout=300)
    done = subprocess.run([str(program), "generic", "wild"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nan" in done.stdout
