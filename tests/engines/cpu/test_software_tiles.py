"""The engines by tiles (AMX) where the processor has none: their own tests, on a twin of the unit in software."""

import os
import subprocess
import sys
from pathlib import Path

import compiling
import compiling_cpu
import pytest
import run_software_tiles

from igpt_fast import backend

if backend._C is None:
    pytest.skip(backend.native_reason, allow_module_level=True)
if reason := compiling.unavailable():
    pytest.skip(reason, allow_module_level=True)
if reason := compiling_cpu.software_tiles_unavailable():
    pytest.skip(reason, allow_module_level=True)

TESTS = Path(__file__).resolve().parents[2]
FORWARD = ("forward", "forward_taken", "int8_forward")
BY_TILES = tuple(f"engines/cpu/test_{name}.py" for name in (*FORWARD, "products", "rows"))


def test_as_by_tiles() -> None:
    """In one process, most of whose time is that of a few large tests."""
    names = [*BY_TILES, "ops/test_causal_attention_cpu.py"]
    # What these tests say of other processes, of clocks and of what torch registers is no matter of tiles.
    others = "not transforms and not opcheck"
    options = ["-k", others, "-m", "not clock", "-rs"]
    command = [sys.executable, run_software_tiles.__file__, *options, *(TESTS / name for name in names)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
