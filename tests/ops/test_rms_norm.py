"""rms_norm: the definition, low precision, gradients, errors."""

from __future__ import annotations

import contract
import pytest
import torch
from implementations import Implementation
from tolerance import assert_parity

from igpt_fast import backend, ops

OP = "rms_norm"


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


# ---- kernels ---------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TENSORS = [torch.Size([3, 5, 64]), torch.Size([64])]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.rms_norm(x, weight, residual=residual)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 97, 64), (65, 72), (2, 1032), (512,), (0, 4, 64), (3, 0, 8)])
def test_parity(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    covered = implementation.name != "cpu" or dtype != torch.float16
    contract.check_parity(implementation, ops.rms_norm, tensors(shape, shape[-1:], dtype=dtype), covered)
    contract.check_parity(implementation, add_rms_norm, tensors(shape, shape, shape[-1:], dtype=dtype), covered)


@pytest.mark.parametrize(("shape", "dtypes"), [
    ((3, 63), (torch.float32, torch.float32)),
    ((2, 8200), (torch.float32, torch.float32)),
    ((2, 64), (torch.bfloat16, torch.float32)),
    ((2, 64), (torch.float16, torch.float16)),
    ((2, 64), (torch.float64, torch.float64)),
])  # fmt: skip
def test_what_no_kernel_covers_is_the_reference(
    implementation: Implementation, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Each kind of kernel has its own bounds."""
    x, weight = torch.randn(shape).to(dtypes[0]), torch.randn(shape[-1:]).to(dtypes[1])
    if implementation.name == "cpu":
        covered = torch.float16 not in dtypes and torch.float64 not in dtypes
    else:
        covered = shape == (2, 64) and torch.float64 not in dtypes
    contract.check_parity(implementation, ops.rms_norm, [x, weight], covered)


def test_an_empty_batch_gives_a_weight_gradient_of_zero(implementation: Implementation) -> None:
    x, weight = torch.zeros(0, 64, device=implementation.device), torch.ones(64, device=implementation.device)
    _, dx, dweight = contract.with_gradients(ops.rms_norm, [x, weight], [x])
    assert dx.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_layouts(implementation: Implementation) -> None:
    contract.check_layouts(implementation, ops.rms_norm, tensors(*TENSORS))
    contract.check_layouts(implementation, add_rms_norm, tensors(TENSORS[0], *TENSORS, dtype=torch.bfloat16))


def test_compiles(implementation: Implementation) -> None:
    contract.check_compiles(implementation, ops.rms_norm, tensors(*TENSORS, dtype=torch.bfloat16))
    contract.check_compiles(implementation, add_rms_norm, tensors(TENSORS[0], *TENSORS))


def test_second_derivative(implementation: Implementation) -> None:
    contract.check_second_derivative(implementation, ops.rms_norm, tensors(*TENSORS))
    contract.check_second_derivative(implementation, add_rms_norm, tensors(TENSORS[0], *TENSORS))


def test_second_derivative_by_x_alone(implementation: Implementation) -> None:
    """The weight needs no gradient, as of a frozen model."""
    weight = torch.randn(64, device=implementation.device)
    contract.check_second_derivative(implementation, lambda x: ops.rms_norm(x, weight.to(x.dtype)), tensors((3, 64)))


def test_transforms(implementation: Implementation) -> None:
    contract.check_transforms(implementation, ops.rms_norm, tensors(*TENSORS))


def test_backward_in_another_thread(implementation: Implementation) -> None:
    contract.check_backward_keeps_the_choice(implementation, ops.rms_norm, tensors(*TENSORS))
    contract.check_backward_keeps_the_choice(implementation, add_rms_norm, tensors(TENSORS[0], *TENSORS))


def test_shapes_alone(implementation: Implementation) -> None:
    contract.check_shapes_alone(implementation, ops.rms_norm, tensors(*TENSORS, dtype=torch.float16))
    contract.check_shapes_alone(implementation, add_rms_norm, tensors(TENSORS[0], *TENSORS))


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_two_is_used(implementation: Implementation, used: int) -> None:
    """The gradients are those of the definition, none included."""

    def gradients(dtype: torch.dtype) -> list[torch.Tensor | None]:
        leaves = [t.to(implementation.device, dtype).requires_grad_() for t in inputs]
        out = add_rms_norm(*leaves)[used]
        return list(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))

    inputs = tensors(TENSORS[0], *TENSORS)
    with contract.launching(implementation):
        ours = gradients(torch.float32)
    with backend.use_backend("reference"):
        plain, exact = gradients(torch.float32), gradients(torch.float64)
    for mine, theirs, wanted in zip(ours, plain, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_parity(mine, theirs, wanted)


def test_autocast(implementation: Implementation) -> None:
    """Parameters in fp32: a residual stream in fp32 runs the kernel, and so do 16-bit activations."""
    x, residual, weight = (t.to(implementation.device) for t in tensors((2, 64), (2, 64), (64,)))
    with torch.autocast(implementation.device, torch.bfloat16):
        with contract.launching(implementation):
            out, total = ops.rms_norm(x, weight, residual=residual)
        assert out.dtype == total.dtype == torch.float32
        with contract.launching(implementation):
            assert ops.rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_a_dtype_of_its_own(implementation: Implementation, wide: torch.dtype, dtype: torch.dtype) -> None:
    """The bits, and the gradients', of a conversion afterwards."""
    x, weight, residual = (t.to(implementation.device) for t in tensors((1030, 72), (72,), (1030, 72), dtype=wide))
    upstream = [torch.randn(1030, 72).to(implementation.device, dtype), torch.randn_like(x)]

    def fused(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, weight, residual=residual, dtype=dtype)

    def apart(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = ops.rms_norm(x, weight, residual=residual)
        return out.to(dtype), total

    with contract.launching(implementation):
        found = contract.with_gradients(fused, [x, weight, residual], upstream)
        alone = contract.with_gradients(lambda *t: ops.rms_norm(*t, dtype=dtype), [x, weight], upstream[:1])
    wanted = contract.with_gradients(apart, [x, weight, residual], upstream)
    assert found[0].dtype == alone[0].dtype == dtype
    assert found[1].dtype == wide
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    wanted = contract.with_gradients(lambda *t: ops.rms_norm(*t).to(dtype), [x, weight], upstream[:1])
    assert all(torch.equal(a, b) for a, b in zip(alone, wanted, strict=True))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_residual_of_float32_beside_bfloat16(
    implementation: Implementation, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """A stream under autocast: the bits, and the gradients', of conversions before and afterwards."""
    x, residual = (t.to(implementation.device) for t in tensors((1030, 72), (1030, 72)))
    x, weight = x.bfloat16(), torch.randn(72).to(implementation.device, weight_dtype)
    upstream = [torch.randn(1030, 72).to(implementation.device, dtype), torch.randn_like(residual)]

    def fused(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, weight, residual=residual, dtype=dtype)

    def apart(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = ops.rms_norm(x.float(), weight.float(), residual=residual)
        return out.to(dtype), total

    with contract.launching(implementation):
        found = contract.with_gradients(fused, [x, weight, residual], upstream)
    wanted = contract.with_gradients(apart, [x, weight, residual], upstream)
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.bfloat16, weight_dtype, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_wider_residual(implementation: Implementation, narrow: torch.dtype) -> None:
    """By the rule, compiled, differentiated twice, as shapes alone; float16 goes the reference's way on the CPU."""

    def stream(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, weight, residual=residual.to(torch.promote_types(x.dtype, torch.float32)), dtype=x.dtype)

    given = [*tensors((3, 5, 64), dtype=narrow), *tensors((3, 5, 64), (64,))]
    covered = implementation.name != "cpu" or narrow == torch.bfloat16
    contract.check_parity(implementation, stream, given, covered)
    contract.check_shapes_alone(implementation, stream, given)
    if covered:
        contract.check_compiles(implementation, stream, given)
        contract.check_second_derivative(implementation, stream, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(emulation: Implementation, dtype: torch.dtype) -> None:
    x, weight = tensors((3, 72), (72,), dtype=dtype)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    registered = torch.ops.igpt_fast
    contract.check_opcheck(emulation, registered.rms_norm.default, (*leaves, 1e-5, leaves[0].dtype))
    contract.check_opcheck(emulation, registered.add_rms_norm.default, (leaves[0], x, leaves[1], 1e-5, torch.bfloat16))
    contract.check_opcheck(emulation, registered.rms_norm_bwd.default, (x, None, x, weight, 1e-5))
    contract.check_opcheck(emulation, registered.rms_norm_bwd.default, (x, x, x, weight, 1e-5))
    wide = x.float()
    residual = wide.clone().requires_grad_()
    contract.check_opcheck(
        emulation, registered.add_rms_norm.default, (leaves[0].bfloat16(), residual, leaves[1], 1e-5, torch.bfloat16)
    )
    contract.check_opcheck(
        emulation, registered.add_rms_norm_bwd.default, (x, wide, wide, weight, 1e-5, torch.bfloat16)
    )


def test_a_branch_has_16_bits(emulation: Implementation) -> None:
    x, weight = tensors((3, 72), (72,))
    with pytest.raises(TypeError, match=r"rms_norm: branch is torch.float32 beside torch.float32; want 16 bits"):
        torch.ops.igpt_fast.add_rms_norm_bwd(x, None, x, weight, 1e-5, torch.float32)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(2, 8).bfloat16(), TypeError, "residual is torch.bfloat16; want torch.float32, x's, or a wider"),
        (torch.zeros(1, 8), ValueError, r"residual has shape \(1, 8\); want \(2, 8\), x's"),
        (torch.zeros(2, 8).long(), TypeError, "residual is torch.int64; want a floating-point tensor"),
        (torch.zeros(2, 8, device="meta"), ValueError, "residual is on meta, others on cpu"),
    ],
)
def test_misuse_of_the_residual(residual, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="rms_norm: " + message):
        ops.rms_norm(torch.zeros(2, 8), torch.ones(8), residual=residual)
