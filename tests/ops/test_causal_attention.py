"""causal_attention: odd lengths, masks, both paths, gradients, registration, errors."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, ops, reference

LENGTHS = [1, 2, 63, 64, 65, 97]


def make(b: int = 3, h: int = 2, t_q: int = 5, t_k: int | None = None, d: int = 32) -> list[Tensor]:
    t_k = t_q if t_k is None else t_k
    return [torch.randn(b, h, t_q, d), torch.randn(b, h, t_k, d), torch.randn(b, h, t_k, d)]


def plain(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The plain expression, in the dtype of its inputs; written without reference.py's helpers."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    t_q, t_k = scores.shape[-2:]
    hidden = torch.arange(t_k) > torch.arange(t_k - t_q, t_k)[:, None]
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    return torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1).nan_to_num(0.0) @ v


def left_padding(b: int, t: int) -> Tensor:
    """The first row is whole, the last one has a single visible key."""
    return torch.arange(t) >= torch.linspace(0, t - 1, b).round()[:, None]


def with_gradients(function: Any, inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t_q", LENGTHS)
@pytest.mark.parametrize("past", [0, 1, 31])
def test_output_and_gradients(past: int, t_q: int, masked: bool, need_weights: bool, dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in make(t_q=t_q, t_k=t_q + past)]
    key_mask = left_padding(3, t_q + past) if masked else None
    upstream = torch.randn_like(inputs[0])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.causal_attention(q, k, v, key_mask=key_mask, need_weights=need_weights)[0]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, key_mask)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.ones(t_q, t_q + past, dtype=torch.bool).tril(past)
        visible = visible if key_mask is None else visible & key_mask[:, None, None]
        seen = visible.any(-1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~seen) * seen

    # In fp32 the op's gradient is that of torch's own, which takes the softmax's correction from dO and O instead of
    # from the weights: of one key or two, noise where the written-out expression has an exact zero.
    yardstick = torchs if dtype == torch.float32 and not need_weights else theirs
    mine, other, exact = (
        with_gradients(function, inputs, upstream, wide)
        for function, wide in ((ours, dtype), (yardstick, dtype), (theirs, torch.float64))
    )
    for i, what in enumerate(("out", "dq", "dk", "dv")):
        assert mine[i].dtype == dtype
        assert mine[i].isfinite().all()
        assert_parity(mine[i], other[i], exact[i].nan_to_num(0.0), what)


@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize("upcast", [False, True])
def test_head_dims_scale_and_weights(upcast: bool, d: int) -> None:
    inputs = [tensor.bfloat16() for tensor in make(t_q=33, d=d)]
    out, weights = ops.causal_attention(*inputs, scale=0.3, upcast=upcast, need_weights=True)
    assert weights is not None
    assert_parity(out, plain(*inputs, scale=0.3), plain(*(x.double() for x in inputs), scale=0.3))
    identity = torch.eye(33, dtype=torch.bfloat16).expand(3, 2, 33, 33)
    q, k, _ = inputs
    exact = plain(q.double(), k.double(), identity.double(), scale=0.3)
    assert_parity(weights, plain(q, k, identity, scale=0.3), exact)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))


def test_upcast_keeps_scores_that_bf16_would_round() -> None:
    """Two keys whose scores differ by less than bf16 resolves at 256."""
    q, k = torch.tensor([[16.0, 0.5]]), torch.tensor([[16.0, 0.0], [16.0, 1.0]])
    q, k = (x.bfloat16()[None, None] for x in (q, k))
    q = q.expand(1, 1, 2, 2)
    exact = 1 / (1 + math.exp(0.5))
    plain_weight, upcast_weight = (
        float(ops.causal_attention(q, k, k, scale=1.0, upcast=upcast, need_weights=True)[1][0, 0, 1, 0])
        for upcast in (False, True)
    )
    assert abs(upcast_weight - exact) < 2e-3 < abs(plain_weight - exact)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_see_nothing(need_weights: bool) -> None:
    """They give zero, and finite gradients."""
    inputs = [tensor.requires_grad_() for tensor in make(t_q=6)]
    key_mask = torch.ones(3, 6, dtype=torch.bool)
    key_mask[1, :4] = False
    key_mask[2] = False
    out, _ = ops.causal_attention(*inputs, key_mask=key_mask, need_weights=need_weights)
    assert torch.equal(out[1, :, :4], torch.zeros_like(out[1, :, :4]))
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert (out[0] != 0).any()
    assert (out[1, :, 4:] != 0).any()
    out.sum().backward()
    for leaf in inputs:
        assert leaf.grad.isfinite().all()
        assert torch.equal(leaf.grad[2], torch.zeros_like(leaf.grad[2]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("t_q", [1, 4, 7])
def test_poisoned_masked_keys_do_not_leak(t_q: int, need_weights: bool, poison: float) -> None:
    q, k, v = make(t_q=t_q, t_k=7)
    key_mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool).expand(3, 7)
    clean, _ = ops.causal_attention(q, k, v, key_mask=key_mask, need_weights=need_weights)
    leaves = [q.requires_grad_()]
    for tensor in (k, v):
        leaves.append(tensor.masked_fill(~key_mask[:, None, :, None], poison).detach().requires_grad_())
    out, _ = ops.causal_attention(*leaves, key_mask=key_mask, need_weights=need_weights)
    assert torch.equal(out, clean)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_strides_and_empty_batch(masked: bool, need_weights: bool) -> None:
    packed = torch.randn(3, 9, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    key_mask = left_padding(3, 18)[:, ::2] if masked else None
    options = {"key_mask": key_mask, "need_weights": need_weights}
    out, _ = ops.causal_attention(*packed, **options)
    expected, _ = ops.causal_attention(*(x.contiguous() for x in packed), **options)
    torch.testing.assert_close(out, expected)
    options["key_mask"] = torch.ones(0, 9, dtype=torch.bool) if masked else None
    assert ops.causal_attention(*(x[:0] for x in packed), **options)[0].shape == (0, 2, 9, 32)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout(masked: bool, need_weights: bool) -> None:
    q, k, v = make(b=1, h=1, t_q=400, d=32)
    v = torch.ones_like(v)  # the output is then the sum of the kept weights, with mean 1
    key_mask = torch.ones(1, 400, dtype=torch.bool) if masked else None
    options = {"key_mask": key_mask, "need_weights": need_weights}
    out, weights = ops.causal_attention(q, k, v, dropout_p=0.25, **options)
    later = out[0, 0, 100:, 0]
    assert abs(float(later.mean()) - 1.0) < 0.02
    assert float(later.std()) > 0.02
    if need_weights:
        dropped = (weights[0, 0].tril() == 0).sum() - 400 * 399 // 2
        assert abs(float(dropped) / (400 * 401 / 2) - 0.25) < 0.02
    assert torch.equal(ops.causal_attention(q, k, v, dropout_p=1.0, **options)[0], torch.zeros_like(q))


@pytest.mark.parametrize("options", [{}, {"need_weights": True}, {"upcast": True}])
@pytest.mark.parametrize(("t_q", "t_k", "masked"), [(4, 4, False), (4, 4, True), (2, 5, False), (1, 3, True)])
def test_gradcheck(t_q: int, t_k: int, masked: bool, options: dict[str, bool]) -> None:
    leaves = tuple(x.double().requires_grad_() for x in make(b=2, h=1, t_q=t_q, t_k=t_k, d=3))
    key_mask = left_padding(2, t_k) if masked else None
    assert torch.autograd.gradcheck(lambda *x: ops.causal_attention(*x, key_mask=key_mask, **options)[0], leaves)


@pytest.mark.parametrize("masked", [False, True])
def test_compile_and_vmap(masked: bool) -> None:
    inputs = make(t_q=6, t_k=9)
    key_mask = left_padding(3, 9) if masked else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.causal_attention(q, k, v, key_mask=key_mask)[0]

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    stacked = [torch.stack([x, x.flip(0)]) for x in inputs]
    torch.testing.assert_close(torch.vmap(attend)(*stacked)[0], attend(*inputs))


def test_the_unmasked_path_is_torch_s_causal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs.get("is_causal", False), kwargs.get("attn_mask") is not None))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for t_q, t_k in ((8, 8), (1, 8), (3, 8)):
        ops.causal_attention(*make(t_q=t_q, t_k=t_k))
    assert calls == [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("dtype", "autocast", "called"), [(torch.bfloat16, False, 0), (torch.float32, True, 0), (torch.float32, False, 3)]
)
def test_where_torch_s_overruns_its_results_the_definition_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool, called: int
) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sys.modules["igpt_fast.ops.causal_attention"], "_TORCH_OVERRUNS", True)
    tensors = [x.to(dtype) for x in make()]
    with backend.use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ops.causal_attention(*tensors)
        ops.causal_attention(*tensors, key_mask=(torch.arange(5) > 0).expand(3, 5))
        ops.full_attention(*tensors)
    assert len(calls) == called


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.zeros(2, 2, 4, 8).long()}, TypeError, "q is torch.int64; want a floating-point tensor"),
    ({"v": None}, TypeError, "v is NoneType; want a floating-point tensor"),
    ({"k": torch.zeros(2, 2, 4, 8).half()}, TypeError, "q, k, v have dtypes .*float16.*; want one dtype"),
    ({"k": torch.zeros(2, 2, 4, 8, device="meta")}, ValueError, "k is on meta, others on cpu; want one device"),
    ({"q": torch.zeros(2, 4, 8)}, ValueError, r"q, k, v have shapes \(2, 4, 8\), "),
    ({"v": torch.zeros(2, 2, 4, 9)}, ValueError, "q, k, v have shapes "),
    ({"q": torch.zeros(2, 1, 4, 8)}, ValueError, "q, k, v have shapes "),
    ({"q": torch.zeros(2, 2, 4, 1)}, ValueError, "q, k, v have shapes "),
    ({"q": torch.zeros(2, 2, 5, 8)}, ValueError, "k has 4 positions, q 5; want at least as many"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1; want a number"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan; want a number"),
    ({"key_mask": torch.ones(2, 4)}, TypeError, "key_mask is torch.float32; want a bool tensor"),
    ({"key_mask": [True]}, TypeError, "key_mask is list; want a bool tensor"),
    ({"key_mask": torch.ones(4).bool()}, ValueError, r"key_mask has shape \(4,\); want \(B, T_k\) = \(2, 4\)"),
    ({"key_mask": torch.ones(1, 4).bool()}, ValueError, r"key_mask has shape \(1, 4\)"),
    ({"key_mask": torch.ones(2, 4, device="meta").bool()}, ValueError, "key_mask is on meta, q on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISUSE, ids=range(len(MISUSE)))
def test_misuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: torch.zeros(2, 2, 4, 8) for name in "qkv"}
    with pytest.raises(error, match="causal_attention: " + message):
        ops.causal_attention(**{**inputs, **change})


def test_the_reference_is_the_plain_expression() -> None:
    q, k, v = (x.double() for x in make(t_q=7, t_k=9))
    key_mask = left_padding(3, 9)
    out, weights = reference.causal_attention(q, k, v, 32**-0.5, key_mask)
    assert torch.allclose(out, plain(q, k, v, key_mask), atol=1e-12, rtol=1e-12)
    assert torch.allclose(weights.sum(-1), key_mask[:, None, :].cumsum(-1)[..., 2:].clamp(max=1).double())
