"""nvcc compiles every kernel for every architecture without a warning, a spill, or memory of its own."""

import re
import shutil
import subprocess
from pathlib import Path

import compiling
import pytest

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=--warn-on-spills,-v"]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("kernel", sorted((compiling.ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_spills(kernel: Path, tmp_path: Path) -> None:
    assert NVCC is not None
    architectures = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    command = [NVCC, *FLAGS, *architectures, "-c", str(kernel), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(found) >= 2
    assert set(found) == {("0", "0", "0")}
