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


def rms_norm_autocast(size: Size) -> None:
    x, weight = blank(IMAGES, T, size.n_embd, grad=True), blank(size.n_embd, dtype=torch.float32, grad=True)
    residual = blank(IMAGES, T, size.n_embd, dtype=torch.float32, grad=True)
    differentiate(ops.rms_norm(x, weight, residual=residual, dtype=x.dtype), x, residual, weight)


def layer_norm(size: Size) -> None:
    x = blank(IMAGES, T, size.n_embd, grad=True)
    weight, bias = blank(size.n_embd, grad=True), blank(size.n_embd, grad=True)
    differentiate(ops.layer_norm(x, weight, bias), x, weight, bias)


def quick_gelu(size: Size) -> None:
    x, bias = blank(IMAGES, T, 4 * size.n_embd, grad=True), blank(4 * size.n_embd, grad=True)
    differentiate(ops.quick_gelu(x), x)
    differentiate(ops.quick_gelu(x, bias), x, bias)


def cross_entropy(dtype: torch.dtype) -> None:
    logits = blank(IMAGES, T, COLOURS, dtype=dtype, grad=True)
    differentiate(ops.cross_entropy(logits, torch.zeros(IMAGES, T, dtype=torch.int64)), logits)


def causal_attention_packed(size: Size) -> None:
    packed = blank(IMAGES, T, 3, size.heads, size.head_dim, grad=True)
    differentiate(ops.causal_attention_packed(packed), packed)


def quantize(dtype: torch.dtype) -> None:
    ops.quantize(torch.zeros(IMAGES * T, 3, dtype=dtype), torch.zeros(COLOURS, 3))


def quantize_table(pixels: int) -> None:
    ops.quantize(torch.zeros(pixels, 3, dtype=torch.uint8), torch.zeros(COLOURS, 3))


def dequantize(dtype: torch.dtype) -> None:
    ops.dequantize(torch.zeros(IMAGES, T, dtype=dtype), torch.zeros(COLOURS, 3))


def sample(settings: dict[str, Any]) -> None:
    ops.sample(blank(IMAGES, COLOURS), torch.zeros(IMAGES), **settings)


def attention_decode(size: Size) -> None:
    for b in (1, IMAGES, 8 * IMAGES):
        _decode(size, b)


def _decode(
    size: Size, b: int, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None, scaled: int = 0
) -> None:
    cache, position = (b, size.heads, T, size.head_dim), torch.zeros((), dtype=torch.int32)
    q, k, v = blank(b, 3, size.heads, size.head_dim).unbind(1)
    k_cache, v_cache = (blank(*cache, dtype=torch.float8_e4m3fn if scaled > n else torch.bfloat16) for n in (1, 0))
    k_scale, v_scale = (blank(*cache[:3], dtype=torch.float32) if scaled > n else None for n in (1, 0))
    others = {"prefix_k": prefix_k, "prefix_v": prefix_v, "v_scale": v_scale, "k_scale": k_scale}
    ops.attention_decode(q, k, v, k_cache, v_cache, position, **others)


def attention_decode_scaled(size: Size) -> None:
    for b in (1, IMAGES, 8 * IMAGES):
        for scaled in (1, 2):
            _decode(size, b, scaled=scaled)


def attention_decode_by_ring(size: Size) -> None:
    with backend.launching(backend.Launching(ring=True, cluster=True)):
        attention_decode(size)
        attention_decode_scaled(size)


def attention_decode_shared(size: Size) -> None:
    primer = (IMAGES // 8, size.heads, T // 2, size.head_dim)
    _decode(size, IMAGES, prefix_k=blank(*primer), prefix_v=blank(*primer))


def gemv(size: Size) -> None:
    n = size.n_embd
    for b in (1, 8, 16, 32, 64):
        ops.gemv(blank(b, n), blank(n, 3 * n), blank(3 * n), norm_weight=blank(n))
        ops.gemv(blank(b, n), blank(n, 4 * n), blank(4 * n), norm_weight=blank(n), activation="quick_gelu")
        ops.gemv(blank(b, 4 * n), blank(4 * n, n), blank(n), residual=blank(b, n))


def sample_next(size: Size) -> None:
    logits, streams, position = blank(IMAGES, COLOURS), torch.arange(IMAGES), torch.tensor(5, dtype=torch.int32)
    wte, wpe = blank(COLOURS + 1, size.n_embd), blank(T, size.n_embd)
    ops.sample_next(logits, 0, streams, position, top_k=100, top_p=0.9, min_p=0.01, wte=wte, wpe=wpe)


def sample_step(size: Size) -> None:
    logits, wte, wpe = blank(IMAGES, COLOURS), blank(COLOURS + 1, size.n_embd), blank(T, size.n_embd)
    settings, streams = torch.zeros(7, dtype=torch.int64), torch.arange(IMAGES)
    position, tokens = torch.zeros(IMAGES, dtype=torch.int32), torch.zeros(IMAGES, T, dtype=torch.int64)
    state = streams, position, tokens, blank(IMAGES, T, dtype=torch.float32)
    ops.sample_step(logits, settings, *state, blank(IMAGES, size.n_embd), wte, wpe)


Call = Callable[[Any], None]
# Op -> (its call, what it is called with).
BY_SIZE: dict[str, Call] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm, under autocast": rms_norm_autocast,
    "layer_norm": layer_norm,
    "quick_gelu": quick_gelu,
    "causal_attention_packed": causal_attention_packed,
    "causal_attention_packed on Hopper": causal_attention_packed,
    "attention_decode": attention_decode,
    "attention_decode, fp8 values, fp8 cache": attention_decode_scaled,
    "attention_decode, by a ring on Hopper": attention_decode_by_ring,
    "attention_decode, shared primers": attention_decode_shared,
    "gemv": gemv,
    "sample_next": sample_next,
    "sample_step": sample_step,
}
OTHERS: dict[str, tuple[Call, Any]] = {
    "cross_entropy, bf16": (cross_entropy, torch.bfloat16),
    "cross_entropy, fp32": (cross_entropy, torch.float32),
    "sample": (sample, {}),
    "sample, top_k": (sample, {"top_k": 40}),
    "sample, top_p": (sample, {"top_p": 0.9}),
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
            module.set_capability(90 if " on Hopper" in name or name.startswith("gemv") else 80)
            module.start_recording()
            try:
                call(argument)
            finally:
                found[name] = module.stop_recording()
                module.set_capability()
    return found
