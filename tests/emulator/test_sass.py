"""The machine code of every kernel has the instructions that were meant; nvdisasm shows them.

A kernel without a line in ``FAMILIES`` fails. An instruction stands here with its modifiers, such as LDG.E.128; one
with fewer stands for those with more.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import nvcc
import pytest

REASON = nvcc.unavailable() or (None if nvcc.nvdisasm() else "no nvdisasm: pip install nvidia-cuda-nvdisasm")
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.xdist_group("nvcc")]

LOAD16, STORE16 = r"LDG\.E\b.*\.128", r"STG\.E\b.*\.128"
TENSOR = r"HMMA\.16816\.F32"  # m16n8k16, sums in float32
POSITION = r"LDG\.E\.STRONG\.GPU( |$)"  # past L1
ASYNC16 = r"LDGSTS\.E\b.*\.128"  # cp.async of 16 bytes
NEVER = {r"LDL": "memory of its own", r"STL": "memory of its own", r"(ATOM|ATOMG|RED)\b.*\.F(16|32|64)": "not in order"}


@dataclass(frozen=True)
class Family:
    """What all kernels of one template have, and which of them an exception is made for."""

    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    but: str = ""  # a pattern of names: instances that only NEVER holds for
    only: str = ""  # the one architecture that it is for; for the others it is a trap

    def of(self, arch: str) -> "Family":
        """What they have for one architecture."""
        return self if self.only in ("", arch) else TRAP


TRAP = Family(has=(r"BPT\.TRAP",), lacks=(r"STG",))
VECTORS = Family(has=(LOAD16, STORE16))
# Two 16-bit tiles and their product; the sums leave through shared memory as whole vectors.
ATTENTION = Family(has=(TENSOR, ASYNC16, r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", STORE16, r"MUFU\.EX2"))
# Products of warpgroups, tile copies, waits for barriers in shared memory; nothing else reads global memory in bulk.
HOPPER = Family(
    has=(r"HGMMA\.64x\d+x16\.F32", r"UTMALDG\.4D", r"SYNCS\.PHASECHK", STORE16, r"MUFU\.EX2"),
    lacks=(TENSOR, ASYNC16, LOAD16),
    only="90a",
)
FAMILIES = {
    "norm_fwd_kernel": VECTORS,
    "norm_bwd_kernel": VECTORS,
    "column_sum_kernel": Family(has=(r"LDG\.E",)),  # a warp reads 128 bytes of a row of partial sums
    "activation_fwd_kernel": VECTORS,
    "activation_bwd_kernel": VECTORS,
    "bias_activation_fwd_kernel": VECTORS,
    "bias_activation_bwd_kernel": VECTORS,
    # Single: rows that are no multiple of a vector.
    "cross_entropy_fwd_kernel": Family(has=(LOAD16,), but="Single<"),
    "cross_entropy_bwd_kernel": Family(has=(LOAD16, STORE16), but="Single<"),
    "cross_entropy_total_kernel": Family(has=(r"LDG\.E\.64",)),  # a sum and a count of each block
    "attention_fwd_kernel": ATTENTION,
    "attention_fwd_hopper_kernel": HOPPER,
    "attention_bwd_hopper_kernel": HOPPER,
    "attention_dkv_kernel": ATTENTION,
    "attention_dq_kernel": ATTENTION,
    "attention_terms_kernel": Family(has=(LOAD16,)),
    # All of keys and values, of 8 bits too, as whole vectors; alone a position, a start, a key's scale.
    "attention_decode_kernel": Family(has=(LOAD16, STORE16), lacks=(r"LDG\.E\.(U8|U16|64)",)),
    # The cache comes by whole tiles, which barriers count; by registers alone the query and the new key and value, and,
    # past L1, the position.
    "attention_decode_ring_kernel": Family(
        has=(LOAD16, r"STG\.E\b.*\.(64|128)", r"LDS.*\.(64|128)", POSITION, r"UBLKCP", r"SYNCS\.PHASECHK"),
        lacks=(ASYNC16,),
        only="90a",
    ),
    "attention_decode_prefix_kernel": Family(has=(LOAD16, TENSOR)),
    "attention_decode_merge_kernel": Family(has=(r"LDG\.E",)),  # a warp reads 128 bytes of a part
    "gemv_kernel": Family(has=(LOAD16, TENSOR)),
    "gemv_rows_kernel": Family(has=(LOAD16, TENSOR, ASYNC16), lacks=(r"LDG\.E\.(U8|U16|64)",)),
    "quantize_kernel": Family(has=(r"LDS.*\.128", r"STG\.E\.64")),  # rounds after every operation, so no FFMA
    "quantize_table_kernel": Family(has=(r"LDS.*\.128", r"STG\.E\.64")),
    "quantize_lookup_kernel": VECTORS,
    "dequantize_kernel": Family(has=(STORE16,)),  # as many tokens as make 4, 8 or 16 bytes
    "sample_kernel": VECTORS,
}


def faults(name: str, found: dict[str, int], family: Family) -> list[str]:
    """What is wrong with a kernel that has these instructions."""

    def times(pattern: str) -> int:
        return sum(n for instruction, n in found.items() if re.match(pattern, instruction))

    wrong = [f"{name} has {pattern}: {why}" for pattern, why in NEVER.items() if times(pattern)]
    if family.but and re.search(family.but, name):
        return wrong
    wrong += [f"{name} has no {pattern}" for pattern in family.has if not times(pattern)]
    return wrong + [f"{name} has {pattern}" for pattern in family.lacks if times(pattern)]


@pytest.mark.parametrize("arch", nvcc.ARCHITECTURES)
def test_instructions(arch: str) -> None:
    wrong = []
    for compiled in nvcc.compile_all():
        assert compiled.success, compiled.output[-1000:]
        for name, found in nvcc.instructions(compiled, arch).items():
            assert found, f"{name}: no code"
            family = FAMILIES.get(nvcc.family(name))
            wrong += faults(name, found, family.of(arch)) if family else [f"{name} has no line in FAMILIES"]
    assert not wrong, "\n".join(wrong)


def test_every_family_has_kernels() -> None:
    names = {nvcc.family(name) for compiled in nvcc.compile_all() for name in nvcc.resources(compiled)}
    assert set(FAMILIES) <= names, set(FAMILIES) - names


def test_quantize_does_not_contract() -> None:
    """Its definition rounds after every operation: CMakeLists.txt says --fmad=false, and nvcc.py reads it there."""
    (compiled,) = (compiled for compiled in nvcc.compile_all() if compiled.source.name == "quantize.cu")
    for arch in nvcc.ARCHITECTURES:
        for name, found in nvcc.instructions(compiled, arch).items():
            if "Float" in name:
                assert not {i for i in found if i.startswith("FFMA")}, name


def between_waits(lines: list[str]) -> list[int]:
    """How many exponentials stand between every two waits for products."""
    waits = [i for i, line in enumerate(lines) if line.startswith("WARPGROUP.DEPBAR")]
    return [sum(line.startswith("MUFU.EX2") for line in lines[i:j]) for i, j in pairwise(waits)]


def test_codes_of_8_bits_are_read_by_their_instruction() -> None:
    """Where there is one; by integers they take more instructions than a byte of memory leaves time for."""
    (compiled,) = (compiled for compiled in nvcc.compile_all() if compiled.source.name == "attention_decode.cu")
    for arch in ("89", "90a"):
        scaled = [found for name, found in nvcc.instructions(compiled, arch).items() if "E4M3" in name]
        assert len(scaled) == 16
        assert all(found.get("F2FP.F16.E4M3.UNPACK_B", 0) >= 16 for found in scaled)


def beside_products(lines: list[str]) -> list[int]:
    """How many exponentials stand between a wait for all products but the newest and the wait for that one."""
    waits = [line for line in lines if line.startswith("WARPGROUP.DEPBAR")]
    counts = zip(pairwise(waits), between_waits(lines), strict=True)
    return [count for (one, two), count in counts if one.endswith(" 0x1") and two.endswith(" 0x0")]


def test_softmax_runs_beside_the_products() -> None:
    """In the forward for Hopper: the assembler is free to put it off until they are waited for."""
    (compiled,) = (compiled for compiled in nvcc.compile_all() if compiled.source.name == "attention_fwd_hopper.cu")
    for name, lines in nvcc.code(compiled, "90a").items():
        assert beside_products(lines) == [64 * 64 // 128 + 2], name  # weights of a thread, and its rows' maxima


def test_weights_are_formed_beside_the_products() -> None:
    """In the backward for Hopper, between the waits for S and for dP: first before the loop, and then in it."""
    (compiled,) = (compiled for compiled in nvcc.compile_all() if compiled.source.name == "attention_bwd_hopper.cu")
    for name, lines in nvcc.code(compiled, "90a").items():
        assert between_waits(lines)[2:] == [64 * 64 // 128, 0], name


def hopper_code() -> dict[str, list[str]]:
    """Kernel of attention for Hopper, forward and backward -> its instructions."""
    sources = ("attention_fwd_hopper.cu", "attention_bwd_hopper.cu")
    found = [nvcc.code(compiled, "90a") for compiled in nvcc.compile_all() if compiled.source.name in sources]
    return {name: lines for kernels in found for name, lines in kernels.items()}


def test_registers_are_divided() -> None:
    """In attention for Hopper: what the warpgroups that compute have, and the one that loads."""
    for name, lines in hopper_code().items():
        found = [int(line.split()[-1], 16) for line in lines if line.startswith("USETMAXREG")]
        two_groups = "HopperBwd<128" in name or ", true>" in name
        wanted = [] if "HopperFwd<64>" in name else [240, 24] if two_groups else [160, 32]
        assert found == wanted, name


def test_own_tiles_are_in_registers() -> None:
    """In the backward for Hopper with a head dimension of 64: A of S, and for dk and dv of dP, is none in memory."""
    for name, lines in hopper_code().items():
        if "HopperBwd" in name:
            scores = [line for line in lines if line.startswith("HGMMA.64x64x16") and ".tnspB" not in line]
            held = [line for line in scores if re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line)]
            share = 0 if "HopperBwd<64," not in name else 2 if ", true>" in name else 1
            assert scores, name
            assert 2 * len(held) == share * len(scores), name


def test_exponentials_beside_products_are_counted() -> None:
    first, last = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    exp = "MUFU.EX2 R4, R5"
    assert beside_products([last, exp, first, exp, "FADD R1, R2, R3", exp, last, exp]) == [2]
    assert beside_products([exp, first, last, exp]) == [0]
    assert beside_products([exp, last, exp]) == []
    assert between_waits([exp, first, exp, last, first, exp, exp, last, exp]) == [1, 0, 2]


# Kernels that may be launched while the one before ends (launch.cuh), and what of memory they read before they wait.
DEPENDENT = {
    "attention_decode_kernel": (),
    # The position and a start; bulk copies of what is old. Neither scales nor the query nor the new key or value.
    "attention_decode_ring_kernel": (POSITION,),
    "attention_decode_prefix_kernel": (),
    "attention_decode_merge_kernel": (),
    "gemv_kernel": (r"LDG",),  # weight, bias, the norm's weight
    "gemv_rows_kernel": (r"LDG",),
    "sample_kernel": (),
}
MEMORY = (r"LDG", r"STG", r"ATOM", r"RED", r"LD\b", r"ST\b", r"EXIT")


def before_the_wait(lines: list[str]) -> list[str] | None:
    """What a kernel does with global memory, or ends, before griddepcontrol.wait; ``None`` if it does not wait."""
    waits = [i for i, line in enumerate(lines) if line.startswith("ACQBULK")]
    if not waits:
        return None
    return [line for line in lines[: waits[0]] if any(re.match(pattern, line) for pattern in MEMORY)]


def test_dependent_kernels_wait() -> None:
    """Before they read what the launch before writes, write anything, or return: else the next one would not wait."""
    seen = set()
    for compiled in nvcc.compile_all():
        for name, lines in nvcc.code(compiled, "90a").items():
            if (family := nvcc.family(name)) in DEPENDENT:
                seen.add(family)
                early = before_the_wait(lines)
                assert early is not None, name
                assert [line for line in early if not any(re.match(p, line) for p in DEPENDENT[family])] == [], name
    assert seen == set(DEPENDENT)


def test_gemv_lets_the_next_begin_at_once() -> None:
    """Before it waits, if it is told to; it has asked for the norm's weight by then, asynchronously."""
    both = [compiled for compiled in nvcc.compile_all() if compiled.source.name in ("gemv.cu", "gemv_rows.cu")]
    for name, lines in (item for compiled in both for item in nvcc.code(compiled, "90a").items()):
        before = lines[: next(i for i, line in enumerate(lines) if line.startswith("ACQBULK"))]
        assert sum(line.startswith("PREEXIT") for line in before) == 1, name
        assert sum(line.startswith("PREEXIT") for line in lines) == 2, name
        assert any(re.match(ASYNC16, line) for line in before) == (", true, " in name or "rows" in name), name


def test_what_comes_before_the_wait_is_found() -> None:
    assert before_the_wait(["LDC R1, c[0x0]", "ACQBULK", "LDG.E R1, desc[UR4][R2.64]", "EXIT"]) == []
    assert before_the_wait(["LDG.E R1, R2", "EXIT", "ACQBULK"]) == ["LDG.E R1, R2", "EXIT"]
    assert before_the_wait(["LDG.E R1, R2", "EXIT"]) is None


def test_faults_are_found() -> None:
    good = {"LDG.E.128.CONSTANT": 4, "STG.E.128": 2, "FADD": 3}
    assert faults("f", good, VECTORS) == []
    assert faults("f", {"LDG.E": 4, "STG.E.128": 2}, VECTORS) == [f"f has no {LOAD16}"]
    assert faults("f", {**good, "LDL.64": 1}, VECTORS) == ["f has LDL: memory of its own"]
    assert faults("f", {**good, "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}, VECTORS) != []
    assert faults("f", {**good, "FFMA": 1}, Family(lacks=("FFMA",))) == ["f has FFMA"]
    assert faults("f<float>", {"LDG.E": 1}, Family(has=(LOAD16,), but="float")) == []
