"""The attention kernels against the definition."""

import checks_attention as attention
import pytest
import torch
from checks_attention import HOPPER
from kernels import Kernels

BF16, FP16 = torch.bfloat16, torch.float16


# Each head dimension has its layout of shared memory, each height of a block its fragments; lengths that fill no tile,
# more keys than queries, every kind of mask.
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(
    ("d", "dtype", "t_q", "t_k", "mask"),
    [
        (32, BF16, 1, 1, ""),
        (32, FP16, 65, 129, "starts"),
        (32, BF16, 130, 130, "both"),
        (64, BF16, 64, 64, ""),
        (64, FP16, 1, 97, "starts"),
        (64, FP16, 97, 130, "keys"),
        (64, BF16, 130, 130, "starts"),
        (64, BF16, 63, 64, "both"),
        (96, FP16, 2, 2, "keys"),
        (96, BF16, 65, 66, ""),
        (96, FP16, 97, 130, "both"),
        (128, BF16, 63, 63, "keys"),
        (128, FP16, 65, 129, ""),
        (128, BF16, 66, 130, "starts"),
    ],
)
def test_parity(kernels: Kernels, d: int, dtype: torch.dtype, t_q: int, t_k: int, mask: str, rows: int) -> None:
    attention.check(kernels, dtype, d, t_q, t_k, mask, rows=min(rows, 64) if d == 128 else rows)


# Rings of several tiles that are filled again; ends of a tile of keys and of queries; one, two and three warpgroups
# with queries; more than one block.
@pytest.mark.parametrize(
    ("d", "dtype", "t_q", "t_k", "mask"),
    [
        (64, BF16, 1, 1, ""),
        (64, FP16, 1, 97, "starts"),
        (64, BF16, 63, 64, "starts"),
        (64, BF16, 64, 64, ""),
        (64, FP16, 97, 130, ""),
        (64, BF16, 130, 130, "starts"),
        (64, BF16, 129, 521, ""),
        (64, BF16, 330, 330, ""),
        (96, FP16, 2, 2, ""),
        (96, BF16, 65, 66, ""),
        (96, BF16, 97, 450, "starts"),
        (96, FP16, 193, 193, "starts"),
        (96, BF16, 321, 333, ""),
        (128, BF16, 63, 63, ""),
        (128, FP16, 65, 129, ""),
        (128, BF16, 130, 520, "starts"),
        (128, BF16, 192, 256, ""),
        (128, FP16, 250, 251, ""),
        (128, BF16, 321, 321, "starts"),
    ],
)
def test_parity_on_hopper(kernels: Kernels, d: int, dtype: torch.dtype, t_q: int, t_k: int, mask: str) -> None:
    attention.check(kernels, dtype, d, t_q, t_k, mask, HOPPER)


@pytest.mark.parametrize(("b", "h", "d", "t_q", "t_k"), [(1, 1, 64, 65, 130), (3, 1, 64, 65, 130), (2, 3, 64, 130, 130),
                                                         (2, 3, 96, 193, 193)])  # fmt: skip
def test_batches_and_heads_on_hopper(kernels: Kernels, b: int, h: int, d: int, t_q: int, t_k: int) -> None:
    attention.check(kernels, BF16, d, t_q, t_k, "starts", HOPPER, b, h)


def test_a_longer_sequence(kernels: Kernels) -> None:
    attention.check(kernels, BF16, 64, 257, 257, "starts", rows=128, b=1)


@pytest.mark.parametrize("rows", [0, HOPPER])
def test_only_hidden_keys(kernels: Kernels, rows: int) -> None:
    """Not a tile is loaded; zeros, and -infinity."""
    case = attention.make(kernels.device, BF16, 64, 66, 70, "starts")
    case.starts.fill_(1000)
    out, lse, *gradients = attention.run(kernels, case, rows)
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert not any(x.any() or x.isnan().any() for x in (out, *gradients))
    case.starts.fill_(-3)
    whole = attention.make(kernels.device, BF16, 64, 66, 70)
    whole = attention.Case(case.q, case.k, case.v, case.dout)
    found, expected = attention.run(kernels, case, rows), attention.run(kernels, whole, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("d", "rows"), [(32, 128), (64, 128), (64, 64), (96, 64), (128, 64)] + [(d, HOPPER) for d in (64, 96, 128)]
)
def test_schedules(emulated: Kernels, d: int, rows: int) -> None:
    attention.check_schedules(emulated, d, rows)


def test_all_kernels_agree_in_range(kernels: Kernels) -> None:
    """Scores of a thousand: the softmax neither overflows nor loses its maximum."""
    case = attention.make(kernels.device, BF16, 64, 70, 70)
    case = attention.Case(case.q * 64, case.k * 64, case.v, case.dout)
    for rows in (64, 128, HOPPER):
        out, lse, *gradients = attention.run(kernels, case, rows)
        exact = attention.define(case, torch.float64)
        assert torch.allclose(lse.double(), exact[1], rtol=1e-5)
        assert torch.allclose(out.double(), exact[0], rtol=1e-2, atol=1e-2)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("rows", [0, HOPPER])
def test_poison(kernels: Kernels, rows: int) -> None:
    attention.check_poison(kernels, rows)


@pytest.mark.parametrize("rows", [0, HOPPER])
def test_access(emulated: Kernels, rows: int) -> None:
    attention.check_access(emulated, rows)


def test_skipping(emulated: Kernels) -> None:
    attention.check_skipping(emulated)


def test_skipping_on_hopper(emulated: Kernels) -> None:
    attention.check_hopper_skipping(emulated)


def test_hopper_is_chosen(emulated: Kernels) -> None:
    attention.check_hopper_is_chosen(emulated)


@pytest.mark.parametrize("rows", [64, HOPPER])
def test_order_of_the_blocks(emulated: Kernels, rows: int) -> None:
    attention.check_order(emulated, rows)


def test_order_of_the_backward_on_hopper(emulated: Kernels) -> None:
    attention.check_order_of_the_backward(emulated)


@pytest.mark.parametrize("rows", [0, HOPPER])
def test_huge_strides(emulated: Kernels, rows: int) -> None:
    attention.check_huge(emulated, rows)


@pytest.mark.parametrize(("d", "rows"), [(48, 0), (64, 32), (128, 128)])
def test_sizes_that_it_does_not_take(kernels: Kernels, d: int, rows: int) -> None:
    case = attention.make(kernels.device, BF16, d, 2, 2)
    with pytest.raises(RuntimeError, match="causal_attention_fwd: CUDA error: invalid argument"):
        attention.run(kernels, case, rows)


def test_too_many_blocks(emulated: Kernels) -> None:
    nowhere = dict.fromkeys(("q", "k", "v", "out"), (0, 0, 0, 0))
    settings = attention.arguments((2**16, 2**15, 1, 1, 64), 1.0, BF16)
    with pytest.raises(RuntimeError, match="causal_attention_fwd: CUDA error: invalid argument"):
        emulated.module.causal_attention_fwd_cuda(**nowhere, lse=0, rows=64, **settings)
