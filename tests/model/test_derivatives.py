"""Second and forward-mode derivatives of attention, of every other op and of whole models, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from igpt_fast import ImageGPTConfig, model, ops

ATTENTION = [(3, 3, False), (2, 4, False), (1, 3, False), (3, 4, True)]


def attention(t_q: int, t_k: int, masked: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op, a query or two of which sees nothing where it is masked, and q, k, v in float64."""
    key_mask = torch.arange(t_k) >= torch.tensor([[0], [2]]) if masked else None
    tensors = [torch.randn(2, 1, t, 3, dtype=torch.float64) for t in (t_q, t_k, t_k)]
    return lambda *x: ops.causal_attention(*x, key_mask=key_mask)[0], tensors


def penalty(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a squared gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)


@pytest.mark.parametrize(("t_q", "t_k", "masked"), ATTENTION)
def test_attention(t_q: int, t_k: int, masked: bool) -> None:
    function, tensors = attention(t_q, t_k, masked)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    narrow = penalty(function, [tensor.float() for tensor in tensors])
    for found, want in zip(narrow, penalty(function, tensors), strict=True):
        torch.testing.assert_close(found, want.float(), atol=1e-4, rtol=1e-3)


def test_attention_under_transforms() -> None:
    """However torch.func and autograd are put upon each other; one level alone is torch's own attention."""
    function, (q, k, v) = attention(3, 3, False)
    total = lambda q: function(q, k, v).square().sum()  # noqa: E731
    torch._dynamo.reset()
    hessian = torch.autograd.functional.hessian(total, q)
    func = torch.func
    for twice in (func.hessian(total), func.jacrev(func.grad(total)), func.jacfwd(func.jacfwd(total))):
        torch.testing.assert_close(twice(q), hessian)
    want = 2 * (hessian.flatten(4).flatten(0, 3).mT @ func.grad(total)(q).flatten()).view_as(q)
    leaf = q.clone().requires_grad_()
    (found,) = torch.autograd.grad(func.grad(total)(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, want)
    compiled = torch.compile(func.hessian(total), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), hessian)


def test_per_sample_gradients_keep_torch_s_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], F.scaled_dot_product_attention
    spy = lambda *args, **more: (calls.append(1), original(*args, **more))[1]  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    function, tensors = attention(3, 3, False)
    total = lambda *x: function(*(t[None] for t in x)).square().sum()  # noqa: E731
    each = torch.vmap(torch.func.grad(total))(*tensors)
    assert calls == [1]
    leaf = tensors[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf, *tensors[1:]).square().sum(), leaf)
    torch.testing.assert_close(each, want)


def test_attention_that_is_recomputed() -> None:
    function, tensors = attention(3, 3, False)
    scaled = lambda *x: function(*(2 * t for t in x))  # noqa: E731
    again = lambda *x: checkpoint(scaled, *x, use_reentrant=False)  # noqa: E731
    for found, want in zip(penalty(again, tensors), penalty(scaled, tensors), strict=True):
        torch.testing.assert_close(found, want)


OPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w, r: torch.cat(ops.rms_norm(x, w, residual=r)), [(2, 4), (4,), (2, 4)]),
    "layer_norm": (lambda x, w, b, r: torch.cat(ops.layer_norm(x, w, b, residual=r)), [(2, 4), (4,), (4,), (2, 4)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, torch.tensor([0, 3, -100]), reduction="none"), [(3, 4)]),
    "packed": (ops.causal_attention_packed, [(1, 3, 3, 1, 2)]),
    "gemv": (
        lambda x, w, b, n, r: ops.gemv(x, w, b, norm_weight=n, activation="quick_gelu", residual=r),
        [(2, 3), (3, 4), (4,), (3,), (2, 4)],
    ),
    **{op.__name__: (op, [(2, 4), (4,)]) for op in (ops.quick_gelu, ops.gelu_tanh, ops.gelu_erf)},
    **{name: (lambda x, n=name: ops.activation(x, n), [(2, 4)]) for name in ("gelu", "gelu_10", "mish", "laplace")},
}


@pytest.mark.parametrize("name", OPS)
def test_every_op(name: str) -> None:
    function, shapes = OPS[name]
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("head", ["ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"])
def test_models(head: str) -> None:
    """Along a direction through all parameters: forward-mode, twice in reverse, forward over reverse, differences."""
    sizes = {"n_layer": 1, "n_positions": 5, "vocab_size": 5, "n_embd": 4, "n_head": 2, "num_labels": 3}
    network = getattr(model, head)(ImageGPTConfig(**sizes, initializer_range=0.5)).eval().double()
    ids = torch.randint(4, (2, 5))
    at = {name: parameter.detach() for name, parameter in network.named_parameters()}
    along = {name: torch.randn_like(parameter) for name, parameter in at.items()}

    def loss(parameters: dict[str, Tensor], ids: Tensor = ids) -> Tensor:
        return torch.func.functional_call(network, parameters, ids, {"use_cache": False})[0].sin().sum()

    gradient = torch.func.grad(loss)
    slope = lambda p: sum((g * a).sum() for g, a in zip(gradient(p).values(), along.values(), strict=True))  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(loss, (at,), (along,))[1], slope(at))
    _, forward = torch.func.jvp(gradient, (at,), (along,))
    reverse = torch.func.grad(slope)(at)
    ahead, behind = ({name: at[name] + step * along[name] for name in at} for step in (1e-5, -1e-5))
    for name, value in gradient(ahead).items():
        torch.testing.assert_close(forward[name], reverse[name])
        torch.testing.assert_close((value - gradient(behind)[name]) / 2e-5, reverse[name], atol=1e-5, rtol=1e-4)
    each = torch.vmap(gradient, (None, 0))(at, ids[:, None])
    torch.testing.assert_close({name: value.sum(0) for name, value in each.items()}, gradient(at))
    leaves = list(network.parameters())
    first = torch.autograd.grad(network(ids, use_cache=False)[0].sin().sum(), leaves, create_graph=True)
    total = sum((g * a).sum() for g, a in zip(first, along.values(), strict=True))
    for name, value in zip(at, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(value, reverse[name])


def test_the_output_is_no_view() -> None:
    """Which may not be written to."""
    function, tensors = attention(3, 4, True)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    doubled = torch.autograd.grad(function(*leaves).mul_(2).sum(), leaves)
    for found, want in zip(doubled, torch.autograd.grad(function(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(found, 2 * want)
