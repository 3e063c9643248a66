"""activation: every name that transformers has, in every dtype."""

from __future__ import annotations

import contract
import pytest
import torch
from implementations import Implementation
from tolerance import assert_parity

from igpt_fast import ImageGPTConfig, ImageGPTModel, ops, reference
from igpt_fast.ops.activation import KERNELS

OP = "activation"
WITH_PARAMETERS = {"prelu", "xielu"}


def test_the_names_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    assert set(ops.ACTIVATIONS) == set(ACT2FN) - WITH_PARAMETERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_output_and_gradient(name: str, dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    theirs = ACT2FN[name]
    # 0 and the kinks are left out: there the derivative is a matter of convention.
    x = torch.cat([torch.linspace(-8.0, 8.0, 1000), torch.tensor([-30.0, -12.0, 12.0, 30.0])]).to(dtype)
    x = x[(x != 0) & (x.abs() != 3) & (x != 6)]

    def run(function, wide: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(wide).requires_grad_()
        out = function(leaf)
        return [out.detach(), torch.autograd.grad(out.sum(), leaf)[0]]

    ours = run(lambda leaf: ops.activation(leaf, name), dtype)
    for mine, reference_value, exact in zip(ours, run(theirs, dtype), run(theirs, torch.float64), strict=True):
        assert mine.dtype == dtype
        assert_parity(mine, reference_value, exact, name)


def test_quick_gelu_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    by_hand = torch.tensor([-1 / (1 + 2.718281828459045**1.702), 0.0, 2 / (1 + 2.718281828459045**-3.404)])
    assert torch.allclose(ops.activation(x, "quick_gelu"), by_hand.double(), rtol=1e-6)
    assert ops.ACTIVATIONS["quick_gelu"] is reference.quick_gelu


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_gradcheck_strides_and_empty(name: str) -> None:
    # Off the kinks of relu, relu6 and hardswish by more than gradcheck's step.
    x = torch.tensor([-3.7, -1.3, -0.2, 0.3, 2.9, 5.1, 7.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: ops.activation(leaf, name), (x,))
    wide = torch.randn(6, 10)[:, ::2].t()
    assert torch.allclose(ops.activation(wide, name), ops.activation(wide.contiguous(), name))
    assert ops.activation(torch.zeros(0, 3), name).shape == (0, 3)


@pytest.mark.parametrize("name", ["no_such", "prelu", "xielu", "", None])
def test_unknown_names(name) -> None:
    with pytest.raises(ValueError, match=f"activation: name is {name!r}.*; want one of quick_gelu, gelu, "):
        ops.activation(torch.zeros(1), name)


def test_names_with_parameters_say_so_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"'prelu' \(it has parameters of its own\); want one of"):
        ImageGPTModel(ImageGPTConfig(n_embd=8, n_head=1, n_layer=1, activation_function="prelu"))


@pytest.mark.parametrize("x", [torch.zeros(2, dtype=torch.long), 1.0, None])
def test_not_floating_point(x) -> None:
    with pytest.raises(TypeError, match=r"activation: x is .*; want a floating-point tensor"):
        ops.activation(x, "relu")


# ---- kernels ---------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = [ops.quick_gelu, ops.gelu_tanh, ops.gelu_erf]
BY_NAME = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [(2 * torch.randn(shape)).to(dtype) for shape in shapes]


def test_the_names_mean_the_formulas_of_transformers() -> None:
    from transformers.activations import ACT2FN as functions

    x = torch.linspace(-9.0, 9.0, 2001, dtype=torch.float64)
    for name, op in KERNELS.items():
        assert torch.allclose(getattr(reference, op)(x), functions[name](x), rtol=0, atol=1e-9), name


@pytest.mark.every_isa
@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 65, 64), (97, 72), (2, 2048), (520,), (0, 4, 64), (3, 0, 8)])
def test_parity(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, op) -> None:
    covered = implementation.name != "cpu" or dtype != torch.float16
    contract.check_parity(implementation, op, tensors(shape, dtype=dtype), covered and 0 not in shape)
    contract.check_parity(implementation, op, tensors(shape, shape[-1:], dtype=dtype), covered)


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_bias_and_kernels_by_name(implementation: Implementation, name: str) -> None:
    x, bias = tensors((5, 64), (64,), dtype=torch.bfloat16)
    with contract.launching(implementation, name in KERNELS):
        out = ops.activation(x.to(implementation.device), name, bias.to(implementation.device))
    assert out.dtype == x.dtype
    exact = ops.ACTIVATIONS[name](x.double() + bias.double())
    assert_parity(out.cpu(), ops.ACTIVATIONS[name](x + bias), exact, name)


@BY_NAME
@pytest.mark.parametrize(
    ("shape", "dtype", "bias_dtype"),
    [
        ((3, 63), torch.float32, None),
        ((), torch.float32, None),
        ((2, 64), torch.float64, torch.float64),
        ((2, 64), torch.bfloat16, torch.float32),
    ],
)
def test_what_no_kernel_covers_is_the_reference(
    implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype | None, op
) -> None:
    inputs = tensors(shape, dtype=dtype) + ([] if bias_dtype is None else tensors(shape[-1:], dtype=bias_dtype))
    covered = implementation.name == "cpu" and shape == (3, 63)
    contract.check_parity(implementation, op, inputs, covered)


@pytest.mark.every_isa
@BY_NAME
@pytest.mark.parametrize("with_bias", [False, True])
def test_far_out(implementation: Implementation, op, with_bias: bool) -> None:
    """No finite argument gives NaN, nor a derivative of NaN; infinite ones give what the definition gives."""
    for dtype, largest in [
        (torch.float32, 1e4),
        (torch.float32, 3e38),
        (torch.float16, 65504.0),
        (torch.bfloat16, 3e38),
    ]:
        x = torch.tensor([largest, -largest, largest / 7, -largest / 7, 30.0, -30.0, 0.0, -0.0], dtype=dtype)
        inputs = [x.to(implementation.device)] + ([torch.zeros_like(x).to(implementation.device)] if with_bias else [])
        out, dx, *_ = contract.with_gradients(op, inputs, [torch.ones_like(inputs[0])])
        kernel = implementation.name != "reference" and (implementation.name, dtype) != ("cpu", torch.float16)
        if kernel or largest < 1e30:
            assert torch.allclose(out.cpu().float(), x.float().clamp(min=0.0)), (dtype, largest)
        # The plain expression's own intermediate results overflow: the square, or cube, of a large number.
        if kernel or (dtype, largest) == (torch.float32, 1e4):
            step = torch.where(x == 0, 0.5, (x > 0).float())
            assert torch.allclose(dx.cpu().float(), step), (dtype, largest)
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0] * 2)
    assert torch.allclose(
        op(infinite.to(implementation.device)).cpu(), getattr(reference, op.__name__)(infinite), equal_nan=True
    )


@BY_NAME
def test_contract(implementation: Implementation, op) -> None:
    x, n = (3, 5, 64), (64,)
    contract.check_layouts(implementation, op, tensors(x, n))
    contract.check_layouts(implementation, op, tensors(x, dtype=torch.bfloat16))
    contract.check_second_derivative(implementation, op, tensors(x, n))
    contract.check_transforms(implementation, op, tensors(x, n))
    contract.check_backward_keeps_the_choice(implementation, op, tensors(x, n))
    contract.check_shapes_alone(implementation, op, tensors(x, n, dtype=torch.float16))
    contract.check_shapes_alone(implementation, op, tensors(x))


@BY_NAME
def test_compiles(implementation: Implementation, op) -> None:
    contract.check_compiles(implementation, op, tensors((3, 64), (64,), dtype=torch.bfloat16))
    contract.check_compiles(implementation, lambda x: ops.activation(x, "gelu_new"), tensors((3, 64)))


@BY_NAME
def test_gradcheck_with_bias(op) -> None:
    leaves = [t.requires_grad_() for t in tensors((3, 7), (7,), dtype=torch.float64)]
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@BY_NAME
def test_autocast(implementation: Implementation, op) -> None:
    """16-bit x and a bias in fp32, as under autocast: the definition, in x's dtype."""
    x, bias = (t.to(implementation.device) for t in tensors((2, 64), (64,)))
    with torch.autocast(implementation.device, torch.bfloat16):
        assert op(x.bfloat16(), bias).dtype == torch.bfloat16
        with contract.launching(implementation):
            assert op(x.bfloat16()).dtype == torch.bfloat16


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(emulation: Implementation, op, dtype: torch.dtype) -> None:
    x, bias = tensors((3, 72), (72,), dtype=dtype)
    leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
    forward, backward = (getattr(torch.ops.igpt_fast, op.__name__ + end).default for end in ("", "_bwd"))
    contract.check_opcheck(emulation, forward, leaves)
    contract.check_opcheck(emulation, forward, (leaves[0], None))
    contract.check_opcheck(emulation, backward, (x, x, bias))
    contract.check_opcheck(emulation, backward, (x, x, None))


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.zeros(2, 8).long(), None, TypeError, "x is torch.int64; want a floating-point tensor"),
        (torch.zeros(2, 8), torch.zeros(8).long(), TypeError, "bias is torch.int64; want a floating-point tensor"),
        (torch.zeros(2, 8), torch.zeros(7), ValueError, r"bias has shape \(7,\); want \(8,\), x's last one"),
        (torch.zeros(2, 8), torch.zeros(1, 8), ValueError, r"bias has shape \(1, 8\)"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"x has shape \(\); want at least one dimension, with bias"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), ValueError, "bias is on meta, others on cpu"),
    ],
)
def test_misuse(x, bias, error: type[Exception], message: str) -> None:
    for op in OPS:
        with pytest.raises(error, match=f"{op.__name__}: {message}"):
            op(x, bias)
    with pytest.raises(error, match=f"activation: {message}"):
        ops.activation(x, "relu", bias)
