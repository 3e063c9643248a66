"""activation: every name that transformers has, in every dtype."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_parity

from igpt_fast import ImageGPTConfig, ImageGPTModel, ops, reference

WITH_PARAMETERS = {"prelu", "xielu"}


def test_the_names_are_those_of_transformers() -> None:
    activations = pytest.importorskip("transformers.activations")
    assert set(ops.ACTIVATIONS) == set(activations.ACT2FN) - WITH_PARAMETERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_output_and_gradient(name: str, dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("transformers.activations").ACT2FN[name]
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
