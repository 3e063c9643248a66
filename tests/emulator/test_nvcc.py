"""nvcc compiles every kernel for every architecture without a warning, a spill, or memory of its own.

And into what was meant: the table of resources (resources.json), the machine code (test_sass.py).
"""

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType

import compiling
import nvcc
import pytest
import resources

REASON = nvcc.unavailable()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.xdist_group("nvcc")]
SECONDS = 240  # for the whole build on two cores; on a quiet machine it takes 140


@pytest.fixture(scope="module")
def built() -> dict[str, nvcc.Compiled]:
    return {compiled.source.name: compiled for compiled in nvcc.compile_all()}


@pytest.mark.parametrize("source", nvcc.sources(), ids=lambda path: path.stem)
def test_neither_warnings_nor_spills(built: dict[str, nvcc.Compiled], source: Path) -> None:
    compiled = built[source.name]
    assert compiled.success, compiled.output[-3000:]
    table = nvcc.resources(compiled)
    for name, row in table.items():
        assert set(row) == set(nvcc.ARCHITECTURES), name
        for arch, has in row.items():
            assert (has.stack, has.spill_stores, has.spill_loads) == (0, 0, 0), f"{name} for sm_{arch}: {has}"


@pytest.mark.parametrize("source", nvcc.sources(), ids=lambda path: path.stem)
def test_no_advice_of_the_assembler(built: dict[str, nvcc.Compiled], source: Path) -> None:
    """C75xx: what ptxas had to do to wgmma, such as to wait for each, which costs most of its speed."""
    found = advice(built[source.name].output)
    assert not found, found


def advice(output: str) -> list[str]:
    return re.findall(r".*\(C75\d\d\).*", output)


def test_advice_is_recognised() -> None:
    line = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert advice(f"ptxas info    : 0 bytes gmem\n{line}\n") == [line]


def test_launchers_ask_for_the_code_and_not_for_the_device() -> None:
    """What older PTX becomes on a newer device lacks what that device could do. Alone: kernels for exactly sm_90a, in a
    build that has code for it, which that device then takes.
    """
    asking = [path.name for path in sorted(nvcc.CUDA.iterdir()) if "ComputeCapability" in path.read_text()]
    assert asking == ["attention.cu"]
    before, _, after = (nvcc.CUDA / "attention.cu").read_text().partition("#if defined(IGPT_SM_90A)")
    assert "ComputeCapability" not in before + after.partition("#else")[2]


@pytest.mark.parametrize("end", ["kill -9 $$", "kill -INT $$", "exit 1"])
def test_what_nvcc_did_not_finish_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    program, source = tmp_path / "nvcc", tmp_path / "cuda" / "kernel.cu"
    source.parent.mkdir()
    source.write_text("// nothing\n")
    program.write_text(f"#!/bin/sh\necho said\n[ -e {tmp_path}/again ] && exit 0\n{end}\n")
    program.chmod(0o755)
    for name, value in {"NVCC": str(program), "CACHE": tmp_path / "cache", "CUDA": source.parent}.items():
        monkeypatch.setattr(nvcc, name, value)
    monkeypatch.setattr(nvcc, "version", lambda: "0")
    first = nvcc.compile_one(source)
    assert not first.success
    assert re.search(r"said\n+nvcc ended with (-9|-2|1)$", first.output)
    (tmp_path / "again").touch()
    assert nvcc.compile_one(source).success
    (tmp_path / "again").unlink()
    assert nvcc.compile_one(source).output == "said\n", "what was finished is kept"
    (tmp_path / "cache" / "kernel-0.partial").mkdir()
    (tmp_path / "cache" / "kernel-0.partial" / "status").touch()
    assert all(compiled.success for compiled in nvcc.compile_all.__wrapped__())


def test_a_build_takes_its_objects_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CMake asks, in the order of its flags; with others, nothing. What is no kernel goes to nvcc as it is."""
    program, source, target = tmp_path / "nvcc", tmp_path / "cuda" / "quantize.cu", tmp_path / "quantize.cu.o"
    source.parent.mkdir()
    source.write_text("// nothing\n")
    program.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$@" >> {tmp_path}/said\necho code > "$last"\n')
    program.chmod(0o755)
    for name, value in {"NVCC": str(program), "CACHE": tmp_path / "cache", "CUDA": source.parent}.items():
        monkeypatch.setattr(nvcc, name, value)
    monkeypatch.setattr(nvcc, "version", lambda: "0")

    def ask(path: Path, *flags: str) -> int:
        places = ("-MD", "-MT", "quantize.cu.o", "-MF", f"{target}.d", "-x", "cu", "-c", str(path), "-o", str(target))
        return nvcc.launch([str(program), "-forward-unknown-to-host-compiler", *flags, *places])

    assert ask(source, *nvcc.FLAGS) == 2, "quantize.cu has a flag of its own"
    assert ask(source, *nvcc.FLAGS, "--fmad=false", "-G") == 2
    assert not target.exists()
    assert [ask(source, *nvcc.FLAGS, "--fmad=false") for _ in range(2)] == [0, 0]
    assert target.read_text() == "code\n"
    assert Path(f"{target}.d").read_text() == f"quantize.cu.o: {source}\n"
    assert (tmp_path / "said").read_text().count("\n") == 1
    assert ask(tmp_path / "trial.cu", "-G") == 0
    assert (tmp_path / "said").read_text().endswith(f"-c {tmp_path}/trial.cu -o {target}\n")


def test_kernels_are_found(built: dict[str, nvcc.Compiled]) -> None:
    """Not every source has one, but what this file checks must be there."""
    assert {"norm.cu", "quantize.cu"} <= {name for name, compiled in built.items() if nvcc.resources(compiled)}


def test_the_build_has_every_source() -> None:
    text = (compiling.ROOT / "CMakeLists.txt").read_text("utf-8")
    listed = re.findall(r"(?:add_library|target_sources)\(igpt_cuda (?:STATIC|PRIVATE)\s([^)]*)\)", text)
    assert sorted(" ".join(listed).split()) == [f"csrc/cuda/{path.name}" for path in nvcc.sources()]


def test_one_group_each(request: pytest.FixtureRequest) -> None:
    """Those of a clock too: here they stay with whoever has compiled."""
    for item in request.session.items:
        assert len(list(item.iter_markers("xdist_group"))) <= 1, item.nodeid


@pytest.mark.clock
def test_time_to_build(built: dict[str, nvcc.Compiled]) -> None:
    seconds = {name: compiled.seconds for name, compiled in built.items()}
    total = sum(seconds.values())
    print(f"nvcc, all kernels for {' '.join(nvcc.ARCHITECTURES)}: {total:.0f} s of one core {seconds}")
    assert total / 2 < SECONDS, seconds
    assert max(seconds.values()) < SECONDS, seconds


# ---- The table of resources ---------------------------------------------------------------------------------


def same_version() -> str | None:
    """Why the table says nothing about this machine's compiler."""
    made_with = json.loads(resources.TABLE.read_text("utf-8"))["nvcc"]
    return None if made_with == nvcc.version() else f"resources.json is of nvcc {made_with}, this is {nvcc.version()}"


def test_resources_are_those_of_the_table(built: dict[str, nvcc.Compiled], emulated_module: ModuleType) -> None:
    if reason := same_version():
        pytest.skip(reason)
    table = resources.kernels()
    changed = resources.difference(resources.as_text(table, resources.launches(emulated_module, table)))
    assert not changed, changed


def test_the_launches_fit(built: dict[str, nvcc.Compiled], emulated_module: ModuleType) -> None:
    """No launch has more threads than its kernel was compiled for, and every GPU holds at least one of its blocks."""
    table = resources.kernels()
    every = {name: row for rows in table.values() for name, row in rows.items()}
    for call, rows in resources.launches(emulated_module, table).items():
        assert rows, f"{call} launches nothing"
        for row in rows:
            bounds = {has.max_threads for has in every[row["kernel"]].values()}
            assert row["threads"] <= min(bounds), (call, row)
            assert all(int(row[arch].split()[0]) > 0 for arch in nvcc.ARCHITECTURES if arch in row), (call, row)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        ("80", 32, 0, 256, 8),  # by warps: 64 / 8
        ("80", 33, 0, 256, 6),  # by registers: 40 * 32 of a warp, 12 warps a partition
        ("80", 255, 0, 256, 1),
        ("80", 32, 0, 32, 32),  # by blocks
        ("89", 32, 0, 32, 24),
        ("86", 32, 49 * 1024, 128, 2),  # by shared memory: 100 / (49 + 1)
        ("86", 32, 100 * 1024, 128, 0),  # more than there is
        ("90a", 168, 100 * 1024, 384, 1),
        ("90a", 128, 112 * 1024, 128, 2),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert resources.blocks_per_multiprocessor(arch, registers, shared, threads) == blocks


def test_a_difference_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As lines with their place, and the command that renews the table."""
    has = nvcc.Resources(32, 0, 0, 0, 0, 256)
    table = {"a.cu": {"f<4>": {"80": has, "90a": has}, "g": {"80": has}}}
    calls = {"f": [{"kernel": "f<4>", "blocks": 1}]}
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.json")
    monkeypatch.setattr(nvcc, "version", lambda: "13.0.0")
    text = resources.as_text(table, calls)
    assert json.loads(text)["kernels"]["a.cu"]["f<4>"]["90a"] == [32, 0, 0, 0, 0, 256]
    resources.TABLE.write_text(text, "utf-8")
    assert resources.difference(text) == ""
    table["a.cu"]["f<4>"]["90a"] = dataclasses.replace(has, registers=40)
    changed = resources.difference(resources.as_text(table, calls))
    assert '-    "90a": [32, 0, 0, 0, 0, 256]' in changed
    assert '+    "90a": [40, 0, 0, 0, 0, 256]' in changed
    assert '"f<4>"' in changed
    assert resources.RENEW in changed


def test_names_are_stable() -> None:
    space = "igpt::cuda::(anonymous namespace)::"
    assert nvcc.short(f"void {space}f<{space}Shape<__half, 8, 4> >(igpt::cuda::Params)") == "f<Shape<__half, 8, 4>>"
    assert nvcc.short("void igpt::cuda::f<(int)64, (bool)1>(igpt::cuda::Params)") == "f<64, 1>"
    assert nvcc.family("f<Shape<__half, 8, 4>>") == "f"
