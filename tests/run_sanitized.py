"""Runs the tests that it is given on csrc/cpu under the address and undefined-behaviour sanitizers.

    python run_sanitized.py LEVELS TESTS...      LEVELS: instruction sets of this machine, such as generic,avx2

The module ``igpt_fast._C`` is compiled with them for these levels, of which the last is chosen; the process starts
again with the sanitizer's library in front of all others, as Python itself has none. Its own leaks are not looked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "emulator"), str(Path(__file__).resolve().parent)]

from compiling import COMPILER, launcher, load, run  # noqa: E402 # found by the line above
from compiling_cpu import build  # noqa: E402

LIBRARIES = ("libasan.so", "libstdc++.so")
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def start_again(libraries: str) -> None:
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": libraries, "OMP_NUM_THREADS": "1"}
    command = [*launcher(), sys.executable, *sys.argv]
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    # C++'s library too: the sanitizer looks for it as it begins, and Python has it only later.
    runtime = ":".join(run(COMPILER, f"-print-file-name={name}").stdout.strip() for name in LIBRARIES)
    if os.environ.get("LD_PRELOAD") != runtime:
        start_again(runtime)
    module = build(sys.argv[1].split(","), sanitizer="address")

    import pytest
    import torch  # noqa: F401 # whose OpenMP is the one that runs

    sys.modules["igpt_fast._C"] = load(module, "_C")
    # What a sanitizer says as it ends the process goes to the descriptor.
    sys.exit(pytest.main(["-p", "no:cacheprovider", "--capture=sys", *sys.argv[2:]]))
