"""The calls of the ops that are measured on a GPU, each with its peers, at the sizes of iGPT; see cuda_timing.py.

Bytes and operations are the least that a call can do with: what it must read and write once, and for causal attention
the half of the square that is not masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import SDPA, forced
from torch import Tensor
from workloads import OURS, Function, Workload

from igpt_fast import backend, ops, reference

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A model's, and how many images are worked on."""

    name: str
    n_embd: int
    heads: int
    images: int  # of whole sequences: norms, activations, losses
    attention_images: int
    decode: tuple[int, ...]  # sequences at a time
    positions: int = 1024
    colours: int = 512

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.heads


SIZES = (
    Size("S", 512, 8, 32, 16, (1, 32, 256)),
    Size("M", 1024, 8, 32, 16, (1, 32)),
    Size("L", 1536, 16, 32, 8, (1, 32)),
)
# For --dry-run: the same code in a moment, on the CPU.
TINY = (Size("tiny", 64, 2, 2, 2, (1, 4), positions=16, colours=24),)


def normal(*shape: int, at: tuple[torch.device, int], scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    device, seed = at
    generator = torch.Generator(device).manual_seed(1000 * seed + len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def integers(high: int, *shape: int, at: tuple[torch.device, int], dtype: torch.dtype = torch.int64) -> Tensor:
    device, seed = at
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, device=device, dtype=dtype)


def compiled(function: Function) -> Function:
    """torch.compile's version, on a GPU; on the CPU, where only shapes are tried, the function itself."""
    fast = torch.compile(function, dynamic=False)
    return lambda *inputs: (fast if inputs[0].is_cuda else function)(*inputs)


# ---- Norms, activations, loss -------------------------------------------------------------------------------


def rms_norm(size: Size) -> Iterator[Workload]:
    n, rows = size.n_embd, size.images * size.positions

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        at = device, seed
        return normal(rows, n, at=at), normal(n, at=at), normal(rows, n, at=(device, seed + 7000))

    def plain(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        return F.rms_norm(x, (n,), weight, 1e-5)

    def plain_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (n,), weight, 1e-5), total

    one = 2.0 * rows * n
    yield Workload(
        op="rms_norm",
        size=f"{size.name}: {rows} x {n}",
        inputs=lambda device, seed: inputs(device, seed)[:2],
        ours=lambda x, weight: ops.rms_norm(x, weight),
        definition=lambda x, weight: reference.rms_norm(x, weight, 1e-5),
        peers={
            "F.rms_norm": lambda x, weight: plain(x, weight, x),
            "torch.compile": compiled(lambda x, weight: plain(x, weight, x)),
        },
        differentiable=2,
        bytes=(2 * one, 3 * one),
    )

    def add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return reference.rms_norm(total, weight, 1e-5), total

    yield Workload(
        op="rms_norm",
        size=f"{size.name}, residual: {rows} x {n}",
        inputs=inputs,
        ours=lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
        definition=add,
        peers={"F.rms_norm": plain_add, "torch.compile": compiled(plain_add)},
        differentiable=3,
        bytes=(4 * one, 4 * one),
    )


def layer_norm(size: Size) -> Iterator[Workload]:
    n, rows = size.n_embd, size.images * size.positions

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (n,), weight, bias, 1e-5)

    yield Workload(
        op="layer_norm",
        size=f"{size.name}: {rows} x {n}",
        inputs=lambda device, seed: (
            normal(rows, n, at=(device, seed)), normal(n, at=(device, seed)), normal(n, at=(device, seed + 7000)),
        ),
        ours=lambda x, weight, bias: ops.layer_norm(x, weight, bias),
        definition=lambda x, weight, bias: reference.layer_norm(x, weight, bias, 1e-5),
        peers={"F.layer_norm": plain, "torch.compile": compiled(plain)},
        differentiable=3,
        bytes=(2 * 2.0 * rows * n, 3 * 2.0 * rows * n),
    )  # fmt: skip


def quick_gelu(size: Size) -> Iterator[Workload]:
    n, rows = 4 * size.n_embd, size.images * size.positions

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        z = x + bias
        return z * torch.sigmoid(1.702 * z)

    yield Workload(
        op="quick_gelu",
        size=f"{size.name}, bias: {rows} x {n}",
        inputs=lambda device, seed: (normal(rows, n, at=(device, seed)), normal(n, at=(device, seed))),
        ours=lambda x, bias: ops.quick_gelu(x, bias),
        definition=plain,
        peers={"torch.compile": compiled(plain)},
        differentiable=2,
        bytes=(2 * 2.0 * rows * n, 3 * 2.0 * rows * n),
    )


def cross_entropy(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L"):
        return  # the colours are as many
    k, rows = size.colours, size.images * size.positions
    yield Workload(
        op="cross_entropy",
        size=f"{rows} x {k}",
        inputs=lambda device, seed: (normal(rows, k, at=(device, seed)), integers(k, rows, at=(device, seed))),
        ours=lambda logits, labels: ops.cross_entropy(logits, labels),
        definition=lambda logits, labels: reference.cross_entropy(logits, labels),
        peers={
            "F.cross_entropy, bf16": lambda logits, labels: F.cross_entropy(logits, labels),
            "torch.compile": compiled(lambda logits, labels: F.cross_entropy(logits.float(), labels)),
        },
        differentiable=1,
        bytes=(2.0 * rows * k, 2 * 2.0 * rows * k),
    )


# ---- Attention ----------------------------------------------------------------------------------------------


def causal_attention(size: Size) -> Iterator[Workload]:
    b, t, h, d = size.attention_images, size.positions, size.heads, size.head_dim

    def inputs(device: torch.device, seed: int) -> tuple[Tensor]:
        return (normal(b, t, 3 * h * d, at=(device, seed)),)

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of c_attn's output."""
        q, k, v = packed.view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
        return q, k, v

    def ours(packed: Tensor) -> Tensor:
        return ops.causal_attention_packed(packed.view(b, t, 3, h, d)).transpose(1, 2)

    def portable(packed: Tensor) -> Tensor:
        with backend.launching(backend.Launching(portable_attention=True)):
            return ours(packed)

    def attend(packed: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*split(packed), is_causal=True)

    products = 4.0 * b * h * d * t * (t + 1) / 2
    yield Workload(
        op="causal_attention",
        size=f"{size.name}: {b} x {h} x {t} x {d}",
        inputs=inputs,
        ours=ours,
        definition=lambda packed: reference.causal_attention(*split(packed), scale=d**-0.5)[0],
        peers={
            f"{OURS}, portable": portable,
            "SDPA": attend,
            **{name: forced(kind, attend) for name, kind in SDPA.items()},
        },
        differentiable=1,
        flops=(products, 2.5 * products),
    )


def attention_decode(size: Size) -> Iterator[Workload]:
    for b in size.decode:
        yield _decode(size, b)
        yield _decode_scaled(size, b, False)
        yield _decode_scaled(size, b, True)
    if size.name in ("S", "tiny"):
        yield _decode_shared(size, max(size.decode), 4 if size.name == "tiny" else 8)


def _decode(size: Size, b: int) -> Workload:
    h, d, t = size.heads, size.head_dim, size.positions

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        at = device, seed
        packed = normal(b, 3, h, d, at=at)
        caches = normal(b, h, t, d, at=at), normal(b, h, t, d, at=(device, seed + 7000))
        return *packed.unbind(1), *caches, torch.tensor(t - 1, dtype=torch.int32, device=device)

    def plain(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor) -> Tensor:
        """As with torch's ops alone: the new key and value are copied in, then one attention over the cache."""
        place = position.view(1).long()
        k_cache.index_copy_(2, place, k.unsqueeze(2))
        v_cache.index_copy_(2, place, v.unsqueeze(2))
        return F.scaled_dot_product_attention(q.unsqueeze(2), k_cache, v_cache).squeeze(2)

    return Workload(
        op="attention_decode",
        size=f"{size.name}: {b} x {h} x {t} x {d}",
        inputs=inputs,
        ours=lambda *tensors: ops.attention_decode(*tensors),
        definition=plain,
        peers={name: forced(backend, plain) for name, backend in SDPA.items()},
        bytes=(2.0 * 2 * b * h * t * d, 0.0),
    )


def _decode_scaled(size: Size, b: int, keys_too: bool) -> Workload:
    """Cached values, or keys as well, of 8 bits. Torch has no attention of them: they are widened before."""
    h, d, t = size.heads, size.head_dim, size.positions
    code = torch.float8_e4m3fn

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        caches: list[Tensor] = []
        for scaled, offset in ((keys_too, 0), (True, 7000)):
            cache = normal(b, h, t, d, at=(device, seed + offset))
            codes, scales = reference.quantize_e4m3(cache)
            caches += (codes.view(torch.uint8), scales) if scaled else (cache,)
        new = normal(b, 3, h, d, at=(device, seed)).unbind(1)
        return *new, torch.tensor(t - 1, dtype=torch.int32, device=device), *caches

    def ours(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *caches: Tensor) -> Any:
        *keys, codes, scales = caches
        cache, k_scale = (keys[0].view(code), keys[1]) if keys_too else (keys[0], None)
        return ops.attention_decode(q, k, v, cache, codes.view(code), position, v_scale=scales, k_scale=k_scale)

    def kept(cache: tuple[Tensor, ...], new: Tensor, place: Tensor) -> Tensor:
        if len(cache) == 1:
            return cache[0].index_copy_(2, place, new.unsqueeze(2))
        codes, scales = cache
        new_codes, scale = reference.quantize_e4m3(new)
        codes.index_copy_(2, place, new_codes.view(torch.uint8).unsqueeze(2))
        scales.index_copy_(2, place, scale.to(scales.dtype).unsqueeze(2))
        return reference.dequantize_e4m3(codes.view(code), scales, new.dtype)

    def plain(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *caches: Tensor) -> Any:
        place = position.view(1).long()
        keys, values = kept(caches[:-2], k, place), kept(caches[-2:], v, place)
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)

    return Workload(
        op="attention_decode",
        size=f"{size.name}, fp8 {'cache' if keys_too else 'values'}: {b} x {h} x {t} x {d}",
        inputs=inputs,
        ours=ours,
        definition=plain,
        bytes=(b * h * t * (2.0 * d + 8.0 if keys_too else 3.0 * d + 4.0), 0.0),
    )


def _decode_shared(size: Size, b: int, together: int) -> Workload:
    """Every ``together`` rows continue one primer, which is half of the keys."""
    h, d, t, groups = size.heads, size.head_dim, size.positions // 2, b // together

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        at, other = (device, seed), (device, seed + 7000)
        caches = normal(b, h, t, d, at=at), normal(b, h, t, d, at=other)
        prefix = normal(groups, h, t, d, at=at), normal(groups, h, t, d, at=other)
        position = torch.tensor(t - 1, dtype=torch.int32, device=device)
        return *normal(b, 3, h, d, at=at).unbind(1), *caches, position, *prefix

    def ours(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, position: Tensor, pk: Tensor, pv: Tensor) -> Any:
        return ops.attention_decode(q, k, v, kc, vc, position, prefix_k=pk, prefix_v=pv)

    def plain(q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, position: Tensor, pk: Tensor, pv: Tensor) -> Any:
        place = position.view(1).long()
        kc.index_copy_(2, place, k.unsqueeze(2))
        vc.index_copy_(2, place, v.unsqueeze(2))
        keys = torch.cat([pk.repeat_interleave(together, 0), kc], 2)
        values = torch.cat([pv.repeat_interleave(together, 0), vc], 2)
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)

    return Workload(
        op="attention_decode",
        size=f"{size.name}, primers of {together} shared: {b} x {h} x {2 * t} x {d}",
        inputs=inputs,
        ours=ours,
        definition=plain,
        bytes=(2.0 * 2 * (b + groups) * h * t * d, 0.0),
    )


# ---- One token at a time ------------------------------------------------------------------------------------


def gemv(size: Size) -> Iterator[Workload]:
    n = size.n_embd
    for b in (1, 8, 16, 32, 64):
        yield _gemv(size, f"norm, qkv, {b}", b, n, 3 * n, norm=True)
        yield _gemv(size, f"norm, fc, quick_gelu, {b}", b, n, 4 * n, norm=True, gelu=True)
        yield _gemv(size, f"proj, residual, {b}", b, 4 * n, n, residual=True)


def _gemv(
    size: Size, name: str, b: int, n_in: int, n_out: int, norm: bool = False, gelu: bool = False, residual: bool = False
) -> Workload:
    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        at = device, seed
        weight = normal(n_in, n_out, at=at, scale=n_in**-0.5)
        extra = normal(n_in, at=at) if norm else normal(b, n_out, at=at)
        return normal(b, n_in, at=at), weight, normal(n_out, at=at), extra

    def ours(x: Tensor, weight: Tensor, bias: Tensor, extra: Tensor) -> Tensor:
        return ops.gemv(
            x, weight, bias, norm_weight=extra if norm else None, activation="quick_gelu" if gelu else None,
            residual=extra if residual else None,
        )  # fmt: skip

    def plain(x: Tensor, weight: Tensor, bias: Tensor, extra: Tensor) -> Tensor:
        """cuBLAS and torch's ops around it."""
        x = F.rms_norm(x, (n_in,), extra, 1e-5) if norm else x
        out = torch.addmm(bias, x, weight)
        out = out * torch.sigmoid(1.702 * out) if gelu else out
        return out + extra if residual else out

    return Workload(
        op="gemv",
        size=f"{size.name}, {name} x {n_in} x {n_out}",
        inputs=inputs,
        ours=ours,
        definition=plain,
        peers={"torch.compile": compiled(plain)} if b == 1 and size.name == "S" else {},
        bytes=(2.0 * n_in * n_out, 0.0),
    )


def sample(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L"):
        return  # the colours are as many
    for settings in ({}, {"top_k": 40}, {"top_p": 0.9}):
        for n in size.decode:
            yield _sample(size, n, settings)


def _sample(size: Size, n: int, settings: dict[str, Any]) -> Workload:
    k = size.colours

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        uniform = torch.rand(n, generator=torch.Generator(device).manual_seed(seed), device=device)
        return normal(n, k, at=(device, seed), scale=2.0), uniform

    temperature, top_k, top_p = 0.9, settings.get("top_k"), settings.get("top_p")
    return Workload(
        op="sample",
        size=f"{n} x {k}{''.join(f', {name} {value}' for name, value in settings.items())}",
        inputs=inputs,
        ours=lambda logits, uniform: ops.sample(logits, uniform, temperature, top_k, top_p),
        definition=lambda logits, uniform: reference.sample(logits.float(), uniform.float(), temperature, top_k, top_p),
        bytes=(2.0 * n * k, 0.0),
        may_differ=0.02,
    )


def sample_next(size: Size) -> Iterator[Workload]:
    """The draw with its random numbers and the next input, which torch makes of about ten ops."""
    for n in size.decode:
        yield _sample_next(size, n)


def _sample_next(size: Size, n: int) -> Workload:
    k, width, t = size.colours, size.n_embd, size.positions

    def inputs(device: torch.device, seed: int) -> tuple[Any, ...]:
        at, other = (device, seed), (device, seed + 7000)
        streams = torch.arange(1, n + 1, device=device) + n * seed
        position = torch.tensor(t // 2, dtype=torch.int32, device=device)
        return (
            normal(n, k, at=at, scale=2.0),
            streams,
            position,
            normal(k + 1, width, at=at),
            normal(t, width, at=other),
        )

    def ours(logits: Tensor, streams: Tensor, position: Tensor, wte: Tensor, wpe: Tensor) -> Any:
        return ops.sample_next(logits, 5, streams, position, wte=wte, wpe=wpe)

    def plain(logits: Tensor, streams: Tensor, position: Tensor, wte: Tensor, wpe: Tensor) -> Any:
        return reference.sample_next(logits, 5, streams, position, wte=wte, wpe=wpe)

    def torch_ops(logits: Tensor, _: Tensor, position: Tensor, wte: Tensor, wpe: Tensor) -> Any:
        """With torch's own generator: other draws, so it is timed and not compared."""
        tokens = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
        return tokens, wte[tokens] + wpe.index_select(0, position.view(1).long() + 1)

    return Workload(
        op="sample_next",
        size=f"{size.name}: {n} x {k}, {width} wide",
        inputs=inputs,
        ours=ours,
        definition=plain,
        peers={"torch multinomial": torch_ops},
        bytes=(2.0 * n * k + 3 * 2.0 * n * width, 0.0),
        may_differ=0.02,
        not_compared=("torch multinomial",),
    )


# ---- Colours ------------------------------------------------------------------------------------------------


def clusters(size: Size, device: torch.device) -> Tensor:
    """One tensor for all sets of inputs: the kernel keeps a table with it."""
    return torch.rand(size.colours, 3, generator=torch.Generator().manual_seed(1)).mul(2).sub(1).to(device)


def quantize(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L"):
        return
    n, k = 32 * size.images * size.positions, size.colours
    palettes: dict[torch.device, Tensor] = {}

    def palette(device: torch.device) -> Tensor:
        return palettes.setdefault(device, clusters(size, device))

    def chunked(x: Tensor, palette: Tensor) -> Tensor:
        colours = x if x.is_floating_point() else x.float() / 127.5 - 1.0
        return torch.cat([torch.cdist(part, palette.to(part.dtype)).argmin(1) for part in colours.split(1 << 18)])

    def float_pixels(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        pixels = integers(1 << 20, n, 3, at=(device, seed), dtype=torch.int32)
        return pixels.float() / (1 << 19) - 1.0, palette(device)

    def bytes_of_pixels(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        return integers(256, 16 * n, 3, at=(device, seed), dtype=torch.uint8), palette(device)

    # A table of all colours serves uint8, but for the first megapixel, and not while a graph is captured.
    for name, count, make, size_of_pixel, operations in (
        ("uint8", 16 * n, bytes_of_pixels, 3, 0),
        ("float32", n, float_pixels, 12, 8),
    ):
        yield Workload(
            op="quantize",
            size=f"{name}: {count} pixels, {k} clusters",
            inputs=make,
            ours=lambda x, palette: ops.quantize(x, palette),
            definition=chunked,
            bytes=((size_of_pixel + 8.0) * count, 0.0),
            flops=(float(operations) * count * k, 0.0),
            may_differ=1e-3,  # cdist rounds otherwise; near ties go the other way
            graph=name != "uint8",
        )


def dequantize(size: Size) -> Iterator[Workload]:
    if size.name in ("M", "L"):
        return
    n, k = 32 * size.images * size.positions, size.colours
    yield Workload(
        op="dequantize",
        size=f"{n} tokens, {k} clusters",
        inputs=lambda device, seed: (integers(k, n, at=(device, seed)), clusters(size, device)),
        ours=lambda tokens, palette: ops.dequantize(tokens, palette),
        definition=lambda tokens, palette: reference.dequantize(tokens, palette.float()),
        peers={"torch.compile": compiled(reference.dequantize)},
        bytes=(11.0 * n, 0.0),
    )


Maker = Callable[[Size], Iterator[Workload]]
# Op -> its workloads; the order is the table's.
MAKERS: dict[str, Maker] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "quick_gelu": quick_gelu,
    "cross_entropy": cross_entropy,
    "causal_attention": causal_attention,
    "attention_decode": attention_decode,
    "gemv": gemv,
    "sample": sample,
    "sample_next": sample_next,
    "quantize": quantize,
    "dequantize": dequantize,
}
