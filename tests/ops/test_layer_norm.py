"""layer_norm: against torch's, the definition, the kernels, errors."""

from __future__ import annotations

import contract
import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from tolerance import assert_parity

from igpt_fast import backend, ops

OP = "layer_norm"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X, N = (3, 5, 64), (64,)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.layer_norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_definition_is_that_of_torch(dtype: torch.dtype, with_bias: bool) -> None:
    inputs = tensors((9, 63), (63,), *([(63,)] if with_bias else []), dtype=dtype)
    upstream = contract.upstream_for(ops.layer_norm, inputs)
    theirs = lambda x, *affine: F.layer_norm(x, x.shape[-1:], *affine)  # noqa: E731
    with backend.use_backend("reference"):
        ours = contract.with_gradients(ops.layer_norm, inputs, upstream)
    plain = contract.with_gradients(theirs, inputs, upstream)
    exact = contract.with_gradients(theirs, contract.wider(inputs), contract.wider(upstream))
    for i, (mine, other, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_parity(mine, other, wanted, f"result {i}")


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0]])
    assert torch.allclose(ops.layer_norm(x, torch.ones(2), torch.tensor([0.0, 1.0]), 0.0), torch.tensor([[-1.0, 2.0]]))
    constant = torch.full((1, 2), 5.0)
    assert torch.equal(ops.layer_norm(constant, torch.ones(2)), torch.zeros(1, 2))


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in tensors((3, 7), (7,), (7,), dtype=torch.float64)]
    assert torch.autograd.gradcheck(ops.layer_norm, leaves)
    assert torch.autograd.gradgradcheck(ops.layer_norm, leaves)
    assert torch.autograd.gradcheck(ops.layer_norm, leaves[:2])


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 97, 64), (65, 72), (2, 1032), (512,), (0, 4, 64), (3, 0, 8)])
def test_parity(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, covered = shape[-1:], implementation.name != "cpu" or dtype != torch.float16
    contract.check_parity(implementation, ops.layer_norm, tensors(shape, n, n, dtype=dtype), covered)
    contract.check_parity(implementation, ops.layer_norm, tensors(shape, n, dtype=dtype), covered)
    contract.check_parity(implementation, add_layer_norm, tensors(shape, shape, n, n, dtype=dtype), covered)
    contract.check_parity(implementation, add_layer_norm, tensors(shape, shape, n, dtype=dtype), covered)


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((3, 63), (torch.float32, torch.float32, torch.float32)),
        ((2, 8200), (torch.float32, torch.float32, torch.float32)),
        ((2, 64), (torch.bfloat16, torch.float32, torch.float32)),
        ((2, 64), (torch.float32, torch.float32, torch.bfloat16)),
        ((2, 64), (torch.float64, torch.float64, torch.float64)),
    ],
)
def test_what_no_kernel_covers_is_the_reference(
    implementation: Implementation, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    inputs = [torch.randn(s).to(dtype) for s, dtype in zip((shape, shape[-1:], shape[-1:]), dtypes, strict=True)]
    # The CPU's kernels have their own bounds: any length, and a wider weight with its bias.
    wanted = {(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)}
    covered = implementation.name == "cpu" and dtypes in wanted
    contract.check_parity(implementation, ops.layer_norm, inputs, covered)


def test_an_empty_batch_gives_gradients_of_zero(implementation: Implementation) -> None:
    x, weight = torch.zeros(0, 64, device=implementation.device), torch.ones(64, device=implementation.device)
    _, dx, dweight, dbias = contract.with_gradients(ops.layer_norm, [x, weight, weight], [x])
    assert dx.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(weight))


def test_layouts(implementation: Implementation) -> None:
    contract.check_layouts(implementation, ops.layer_norm, tensors(X, N, N))
    contract.check_layouts(implementation, add_layer_norm, tensors(X, X, N, N, dtype=torch.bfloat16))


def test_compiles(implementation: Implementation) -> None:
    contract.check_compiles(implementation, ops.layer_norm, tensors(X, N, N, dtype=torch.bfloat16))
    contract.check_compiles(implementation, add_layer_norm, tensors(X, X, N))


def test_second_derivative(implementation: Implementation) -> None:
    contract.check_second_derivative(implementation, ops.layer_norm, tensors(X, N, N))
    contract.check_second_derivative(implementation, add_layer_norm, tensors(X, X, N))


def test_transforms(implementation: Implementation) -> None:
    contract.check_transforms(implementation, ops.layer_norm, tensors(X, N, N))


def test_backward_in_another_thread(implementation: Implementation) -> None:
    contract.check_backward_keeps_the_choice(implementation, ops.layer_norm, tensors(X, N, N))
    contract.check_backward_keeps_the_choice(implementation, add_layer_norm, tensors(X, X, N))


def test_shapes_alone(implementation: Implementation) -> None:
    contract.check_shapes_alone(implementation, ops.layer_norm, tensors(X, N, N, dtype=torch.float16))
    contract.check_shapes_alone(implementation, add_layer_norm, tensors(X, X, N))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_two_is_used(implementation: Implementation, used: int) -> None:
    """The gradients are those of the definition, none included."""

    def gradients(dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = [t.to(implementation.device, dtype).requires_grad_() for t in inputs]
        out = add_layer_norm(*leaves)[used]
        return list(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))

    inputs = tensors(X, X, N, N)
    with contract.launching(implementation):
        ours = gradients(torch.float32)
    with backend.use_backend("reference"):
        plain, exact = gradients(torch.float32), gradients(torch.float64)
    for mine, theirs, wanted in zip(ours, plain, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_parity(mine, theirs, wanted)


def test_autocast(implementation: Implementation) -> None:
    x, weight, bias = (t.to(implementation.device) for t in tensors((2, 64), (64,), (64,)))
    with torch.autocast(implementation.device, torch.bfloat16), contract.launching(implementation):
        assert ops.layer_norm(x, weight, bias).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(emulation: Implementation, dtype: torch.dtype) -> None:
    x, weight, bias = tensors((3, 72), (72,), (72,), dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    registered = torch.ops.igpt_fast
    contract.check_opcheck(emulation, registered.layer_norm.default, (*leaves, 1e-5))
    contract.check_opcheck(emulation, registered.layer_norm.default, (*leaves[:2], None, 1e-5))
    contract.check_opcheck(emulation, registered.add_layer_norm.default, (leaves[0], x, *leaves[1:], 1e-5))
    contract.check_opcheck(emulation, registered.layer_norm_bwd.default, (x, x, x, weight, 1e-5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 8).long()}, TypeError, "x is torch.int64; want a floating-point tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\); want at least one dimension"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); want \(8,\), x's last one"),
        ({"bias": torch.ones(1, 8)}, ValueError, r"bias has shape \(1, 8\); want \(8,\), x's last one"),
        ({"bias": 1.0}, TypeError, "bias is float; want a floating-point tensor"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta, others on cpu"),
        ({"eps": float("nan")}, ValueError, "eps is nan; want 0 or above"),
        ({"residual": torch.zeros(2, 8).half()}, TypeError, "residual is torch.float16; want torch.float32, x's"),
        ({"residual": torch.zeros(2, 1)}, ValueError, r"residual has shape \(2, 1\); want \(2, 8\), x's"),
    ],
)
def test_misuse(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="layer_norm: " + message):
        ops.layer_norm(**{"x": torch.zeros(2, 8), "weight": torch.ones(8), "bias": torch.zeros(8)} | changes)


def test_a_wider_residual(implementation: Implementation) -> None:
    """The sum has the residual's dtype; the CPU's kernel takes it, and the reference where CUDA's does not."""

    def stream(x: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.layer_norm(x, *parameters, residual=residual)

    given = [*tensors((3, 64), dtype=torch.bfloat16), *tensors((3, 64), (64,), (64,))]
    contract.check_shapes_alone(implementation, stream, given)
    contract.check_parity(implementation, stream, given, covered=implementation.name == "cpu")
