"""Calls of the ops at the sizes of iGPT, of which the emulator writes down what they launch. Nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igpt_fast import backend, ops


class Size(NamedTuple):
    n_embd: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.heads


SIZES = {"S": Size(512, 8), "M": Size(1024, 8), "L": Size(1536, 16)}
IMAGES, T, COLOURS = 32, 1024, 512

Launch = tuple[int, int, int, int]  # kernel's address, blocks, threads, bytes of shared memory


def blank(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """Memory that nothing is written to: however large, it costs nothing."""
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def differentiate(out: Tensor | tuple[Tensor, ...], *by: Tensor) -> None:
    outs = (out,) if isinstance(out, Tensor) else out
    torch.autograd.grad(outs, by, tuple(torch.empty_like(o) for o in outs))


def rms_norm(size: Size) -> None:
    x, weight = blank(IMAGES, T, size.n_embd, grad=True), blank(size.n_embd, grad=True)
    differentiate(ops.rms_norm(x, weight), x, weight)


def add_rms_norm(size: Size) -> None:
    x, residual = blank(IMAGES, T, size.n_embd, grad=True), blank(IMAGES, T, size.n_embd, grad=True)
    weight = blank(size.n_embd, grad=True)
    differentiate(ops.rms_norm(x, weight, residual=residual), x, residual, weight)


def causal_attention_packed(size: Size) -> None:
    qkv = blank(IMAGES, T, 3, size.heads, size.head_dim, grad=True)
    differentiate(ops.causal_attention_packed(qkv), qkv)


def quantize(dtype: torch.dtype) -> None:
    ops.quantize(torch.zeros(IMAGES * T, 3, dtype=dtype), torch.zeros(COLOURS, 3))


def quantize_table(pixels: int) -> None:
    ops.quantize(torch.zeros(pixels, 3, dtype=torch.uint8), torch.zeros(COLOURS, 3))


def dequantize(dtype: torch.dtype) -> None:
    ops.dequantize(torch.zeros(IMAGES, T, dtype=dtype), torch.zeros(COLOURS, 3))


def attention_decode(size: Size, images: int = IMAGES, together: int = 1, prefix: int = 0) -> None:
    q, cache = blank(images, size.heads, size.head_dim), blank(images, size.heads, T - prefix, size.head_dim)
    shared = blank(images // together, size.heads, prefix, size.head_dim) if prefix else None
    position = torch.tensor(5, dtype=torch.int32)
    ops.attention_decode(q, q, q, cache, cache, position, prefix_k=shared, prefix_v=shared)


def attention_decode_one(size: Size) -> None:
    attention_decode(size, images=1)


def attention_decode_prefix(size: Size) -> None:
    attention_decode(size, together=8, prefix=T // 2)


def gemv(size: Size) -> None:
    """A layer's four for one image, its largest for eight, and the head."""
    n, one, eight = size.n_embd, blank(1, size.n_embd), blank(8, size.n_embd)
    ops.gemv(one, blank(n, 3 * n), blank(3 * n), norm_weight=blank(n))
    ops.gemv(one, blank(n, n), blank(n), residual=one)
    ops.gemv(one, blank(n, 4 * n), blank(4 * n), norm_weight=blank(n), activation="quick_gelu")
    ops.gemv(blank(1, 4 * n), blank(4 * n, n), blank(n), residual=one)
    ops.gemv(eight, blank(n, 4 * n), blank(4 * n), norm_weight=blank(n), activation="quick_gelu")
    ops.gemv(one, blank(COLOURS, n).T, norm_weight=blank(n))


def sample_next(size: Size) -> None:
    logits, streams, position = blank(IMAGES, COLOURS), torch.arange(IMAGES), torch.tensor(5, dtype=torch.int32)
    wte, wpe = blank(COLOURS + 1, size.n_embd), blank(T, size.n_embd)
    ops.sample_next(logits, 0, streams, position, top_k=100, top_p=0.9, wte=wte, wpe=wpe)


Call = Callable[[Any], None]
# Op -> (its call, what it is called with).
BY_SIZE: dict[str, Call] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "causal_attention_packed": causal_attention_packed,
    "attention_decode": attention_decode,
    "attention_decode, one image": attention_decode_one,
    "attention_decode, eight images of a prefix": attention_decode_prefix,
    "gemv": gemv,
    "sample_next": sample_next,
}
OTHERS: dict[str, tuple[Call, Any]] = {
    "quantize, uint8": (quantize, torch.uint8),
    "quantize, float32": (quantize, torch.float32),
    "quantize, uint8, a table and its use": (quantize_table, 1 << 20),
    "dequantize, int64": (dequantize, torch.int64),
}


def record(module: ModuleType) -> dict[str, list[Launch]]:
    """Call -> launches, forward and backward, in their order."""
    calls = {f"{name}, iGPT-{size}": (call, SIZES[size]) for name, call in BY_SIZE.items() for size in SIZES} | OTHERS
    found = {}
    with backend.use_backend("auto"), backend.emulate(module):
        for name, (call, argument) in calls.items():
            module.start_recording()
            try:
                call(argument)
            finally:
                found[name] = module.stop_recording()
    return found
