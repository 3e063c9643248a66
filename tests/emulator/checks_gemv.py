"""What gemv has to stand up to, as functions of a device; the op runs there as the caller has chosen."""

from __future__ import annotations

import mmap

import torch
from checks import SCHEDULES, Counted, schedule
from kernels import Kernels
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, ops, reference

ACTIVATIONS = [None, "quick_gelu", "gelu_tanh", "gelu_erf"]
# (rows, n_in, n_out): every number of rows that a kernel is compiled for and ones between; n_in of less than a step,
# ragged, and of several slabs; n_out of half a tile, ragged, and of both sizes of tile.
SHAPES = [
    *((1, 8, 8), (1, 512, 40), (1, 8232, 16), (1, 72, 4104), (2, 264, 24), (2, 4104, 8), (3, 520, 48), (4, 2056, 8)),
    *((5, 96, 136), (7, 1032, 24), (8, 1544, 16), (8, 3080, 8), (8, 40, 4136)),
]
# The same for the kernels of up to 16, 32 and 64 rows.
MANY = [
    (9, 8, 8),
    (9, 4104, 40),
    (16, 520, 24),
    (17, 520, 136),
    (32, 264, 8),
    (33, 4104, 8),
    (63, 72, 72),
    (64, 520, 24),
]


def operands(
    device: str, dtype: torch.dtype, rows: int, n_in: int, n_out: int, transposed: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of the op, every one of them; the products are of size 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    weight = (normal(n_out, n_in).T if transposed else normal(n_in, n_out)) * n_in**-0.5
    assert weight.is_contiguous() != transposed or min(n_in, n_out) == 1
    named = {"x": 3 * normal(rows, n_in), "weight": weight, "bias": normal(n_out)}
    return named | {"norm_weight": 1 + 0.5 * normal(n_in), "residual": normal(rows, n_out)}


def check(named: dict[str, Tensor], activation: str | None = None, eps: float = 1e-5) -> None:
    """By the tolerance rule against the definition."""
    out = ops.gemv(**named, eps=eps, activation=activation)
    plain = reference.gemv(**named, eps=eps, activation=activation)
    exact = reference.gemv(**{k: t.double() for k, t in named.items()}, eps=eps, activation=activation)
    assert out.dtype == plain.dtype
    assert_parity(out, plain, exact, "out")


def check_shape(device: str, dtype: torch.dtype, rows: int, n_in: int, n_out: int, transposed: bool) -> None:
    """With everything, and with nothing but the product."""
    named = operands(device, dtype, rows, n_in, n_out, transposed)
    check(named, ACTIVATIONS[1 + (rows + n_in // 8) % 3])
    check({name: named[name] for name in ("x", "weight")})


def check_options(device: str, transposed: bool, rows: int = 2) -> None:
    """Each part alone, each activation; an eps that matters."""
    named = operands(device, torch.float16, rows, 264, 24, transposed)
    product = {name: named[name] for name in ("x", "weight")}
    for option in ("bias", "norm_weight", "residual"):
        check(product | {option: named[option]})
    for activation in ACTIVATIONS:
        check(named, activation)
    check(product | {"x": 1e-3 * named["x"], "norm_weight": named["norm_weight"]}, eps=1e-3)


def check_dependent(device: str) -> None:
    """Of two that follow each other the second may begin before the first has ended, and reads what that writes."""
    for rows in (2, 9):
        first, second = (operands(device, torch.bfloat16, rows, 64, 64, False) for _ in range(2))
        found = []
        for dependent in ("none", "late", "early"):
            with backend.launching(backend.Launching(dependent=dependent)):
                found.append(ops.gemv(**second | {"x": ops.gemv(**first)}))
        assert torch.equal(found[1], found[0])
        assert torch.equal(found[2], found[0])


def check_range(device: str, rows: int = 2) -> None:
    """float16 of magnitude 300, whose squares overflow, and 1e-4, whose squares are zero, through the norm.

    And 5e4 and 1e-7, with a norm's weight whose product with them is none of float16.
    """
    for transposed in (False, True):
        for value, factor in ((300.0, 1.0), (1e-4, 1.0), (5e4, 4.0), (1e-7, 0.25)):
            x = torch.full((rows, 64), value, dtype=torch.float16, device=device)
            eye = torch.eye(64, dtype=torch.float16, device=device)
            factors = torch.full((64,), factor, dtype=torch.float16, device=device)
            out = ops.gemv(x, eye.T if transposed else eye, norm_weight=factors, eps=0.0)
            assert torch.equal(out, torch.full_like(x, factor)), value


def check_rows_of_other_numbers(device: str) -> None:
    """A row's result is the same bits whatever the number of rows, from 9 on."""
    for transposed in (False, True):
        named = operands(device, torch.bfloat16, 64, 520, 72, transposed)
        want = ops.gemv(**named)
        for rows in (9, 32, 33):
            few = {name: tensor[:rows] if name in ("x", "residual") else tensor for name, tensor in named.items()}
            assert torch.equal(ops.gemv(**few), want[:rows]), rows


def check_one_rounding(device: str) -> None:
    """Sums that bfloat16 cannot hold on the way: the product, the norm and the bias are not rounded."""
    x = torch.full((1, 64), 1.0, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(64, 8, dtype=torch.bfloat16, device=device)
    weight[0], weight[1] = 256.0, 1.0
    bias = torch.full((8,), -256.0, dtype=torch.bfloat16, device=device)
    assert torch.equal(ops.gemv(x, weight, bias), torch.full_like(bias, 1.0)[None])
    assert torch.equal(ops.gemv(x, weight, residual=bias[None]), torch.full_like(bias, 1.0)[None])


def check_digits_of_the_norm(device: str) -> None:
    """A normed 1 + 2^-12, which neither dtype holds, less the 1 of the residual."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.ones(1, 64, dtype=dtype, device=device)
        weight = torch.zeros(64, 8, dtype=dtype, device=device)
        weight[0] = 1.0
        ones = torch.ones(64, dtype=dtype, device=device)
        bias = -torch.ones(8, dtype=dtype, device=device)
        out = ops.gemv(x, weight, bias, norm_weight=ones, eps=2.0**-11)  # 1 / sqrt(1 + 2^-11) is about 1 - 2^-12
        assert torch.allclose(out.float(), torch.full_like(out.float(), (1 + 2.0**-11) ** -0.5 - 1), rtol=0.02), dtype


def check_nan_stays(device: str, rows: int = 3) -> None:
    """A NaN in a row of x is in that row's output and no other's; one in a column of the weight likewise."""
    for transposed in (False, True):
        named = operands(device, torch.bfloat16, rows, 264, 24, transposed)
        named["x"][1, 5] = torch.nan
        out = ops.gemv(**named)
        assert out[1].isnan().all()
        assert not out[[0, *range(2, rows)]].isnan().any()
        named = operands(device, torch.bfloat16, rows, 264, 24, transposed)
        named["weight"][7, 9] = torch.nan
        out = ops.gemv(**named)
        assert out[:, 9].isnan().all()
        assert not out[:, [*range(9), *range(10, 24)]].isnan().any()


def check_slices(device: str, rows: int = 2) -> None:
    """Columns of a wider weight, with NaN around them, are taken as they are."""
    for transposed in (False, True):
        named = operands(device, torch.bfloat16, rows, 264, 24, transposed)
        weight = named["weight"].T if transposed else named["weight"]
        around = torch.full((weight.shape[0], weight.shape[1] + 16), torch.nan, dtype=weight.dtype, device=device)
        around[:, 8:-8] = weight
        inside = around[:, 8:-8]
        want = ops.gemv(**named)
        assert torch.equal(ops.gemv(**(named | {"weight": inside.T if transposed else inside})), want)


def check_huge(device: str) -> None:
    """Rows of a weight so far apart that they span more than 2^32 elements."""
    assert device == "cpu"
    distance, rows = 2**28 + 8, 24
    count = distance * (rows - 1) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.bfloat16, count=count)
    for transposed in (False, True):
        far = memory.as_strided((rows, 16), (distance, 1))
        far.copy_(torch.randn(rows, 16))
        weight = far.T if transposed else far
        for few in (2, 9):
            check({"x": torch.randn(few, weight.shape[0]).bfloat16(), "weight": weight})


def check_determinism(kernels: Kernels) -> None:
    """The same bits under every schedule."""
    for transposed in (False, True):
        for rows, n_in, n_out in [(1, 1032, 24), (6, 1544, 24), (9, 520, 24), (33, 520, 8)]:
            named = operands("cpu", torch.bfloat16, rows, n_in, n_out, transposed)
            results = []
            for order, seed in SCHEDULES:
                schedule(kernels, order, seed)
                results.append(ops.gemv(**named, activation="quick_gelu"))
            assert all(torch.equal(result, results[0]) for result in results)


def check_coalescing(kernels: Kernels) -> None:
    """Every weight moves once, in whole sectors; bank conflicts are those of the sums at the end."""
    for rows in (1, 2, 4, 8):
        for transposed in (False, True):
            n_in, n_out = 2048, 64
            named = operands("cpu", torch.bfloat16, rows, n_in, n_out, transposed)
            for norm in (None, named["norm_weight"]):
                with Counted(kernels) as counted:
                    ops.gemv(named["x"], named["weight"], norm_weight=norm)
                case = rows, transposed, norm is not None, dict(counted)
                assert counted["launches"] == 1, case
                # Eight blocks share n_in: each reads its part of x and, for the norm, all of x, and its part of the
                # norm's weight, asynchronously.
                parts_of_x = 1 if norm is None else 1 + 8
                factors = 0 if norm is None else n_in
                assert counted["load_bytes"] == 2 * (n_in * (rows * parts_of_x + n_out) + factors), case
                assert counted["async_copies"] * 8 == factors, case
                assert counted["load_sectors"] * 32 == counted["load_bytes"], case
                assert counted["shared_conflicts"] <= 0.1 * counted["shared_wavefronts"], case


def check_coalescing_of_many_rows(kernels: Kernels) -> None:
    """Every weight moves once, in whole sectors; a tile of columns reads x once, asynchronously."""
    for rows in (9, 32, 64):
        for transposed in (False, True):
            n_in, n_out = 1024, 64
            named = operands("cpu", torch.bfloat16, rows, n_in, n_out, transposed)
            for others in ({}, {name: named[name] for name in ("bias", "norm_weight", "residual")}):
                with Counted(kernels) as counted:
                    ops.gemv(named["x"], named["weight"], **others)
                case = rows, transposed, list(others), dict(counted)
                assert counted["launches"] == 1, case
                copied = rows * n_in + sum(tensor.numel() for tensor in others.values())
                # All blocks of the cluster have a bias.
                copied += 7 * n_out if others else 0
                assert counted["async_copies"] * 8 == copied, case
                assert counted["load_bytes"] == 2 * (n_in * n_out + copied), case
                assert counted["load_sectors"] * 32 == counted["load_bytes"], case
                assert counted["shared_conflicts"] <= 0.1 * counted["shared_wavefronts"], case
