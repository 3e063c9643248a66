"""AArch64: all of csrc/cpu compiles for it without a warning, and every level computes there what the plain one does
here. ``make check-arm`` runs the tests of the CPU part there, with torch.
"""

import math
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
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
LEVELS = ("generic", "neon", "neon_dotprod", "neon_bf16")  # slowest first
PROCESSORS = {"cortex-a72": LEVELS[:2], "cortex-a76": LEVELS[:3], "max": LEVELS}

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


def levels() -> dict[Path, tuple[str, ...]]:
    """The sources of AArch64's levels, and the flags that CMakeLists.txt gives them."""
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    found = re.findall(r'set_source_files_properties\(csrc/cpu/isa/(neon\w*)\.cpp\s[^"]*"([^"]*)"', text)
    assert tuple(name for name, _ in found) == LEVELS[1:]
    return {CPU / "isa" / f"{name}.cpp": (*flags.split(";"), "-fno-exceptions") for name, flags in found}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("aarch64")

    def compiled(item: tuple[Path, tuple[str, ...]]) -> Path:
        target = folder / f"{item[0].stem}.o"
        run(CROSS, *FLAGS, "-DIGPT_AARCH64", *item[1], "-I", ROOT / "csrc", "-c", item[0], "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, (dict.fromkeys(sources(), ()) | levels()).items()))


def test_compiles_without_a_warning(objects: list[Path]) -> None:
    header = run("aarch64-linux-gnu-readelf", "-h", objects[0])
    assert "AArch64" in header


def test_every_source_is_compiled_or_x86s() -> None:
    left = {str(path.relative_to(CPU)) for path in set(CPU.rglob("*.cpp")) - set(sources()) - set(levels())}
    assert all(re.fullmatch(r"isa/(avx|amx)\w*\.cpp", name) for name in left), left


def test_levels_have_their_instructions_and_share_nothing(objects: list[Path]) -> None:
    """A level that lacks them would run, and be slow; a weak symbol of one could serve every processor."""
    found = {path.stem: path for path in objects if path.stem in LEVELS}
    assert tuple(found) == LEVELS
    for name, path in found.items():
        code = run("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", path)
        at = LEVELS.index(name)
        has = [f"\t{op}\t" in code for op in ("fmla", "sdot", "bfdot", "bfmmla", "smmla")]
        assert has == [at > 0, at > 1, at > 2, at > 2, at > 2], name
        lines = run("aarch64-linux-gnu-nm", "-C", "--defined-only", path).splitlines()
        shared = [line.split(None, 2)[2] for line in lines if line.split(None, 2)[1] not in "bdrt"]
        assert shared == [f"igpt::cpu::{name}_ops"], name


def numbers(text: str) -> dict[str, list[float]]:
    """What the driver has printed, by what it belongs to."""
    found = defaultdict(list)
    for line in text.splitlines():
        name, number = line.split()
        found[name].append(float(number))
    return found


# Of the root mean square: rounding in another order; of inputs to 15 bits; of inputs to bf16; a bf16 that ties.
SMALL, BYTES, PAIRS, TIES = 1e-6, 1e-3, 1e-2, 1e-4


def bound(level: str, name: str) -> float:
    op, _, format_ = name.partition("-")
    at = LEVELS.index(level)
    if format_ == "int8" and op.startswith("forward"):  # roundings that the last bit turns; attention is in bf16
        return PAIRS if at > 2 else BYTES
    if format_ == "int8" and at > 1:
        return BYTES
    if format_ == "bf16" and at > 2 and op.startswith(("logits", "attention", "forward")):
        return PAIRS
    return TIES if format_ == "bf16" and op != "logits" else SMALL


def off(name: str, got: dict[str, list[float]], want: dict[str, list[float]]) -> list[tuple[str, float]]:
    """What a level has computed otherwise than the plain one, and by how much."""
    errors = {key: math.dist(got[key], values) / math.hypot(*values) for key, values in want.items()}
    return [(key, error) for key, error in errors.items() if not error < bound(name, key)]


@pytest.fixture(scope="module")
def want() -> dict[str, list[float]]:
    """The plain level's numbers, here."""
    if QEMU is None:
        pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user)")
    if reason := compiling.unavailable():
        pytest.skip(reason)
    if platform.machine() != "x86_64":
        pytest.skip("compares with x86-64")
    found = numbers(run(compiling_cpu.build(("generic",), program="portable"), "generic"))
    assert len(set(found["logits-fp32"])) > 80
    return found


def test_computes_what_the_plain_level_does_here(
    objects: list[Path], want: dict[str, list[float]], tmp_path: Path
) -> None:
    """Clusters are equal; the rest up to rounding, and the C libraries' expf differ."""
    run(CROSS, *FLAGS, "-static", "-I", ROOT / "csrc", DRIVER, *objects, "-o", tmp_path / "there")
    for processor, names in PROCESSORS.items():
        assert tuple(run(QEMU, "-cpu", processor, tmp_path / "there").split()) == names
    for processor, name in (("max", "generic"), *((cpu, names[-1]) for cpu, names in PROCESSORS.items())):
        got = numbers(run(QEMU, "-cpu", processor, tmp_path / "there", name))
        assert {key: len(values) for key, values in got.items()} == {key: len(values) for key, values in want.items()}
        for key in ("u8", "f32"):
            assert got[key] == want[key], (name, key)
        assert not off(name, got, want), name


# Of products of two rows by two columns, which no other machine's level has: see tests/native/mutations_cpu.py.
MISTAKES = [
    ("simd/neon", "second = reinterpret_cast<V>(vzip2q_s64(x, y));", "second = first;"),
    ("simd/neon", "second = vzip2q_s32(a, b);", "second = first;"),
    ("block", "if (g < groups) interleave_words(", "if (g + 2 < groups) interleave_words("),
    ("block", "padded(p.depth, Kind::step) / Kind::step", "p.depth / Kind::step"),
    ("block", "pair_halves(load_ints(row), load_ints(row + row_bytes)", "pair_halves(load_ints(row), load_ints(row)"),
    ("block", "acc[2 * r + c % 2][c / 2]", "acc[2 * r][c / 2]"),
    ("block", "pair_halves(even, odd, even, odd);", ""),
    ("gemm", "if constexpr (turns) w = turn_weights", "if constexpr (turns) turn_weights"),
    ("attention_blocks", "turned + l * kTileBytes);", "turned);"),
    ("attention_blocks", "a += p.a_below, ", ""),
]
MUTATIONS = [
    compiling.Mutation(f"aarch64_{i}", f"cpu/bodies/{stem}.h", old, new) for i, (stem, old, new) in enumerate(MISTAKES)
]


def test_every_mistake_has_its_place() -> None:
    for mutation in MUTATIONS:
        mutation.apply((ROOT / "csrc" / mutation.file).read_text("utf-8"))


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_finds_a_mistake(
    objects: list[Path], want: dict[str, list[float]], mutation: compiling.Mutation, tmp_path: Path
) -> None:
    csrc, name = compiling.Tree(mutation).csrc, LEVELS[-1]
    flags = (*FLAGS, "-w", *levels()[CPU / "isa" / f"{name}.cpp"], "-DIGPT_AARCH64", "-I", csrc)
    run(CROSS, *flags, "-O0", "-c", csrc / "cpu" / "isa" / f"{name}.cpp", "-o", tmp_path / "mistaken.o")
    others = [path for path in objects if path.stem != name]
    run(CROSS, *flags, "-static", DRIVER, *others, tmp_path / "mistaken.o", "-o", tmp_path / "there")
    command = [str(QEMU), "-cpu", "max", str(tmp_path / "there"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0 or off(name, numbers(done.stdout), want), "survives"
