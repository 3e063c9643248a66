"""AArch64: all of csrc/cpu compiles for it without a warning, and computes there what the plain level does here."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import compiling
import compiling_cpu
import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc" / "cpu"
DRIVER = ROOT / "tests" / "native" / "portable.cpp"
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# As CMakeLists.txt has it.
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-ffp-contract=off", "-fopenmp")

pytestmark = [
    pytest.mark.xdist_group("aarch64"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository"),
    pytest.mark.skipif(CROSS is None, reason="aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)"),
]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> list[Path]:
    """Those that CMakeLists.txt compiles for every processor."""
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    listed = re.search(r"add_library\(igpt_cpu STATIC(.*?)\)", text, re.DOTALL).group(1)  # type: ignore[union-attr]
    assert {"csrc/cpu/isa/generic.cpp", "csrc/cpu/decoder.cpp"} <= set(listed.split())
    return [ROOT / name for name in listed.split()]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("aarch64")
    compiled = []
    for source in sources():
        compiled.append(folder / f"{source.stem}.o")
        run(CROSS, *FLAGS, "-I", ROOT / "csrc", "-c", source, "-o", compiled[-1])
    return compiled


def test_compiles_without_a_warning(objects: list[Path]) -> None:
    header = run("aarch64-linux-gnu-readelf", "-h", objects[0])
    assert "AArch64" in header


def test_every_source_is_compiled_or_x86s() -> None:
    left = {str(path.relative_to(CPU)) for path in set(CPU.rglob("*.cpp")) - set(sources())}
    assert all(re.fullmatch(r"isa/(avx|amx)\w*\.cpp", name) for name in left), left


@pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (Debian: qemu-user)")
@pytest.mark.skipif(compiling.unavailable() is not None, reason=str(compiling.unavailable()))
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
def test_computes_what_the_plain_level_does_here(objects: list[Path], tmp_path: Path) -> None:
    """Clusters are equal; logits up to rounding: the C libraries' expf differ."""
    run(CROSS, *FLAGS, "-static", "-I", ROOT / "csrc", DRIVER, *objects, "-o", tmp_path / "there")
    program = compiling_cpu.build(("generic",), program="portable")
    there, here = (run(*command).split() for command in ((QEMU, tmp_path / "there"), (program,)))
    assert there[:2002] == here[:2002]
    assert len(there) == len(here) == 2002 + 3 * 6 * 16
    got, want = ([float(x) for x in lines[2002:]] for lines in (there, here))
    assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert len(set(want)) > 250
