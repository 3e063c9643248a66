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


def layer_norm(size: Size) -> None:
    x, weight, bias = (
        blank(IMAGES, T, size.n_embd, grad=True),
        blank(size.n_embd, grad=True),
        blank(size.n_embd, grad=True),
    )
    differentiate(ops.layer_norm(x, weight, bias), x, weight, bias)


def quick_gelu(size: Size) -> None:
    x, bias = blank(IMAGES, T, 4 * size.n_embd, grad=True), blank(4 * size.n_embd, grad=True)
    differentiate(ops.quick_gelu(x), x)
    differentiate(ops.quick_gelu(x, bias), x, bias)


def cross_entropy(dtype: torch.dtype) -> None:
    logits = blank(IMAGES, T, COLOURS, dtype=dtype, grad=True)
    differentiate(ops.cross_entropy(logits, torch.zeros(IMAGES, T, dtype=torch.int64)), logits)


def causal_attention(size: Size) -> None:
    packed = blank(IMAGES, T, 3, size.heads, size.head_dim, grad=True)
    differentiate(ops.causal_attention_packed(packed), packed)


def quantize(shape: tuple[torch.dtype, int]) -> None:
    dtype, pixels = shape
    ops.quantize(torch.empty(pixels, 3, dtype=dtype), torch.empty(COLOURS, 3))


def dequantize(dtype: torch.dtype) -> None:
    ops.dequantize(torch.empty(IMAGES * T, dtype=dtype), torch.empty(COLOURS, 3))


def sample(settings: dict[str, Any]) -> None:
    ops.sample(blank(IMAGES, COLOURS), torch.empty(IMAGES), **settings)


def sample_next(size: Size) -> None:
    streams, position = torch.empty(IMAGES, dtype=torch.int64), torch.empty((), dtype=torch.int32)
    embeddings = blank(COLOURS + 1, size.n_embd), blank(T, size.n_embd)
    ops.sample_next(blank(IMAGES, COLOURS), 0, streams, position, top_p=0.9, wte=embeddings[0], wpe=embeddings[1])


Call = Callable[[Any], None]
# Op -> (its call, what it is called with).
BY_SIZE: dict[str, Call] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "quick_gelu": quick_gelu,
    "causal_attention": causal_attention,
    "sample_next, top_p": sample_next,
}
OTHERS: dict[str, tuple[Call, Any]] = {
    "cross_entropy, bf16": (cross_entropy, torch.bfloat16),
    "cross_entropy, fp32": (cross_entropy, torch.float32),
    "quantize, uint8, few": (quantize, (torch.uint8, T)),
    "quantize, uint8, with a table": (quantize, (torch.uint8, 1024 * T)),
    "quantize, float32": (quantize, (torch.float32, IMAGES * T)),
    "dequantize": (dequantize, torch.int64),
    "sample": (sample, {}),
    "sample, top_k": (sample, {"top_k": 40}),
    "sample, top_p": (sample, {"top_p": 0.9}),
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
