"""What the kernels of activation.cu have to stand up to; see checks.py."""

import torch
from checks import SCHEDULES, Counted, normal, schedule
from kernels import DTYPES, Kernels, addresses
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import reference

FUNCTIONS = [reference.quick_gelu, reference.gelu_tanh, reference.gelu_erf]
# Less than a vector for a lane, more columns than a block has, more rows than a turn; parts that have few rows or none.
SHAPES = [(1, 8, 1), (9, 72, 2), (67, 264, 3), (5, 520, 1), (33, 64, 7)]


def run(
    kernels: Kernels, kind: int, x: Tensor, bias: Tensor | None, dout: Tensor, parts: int = 1, in_place: bool = False
) -> list[Tensor]:
    """out, dx and, with bias, dbias, through the launchers; into x and dout themselves ``in_place``."""
    rows, n = x.shape
    settings = {"rows": rows, "n": n, "activation": kind, "dtype": DTYPES[x.dtype], "place": kernels._place()}
    x, dout = x.clone(), dout.clone()
    kept = x.clone()
    out, dx = (x, dout) if in_place else (torch.full_like(x, torch.nan), torch.full_like(x, torch.nan))
    kernels.module.activation_fwd_cuda(**addresses(x=x, bias=bias, out=out), **settings)
    dbias = x.new_full((n,), torch.nan)
    partial = torch.full((parts, n), torch.nan, device=x.device)
    sums = {"dbias": None, "partial": None} if bias is None else {"dbias": dbias, "partial": partial}
    given = addresses(dout=dout, x=kept, bias=bias, dx=dx, **sums)
    kernels.module.activation_bwd_cuda(**given, parts=parts, **settings)
    return [out, dx] if bias is None else [out, dx, dbias]


def by_definition(kind: int, x: Tensor, bias: Tensor | None, dout: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    out = FUNCTIONS[kind](*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check_activation(
    kernels: Kernels, dtype: torch.dtype, rows: int, n: int, parts: int, with_bias: bool, in_place: bool = False
) -> None:
    """Every function, forward and backward, against the definition in float64, by the tolerance rule."""
    for kind in range(3):
        x, dout = (normal(rows, n, dtype=dtype, device=kernels.device, scale=2.0) for _ in range(2))
        bias = normal(n, dtype=dtype, device=kernels.device) if with_bias else None
        ours = run(kernels, kind, x, bias, dout, parts, in_place)
        plain = by_definition(kind, x, bias, dout)
        exact = by_definition(kind, x.double(), None if bias is None else bias.double(), dout.double())
        for name, mine, theirs, wanted in zip(("out", "dx", "dbias"), ours, plain, exact, strict=False):
            assert_parity(mine, theirs, wanted, f"{FUNCTIONS[kind].__name__} {name}")


def check_activation_rounds_once(kernels: Kernels) -> None:
    """Neither the sum with the bias nor what dbias adds up is rounded: all but a few results are the exact ones' own
    roundings, which the tolerance rule does not ask, since the plain expression rounds in between."""
    for kind in range(3):
        x, dout = (normal(67, 264, dtype=torch.bfloat16, device=kernels.device) for _ in range(2))
        bias = normal(264, dtype=torch.bfloat16, device=kernels.device)
        ours = run(kernels, kind, x, bias, dout, parts=2)
        exact = by_definition(kind, x.double(), bias.double(), dout.double())
        for name, mine, wanted in zip(("out", "dx", "dbias"), ours, exact, strict=True):
            share = float((mine == wanted.to(torch.bfloat16)).double().mean())
            assert share > 0.98, f"{FUNCTIONS[kind].__name__} {name}: {share}"


def check_activation_determinism(kernels: Kernels) -> None:
    """The same bits under every schedule."""
    x, dout = (normal(67, 264, dtype=torch.bfloat16, device=kernels.device) for _ in range(2))
    results = []
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        results.append(torch.cat([t.flatten() for t in run(kernels, 0, x, x[0].clone(), dout, parts=3)]))
    assert all(torch.equal(result, results[0]) for result in results)


def check_activation_schedules(kernels: Kernels) -> None:
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        check_activation(kernels, torch.bfloat16, 19, 264, 2, with_bias=True)


def check_activation_far_out(kernels: Kernels) -> None:
    """Numbers whose square or exponential is infinite: a derivative is 0 or 1 there."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[3e38, -3e38, 1e20, -1e20, 1e4, -1e4, 100.0, -100.0]], dtype=dtype, device=kernels.device)
        for kind in range(3):
            for bias in (None, torch.zeros_like(x[0])):
                out, dx, *_ = run(kernels, kind, x, bias, torch.ones_like(x))
                assert torch.equal(out.relu(), x.relu()), kind
                assert not (out - x.relu()).any(), kind
                assert torch.equal(dx, (x > 0).to(dtype)), kind


def check_activation_coalescing(kernels: Kernels) -> None:
    """Every byte of the tensors moves once, 16 bytes a lane, in whole sectors; no shared-memory conflict."""
    rows, n, parts = 64, 1024, 2
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = normal(rows, n, dtype=dtype, device="cpu"), normal(n, dtype=dtype, device="cpu")
        size = x.numel() * x.element_size()
        for with_bias in (False, True):
            with Counted(kernels) as counted:
                run(kernels, 0, x, bias if with_bias else None, x, parts)
            assert counted["load_sectors"] * 32 == counted["load_bytes"], dict(counted)
            assert counted["store_sectors"] * 32 == counted["store_bytes"], dict(counted)
            assert counted["shared_conflicts"] == 0, dict(counted)
            # A row of the partial sums for each part, and dbias: by 4 bytes, 32 lanes at a time.
            sums, dbias = (parts * n * 4, bias.numel() * bias.element_size()) if with_bias else (0, 0)
            assert counted["store_bytes"] == 2 * size + sums + dbias, dict(counted)
            assert counted["store_requests"] == 2 * size // 512 + (parts + 1) * n // 32 * with_bias, dict(counted)
            if not with_bias:
                assert counted["load_bytes"] == 3 * size, dict(counted)
                assert counted["load_requests"] == 3 * size // 512, dict(counted)
            else:  # the bias once for each warp that goes down its columns: forward two rows, backward 8 warps a part
                assert counted["load_bytes"] == 3 * size + sums + (rows // 2 + parts * 8) * dbias, dict(counted)
