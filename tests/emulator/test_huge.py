"""Index arithmetic beyond 2^31 elements: memory that nobody touches costs nothing, and only the last blocks run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernels import Kernels, addresses
from torch import Tensor

from igpt_fast import reference

BEYOND = 2**31 + 2**12
BF16 = {"dtype": 1, "place": (0, 0)}


@contextmanager
def last_blocks(kernels: Kernels, total: int, count: int = 1) -> Iterator[None]:
    """Of the ``total`` blocks of a launch only the last ``count`` run."""
    kernels.module.set_blocks(total - count, count)
    try:
        yield
    finally:
        kernels.module.set_blocks()


def lazily(*shape: int, dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # the system promises no more memory than it has
        pytest.skip(str(error))


def test_rms_norm(emulated: Kernels) -> None:
    n = 1024
    rows = BEYOND // n
    x, out, weight = (lazily(*shape, dtype=torch.bfloat16) for shape in ((rows, n), (rows, n), (n,)))
    x[-4:] = torch.randn(4, n)
    weight.normal_()
    with last_blocks(emulated, rows, 4):
        given = addresses(x=x, residual=None, weight=weight, bias=None, sum=None, out=out)
        emulated.module.norm_fwd_cuda(
            **given, rows=rows, n_embd=n, eps=1e-5, centred=False, x_dtype=1, weight_dtype=1, out_dtype=1, **BF16
        )
    exact = reference.rms_norm(x[-4:].double(), weight.double(), 1e-5)
    assert torch.allclose(out[-4:].double(), exact, rtol=1e-2, atol=1e-6)


def test_activation(emulated: Kernels) -> None:
    """Without bias: the block that has the last vector, in all its turns."""
    n, blocks, at_once = 1024, 2 * 132 * 8, 4 * 256
    rows = BEYOND // n
    x, out = (lazily(rows, n, dtype=torch.bfloat16) for _ in range(2))
    x[-4:] = torch.randn(4, n)
    last = (rows * n // 8 - 1) // at_once % blocks
    with last_blocks(emulated, last + 1):
        given = addresses(x=x, bias=None, out=out)
        emulated.module.activation_fwd_cuda(**given, rows=rows, n=n, activation=0, **BF16)
    exact = reference.quick_gelu(x[-4:].double())
    assert torch.allclose(out[-4:].double(), exact, rtol=1e-2, atol=1e-6)


def test_activation_with_bias(emulated: Kernels) -> None:
    """As many columns as make two rows of more than 2^31 elements; the last 32 vectors of them."""
    n, lanes = 2**30 + 2**12, 32 * 8
    x, out, bias = (lazily(*shape, dtype=torch.bfloat16) for shape in ((2, n), (2, n), (n,)))
    x[:, -lanes:] = torch.randn(2, lanes)
    bias[-lanes:] = torch.randn(lanes)
    given = addresses(x=x, bias=bias, out=out)
    with last_blocks(emulated, n // lanes):
        emulated.module.activation_fwd_cuda(**given, rows=2, n=n, activation=0, **BF16)
    exact = reference.quick_gelu(x[:, -lanes:].double(), bias[-lanes:].double())
    assert torch.allclose(out[:, -lanes:].double(), exact, rtol=1e-2, atol=1e-6)


def test_activation_of_more_rows_than_a_grid_has(emulated: Kernels) -> None:
    """With bias: 65535 blocks take 16 rows each, and the first ones then what is left."""
    rows, n = 65535 * 16 + 5, 8
    x, out = (lazily(rows, n, dtype=torch.bfloat16) for _ in range(2))
    x[-5:], bias = torch.randn(5, n), torch.randn(n).bfloat16()
    with last_blocks(emulated, 1):
        given = addresses(x=x, bias=bias, out=out)
        emulated.module.activation_fwd_cuda(**given, rows=rows, n=n, activation=0, **BF16)
    exact = reference.quick_gelu(x[-5:].double(), bias.double())
    assert torch.allclose(out[-5:].double(), exact, rtol=1e-2, atol=1e-6)


def test_cross_entropy(emulated: Kernels) -> None:
    """The warps of the last rows, in all their turns, forward and backward."""
    k, blocks = 1024, 1056
    rows = BEYOND // k
    logits, dlogits = (lazily(rows, k, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.full((rows,), -100)
    losses, statistics = torch.zeros(rows), torch.zeros(rows, 2)
    last = (rows - 1) // 4 % blocks
    logits[-4:] = torch.randn(4, k)
    labels[-4:] = torch.tensor([0, 5, 1023, 512])
    ends = {"losses": losses, "loss": None, "count": None, "statistics": statistics, "partial": None}
    sizes = {"rows": rows, "k": k, "ignore_index": -100} | BF16
    with last_blocks(emulated, last + 1):
        given = addresses(logits=logits, labels=labels, **ends)
        emulated.module.cross_entropy_fwd_cuda(**given, parts=blocks, mean=False, **sizes)
    leaf = logits[-4:].double().requires_grad_()
    exact = reference.cross_entropy(leaf, labels[-4:], reduction="none")
    assert torch.allclose(losses[-4:].double(), exact.detach(), rtol=1e-5)
    one = torch.ones(())
    tensors = {"dloss": one, "logits": logits, "labels": labels, "statistics": statistics, "dlogits": dlogits}
    last = (rows - 1) // 4 % (2 * blocks)
    with last_blocks(emulated, last + 1):
        emulated.module.cross_entropy_bwd_cuda(**addresses(**tensors, count=None), for_each=False, **sizes)
    (wanted,) = torch.autograd.grad(exact.sum(), leaf)
    assert torch.allclose(dlogits[-4:].double(), wanted, rtol=1e-2, atol=1e-6)
