"""Calls every registered op with arguments that are wrong in one or two places; the process must live through it.

Every tensor ends where a page begins that nobody may touch, so that a read past its end ends the process. Prints a line
of JSON: for each op how many of the calls were refused.

    python run_fuzz.py cpu|emulated SEED CALLS
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import math
import mmap
import random
import sys
from collections import Counter
from typing import Any

import compiling
import torch
from cases import CASES, CPU_CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_fast import backend

PAGE = mmap.PAGESIZE
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Recorded(TorchDispatchMode):
    """The calls of registered ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "igpt_fast":
            name = op._schema.name.partition("::")[2]
            copied = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
            self.calls.setdefault(f"{name} {len(self.calls)}", (op, copied))
        return op(*args, **(kwargs or {}))


def guarded(tensor: Tensor) -> Tensor:
    """The same values at the end of a page, at most 15 bytes before the next one, which is protected."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    assert libc.mprotect(everything.data_ptr() + pages * PAGE, PAGE, 0) == 0
    start = (pages * PAGE - size) // 16 * 16
    place = everything[start : start + size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    place.view(raw).copy_(tensor.view(raw))
    return place


def wrong_tensor(tensor: Tensor, rng: random.Random) -> Any:
    """Of another dtype, rank, size, stride or device, or other values."""
    kind = rng.choice(["dtype", "less", "more", "none", "rank", "flat", "expanded", "transposed", "meta", "values"])
    if kind == "dtype":
        return tensor.float().nan_to_num().to(rng.choice(DTYPES))
    if kind in ("less", "more") and tensor.ndim:
        shape = list(tensor.shape)
        axis = rng.randrange(tensor.ndim)
        shape[axis] = max(0, shape[axis] + rng.choice([-8, -2, -1]) if kind == "less" else shape[axis] + 1)
        return torch.zeros(shape, dtype=tensor.dtype)
    if kind == "rank":
        return tensor[None] if rng.random() < 0.5 or not tensor.ndim else tensor[0] if len(tensor) else tensor
    if kind == "flat":
        return tensor.reshape(-1)
    if kind == "expanded" and tensor.ndim and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    if kind == "transposed" and tensor.ndim > 1:
        a, b = rng.sample(range(tensor.ndim), 2)
        return tensor.transpose(a, b).contiguous().transpose(a, b) if rng.random() < 0.5 else tensor.transpose(a, b)
    if kind == "meta":
        return tensor.to("meta")
    if kind == "values" and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        info = torch.iinfo(tensor.dtype)
        return torch.full_like(tensor, rng.choice([info.min, info.max, 1 << 6]))
    if kind == "none":
        return None
    return tensor.new_zeros([0] * tensor.ndim)


def wrong(argument: Any, rng: random.Random) -> Any:
    if isinstance(argument, Tensor):
        return wrong_tensor(argument, rng)
    if isinstance(argument, torch.dtype):
        return rng.choice(DTYPES)
    if isinstance(argument, float):
        return rng.choice([0.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300])
    if isinstance(argument, int):
        return rng.choice([0, -1, 1 << 20, (1 << 62), -(1 << 62), 2**31])
    return rng.choice(["", "none", "mean", "nothing", 3.5, torch.randn(3), torch.randn(3, 8).bfloat16()])


def main(kind: str, seed: int, calls: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if kind == "emulated":
        backend._emulated = compiling.emulated()
    else:
        backend.OPS.update(
            {name: dataclasses.replace(op, least_cpu=0, least_queries_cpu=0) for name, op in backend.OPS.items()}
        )
    recorded = Recorded()
    for case in CASES if kind == "emulated" else (*CASES, *CPU_CASES):
        with recorded:
            case.run(case.on("cpu"))
    rng, refused = random.Random(seed), Counter[str]()
    for op, arguments in recorded.calls.values():
        name = op._schema.name.partition("::")[2]
        with torch.no_grad():
            op(*(guarded(a) if isinstance(a, Tensor) else a for a in arguments))
            for _ in range(calls):
                tried = list(arguments)
                for i in rng.sample(range(len(tried)), rng.choice([1, 1, 1, 2])):
                    tried[i] = wrong(tried[i], rng)
                try:
                    op(*(guarded(a) if isinstance(a, Tensor) else a for a in tried))
                except Exception as error:
                    refused[name] += not isinstance(error, AssertionError)
    print(json.dumps(refused), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
