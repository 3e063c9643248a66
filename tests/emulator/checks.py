"""What the kernels have to stand up to, as functions: the tests call them, and so do the mutations, which must fail."""

import itertools

import torch
from kernels import Kernels, definition
from tolerance import assert_parity

from igpt_fast import reference

SCHEDULES = [("fifo", 0), ("random", 1), ("random", 2), ("skewed", 1), ("skewed", 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every team of warps of norm.cu, whole and ragged; rows that do not fill a block, and more than there are parts.
NORM_SHAPES = [(1, 8, 1), (5, 72, 2), (9, 512, 2), (3, 1000, 3), (5, 1032, 2), (5, 2048, 2), (2, 4104, 1), (3, 8192, 2)]


def normal(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(device)


def check_norm(
    kernels: Kernels,
    dtype: torch.dtype,
    rows: int,
    n: int,
    parts: int,
    fused: bool,
    centred: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Forward and backward against the definition in float64, by the tolerance rule."""
    x, residual, dout, dsum = (normal(rows, n, dtype=dtype, device=kernels.device) for _ in range(4))
    # The whole-row sum of squares exceeds the largest float16, its mean does not.
    x = x * 8
    weight = normal(n, dtype=weight_dtype or dtype, device=kernels.device)
    bias = normal(n, dtype=dtype, device=kernels.device) if centred else None
    arguments = x, weight, 1e-5, residual if fused else None, dout, dsum, bias
    ours, plain = kernels.norm(*arguments, parts=parts), definition(*arguments)
    # The sum is rounded once, by definition; everything else is exact from there on.
    total, *wide = (
        None if t is None else t.double() for t in (x if plain.sum is None else plain.sum, weight, dout, dsum, bias)
    )
    exact = definition(total, wide[0], 1e-5, torch.zeros_like(total) if fused else None, *wide[1:])
    if fused:
        assert torch.equal(ours.sum, plain.sum), "sum"
    for name in ("out", "dx", "dweight", *(["dbias"] if centred else [])):
        assert_parity(getattr(ours, name), getattr(plain, name), getattr(exact, name), name)


def check_norm_mixed(kernels: Kernels, narrow: torch.dtype, rows: int, n: int, parts: int) -> None:
    """A stream of float32 beside 16-bit branches, as under autocast: the bits of conversions apart."""
    branch, dout = (normal(rows, n, dtype=narrow, device=kernels.device) for _ in range(2))
    stream, dsum = (normal(rows, n, dtype=torch.float32, device=kernels.device, scale=8.0) for _ in range(2))
    for weight in (normal(n, dtype=dtype, device=kernels.device) for dtype in (torch.float32, narrow)):
        wide = weight.float()
        total = kernels.norm_fwd(branch.float(), wide, 1e-5, stream)[1]
        apart = kernels.norm_fwd(total, wide, 1e-5, None)[0].to(narrow)
        for x, residual in ((branch, stream), (branch.float(), stream), (total, None)):
            out, found = kernels.norm_fwd(x, weight, 1e-5, residual, dtype=narrow)
            assert torch.equal(found, total), "sum"
            assert torch.equal(out, apart), "out"
        dx, dweight = kernels.norm_bwd(dout.float(), dsum, total, wide, 1e-5, parts)
        found = kernels.norm_bwd(dout, dsum, total, weight, 1e-5, parts, branch=narrow)
        assert all(map(torch.equal, found, (dx, dweight.to(weight.dtype), dx.to(narrow)))), "gradients"


def check_norm_of_a_wide_weight(kernels: Kernels, narrow: torch.dtype, rows: int, n: int, parts: int) -> None:
    """Of 16 bits but for the weight, by the rule; it is the rounded sum that is normalised."""
    check_norm(kernels, narrow, rows, n, parts, True, weight_dtype=torch.float32)
    x, weight = normal(rows, n, dtype=narrow, device=kernels.device), torch.ones(n, device=kernels.device)
    out, total = kernels.norm_fwd(x, weight, 1e-5, x / 3)
    assert torch.equal(out, kernels.norm_fwd(total, weight, 1e-5, None)[0])


def check_norm_mixed_coalescing(kernels: Kernels) -> None:
    """Whole sectors, of 16-bit tensors too: 8 bytes a thread, side by side."""
    rows, n, narrow = 8, 1024, torch.bfloat16
    x, weight = normal(rows, n, dtype=torch.float32, device="cpu"), normal(n, dtype=torch.float32, device="cpu")
    with Counted(kernels) as forward:
        kernels.norm_fwd(x.to(narrow), weight, 1e-5, x, dtype=narrow)
    assert forward["load_sectors"] * 32 == forward["load_bytes"] == (2 + 4 + 4) * rows * n, dict(forward)
    assert forward["store_sectors"] * 32 == forward["store_bytes"] == (4 + 2) * rows * n, dict(forward)
    with Counted(kernels) as backward:
        kernels.norm_bwd(x.to(narrow), x, x, weight, 1e-5, parts=2, branch=narrow)
    assert backward["load_sectors"] * 32 == backward["load_bytes"], dict(backward)
    assert backward["shared_conflicts"] == 0, dict(backward)


def check_norm_range(kernels: Kernels) -> None:
    """float16 of magnitude 300, whose square is no float16, and of magnitude 1e-4, whose square is zero."""
    ones = torch.ones(64, dtype=torch.float16, device=kernels.device)
    for value in (300.0, 1e-4):
        x = torch.full((2, 64), value, dtype=torch.float16, device=kernels.device)
        out, _ = kernels.norm_fwd(x, ones, 0.0, None)
        assert torch.equal(out, torch.ones_like(x)), value


def check_layer_norm_offset(kernels: Kernels) -> None:
    """Values of deviation 1 around 1000: a difference of two sums of squares has few bits of the variance."""
    for n in (64, 1032):
        x = normal(3, n, dtype=torch.float32, device=kernels.device) + 1000.0
        weight, bias = (normal(n, dtype=torch.float32, device=kernels.device) for _ in range(2))
        dout = normal(3, n, dtype=torch.float32, device=kernels.device)
        arguments = x, weight, 1e-5, None, dout, dout, bias
        ours, plain = kernels.norm(*arguments), definition(*arguments)
        wide = [t.double() for t in (x, weight, dout, bias)]
        exact = definition(wide[0], wide[1], 1e-5, None, wide[2], wide[2], wide[3])
        for name in ("out", "dx", "dweight", "dbias"):
            assert_parity(getattr(ours, name), getattr(plain, name), getattr(exact, name), name)


def check_norm_determinism(kernels: Kernels, centred: bool = False) -> None:
    """The same bits under every schedule."""
    x, dout = (normal(11, 1032, dtype=torch.bfloat16, device=kernels.device) for _ in range(2))
    weight = normal(1032, dtype=torch.bfloat16, device=kernels.device)
    results = []
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        norm = kernels.norm(x, weight, 1e-5, None, dout, dout, weight if centred else None, parts=3)
        found = norm.out, norm.dx, norm.dweight, norm.dbias
        results.append(torch.cat([t.flatten() for t in found if t is not None]))
    assert all(torch.equal(result, results[0]) for result in results)


def check_norm_coalescing(kernels: Kernels, centred: bool = False) -> None:
    """Every byte of the tensors moves once, in whole sectors; no shared-memory conflict."""
    rows = 8
    for dtype, n in itertools.product((torch.bfloat16, torch.float32), (512, 1024)):
        x, weight = normal(rows, n, dtype=dtype, device="cpu"), normal(n, dtype=dtype, device="cpu")
        size = x.element_size()
        with Counted(kernels) as forward:
            kernels.norm_fwd(x, weight, 1e-5, x, weight if centred else None)
        # The two tensors, and the weight and bias for every row.
        assert forward["load_sectors"] * 32 == forward["load_bytes"] == (3 + centred) * rows * n * size, dict(forward)
        assert forward["store_sectors"] * 32 == forward["store_bytes"] == 2 * rows * n * size, dict(forward)
        assert forward["load_requests"] == forward["load_bytes"] // 512, dict(forward)  # 32 lanes, 16 bytes each
        assert forward["shared_conflicts"] == 0, dict(forward)
        with Counted(kernels) as backward:
            kernels.norm_bwd(x, x, x, weight, 1e-5, parts=2, centred=centred)
        assert backward["load_sectors"] * 32 == backward["load_bytes"], dict(backward)
        assert backward["store_requests"] * 32 <= backward["store_sectors"] * 8, dict(backward)
        assert backward["shared_conflicts"] == 0, dict(backward)


def check_quantize(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    """Bit for bit; many clusters stand twice, so that ties are met, and the last one has a pixel of its colour."""
    colours = torch.randint(0, 256, (k, 3), dtype=torch.uint8)
    colours[k // 2 : k // 2 + k // 4] = colours[: k // 4].clone()
    clusters = (colours / 127.5 - 1.0).to(torch.float32)
    x = torch.randint(0, 256, (n, 3), dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(n, 3)
    x[-1:] = colours[-1] if dtype == torch.uint8 else clusters[-1]
    ours = kernels.quantize(x.to(kernels.device), clusters.to(kernels.device)).cpu()
    assert torch.equal(ours, reference.quantize(x, clusters))


def check_quantize_near_ties(kernels: Kernels) -> None:
    """Each cluster a little nearer to black than the one before, by less than a careless bound would tell."""
    clusters = -1.0 + 0.1 * (1.0 - 5e-6 * torch.arange(64.0))[:, None].expand(64, 3).contiguous()
    x = torch.zeros(33, 3, dtype=torch.uint8)
    assert torch.equal(kernels.quantize(x.to(kernels.device), clusters.to(kernels.device)).cpu(), torch.full((33,), 63))


def check_quantize_coalescing(kernels: Kernels) -> None:
    """Whole sectors. Clusters, 12 bytes each, get 16 in shared memory, so storing 128 bytes of them takes two turns."""
    blocks, clusters = 512 // 128, 256
    for dtype, size in ((torch.uint8, 1), (torch.float32, 4)):
        with Counted(kernels) as counted:
            kernels.quantize(torch.zeros(512, 3, dtype=dtype), torch.zeros(clusters, 3))
        bytes_of_clusters = blocks * clusters * 12
        assert counted["load_sectors"] * 32 == counted["load_bytes"] == bytes_of_clusters + 512 * 3 * size, dict(
            counted
        )
        assert counted["store_sectors"] * 32 == counted["store_bytes"] == 512 * 8, dict(counted)
        assert counted["shared_conflicts"] == bytes_of_clusters // 128, dict(counted)


def schedule(kernels: Kernels, order: str, seed: int) -> None:
    """Chooses the order of execution, where there is a choice."""
    if kernels.device == "cpu":
        kernels.module.set_schedule(order, seed)


class Counted(dict[str, int]):
    """The emulator's counters over a ``with`` block."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.module = kernels.module

    def __enter__(self) -> "Counted":
        self.module.reset_counters()
        return self

    def __exit__(self, *_: object) -> None:
        self.update(self.module.counters())
