"""Attention of one new position against a key/value cache that it is added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast import reference
from igpt_fast.backend import OPS, Kernels, Op
from igpt_fast.ops import dispatch

# Keys and values as a cache of 8 bits has them, for who reads and writes such caches; under their older names as well.
from igpt_fast.reference import dequantize_e4m3 as dequantize_e4m3
from igpt_fast.reference import dequantize_values as dequantize_values
from igpt_fast.reference import quantize_e4m3 as quantize_e4m3
from igpt_fast.reference import quantize_values as quantize_values

OPS["attention_decode"] = Op(
    native=("cuda",),
    covers="head_dim 32, 64, 96, 128; bf16, fp16, whose cached values and keys may be fp8; fp32 without a prefix",
    otherwise="torch expression over the whole cache",
)

_ROWS = 16  # that a block of the prefix's kernel serves
_MOST_KEYS = 2**31 - 1025  # of a cache or a prefix
_SCALES = {"v_cache": "v_scale", "k_cache": "k_scale"}


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    limit: int | None = None,
    v_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """Attention of one new position of each sequence; its key and value are written into the cache.

    The keys that row b sees are those of its prefix, if there is one, then those of its cache at 0 to ``position``,
    the new one among them, without the first ``starts[b]`` of them all. A row that sees none gives zero, and what
    stands in a key that is not seen, be it NaN, reaches nothing; of a prefix, a key that none of its rows sees.

    A kernel reads ``position`` and ``starts`` on the device, and nothing on the host depends on their values: a
    captured CUDA graph may be replayed as they change. It moves ``2 (position + 1) D`` elements for each row and head,
    and ``2 T_p D`` for each head and 16 rows of a prefix; ``4 D`` floating-point operations for each key that a row
    sees.

    With ``v_scale`` the cached values have 8 bits: ``quantize_e4m3`` is what becomes of the new one, and what is to
    become of others that are put there. A NaN or an infinity in a value makes all of that head's value NaN. With
    ``k_scale`` as well so have the cached keys, and what a row sees is the cache: of the new position, too, the key and
    the value as they are kept.

    Args:
        q, k, v: (B, H, D) of the new position. Strides are free but for the last dimension's, as in views of the
            packed projection.
        k_cache, v_cache: (B, H, T_max, D), contiguous, of the dtype of ``q``, but float8_e4m3fn where it has
            scales; written at ``position``.
        position: int32 on the device of ``q``: (), (1,), one for all rows, or (B,). Where it is outside 0..T_max-1
            nothing is written and the row's output is NaN.
        starts: (B,) int32: how many keys from the first on are hidden, the prefix's counted; ``None`` hides none.
        scale: Of the scores; ``D ** -0.5`` when ``None``.
        prefix_k, prefix_v: (G, H, T_p, D) with B a multiple of G: rows ``g B/G`` to ``(g + 1) B/G - 1`` share prefix g,
            as continuations of one primer do. Read once for up to 16 rows. A view of a longer cache is taken as it is.
        limit: Positions below it are what the launch is made for, in 1..T_max; ``None``: T_max. Others are computed as
            well, by fewer blocks. For graphs: the number of blocks is the graph's.
        v_scale: (B, H, T_max) float32, contiguous: the cached values are v_cache times it; written at ``position``. A
            prefix is in the dtype of ``q`` all the same.
        k_scale: Likewise of the cached keys, beside ``v_scale``.

    Returns:
        (B, H, D), dtype and device of ``q``. Decoding is for inference: there is no gradient.

    Raises:
        TypeError: A dtype that is not as above.
        ValueError: Shapes that do not fit, a cache that is not contiguous, several devices, one half of a prefix,
            ``k_scale`` without ``v_scale``, a ``limit`` outside its range, or a tensor that wants a gradient while
            gradients are recorded.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: the attention of openai/image-gpt src/model.py ``attn`` with its ``past``.
    """
    given = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    given |= _given(v_scale, k_scale, prefix_k, prefix_v)
    _check(given, position, starts)
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    if limit is None:
        limit = k_cache.shape[2]
    elif isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= k_cache.shape[2]:
        want = f"an integer in 1..{k_cache.shape[2]}, the cache's length"
        raise ValueError(f"attention_decode: limit is {limit!r}; want {want}")
    tensors = [*given.values(), position, *(() if starts is None else (starts,))]
    if _covered(q, k_cache, prefix_k, v_scale) and dispatch.use_kernel("attention_decode", *tensors):
        run = _attention_decode if dispatch.is_plain(*tensors) else torch.ops.igpt_fast.attention_decode
        return run(q, k, v, k_cache, v_cache, position, starts, prefix_k, prefix_v, v_scale, k_scale, scale, limit)
    others = starts, prefix_k, prefix_v, v_scale, k_scale
    return reference.attention_decode(q, k, v, k_cache, v_cache, position, scale, *others)


def _given(*optional: Tensor | None) -> dict[str, Tensor]:
    """Those that are there, by name."""
    named = zip(("v_scale", "k_scale", "prefix_k", "prefix_v"), optional, strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def _covered(q: Tensor, k_cache: Tensor, prefix_k: Tensor | None, v_scale: Tensor | None) -> bool:
    """Whether the kernel takes it; the rule is in ``OPS`` in words."""
    if q.dtype not in dispatch.DTYPES or q.shape[-1] not in dispatch.HEAD_DIMS or k_cache.shape[2] > _MOST_KEYS:
        return False
    if q.dtype == torch.float32 and (prefix_k is not None or v_scale is not None):
        return False
    return prefix_k is None or prefix_k.shape[2] <= _MOST_KEYS


def _check(tensors: dict[str, Tensor], position: Tensor, starts: Tensor | None) -> None:
    op = "attention_decode"
    if ("prefix_k" in tensors) != ("prefix_v" in tensors):
        raise ValueError(f"{op}: prefix_k and prefix_v come together; want both or neither")
    if "k_scale" in tensors and "v_scale" not in tensors:
        raise ValueError(f"{op}: k_scale comes with v_scale; want both, v_scale alone or neither")
    dispatch.check_floating(op, **tensors)
    q, k_cache = tensors["q"], tensors["k_cache"]
    for name, tensor in tensors.items():
        dtype, whose = q.dtype, "q's"
        if name in _SCALES.values():
            dtype, whose = torch.float32, "as scales are"
        elif _SCALES.get(name) in tensors:
            dtype, whose = torch.float8_e4m3fn, f"with {_SCALES[name]}"
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; want {dtype}, {whose}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} wants a gradient; there is none: decode under torch.no_grad()")
    if q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; want (B, H, D)")
    _check_shape(tensors, "k", "q", q.shape)
    _check_shape(tensors, "v", "q", q.shape)
    rows, heads, dim = q.shape
    if k_cache.ndim != 4 or (*k_cache.shape[:2], k_cache.shape[3]) != (rows, heads, dim) or k_cache.shape[2] < 1:
        raise ValueError(f"{op}: k_cache has shape {tuple(k_cache.shape)}; want ({rows}, {heads}, T_max, {dim})")
    _check_shape(tensors, "v_cache", "k_cache", k_cache.shape)
    scales = [name for name in _SCALES.values() if name in tensors]
    for name in scales:
        _check_shape(tensors, name, "k_cache", k_cache.shape[:3])
    for name in ("k_cache", "v_cache", *scales):
        if not tensors[name].is_contiguous():
            strides = tensors[name].stride()
            raise ValueError(f"{op}: {name} has strides {strides}; want a contiguous tensor, to write to")
    _check_integers("position", position, q, ((), (1,), (rows,)))
    if starts is not None:
        _check_integers("starts", starts, q, ((rows,),))
    if "prefix_k" not in tensors:
        return
    shape = tensors["prefix_k"].shape
    if len(shape) != 4 or (shape[1], shape[3]) != (heads, dim) or shape[2] < 1 or rows % max(shape[0], 1):
        want = f"(G, {heads}, T_p, {dim}) with G a divisor of {rows}"
        raise ValueError(f"{op}: prefix_k has shape {tuple(shape)}; want {want}")
    if shape[0] == 0 and rows > 0:
        raise ValueError(f"{op}: prefix_k has shape {tuple(shape)}; want one prefix or more")
    _check_shape(tensors, "prefix_v", "prefix_k", shape)


def _check_shape(tensors: dict[str, Tensor], name: str, whose: str, want: torch.Size) -> None:
    shape = tensors[name].shape
    if shape != want:
        raise ValueError(f"attention_decode: {name} has shape {tuple(shape)}; want {tuple(want)}, {whose}'s")


def _check_integers(name: str, tensor: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"attention_decode: {name} is {got}; want an int32 tensor")
    if tuple(tensor.shape) not in shapes:
        want = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"attention_decode: {name} has shape {tuple(tensor.shape)}; want {want}")
    if tensor.device != q.device:
        raise ValueError(f"attention_decode: {name} is on {tensor.device}, others on {q.device}; want one device")


def _rows_of_heads(tensor: Tensor) -> Tensor:
    """Itself, if every (row, head) is contiguous and 16-byte aligned, as in a view of the packed projection."""
    vector = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    fits = last == 1 and not any(stride % vector for stride in outer) and tensor.data_ptr() % 16 == 0
    return tensor if fits else dispatch.dense(tensor)


def _prefixes(prefix_k: Tensor, prefix_v: Tensor) -> tuple[Tensor, Tensor]:
    """Themselves, if every (prefix, head) is contiguous and aligned, at the same strides for both."""
    k, v = (_rows_of_heads(prefix) for prefix in (prefix_k, prefix_v))
    return (k, v) if k.stride() == v.stride() and k.stride(2) == k.shape[3] else (dispatch.dense(k), dispatch.dense(v))


def count_splits(kernels: Kernels, blocks: int, keys: int, dtype: torch.dtype) -> int:
    """Into how many parts the keys of each of so many (row, head)s are split, as ``kernels.launching`` has it."""
    how = kernels.launching
    ring = how.ring and dtype != torch.float32
    return kernels.module.attention_decode_splits(blocks, keys, kernels.device, ring, how.cluster)


def _attention_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, *others: Any
) -> Tensor:
    """Launches the kernels."""
    starts, prefix_k, prefix_v, v_scale, k_scale, scale, limit = others
    kernels = dispatch.native_kernels("attention_decode", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.data_ptr() % 16:
            raise ValueError(f"attention_decode: {name} begins at {cache.data_ptr():#x}; want a multiple of 16 bytes")
    q, k, v = _rows_of_heads(q), _rows_of_heads(k), _rows_of_heads(v)
    # Read before the launch waits for those before it, among which a copy's would be.
    copied = not position.is_contiguous() or not (starts is None or starts.is_contiguous())
    dependent = 0 if copied else kernels.dependent
    position, starts = position.contiguous(), None if starts is None else starts.contiguous()
    rows, heads, t_max, dim = k_cache.shape
    splits, prefix_splits = count_splits(kernels, rows * heads, limit, q.dtype), 0
    prefix: tuple[int, ...] = (0, 1, 0, 0, 0, 0)  # its length, the rows that share one, addresses and strides
    if prefix_k is not None and prefix_v is not None and rows > 0:
        prefix_k, prefix_v = _prefixes(prefix_k, prefix_v)
        length, group = prefix_k.shape[2], rows // prefix_k.shape[0]
        prefix = length, group, prefix_k.data_ptr(), prefix_v.data_ptr(), *prefix_k.stride()[:2]
        blocks = prefix_k.shape[0] * heads * -(-group // _ROWS)
        prefix_splits = kernels.module.attention_decode_splits(blocks, length, kernels.device)
    out, slots = q.new_empty((rows, heads, dim)), splits + prefix_splits
    partial = q.new_empty(rows * heads * slots * (dim + 2), dtype=torch.float32) if slots > 1 else None
    kernels.module.attention_decode_cuda(
        q=(q.data_ptr(), *q.stride()[:2]),
        k=(k.data_ptr(), *k.stride()[:2]),
        v=(v.data_ptr(), *v.stride()[:2]),
        k_cache=(k_cache.data_ptr(), dispatch.address(k_scale)),
        v_cache=(v_cache.data_ptr(), dispatch.address(v_scale)),
        position=(position.data_ptr(), int(position.numel() > 1)),
        starts=dispatch.address(starts),
        prefix=prefix,
        out=out.data_ptr(),
        partial=(dispatch.address(partial), splits, prefix_splits),
        shape=(rows, heads, t_max, dim),
        scale=scale,
        dtype=dispatch.DTYPES[q.dtype],
        dependent=dependent,
        ring=kernels.launching.ring,
        cluster=kernels.launching.cluster,
        place=kernels.place,
    )
    return out


def _check_launch(*arguments: Any) -> None:
    q, k, v, k_cache, v_cache, position, starts, prefix_k, prefix_v, v_scale, k_scale, _, limit = arguments
    given = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    given |= _given(v_scale, k_scale, prefix_k, prefix_v)
    _check(given, position, starts)
    covered = _covered(q, k_cache, prefix_k, v_scale) and 1 <= limit <= k_cache.shape[2]
    dispatch.check_covered("attention_decode", covered, q)


dispatch.register(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, "
    "Tensor? starts, Tensor? prefix_k, Tensor? prefix_v, Tensor(c!)? v_scale, Tensor(d!)? k_scale, float scale, "
    "SymInt limit) -> Tensor",
    _attention_decode,
    lambda q, *_: q.new_empty(q.shape),
    check=_check_launch,
)
