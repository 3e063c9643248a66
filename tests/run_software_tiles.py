"""Runs the tests that it is given, of the compiled CPU engines, where the processor has no tiles (AMX).

csrc/cpu is compiled as it is but for its tile unit, which tests/native/tiles.h stands for by AVX-512's products, and
the choice of an instruction set; the tests meet the module that this gives as ``igpt_fast._C``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "emulator"), str(Path(__file__).resolve().parent)]

from compiling import load  # noqa: E402 # found by the line above
from compiling_cpu import build  # noqa: E402

if __name__ == "__main__":
    import pytest
    import torch  # noqa: F401 # whose OpenMP is the one that runs

    sys.modules["igpt_fast._C"] = load(build(("generic", "amx"), software_tiles=True), "_C")
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
