"""The table of what the kernels need: registers, shared memory, stack, spills, and how many blocks a GPU then holds.

    python tests/emulator/resources.py [--write]

``resources.json`` has it for one version of nvcc; test_nvcc.py compares. ``kernels`` is what ptxas says of every
kernel, ``launches`` what the ops launch at the sizes of iGPT: the emulator writes the launches down, and the occupancy
follows from registers, threads and shared memory by the rules of the CUDA programming guide.
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import compiling
import nvcc

TABLE = Path(__file__).with_name("resources.json")
RENEW = "python tests/emulator/resources.py --write"
COLUMNS = [field.name for field in fields(nvcc.Resources)]


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one; CUDA C++ programming guide, technical specifications per compute capability."""

    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536
    partitions: int = 4


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "86": Multiprocessor(48, 16, 100 * 1024),
    "89": Multiprocessor(48, 24, 100 * 1024),
    "90a": Multiprocessor(64, 32, 228 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the system takes in every block


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks run at a time on one multiprocessor.

    Args:
        arch: A key of ``MULTIPROCESSORS``.
        registers: Of a thread.
        shared: Bytes of a block, static and dynamic.
        threads: Of a block.
    """
    has, warps = MULTIPROCESSORS[arch], -(-threads // 32)
    for_a_warp = -(-registers * 32 // 256) * 256
    by_registers = has.registers // has.partitions // for_a_warp * has.partitions // warps
    by_shared = has.shared // (-(-(shared + RESERVED) // 128) * 128)
    return min(has.blocks, has.warps // warps, by_registers, by_shared)


Kernels = dict[str, dict[str, nvcc.Resources]]


def kernels() -> dict[str, Kernels]:
    """Source -> kernel -> architecture -> resources."""
    return {compiled.source.name: nvcc.resources(compiled) for compiled in nvcc.compile_all()}


def symbols(module: ModuleType) -> dict[int, str]:
    """Address in a compiled module -> the kernel there."""
    lines = [line.split(None, 2) for line in compiling.run("nm", module.__file__).stdout.splitlines()]
    found = {
        int(line[0], 16): line[2] for line in lines if len(line) == 3 and line[1] in "tTwW" and "igpt4cuda" in line[2]
    }
    names = nvcc.demangle(list(found.values()))
    return {address: names[mangled] for address, mangled in found.items()}


def launches(module: ModuleType, table: dict[str, Kernels]) -> dict[str, list[dict[str, Any]]]:
    """Call -> its launches, each with blocks and warps at a time on a multiprocessor of every architecture."""
    from launches import record

    every = {name: (source, row) for source, rows in table.items() for name, row in rows.items()}
    names, found = symbols(module), {}
    for call, recorded in record(module).items():
        rows: list[dict[str, Any]] = []
        for address, blocks, threads, shared in recorded:
            name = names[address]
            row: dict[str, Any] = {"kernel": name, "blocks": blocks, "threads": threads, "shared": shared}
            for arch, has in every[name][1].items():
                if ("hopper" in name or "decode_ring" in name) and arch != "90a":  # a trap
                    continue
                at_a_time = blocks_per_multiprocessor(arch, has.registers, has.shared + shared, threads)
                row[arch] = f"{at_a_time} blocks, {at_a_time * -(-threads // 32)}/{MULTIPROCESSORS[arch].warps} warps"
            rows.append(row)
        found[call] = rows
    return found


def as_text(table: dict[str, Kernels], calls: dict[str, list[dict[str, Any]]]) -> str:
    """The file: JSON with one line for a kernel and architecture, and for a launch."""
    lines = ["{", f' "nvcc": "{nvcc.version()}",', f' "columns": {json.dumps(COLUMNS)},', ' "kernels": {']
    for source, rows in table.items():
        lines.append(f"  {json.dumps(source)}: {{")
        for name, row in rows.items():
            lines.append(f"   {json.dumps(name)}: {{")
            lines += [f'    "{arch}": {json.dumps(astuple(values))},' for arch, values in row.items()]
            _close(lines, "   },")
        _close(lines, "  },")
    _close(lines, " },")
    lines.append(' "launches": {')
    for call, recorded in calls.items():
        lines += [f"  {json.dumps(call)}: [", *(f"   {json.dumps(row)}," for row in recorded)]
        _close(lines, "  ],")
    _close(lines, " }")
    return "\n".join([*lines, "}"]) + "\n"


def _close(lines: list[str], end: str) -> None:
    """JSON has no comma after the last item."""
    lines[-1] = lines[-1].removesuffix(",")
    lines.append(end)


def difference(text: str) -> str:
    """What is not as in the file, with its place, or nothing."""
    old = TABLE.read_text("utf-8") if TABLE.exists() else ""
    if old == text:
        return ""
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), "resources.json", "these sources", "", "", 2, "")
    return "\n".join([*lines, f"If it is meant: {RENEW}"])


def main() -> int:
    table = kernels()
    text = as_text(table, launches(compiling.emulated(), table))
    changed = difference(text)
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text, "utf-8")
    print(changed or "resources.json is up to date")
    return int(bool(changed) and "--write" not in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
