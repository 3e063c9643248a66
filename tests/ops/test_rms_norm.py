"""rms_norm: the definition, low precision, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_parity

from igpt_fast import ops


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The plain expression, in the dtype of its inputs."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 97, 64), (2, 5, 63), (0, 4, 8), (1023, 96)])
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    upstream = torch.randn(shape).to(dtype)

    def run(function, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weight)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(wide))]

    triples = zip(run(ops.rms_norm, dtype), run(plain, dtype), run(plain, torch.float64), strict=True)
    for what, (ours, theirs, exact) in zip(("out", "dx", "dweight"), triples, strict=True):
        assert ours.dtype == dtype
        assert_parity(ours, theirs, exact, what)


def test_large_fp16_values_do_not_overflow() -> None:
    """300^2 exceeds fp16: statistics in fp16 give a norm of infinity, and an output of zero."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    assert torch.equal(plain(x, torch.ones(64, dtype=torch.float16)), torch.zeros_like(x))
    assert torch.equal(ops.rms_norm(x, torch.ones(64, dtype=torch.float16)), torch.ones_like(x))


def test_small_fp16_values_do_not_underflow() -> None:
    x = torch.full((2, 64), 1e-4, dtype=torch.float16)
    exact = plain(x.double(), torch.ones(64, dtype=torch.float64), 1e-12)
    assert torch.equal(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-12), exact.to(torch.float16))


def test_not_mean_centred_and_eps() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(ops.rms_norm(x, torch.ones(2), 0.0), x / 12.5**0.5)
    assert torch.equal(ops.rms_norm(torch.zeros(1, 2), torch.ones(2)), torch.zeros(1, 2))


def test_strides() -> None:
    x, weight = torch.randn(5, 8, 3).transpose(1, 2), torch.randn(16)[::2]
    assert torch.allclose(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight.contiguous()))


def test_weight_wider_than_x() -> None:
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32)
    assert ops.rms_norm(x, weight).dtype == torch.bfloat16
    assert torch.equal(ops.rms_norm(x, weight), plain(x.float(), weight).bfloat16())


def test_gradcheck() -> None:
    leaves = (torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64))
    leaves = tuple(t.requires_grad_() for t in leaves)
    assert torch.autograd.gradcheck(ops.rms_norm, leaves)
    assert torch.autograd.gradgradcheck(ops.rms_norm, leaves)


def test_compile_and_vmap() -> None:
    x, weight = torch.randn(4, 3, 8), torch.randn(8)
    expected = ops.rms_norm(x, weight)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(ops.rms_norm, backend="aot_eager", fullgraph=True)(x, weight), expected)
    assert torch.allclose(torch.vmap(ops.rms_norm, (0, None))(x, weight), expected)


@pytest.mark.parametrize(
    ("x", "weight", "eps", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(3), 1e-5, TypeError, "x is torch.int64; want"),
        ([1.0], torch.ones(1), 1e-5, TypeError, "x is list; want"),
        (torch.zeros(2, 3), torch.ones(3).long(), 1e-5, TypeError, "weight is torch.int64"),
        (torch.zeros(2, 3), torch.ones(2), 1e-5, ValueError, r"weight has shape \(2,\); want \(3,\)"),
        (torch.zeros(2, 3), torch.ones(1, 3), 1e-5, ValueError, r"weight has shape \(1, 3\)"),
        (torch.tensor(1.0), torch.tensor(1.0), 1e-5, ValueError, r"x has shape \(\)"),
        (torch.zeros(2, 3), torch.ones(3), -1.0, ValueError, "eps is -1.0; want"),
        (torch.zeros(2, 3), torch.ones(3), float("nan"), ValueError, "eps is nan; want"),
        (torch.zeros(2, 3), torch.ones(3, device="meta"), 1e-5, ValueError, "weight is on meta"),
    ],
)
def test_misuse(x, weight, eps: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="rms_norm: " + message):
        ops.rms_norm(x, weight, eps)
