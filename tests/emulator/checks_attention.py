"""What the attention kernels have to stand up to, as functions: the tests call them, and so do the mutations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from checks import SCHEDULES, Counted, schedule
from kernels import DTYPES, Kernels, addresses
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, ops, reference

NAMES = ("out", "lse", "dq", "dk", "dv")
HOPPER = -1  # in place of `rows`: the kernels for Hopper


@contextmanager
def capability(kernels: Kernels, ten_times: int) -> Iterator[None]:
    """What the emulated device is; a GPU is what it is."""
    if kernels.device == "cpu":
        kernels.module.set_capability(ten_times)
    try:
        yield
    finally:
        if kernels.device == "cpu":
            kernels.module.set_capability()


@dataclass(frozen=True)
class Case:
    """A problem: queries, keys, values, the upstream gradient, and what is hidden."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    starts: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def shown(self) -> Tensor:
        """(B, T_k) bool."""
        b, t_k = self.k.shape[0], self.k.shape[2]
        shown = torch.ones(b, t_k, dtype=torch.bool, device=self.q.device)
        shown = shown if self.key_mask is None else self.key_mask
        return shown if self.starts is None else reference.shown_keys(self.starts, t_k, shown)


def eighths(*shape: int) -> Tensor:
    """Numbers whose products add up without rounding: of a query with a single key, delta is dP exactly, and so is the
    gradient of its score zero, whatever the order of the sums."""
    return torch.randn(shape).mul(8).round().div(8)


def make(device: str, dtype: torch.dtype, d: int, t_q: int, t_k: int, mask: str = "", b: int = 2, h: int = 1) -> Case:
    """``mask``: "starts", "keys", "both" or nothing. The first batch row's starts hide nothing, the last one's most."""
    q, k, v, dout = (eighths(b, h, t, d).to(dtype).to(device) for t in (t_q, t_k, t_k, t_q))
    starts = torch.linspace(0, 0.7 * t_k, b).round().int().to(device) if mask in ("starts", "both") else None
    key_mask = torch.rand(b, t_k).lt(0.7).to(device) if mask in ("keys", "both") else None
    return Case(q, k, v, dout, starts, key_mask)


def heads_apart(x: Tensor) -> Tensor:
    """The same values in the memory of (B, T, H, D), with the rest of a packed projection, NaN, in between."""
    b, h, t, d = x.shape
    packed = torch.full((b, t, 3, h, d), torch.nan, dtype=x.dtype, device=x.device)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def run(kernels: Kernels, case: Case, rows: int = 0, ten_times: int | None = None) -> list[Tensor]:
    """out, lse, dq, dk, dv by the kernels, into memory that is NaN before.

    Above 0, ``rows`` are the forward's, and both directions are those of every GPU.
    """
    inputs = [heads_apart(x) for x in (case.q, case.k, case.v)]
    (b, h, t_q, d), t_k, device = case.q.shape, case.k.shape[2], case.q.device
    out, dq, dk, dv = (heads_apart(torch.full_like(x, torch.nan)) for x in (case.q, case.q, case.k, case.k))
    lse = torch.full((b, h, t_q), torch.nan, device=device)
    terms = torch.full((b, h, t_q, 2), torch.nan, device=device)
    mask = case.key_mask
    settings = arguments((b, h, t_q, t_k, d), case.scale, case.q.dtype) | {"lse": lse.data_ptr()}
    settings |= addresses(starts=case.starts, key_mask=mask)
    settings["key_mask_stride"] = 0 if mask is None else mask.stride(0)
    settings["device"], settings["stream"] = kernels._place()
    named = places(**dict(zip(("q", "k", "v"), inputs, strict=True)), out=out)
    with capability(kernels, ten_times or (90 if rows == HOPPER else 80)):
        kernels.module.causal_attention_fwd_cuda(**named, rows=max(rows, 0), **settings)
        named |= places(dout=case.dout, dq=dq, dk=dk, dv=dv) | {"terms": terms.data_ptr(), "portable": rows > 0}
        kernels.module.causal_attention_bwd_cuda(**named, **settings)
    return [out, lse, dq, dk, dv]


def places(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    """Address and strides of each (B, H, T, D) tensor."""
    return {name: (x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()}


def arguments(sizes: tuple[int, ...], scale: float, dtype: torch.dtype) -> dict[str, Any]:
    """What the launchers take beside tensors, of (B, H, T_q, T_k, D): nothing is hidden."""
    named: dict[str, Any] = dict(zip(("batch", "heads", "t_q", "t_k", "head_dim"), sizes, strict=True))
    hidden = {"starts": 0, "key_mask": 0, "key_mask_stride": 0}
    return named | hidden | {"scale": scale, "dtype": DTYPES[dtype], "device": 0, "stream": 0}


def define(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The same without kernels in a dtype: through torch's attention, whose gradient has its correction from out, which
    is rounded, as the kernels'. lse is in fp32 at least, of scores that are rounded to the dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    with backend.use_backend("reference"):
        out, _ = ops.causal_attention(*leaves, case.scale, case.key_mask, starts=case.starts)
    gradients = torch.autograd.grad(out, leaves, case.dout.to(dtype))
    visible = reference.visible_keys(case.q.shape[2], case.k.shape[2], case.shown(), case.q.device)
    q, k, _ = (x.detach() for x in leaves)
    scores = (q @ k.transpose(-1, -2)) * case.scale
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse = scores.to(wide).masked_fill(~visible, -torch.inf).logsumexp(-1)
    return [out.detach(), lse.to(dtype), *gradients]


def check(
    kernels: Kernels,
    dtype: torch.dtype,
    d: int,
    t_q: int,
    t_k: int,
    mask: str = "",
    rows: int = 0,
    b: int = 2,
    h: int = 1,
) -> None:
    """Output, lse and gradients against the definition in float64, by the tolerance rule."""
    case = make(kernels.device, dtype, d, t_q, t_k, mask, b, h)
    ours, plain, exact = run(kernels, case, rows), define(case, dtype), define(case, torch.float64)
    nothing = exact[1] == -torch.inf  # a query without a key
    assert torch.equal(ours[1] == -torch.inf, nothing), "lse"
    for i in (0, 2):
        assert not ours[i][nothing].any(), NAMES[i]
    hidden = ~case.shown()[:, None, :].expand(case.k.shape[:3])
    for i in (3, 4):
        assert not ours[i][hidden].any(), NAMES[i]
    for name, mine, theirs, wanted in zip(NAMES, ours, plain, exact, strict=True):
        finite = [x.masked_fill(nothing, 0.0) if name == "lse" else x for x in (mine, theirs, wanted)]
        assert_parity(*finite, name)


def check_schedules(kernels: Kernels, d: int, rows: int) -> None:
    """The same bits whatever the order of the threads."""
    if rows == HOPPER:  # rings that are filled again, and warpgroups that see no key beside others that do
        case = make(kernels.device, torch.bfloat16, d, 330, 330, b=1)
        case = replace(case, starts=torch.tensor([70], dtype=torch.int32))
    else:
        case = make(kernels.device, torch.bfloat16, d, 80, 140, "both", b=1, h=2)
    expected = None
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        found = run(kernels, case, rows)
        expected = found if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (order, seed)
    schedule(kernels, "fifo", 0)


def check_poison(kernels: Kernels, rows: int = 0) -> None:
    """What stands in hidden keys, and in queries that are shown none, reaches nothing."""
    masks = ((64, "starts"), (96, "starts")) if rows == HOPPER else ((64, "both"), (32, "starts"), (96, "keys"))
    for d, mask in masks:
        clean = make(kernels.device, torch.bfloat16, d, 70, 75, mask)
        if clean.key_mask is not None:
            clean.key_mask[0, :9] = False
            clean.key_mask[1, :69] = False
        hidden = ~clean.shown()[:, None, :, None]
        k, v = (x.masked_fill(hidden, torch.nan) for x in (clean.k, clean.v))
        nothing = ~reference.visible_keys(70, 75, clean.shown(), kernels.device).any(-1, keepdim=True)
        assert nothing.any()
        q, dout = (x.masked_fill(nothing, torch.nan) for x in (clean.q, clean.dout))
        found, expected = run(kernels, replace(clean, q=q, k=k, v=v, dout=dout), rows), run(kernels, clean, rows)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (d, mask)


def check_access(kernels: Kernels, rows: int = 0) -> None:
    """No bank conflicts, in ldmatrix neither; whole sectors of global memory."""
    for d in (32, 64, 96, 128):
        case = make("cpu", torch.bfloat16, d, 128, 128, b=1)
        with Counted(kernels) as counted:
            run(kernels, case, rows)
        assert counted["ldmatrix_wavefronts"] == 4 * counted["ldmatrix"], (d, dict(counted))
        assert counted["shared_conflicts"] == 0, (d, dict(counted))
        # lse and terms are read and written by fours and eights of bytes, in runs of 32 and 64 bytes at least.
        assert counted["load_sectors"] * 32 <= counted["load_bytes"] * 1.05, (d, dict(counted))
        assert counted["store_sectors"] * 32 == counted["store_bytes"], (d, dict(counted))


def mma_of(kernels: Kernels, case: Case, rows: int) -> int:
    with Counted(kernels) as counted:
        run(kernels, case, rows)
    return counted["mma"]


def check_skipping(kernels: Kernels) -> None:
    """Only tiles with a shown key in them are multiplied: by warps of 16 rows with blocks of 64."""
    t, d = 192, 96  # 64 rows in the backward too
    case = make("cpu", torch.bfloat16, d, t, t, b=1)
    tile = 4 * (64 // 8) * (d // 16)  # mma of one product of 64 x 64 x d
    pairs = 1 + 2 + 3
    assert mma_of(kernels, case, 64) == (2 + 4 + 3) * pairs * tile
    # A start in the last tile leaves one pair to the query tiles, and the others have none.
    late = replace(case, starts=torch.tensor([130], dtype=torch.int32))
    assert mma_of(kernels, late, 64) == (2 + 4 + 3) * tile
    # Blocks of 128 queries: where a tile is beyond all 32 queries of a warp, it skips its part.
    d = 64
    case = make("cpu", torch.bfloat16, d, t, t, b=1)
    warps = sum(1 for first in range(0, 256, 32) for n0 in range(0, t, 64) if n0 <= first + 31)
    tile = 2 * (64 // 8) * (d // 16)  # of 32 x 64 x d
    assert mma_of(kernels, case, 128) - mma_of(kernels, case, 64) == 2 * tile * warps - 2 * pairs * 2 * tile


def wgmma_of(kernels: Kernels, case: Case, rows: int = HOPPER, ten_times: int = 90) -> tuple[int, int]:
    """Instructions of a warp, for Hopper and for every GPU, that both directions take."""
    with Counted(kernels) as counted:
        run(kernels, case, rows, ten_times)
    return counted["wgmma"], counted["mma"]


def check_hopper_skipping(kernels: Kernels) -> None:
    """A warpgroup multiplies the tiles that its 64 queries see, or that see its 64 keys."""
    for d in (64, 96, 128):
        short, long = 4 * d // 16, 4 * 64 // 16  # wgmma of 64 x 64 x d, for four warps: sums over d, over the tile

        def wanted(by_queries: int, by_keys: int, short: int = short, long: int = long) -> tuple[int, int]:
            """In the forward and for dq, tiles of keys from the first that is shown; for dk and dv, of queries."""
            return by_queries * (3 * short + 2 * long) + by_keys * 2 * (short + long), 0

        case = make("cpu", torch.bfloat16, d, 320, 320, b=1)
        assert wgmma_of(kernels, case) == wanted(1 + 2 + 3 + 4 + 5, 5 + 4 + 3 + 2 + 1), d
        # From the first key that is shown, whichever that is; queries before it see none. The first 128 keys are a
        # block that is not shown; the next ones are seen from query 130 on, the last warpgroup's from 256 on.
        late = replace(case, starts=torch.tensor([130], dtype=torch.int32))
        assert wgmma_of(kernels, late) == wanted(1 + 2 + 3, 3 + 3 + 1), d
        # The last warpgroup's first query is the last one, and so is its first key.
        assert wgmma_of(kernels, make("cpu", torch.bfloat16, d, 65, 65, b=1)) == wanted(1 + 2, 2 + 1), d


def check_hopper_is_chosen(kernels: Kernels) -> None:
    """Where it can run, and nowhere else."""
    case = make("cpu", torch.bfloat16, 64, 2, 3, b=2, h=2)
    for ten_times in (80, 89, 90, 100, 120):
        wgmma, mma = wgmma_of(kernels, case, ten_times=ten_times)
        assert (wgmma > 0) == (ten_times == 90), ten_times
        assert (mma > 0) == (ten_times != 90), ten_times
    assert wgmma_of(kernels, case, rows=64)[0] == 0  # as it is asked for
    masked = replace(case, key_mask=torch.ones(2, 3, dtype=torch.bool))
    assert wgmma_of(kernels, masked)[0] == 0
    assert wgmma_of(kernels, make("cpu", torch.bfloat16, 32, 2, 3))[0] == 0
    # A stride of 0 is none that TMA takes, unless the dimension has one element.
    for b, h in ((2, 1), (1, 2), (1, 1)):
        q = case.q[:b, :h]
        k, v = (x.as_strided((b, h, *x.shape[2:]), (0, 0, *x.stride()[2:])) for x in (case.k, case.v))
        with Counted(kernels) as counted, capability(kernels, 90):
            out = launch_forward(kernels, q, k, v)
        assert (counted["wgmma"] > 0) == (b * h == 1), (b, h)
        with capability(kernels, 90):
            assert torch.allclose(out, launch_forward(kernels, q, k.contiguous(), v.contiguous()), 1e-2, 1e-2)
    # The same of the upstream gradient, which only the backward reads.
    alike = replace(case, dout=case.dout[:1].expand_as(case.dout))
    assert min(wgmma_of(kernels, alike)) > 0


def launch_forward(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out, from tensors as they lie in memory."""
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full(q.shape[:3], torch.nan)
    settings = arguments((*q.shape[:3], k.shape[2], q.shape[3]), 0.125, q.dtype)
    kernels.module.causal_attention_fwd_cuda(**places(q=q, k=k, v=v, out=out), lse=lse.data_ptr(), rows=0, **settings)
    return out


def check_order(kernels: Kernels, rows: int = 64) -> None:
    """More pairs of batch and head than fit into a group: the last group's blocks are those of its pairs, and it is as
    large as the first."""
    pairs, t, d = (801, 129, 64) if rows == HOPPER else (3101, 65, 32)
    group = pairs // 2 + 1
    assert group < (24 << 20) // (t * d * 4) < pairs
    q = eighths(pairs, 1, t, d).bfloat16()
    out, lse = torch.full_like(q, torch.nan), torch.full((pairs, 1, t), torch.nan)
    tensors = places(q=q, k=q, v=q, out=out)
    kernels.module.set_blocks(2 * group, 2 * (pairs - group))
    try:
        with capability(kernels, 90 if rows == HOPPER else 80):
            settings = arguments((pairs, 1, t, t, d), 0.2, q.dtype)
            kernels.module.causal_attention_fwd_cuda(**tensors, lse=lse.data_ptr(), rows=max(rows, 0), **settings)
    finally:
        kernels.module.set_blocks()
    assert lse[:group].isnan().all()
    assert not lse[group:].isnan().any()
    assert not out[group:].isnan().any()


def check_order_of_the_backward(kernels: Kernels) -> None:
    """The same for Hopper: blocks around the end of the last group's first tile, of 128 keys or from the last on of 128
    queries, belong to its last pairs and, for the next tile, to its first ones."""
    pairs, t, d, count = 501, 129, 128, 4
    group = pairs // 2 + 1
    assert group < (24 << 20) // (t * d * 4) < pairs
    q, like = eighths(pairs, 1, t, d).bfloat16(), torch.full((pairs, 1, t, d), torch.nan, dtype=torch.bfloat16)
    dq, dk, dv = like, like.clone(), like.clone()
    # Of the queries' terms the chosen blocks write some alone, of pairs in the first group.
    lse, terms = torch.zeros(pairs, 1, t), torch.zeros(pairs, 1, t, 2)
    settings = arguments((pairs, 1, t, t, d), 0.01, q.dtype) | {"portable": False}
    settings |= {"lse": lse.data_ptr(), "terms": terms.data_ptr()}
    kernels.module.set_blocks(pairs + group - count, 2 * count)
    try:
        with capability(kernels, 90):
            tensors = places(q=q, k=q, v=q, out=q, dout=q, dq=dq, dk=dk, dv=dv)
            kernels.module.causal_attention_bwd_cuda(**tensors, **settings)
    finally:
        kernels.module.set_blocks()
    first = torch.zeros(pairs, t, dtype=torch.bool)  # rows that are written, where the first tile begins at row 0
    first[pairs - count :, :128] = True
    first[group : group + count, 128:] = True
    last = torch.zeros_like(first)
    last[pairs - count :, 128:] = True
    last[group : group + count, :128] = True
    for name, x, written in (("dq", dq, last), ("dk", dk, first), ("dv", dv, first)):
        assert torch.equal(x[:, 0].isfinite().all(-1), written), name
        assert torch.equal(x[:, 0].isnan().all(-1), ~written), name


def check_huge(kernels: Kernels, rows: int = 0) -> None:
    """Strides beyond 2^31 elements, of batch rows and of positions: the same bits as of small ones."""
    d = 64 if rows == HOPPER else 32
    for dtype, b, t, stride in ((torch.bfloat16, 2, 5, 2**31 + 64), (torch.float16, 1, 34, 2**26 + 8)):
        case = make("cpu", dtype, d, t, t, b=b)
        try:
            memory = torch.empty(2**31 + 2**27, dtype=dtype)
        except RuntimeError:
            return  # the system promises no more memory than it has
        views = []
        for i, x in enumerate((case.q, case.k, case.v, case.q, case.dout, case.q, case.k, case.v)):
            strides = (stride, 8, 8 * d, 1) if b > 1 else (8, 8, stride, 1)
            far = memory[d * i :].as_strided(x.shape, strides, d * i)
            far.copy_(torch.full_like(x, torch.nan) if i in (3, 5, 6, 7) else x)
            views.append(far)
        lse, terms = torch.empty(b, 1, t), torch.empty(b, 1, t, 2)
        named = dict(zip(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), views, strict=True))
        settings = arguments((b, 1, t, t, d), case.scale, dtype) | {"lse": lse.data_ptr()}
        with capability(kernels, 90 if rows == HOPPER else 80):
            first = {name: named[name] for name in ("q", "k", "v", "out")}
            kernels.module.causal_attention_fwd_cuda(**places(**first), rows=0, **settings)
            settings |= {"terms": terms.data_ptr(), "portable": False}
            kernels.module.causal_attention_bwd_cuda(**places(**named), **settings)
        expected = run(kernels, case, rows)
        for i, wanted in ((3, 0), (5, 2), (6, 3), (7, 4)):
            assert torch.equal(views[i], expected[wanted]), (b, NAMES[wanted])
