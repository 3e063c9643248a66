"""What this machine can do at most, measured where the figures are: reading and copying memory, and multiplying.

Needs g++ (``CXX`` names another compiler). What cannot be measured is 0, and gives no roofline.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch

# As arithmetic.cpp numbers them; the fastest unit of a dtype is its peak, and without any the fastest FMA is.
UNITS = ("avx2_fma", "avx512_fma", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "vnni_256")
PRODUCTS = {"bfloat16": ("amx_bf16", "avx512_bf16"), "int8": ("amx_int8", "avx512_vnni", "vnni_256")}
STEADY = 0.8  # of what the ceilings were before a run they still are behind it


@dataclass(frozen=True)
class Ceilings:
    """Of ``threads`` threads together.

    Attributes:
        read_gb_s: Working set in MB -> GB/s of reading it again and again.
        copy_gb_s: GB/s of a copy that no cache holds; each byte counts twice, read and written.
        tflop_s: Unit of the processor -> 10^12 operations a second; a multiplication and an addition are two.
    """

    threads: int
    read_gb_s: dict[int, float]
    copy_gb_s: float
    tflop_s: dict[str, float]

    def read(self, count: float) -> float:
        """GB/s at a working set of ``count`` bytes: that of the nearest measured size."""
        return self.read_gb_s[min(self.read_gb_s, key=lambda size: abs(size - count / 1e6))]

    def peak(self, dtype: str) -> float:
        """TFLOP/s of the fastest unit for products of a dtype."""
        fma = max(self.tflop_s["avx512_fma"], self.tflop_s["avx2_fma"])
        return max((self.tflop_s[unit] for unit in PRODUCTS.get(dtype, ())), default=0.0) or fma

    def check_steady(self, again: Ceilings) -> None:
        """Compares with the ceilings behind the run: another job on the machine makes times of no use.

        Raises:
            SystemExit: They have moved, either way: the other job may have been there at the beginning alone.
        """
        before, after = self._rates(), again._rates()
        for name, rate in before.items():
            if rate and not STEADY <= after[name] / rate <= 1 / STEADY:
                raise SystemExit(
                    f"the machine's ceilings moved during the run, {name} from {rate:.3g} to {after[name]:.3g}: "
                    "another job is on it; nothing was written, run again when it has ended"
                )

    def _rates(self) -> dict[str, float]:
        rates = {f"GB/s of reading {size} MB": rate for size, rate in self.read_gb_s.items()}
        return rates | {f"TFLOP/s of {name}": rate for name, rate in self.tflop_s.items()}

    def limit_ms(self, work: Work, dtype: str) -> float | None:
        """Milliseconds under which a work cannot come: the longer of reading and multiplying, then copying."""
        read, peak = self.read(work.read), self.peak(dtype)
        if not (read and peak and self.copy_gb_s):
            return None
        return 1e3 * max(work.read / read / 1e9, work.flops / peak / 1e12) + work.copied / self.copy_gb_s / 1e6


@dataclass(frozen=True)
class Work:
    """What has to be done at least: bytes read, operations, and bytes read and written by a pass that only copies."""

    read: float = 0.0
    flops: float = 0.0
    copied: float = 0.0


def compiled(source: str, *more: str) -> ctypes.CDLL:
    """A C++ file of this folder as a library; ``more`` flags."""
    library = Path(tempfile.mkdtemp()) / f"{source}.so"
    flags = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", *more]
    if source == "memory" and platform.machine() == "x86_64":
        # Loads of 64 bytes where there are: those of 32 read memory at four fifths of its rate.
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        flags.append("-march=x86-64-v4" if wide else "-march=x86-64-v3")
    path = Path(__file__).with_name(f"{source}.cpp")
    subprocess.run([os.environ.get("CXX", "g++"), *flags, "-o", str(library), str(path)], check=True)
    return ctypes.CDLL(str(library))


class Memory:
    """Streams memory through the processor.

    Args:
        most: Bytes that will be read at most.
        threads: That share the reading.
    """

    def __init__(self, most: int, threads: int) -> None:
        self.size, self.threads = (most + 4095) // 4096 * 4096, threads
        # Private, as shared memory has no huge pages, and a walk through small ones is slower than the memory.
        self.block = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.block.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, self.size, 1 << 24):  # untouched pages are all one page of zeros
            self.block[start : start + (1 << 24)] = b"\1" * min(1 << 24, self.size - start)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.block))
        library = compiled("memory")
        self._read, self._copy = library.streaming_read, library.streaming_copy
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._read.restype = ctypes.c_uint64
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._copy.restype = None

    def read(self, count: int) -> None:
        self._read(self.address, min(count // 4096 * 4096, self.size), self.threads)

    def copy(self) -> None:
        """The first half to the second."""
        self._copy(self.address + self.size // 2, self.address, self.size // 2, self.threads)


def measure(threads: int, sizes: tuple[int, ...], seconds: float = 0.15) -> Ceilings:
    """The ceilings of a machine.

    Args:
        threads: Threads that work together.
        sizes: Working sets in MB.
        seconds: Length of a measurement; each is the best of five.
    """
    most = 2 * max(sizes) * 10**6
    memory, multiply = Memory(most, threads), compiled("arithmetic").multiply
    multiply.argtypes, multiply.restype = [ctypes.c_int, ctypes.c_long, ctypes.c_int], ctypes.c_double
    read = {size: 1e-9 * _rate(lambda size=size: _read(memory, size), seconds) for size in sizes}
    copy = 1e-9 * _rate(lambda: (memory.copy(), memory.size)[1], seconds)
    units = {
        name: 1e-12 * _rate(lambda unit=unit: multiply(unit, 100_000, threads), seconds)
        for unit, name in enumerate(UNITS)
    }
    return Ceilings(threads, read, copy, units)


def _read(memory: Memory, size: int) -> int:
    memory.read(size * 10**6)
    return size * 10**6


def _rate(run: Callable[[], float], seconds: float) -> float:
    """What ``run`` returns, a second."""
    if not run():
        return 0.0
    rates = []
    for _ in range(5):
        done, start = 0.0, time.perf_counter()
        while time.perf_counter() - start < seconds / 5:
            done += run()
        rates.append(done / (time.perf_counter() - start))
    return max(rates)


def report(ceilings: Ceilings) -> dict[str, object]:
    """For the result file, and on stderr."""
    values = dataclasses.asdict(ceilings)
    rounded = {name: round(value, 2) for name, value in ceilings.tflop_s.items()}
    read = ", ".join(f"{size} MB {rate:.0f}" for size, rate in ceilings.read_gb_s.items())
    common.say(f"ceilings: read GB/s {read}; copy {ceilings.copy_gb_s:.0f} GB/s; TFLOP/s {rounded}")
    return values
