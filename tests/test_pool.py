"""The threads that csrc/cpu has of its own where the compiler has no OpenMP; also under the thread sanitizer."""

import shutil
import subprocess
from pathlib import Path

import compiling
import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository"),
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
]


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_regions_are_whole(sanitizer: str | None, tmp_path: Path) -> None:
    if sanitizer and (reason := compiling.sanitizer_unavailable(sanitizer)):
        pytest.skip(reason)
    sources = [ROOT / "csrc/cpu/pool.cpp", ROOT / "tests/native/pool.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", ROOT / "csrc"]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    program = tmp_path / "pool"
    subprocess.run(list(map(str, [COMPILER, *flags, *sources, "-o", program])), check=True, timeout=120)
    before = compiling.launcher() if sanitizer else ()
    done = subprocess.run([*before, str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alone 1500\nat once 600\nchild 7\nlate 1\n"
