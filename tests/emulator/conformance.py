"""Runs the kernels of conformance.cu and conformance_hopper.cu: on the emulator, or built by nvcc on a GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import compiling
import torch
from torch import Tensor

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SCHEDULES = [("fifo", 0), ("random", 1), ("random", 2), ("skewed", 1), ("skewed", 2)]
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

# run(name, out, *inputs): the kernel fills ``out``, whose first dimension is the number of cases.
Run = Callable[..., Tensor]


def nvcc(architecture: str, source: Path, out: Path, *flags: str) -> str:
    """Compiles without a warning; gives what ptxas says."""
    assert NVCC is not None
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", "-Xptxas=--warn-on-spills,-v"]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", "-O3", *strict, code, f"-I{compiling.ROOT / 'csrc'}", *flags]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def on_emulator(probes: ModuleType, *options: int) -> Run:
    """Of a module with a function ``conformance``, which takes ``options`` behind the name."""

    def run(name: str, out: Tensor, *inputs: Tensor) -> Tensor:
        addresses = [t.data_ptr() for t in inputs] + [0] * (3 - len(inputs))
        assert probes.conformance(name, *options, *addresses, out.data_ptr(), len(out)) == 0
        return out

    return run


def architecture() -> str:
    """Of the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def on_gpu(library: Path, function: str, *options: int) -> Run:
    called = getattr(ctypes.CDLL(str(library)), function)

    def run(name: str, out: Tensor, *inputs: Tensor) -> Tensor:
        held = [t.cuda() for t in (*inputs, out)]
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in held]
        addresses[-1:-1] = [ctypes.c_void_p(0)] * (3 - len(inputs))
        torch.cuda.synchronize()
        assert called(name.encode(), *map(ctypes.c_int, options), *addresses, ctypes.c_uint(len(out))) == 0
        return held[-1].cpu()

    return run


def words(*shape: int) -> Tensor:
    """Random bits."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def check_race(sanitizer: str, program: str, name: str, found: bool) -> None:
    """Whether a sanitizer finds a fault in a kernel of races.cpp or its like, and only where there is one."""
    done = compiling.run_sanitized(compiling.races(sanitizer, program), name)
    if found:
        assert done.returncode != 0, "not found"
        assert "data race" in done.stderr or "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
        assert f"{program}.cpp" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
