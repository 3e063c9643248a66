"""csrc/cpu under the address, undefined-behaviour and thread sanitizers; mutations_cpu.py says that these see."""

import os
import re
import subprocess
import sys
from pathlib import Path

import compiling
import compiling_cpu
import pytest
import run_sanitized

from igpt_fast import backend

REASON = backend.native_reason or compiling.unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=str(REASON))
CASES = re.findall(r'\{"(\w+)", \w+\}', (Path(__file__).parent / "threads.cpp").read_text("utf-8"))
BY_TILES = {"forward", "attention"}
TESTS = Path(__file__).resolve().parents[1]
# Every op and engine in short, and at length. What starts processes of its own, or measures memory, is no matter here.
QUICK = ("native/test_sizes.py", "engines/cpu/test_products.py")
LONG = (
    "ops/test_elementwise_cpu.py",
    *("engines/cpu/test_decoder.py", "engines/cpu/test_rows.py", "engines/cpu/test_shared_primer.py"),
    "engines/cpu/test_weights.py",
    *("engines/cpu/test_forward.py", "engines/cpu/test_forward_taken.py", "ops/test_causal_attention_cpu.py"),
    *("ops/test_sample.py", "sampling/test_speculation.py"),
    *("ops/test_quantize.py", "ops/test_dequantize.py", "ops/test_colour_table.py"),
)
OTHERS = ("memory", "process", "fork", "environment", "compile", "opcheck", "transforms", "without_tiles", "nats")
LEVELS = [name for name, supported in backend._C.cpu_isas() if supported] if backend._C else []


@pytest.mark.parametrize("case", CASES)
def test_no_race(case: str) -> None:
    tiles = case in BY_TILES
    reason = compiling.sanitizer_unavailable("thread") or (compiling_cpu.software_tiles_unavailable() if tiles else "")
    if reason:
        pytest.skip(reason)
    levels = ("generic", "amx") if tiles else ("generic",)
    program = compiling_cpu.build(levels, software_tiles=tiles, sanitizer="thread", program="threads")
    done = compiling.run_sanitized(program, case)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def clean(level: str, names: tuple[str, ...]) -> None:
    if reason := compiling.sanitizer_unavailable("address"):
        pytest.skip(reason)
    left_out = ["-m", "not clock", "-k", " and ".join(f"not {word}" for word in OTHERS)]
    command = [sys.executable, run_sanitized.__file__, level, *left_out, *(TESTS / name for name in names)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[pytest.mark.soak] if level != "generic" else []) for level in LEVELS]
)
def test_clean(level: str) -> None:
    clean(level, QUICK)


@pytest.mark.soak
@pytest.mark.parametrize("level", LEVELS)
def test_clean_at_length(level: str) -> None:
    clean(level, LONG)
