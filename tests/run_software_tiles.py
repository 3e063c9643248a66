"""Runs the tests that it is given, of the compiled CPU engines, where the processor has no tiles (AMX), and those of AVX-VNNI where
it has AVX-512's instead.

csrc/cpu is compiled as it is but for its tile unit, which tests/native/tiles.h stands for by AVX-512's products, the
encoding of AVX-VNNI's (tests/native/avx_vnni.h), and the choice of an instruction set; the tests meet the module that this gives as ``igpt_fast._C``.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "emulator")]

from compiling import CACHE, Tree, alone, link, load, python_flags  # noqa: E402 # found by the line above

# As CMakeLists.txt has them, without the tiles themselves.
EVERY = ("-O2", "-fno-math-errno", "-fopenmp", "-DIGPT_X86")
AVX512 = ("f", "bw", "dq", "vl", "vnni", "bf16")
TILES = ("-mfma", "-mprefer-vector-width=512", "-fno-exceptions", *(f"-mavx512{part}" for part in AVX512))
VNNI = ("-mavx2", "-mfma", "-mavxvnni", "-fno-exceptions", "-include", str(ROOT / "tests" / "native" / "avx_vnni.h"))
INFO = """#define IGPT_VERSION "{version}"
#define IGPT_COMPILER "the tests'"
#define IGPT_OPENMP_STATUS "yes"
#define IGPT_CUDA_STATUS "off"
"""


def build() -> Path:
    """The file of the module."""
    tree, native = Tree(), ROOT / "tests" / "native"
    tree.csrc = CACHE / "tiles" / "csrc"
    with alone(tree.csrc):
        shutil.rmtree(tree.csrc, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", tree.csrc)
        shutil.copy(native / "tiles.h", tree.csrc / "cpu" / "bodies" / "simd" / "tiles.h")
        shutil.copy(native / "tiles_choice.cpp", tree.csrc / "cpu" / "isa" / "choice.cpp")
        version = re.search(r'^__version__ = "(.*)"', (ROOT / "igpt_fast" / "__init__.py").read_text("utf-8"), re.M)
        assert version is not None
        (tree.csrc / "build_info.h").write_text(INFO.format(version=version[1]), "utf-8")
        cpu, bind = tree.csrc / "cpu", tree.csrc / "bind"
        isa = {"choice.cpp": (), "generic.cpp": ("-fno-exceptions",), "avx_vnni.cpp": VNNI, "amx.cpp": TILES}
        sources = [(path, EVERY) for path in sorted(cpu.glob("*.cpp"))]
        sources += [(cpu / "isa" / name, (*EVERY, *flags)) for name, flags in isa.items()]
        names = ("module", "cpu", "decoder", "forward")
        sources += [(bind / f"{name}.cpp", ("-DIGPT_X86", *python_flags())) for name in names]
        objects = tree.objects(sources)
    return link(objects, f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "-shared", "-fopenmp")


if __name__ == "__main__":
    import pytest
    import torch  # noqa: F401 # whose OpenMP is the one that runs

    sys.modules["igpt_fast._C"] = load(build(), "_C")
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
