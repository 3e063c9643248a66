"""The engines by tiles (AMX) where the processor has none: their own tests, on a twin of the unit in software."""

import os
import subprocess
import sys
from pathlib import Path

import compiling
import pytest
import run_software_tiles

from igpt_fast import backend

if backend._C is None:
    pytest.skip(backend.native_reason, allow_module_level=True)
if reason := compiling.unavailable():
    pytest.skip(reason, allow_module_level=True)
if not dict(backend._C.cpu_isas()).get("avx512_bf16"):
    pytest.skip("the twin's products are AVX-512's, of bf16, which the processor lacks", allow_module_level=True)

TESTS = Path(__file__).resolve().parents[2]
BY_TILES = ("engines/cpu/test_forward.py", "engines/cpu/test_forward_taken.py", "engines/cpu/test_products.py")


@pytest.mark.parametrize("name", [*BY_TILES, "ops/test_causal_attention_cpu.py"])
def test_as_by_tiles(name: str) -> None:
    # What these tests say of other processes, of clocks and of compiling for torch is no matter of tiles.
    others = "not transforms"
    command = [sys.executable, run_software_tiles.__file__, "-k", others, "-m", "not clock", "-rs", TESTS / name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
