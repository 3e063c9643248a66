"""What attention_decode has to stand up to, as functions of a device; the op runs there as the caller has chosen."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

import torch
from checks import SCHEDULES, Counted, schedule
from kernels import Kernels
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, ops, reference
from igpt_fast.ops.attention_decode import dequantize_e4m3, quantize_e4m3

OP = sys.modules["igpt_fast.ops.attention_decode"]  # the module, which the op hides


@dataclass(frozen=True)
class Case:
    """Arguments of the op. What is not to be seen in the caches and the prefix is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    position: Tensor
    starts: Tensor | None = None
    prefix_k: Tensor | None = None
    prefix_v: Tensor | None = None
    v_scale: Tensor | None = None
    k_scale: Tensor | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def op(self) -> tuple[Tensor, ...]:
        """The output and the caches afterwards, of scaled ones their scales too; the case keeps its own."""
        caches = [t.clone() for t in (self.k_cache, self.v_cache, self.v_scale, self.k_scale) if t is not None]
        new, prefix = (self.q, self.k, self.v), (self.prefix_k, self.prefix_v)
        scales = dict(zip(("v_scale", "k_scale"), caches[2:], strict=False))
        out = ops.attention_decode(*new, *caches[:2], self.position, self.starts, None, *prefix, **scales)
        return out, *caches

    def definition(self, dtype: torch.dtype) -> Tensor:
        new = [t.to(dtype) for t in (self.q, self.k, self.v)]
        scales = [None if t is None else t.clone() for t in (self.v_scale, self.k_scale)]
        caches = [
            cache.clone() if scale is not None else cache.to(dtype, copy=True)
            for cache, scale in zip((self.k_cache, self.v_cache), reversed(scales), strict=True)
        ]
        prefix = [None if t is None else t.to(dtype) for t in (self.prefix_k, self.prefix_v)]
        return reference.attention_decode(*new, *caches, self.position, self.scale, self.starts, *prefix, *scales)


def case(
    device: str,
    dtype: torch.dtype,
    dim: int,
    position: int | Sequence[int],
    t_max: int = 130,
    rows: int = 3,
    heads: int = 2,
    starts: Sequence[int] | None = None,
    prefixes: int = 0,
    prefix: int = 0,
    scaled: int = 0,
) -> Case:
    """q, k, v are views of a packed projection; the scores spread over several units. ``scaled``: 1 for
    values of 8 bits, 2 for keys as well.
    """
    packed = torch.randn(rows, 3, heads, dim)
    scales = {}
    packed[:, :2] *= 1.5
    caches = [torch.randn(rows, heads, t_max, dim).to(dtype) for _ in range(2)]
    shared = [torch.randn(prefixes, heads, prefix, dim).to(dtype) for _ in range(2)] if prefixes else []
    first = list(starts) if starts is not None else [0] * rows
    for row in range(rows):
        at = position if isinstance(position, int) else position[row]
        for cache in caches:
            cache[row, :, max(at, 0) :] = torch.nan
            cache[row, :, : max(first[row] - prefix, 0)] = torch.nan
    for name, which in (("v_scale", 1), ("k_scale", 0))[:scaled]:  # each one's elements of a size of their own
        sizes = torch.randn(rows, heads, t_max, 1).exp2().to(dtype)
        caches[which], scale = quantize_e4m3(caches[which] * sizes)
        packed[:, 1 + which] *= torch.randn(rows, heads, 1).exp2()
        scales[name] = scale.to(device)
    q, k, v = packed.to(dtype).to(device).unbind(1)
    for group in range(prefixes):
        n = rows // prefixes
        hidden = max(min(first[group * n : group * n + n]), 0)
        for keys in shared:
            keys[group, :, :hidden] = torch.nan
    return Case(
        *(q, k, v),
        *(cache.to(device) for cache in caches),
        torch.tensor(position, dtype=torch.int32, device=device),
        None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device),
        *(keys.to(device) for keys in shared or (None, None) if keys is not None),
        **scales,
    )


def check(made: Case) -> None:
    """The output by the tolerance rule, the caches bit for bit."""
    out, *caches = made.op()
    assert out.shape == made.q.shape
    assert out.dtype == made.q.dtype
    rows, _, t_max, _ = made.k_cache.shape
    positions = made.position.reshape(-1).expand(rows).tolist()
    before_and_new = [(made.k_cache, made.k), (made.v_cache, made.v)]
    for which, scales in ((1, made.v_scale), (0, made.k_scale)):
        if scales is not None:
            before, new = before_and_new[which]
            codes, scale_of_new = quantize_e4m3(new)
            before_and_new[which] = before, codes
            before_and_new.append((scales, scale_of_new))
    for cache, (before, new) in zip(caches, before_and_new, strict=True):
        wanted = before.clone()
        for row, at in enumerate(positions):
            if 0 <= at < t_max:
                wanted[row, :, at] = new[row]
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[cache.element_size()]
        assert torch.equal(cache.view(bits), wanted.view(bits)), "cache"
    inside = [0 <= at < t_max for at in positions]
    outside = [not x for x in inside]
    assert out[outside].isnan().all()
    exact, plain = made.definition(torch.float64), made.definition(made.q.dtype)
    assert_parity(out[inside], plain[inside], exact[inside], "out")


# Both ends of the kernels' spans of 64 keys, and of the cache; some rows see nothing.
POSITIONS = [0, 1, 62, 63, 64, 97, 129]
STARTS = [0, 1, 63, 62, 70, 64, -5]
# (prefixes, rows, prefix): 1, several, 16 and more than 16 rows for each; less than a warp's keys, ragged, split.
PREFIXES = [(3, 3, 1), (1, 2, 63), (2, 10, 65), (1, 16, 97), (1, 17, 33), (1, 35, 130)]


def check_positions(device: str, dtype: torch.dtype, dim: int, starts: bool = False, scaled: int = 0) -> None:
    check(case(device, dtype, dim, POSITIONS, rows=7, heads=1, starts=STARTS if starts else None, scaled=scaled))


def check_prefix(
    device: str, dtype: torch.dtype, dim: int, prefixes: int, rows: int, prefix: int, scaled: int = 0
) -> None:
    position = [(37 * row) % 70 for row in range(rows)]
    starts = [row % 3 * (prefix + 2) // 2 for row in range(rows)]
    for some in (None, starts):
        check(case(device, dtype, dim, position, 70, rows, 1 + prefixes % 2, some, prefixes, prefix, scaled))


def check_long(device: str, dtype: torch.dtype = torch.bfloat16, dim: int = 64, scaled: int = 0) -> None:
    """Every split has a part, of one or two spans, and the last is ragged."""
    for position in (1023, 1000, 511):
        check(case(device, dtype, dim, position, t_max=1024, rows=1, heads=1, scaled=scaled))
    check(case(device, dtype, 32, 399, t_max=400, rows=1, heads=66, scaled=scaled))


def check_many_blocks(device: str) -> None:
    """So many that nothing is split: the one kernel writes the output."""
    position = [row % 7 - 1 for row in range(128)]
    check(case(device, torch.bfloat16, 32, position, t_max=5, rows=128, heads=2))


def check_dependent(device: str, position: int = 3) -> None:
    """It may begin before the projection has ended that makes its queries, keys and values."""
    x, weight = torch.randn(2, 64).bfloat16().to(device), torch.randn(64, 192).bfloat16().to(device)
    at = torch.tensor(position, dtype=torch.int32, device=device)
    for ring in (False, True):
        found = []
        for dependent in ("none", "late", "early"):
            caches = [torch.ones(2, 2, position + 5, 32, dtype=torch.bfloat16, device=device) for _ in range(2)]
            with backend.launching(backend.Launching(dependent, ring)):
                q, k, v = ops.gemv(x, weight).view(2, 3, 2, 32).unbind(1)
                found.append(torch.stack([ops.attention_decode(q, k, v, *caches, at), k, v]))
        assert all(torch.equal(result, found[0]) for result in found)


def check_outside(device: str) -> None:
    """Nothing is written, and NaN says so; with splits, a prefix and scales as well."""
    for scaled in (1, 2):
        check(case(device, torch.bfloat16, 64, [-1, 130, 5], scaled=scaled))
    check(case(device, torch.bfloat16, 64, [-1, 130, 5], starts=[0, 0, 2]))
    check(case(device, torch.bfloat16, 64, [2**31 - 1, -(2**31), 0, 70], 70, 4, prefixes=2, prefix=20))


def check_nan_stays(device: str, prefixes: int = 0, scaled: int = 0) -> None:
    """A NaN in one row's query, key, value, or cache is in its output and no other row's."""
    made = case(device, torch.bfloat16, 64, 70, rows=4, prefixes=prefixes, prefix=40 if prefixes else 0, scaled=scaled)
    places = [made.q[1], made.k[1], made.v[1], made.k_cache[1, :, 3], made.v_cache[1, :, 3]]
    for new, scales in ((made.v, made.v_scale), (made.k, made.k_scale)):
        if scales is not None:  # of a new one one element will do
            places += [new[1, :, :1], scales[1, :, 3]]
    for poison in places:
        kept = poison.clone()
        poison.fill_(torch.nan)
        out = made.op()[0]
        assert out[1].isnan().all()
        assert not out[[0, 2, 3]].isnan().any()
        poison.copy_(kept)


def check_codes(device: str, dtype: torch.dtype, dim: int) -> None:
    """Every code of 8 bits in every place of a value, with a scale of 1 and another; the new key has no weight."""
    zeros = torch.zeros(256, 1, dim, dtype=dtype, device=device)
    q, k = zeros + 1.0, zeros - 1000.0
    codes = (torch.arange(256)[:, None, None, None] + torch.arange(dim)).to(torch.uint8)
    for scale in (1.0, 0.75):
        v_cache = torch.cat([codes, codes], dim=2).view(torch.float8_e4m3fn).to(device)
        v_scale = torch.full((256, 1, 2), scale, device=device)
        position = torch.tensor(1, dtype=torch.int32, device=device)
        out = ops.attention_decode(
            q, k, zeros, zeros[:, :, None].repeat(1, 1, 2, 1), v_cache, position, v_scale=v_scale
        )
        wanted = (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)[:, :, 0].to(device)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(out.nan_to_num(), wanted.nan_to_num())
        assert not v_cache[:, :, 1].float().any()
        assert not v_scale[:, :, 1].any()


def check_quantizing(device: str, dtype: torch.dtype, dim: int) -> None:
    """Every number of 16 bits as an element of a new value, with large and small ones beside it, and with none."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).sort().values  # of like size together, or the largest would leave nothing of the others
    every = every[: 65536 // (dim - 1) * (dim - 1)].view(-1, 1, dim - 1)
    at_448 = torch.where(every.abs() <= 448.0, every, 0.0).to(dtype)
    odd = torch.zeros(4, 1, dim - 1, dtype=dtype)
    odd[1, 0, -1], odd[2, 0, 3], odd[3] = -torch.inf, torch.nan, -0.0
    for values, first in ((every, -0.0), (at_448, 448.0), (odd, 0.0)):
        v = torch.cat([torch.full((len(values), 1, 1), first, dtype=dtype), values], dim=2).to(device)
        v_cache = torch.zeros(len(v), 1, 1, dim, device=device).to(torch.float8_e4m3fn)
        zeros = torch.zeros_like(v)
        v_scale, k_cache = torch.zeros(len(v), 1, 1, device=device), zeros[:, :, None].clone()
        position = torch.tensor(0, dtype=torch.int32, device=device)
        out = ops.attention_decode(zeros, zeros, v, k_cache, v_cache, position, v_scale=v_scale)
        codes, scales = quantize_e4m3(v.cpu())
        broken = ~v.isfinite().all(dim=2)
        assert torch.equal(v_scale[:, :, 0].isnan(), broken)
        assert torch.equal(v_scale[:, :, 0].nan_to_num().cpu(), scales.nan_to_num())
        assert torch.equal(v_cache[:, :, 0].view(torch.uint8).cpu(), codes.view(torch.uint8))
        assert out[broken].isnan().all()
        kept = dequantize_e4m3(codes, scales, dtype).to(device)[~broken]
        large = kept.abs() > 2.0**-100  # torch's product has no smaller ones than 2^-126
        assert torch.equal(out[~broken][large], kept[large])
        assert ((out[~broken] - kept)[~large].abs() <= 2.0**-100).all()


def check_huge(device: str, dim: int = 64) -> None:
    """A cache, and a prefix, whose second head begins behind 2^32 elements, of which a few are touched."""

    def lazy(*shape: int) -> Tensor:
        """Memory that is there once it is written to."""
        count = torch.Size(shape).numel()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.bfloat16, count=count).view(shape)

    assert device == "cpu"
    t_max = 2**32 // dim + 8
    q, k, v = (torch.randn(1, 2, dim).bfloat16() for _ in range(3))
    k_cache, v_cache = lazy(1, 2, t_max, dim), lazy(1, 2, t_max, dim)
    near = slice(t_max - 5, t_max)
    k_cache[:, :, near], v_cache[:, :, near] = torch.randn(2, 1, 2, 5, dim).bfloat16()
    position = torch.tensor(t_max - 1, dtype=torch.int32)
    starts = torch.tensor([t_max - 5], dtype=torch.int32)
    small = Case(q, k, v, k_cache[:, :, near].clone(), v_cache[:, :, near].clone(), position * 0 + 4)
    out = ops.attention_decode(q, k, v, k_cache, v_cache, position, starts)
    assert torch.equal(k_cache[:, :, -1], k)
    assert torch.equal(v_cache[:, :, -1], v)
    assert_parity(out, small.definition(torch.bfloat16), small.definition(torch.float64), "out")
    # The second head's first four keys, in a view of that cache.
    k_cache[:, :, :4], v_cache[:, :, :4] = torch.randn(2, 1, 2, 4, dim).bfloat16()
    keys, values = k_cache[:, :, :4], v_cache[:, :, :4]
    empty = torch.zeros(1, 2, 3, dim).bfloat16()
    with_prefix = Case(q, k, v, empty, empty, position * 0, None, keys.clone(), values.clone())
    out = ops.attention_decode(q, k, v, empty.clone(), empty.clone(), position * 0, None, None, keys, values)
    assert_parity(out, with_prefix.definition(torch.bfloat16), with_prefix.definition(torch.float64), "prefix")


def check_determinism(kernels: Kernels) -> None:
    """The same bits under every schedule."""
    cases = [
        case("cpu", torch.bfloat16, 64, 300, 320, 1),
        case("cpu", torch.float16, 96, 70, 70 + 1, 5, prefixes=1, prefix=150),
        case("cpu", torch.bfloat16, 96, 300, 320, 1, scaled=True),
    ]
    for made in cases:
        results = []
        for order, seed in SCHEDULES:
            schedule(kernels, order, seed)
            results.append(made.op()[0])
        assert not results[0].isnan().any()
        assert all(torch.equal(result, results[0]) for result in results)


def check_coalescing(kernels: Kernels) -> None:
    """Every key and value moves once, in whole sectors; no more shared-memory conflicts than are known."""
    for dim in (32, 64, 96, 128):
        # 256 blocks for 128 keys each, of which the last is the new one: a span of 64, one of 63, and one more.
        made = case("cpu", torch.bfloat16, dim, 128, 192, rows=2, heads=128)
        with Counted(kernels) as counted:
            made.op()
        size = 2 * dim
        # Each of a block's 16 or 32 groups of lanes loads the query, the new key and the new value.
        groups = 128 // (8 if dim % 64 == 0 else 4)
        position = 256 * 128 * 4
        assert counted["launches"] == 1, dict(counted)
        assert counted["load_bytes"] - position == 256 * size * (2 * 128 + 3 * groups), dict(counted)
        assert counted["store_bytes"] == 256 * size * 3, dict(counted)
        # A warp's lanes share the query's sectors, and the position's.
        warp_groups = groups // 4
        sectors = 256 * (size * (2 * 128 + 3 * groups // warp_groups) // 32 + 4)
        assert counted["load_sectors"] == sectors, (sectors, dict(counted))
        # 8 lanes, which write each vector of 8 sums in two halves, meet in twos.
        assert counted["shared_conflicts"] == (256 * 4 * dim // 32 if dim % 64 == 0 else 0), dict(counted)


def check_scaled_bytes(kernels: Kernels, scaled: int) -> None:
    """Of a key more move one byte an element of what has 8 bits, two of what has not, and a scale; in whole sectors."""
    for dim in (64, 96, 128):
        counts, size = [], (4 - scaled) * dim
        for position in (64, 128):
            made = case("cpu", torch.bfloat16, dim, position, 192, rows=2, heads=128, scaled=scaled)
            with Counted(kernels) as counted:
                made.op()
            counts.append(dict(counted))
            assert counted["store_bytes"] == 256 * (size + 4 * scaled + 2 * dim), dict(counted)
        more = {name: counts[1][name] - counts[0][name] for name in counts[0]}
        vectors = dim // (16 if scaled == 2 else 8)
        lanes = next(n for n in (8, 4, 2) if vectors % n == 0)
        assert more["load_bytes"] == 256 * 64 * (size + 4 * lanes * scaled), more
        # A warp's lanes share the sectors of the scales of its 4, 8 or 16 keys.
        assert more["load_sectors"] == 256 * 64 * (size + max(lanes, 4) * scaled) // 32, more


def check_prefix_reads_once(kernels: Kernels) -> None:
    """16 rows read a key of their prefix once, in whole sectors, and multiply it on the tensor cores."""
    for dim in (32, 64, 96, 128):
        counts = []
        for prefix in (32, 64):
            made = case("cpu", torch.bfloat16, dim, 0, 1, rows=16, heads=2, prefixes=1, prefix=prefix)
            with Counted(kernels) as counted:
                made.op()
            counts.append(dict(counted))
        assert counts[0]["launches"] == counts[1]["launches"] == 3, counts
        more = {name: counts[1][name] - counts[0][name] for name in counts[0]}
        # For 32 keys more of two heads, in two tensors.
        assert more["load_bytes"] == more["load_sectors"] * 32 == 2 * 32 * 2 * 2 * dim, more
        assert more["mma"] == 2 * 32 * 2 * 16 * dim // (16 * 8 * 16), more
        assert more["shared_requests"] == 0, more


# How the ring runs: the device's multiprocessors, where it is emulated, and whether in clusters. Two multiprocessors
# have fewer blocks than there are parts of keys.
RINGS = [(132, False), (2, True), (132, True)]


@contextmanager
def by_ring(module: ModuleType | None, multiprocessors: int, cluster: bool, capability: int = 90) -> Iterator[None]:
    """``module``: the emulated one, or none on a device, which is what it is."""
    with backend.launching(backend.Launching(ring=True, cluster=cluster)):
        if module is None:
            yield
            return
        module.set_capability(capability)
        module.set_multiprocessors(multiprocessors)
        try:
            yield
        finally:
            module.set_capability()
            module.set_multiprocessors()


def check_without_ring(kernels: Kernels) -> None:
    """Below sm_90 nothing is launched but what is without it."""
    with by_ring(kernels.module, 132, True, 80), Counted(kernels) as counted:
        check_positions("cpu", torch.bfloat16, 64, scaled=1)
    assert counted["bulk_bytes"] == counted["async_copies"] == 0, dict(counted)


def check_cluster_without_room(kernels: Kernels) -> None:
    """A multiprocessor with three blocks has no cluster of four: the second kernel puts the parts together."""
    with by_ring(kernels.module, 1, True), patch.object(OP, "count_splits", lambda *_: 4), Counted(kernels) as counted:
        check(case("cpu", torch.bfloat16, 64, 250, 256, rows=2))
    assert counted["launches"] == 2, dict(counted)


def check_scales_in_time(kernels: Kernels) -> None:
    """The launch before may write the scale of an old key: that is not asked for until it has ended."""
    q, k, v = torch.randn(3, 1, 1, 64).bfloat16().unbind()
    scales = torch.ones(1, 1, 128), torch.ones(1, 1, 128)
    with by_ring(kernels.module, 132, False), backend.launching(backend.Launching("early", ring=True)):
        for position in (64, 65):
            caches = torch.zeros(2, 1, 1, 128, 64).to(torch.float8_e4m3fn).unbind()
            at = torch.tensor(position, dtype=torch.int32)
            ops.attention_decode(q, k, v, *caches, at, v_scale=scales[0], k_scale=scales[1])


def check_ring_bits(kernels: Kernels) -> None:
    """The same bits under every schedule, from a cluster and from the second kernel."""
    for dim, scaled, prefix in ((64, 0, 0), (96, 2, 0), (64, 1, 40)):
        made = case("cpu", torch.bfloat16, dim, 250, 256, 1, prefixes=1 if prefix else 0, prefix=prefix, scaled=scaled)
        results = []
        for (order, seed), cluster in zip(SCHEDULES, (False, False, True, True, True), strict=True):
            schedule(kernels, order, seed)
            with by_ring(kernels.module, 132, cluster), Counted(kernels) as counted:
                results.append(made.op()[0])
            assert counted["launches"] == (1 if cluster else 2) + (prefix > 0)
        assert not results[0].isnan().any()
        assert all(torch.equal(result, results[0]) for result in results)
    schedule(kernels, "fifo", 0)


def check_ring_ahead(kernels: Kernels) -> None:
    """Three clusters with several (row, head)s each, or one with all, whose last block is as far ahead as it can be."""
    for order, splits in (("skewed", 2), ("random", 4)):
        schedule(kernels, order, 1)
        with by_ring(kernels.module, 2, True), patch.object(OP, "count_splits", lambda *_, splits=splits: splits):
            check_positions("cpu", torch.bfloat16, 64, True)
    schedule(kernels, "fifo", 0)


def check_ring_bytes(kernels: Kernels) -> None:
    """Of 64 keys more move their own bytes and scales, asynchronously, and nothing else; no bank is asked twice."""
    for dim, scaled in [(d, s) for d in (32, 64, 96, 128) for s in (0, 1, 2)]:
        counts = []
        for position in (64, 128):
            made = case("cpu", torch.bfloat16, dim, position, 192, rows=1, heads=4, scaled=scaled)
            with by_ring(kernels.module, 2, True), Counted(kernels) as counted:
                made.op()
            counts.append(dict(counted))
            assert counted["launches"] == 1
        more = {name: counts[1][name] - counts[0][name] for name in counts[0]}
        keys, size = 4 * 64, dim * (4 - scaled)
        assert more["bulk_bytes"] == keys * size, more
        assert more["async_copies"] == keys * scaled, more  # a scale by itself
        if scaled == 0:
            assert more["load_bytes"] == more["load_sectors"] == 0, more
        assert more["shared_conflicts"] == 0, more
        assert more["store_bytes"] == more["barriers"] == 0, more
