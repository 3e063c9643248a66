"""causal_attention and causal_attention_packed where kernels serve them: against the definition, and in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import contract
import pytest
import torch
from implementations import Implementation
from torch import Tensor

from igpt_fast import backend, ops, reference
from igpt_fast.ops import dispatch

OP = "causal_attention"
BF16, FP16 = torch.bfloat16, torch.float16
MASKS = ["", "starts", "keys", "both"]
registered = torch.ops.igpt_fast


def make(
    t_q: int = 9, t_k: int | None = None, d: int = 32, dtype: torch.dtype = BF16, b: int = 2, h: int = 2
) -> list[Tensor]:
    t_k = t_q if t_k is None else t_k
    return [torch.randn(b, h, t, d).to(dtype) for t in (t_q, t_k, t_k)]


def make_packed(t: int = 9, d: int = 32, dtype: torch.dtype = BF16, b: int = 2, h: int = 2) -> Tensor:
    return torch.randn(b, t, 3, h, d).to(dtype)


def hiding(mask: str, b: int, t_k: int, device: str) -> dict[str, Tensor]:
    options = {}
    if mask in ("starts", "both"):
        options["starts"] = torch.linspace(0, 0.8 * t_k, b).int().to(device)
    if mask in ("keys", "both"):
        options["key_mask"] = torch.rand(b, t_k).lt(0.8).to(device)
    return options


def attending(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: ops.causal_attention(q, k, v, **options)[0]


def attending_packed(**options: Any) -> Callable[..., Tensor]:
    return lambda qkv: ops.causal_attention_packed(qkv, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("d", "dtype", "t_q", "t_k"),
    [(32, BF16, 63, 63), (64, FP16, 65, 97), (64, BF16, 2, 2), (96, BF16, 64, 65), (128, FP16, 3, 64)],
)
def test_parity(implementation: Implementation, d: int, dtype: torch.dtype, t_q: int, t_k: int, mask: str) -> None:
    options = hiding(mask, 3, t_k, implementation.device)
    covered = implementation.name != "cpu" or dtype == BF16
    contract.check_parity(implementation, attending(**options), make(t_q, t_k, d, dtype, b=3), covered)


@pytest.mark.parametrize(
    ("d", "dtype", "t", "mask"), [(64, BF16, 97, "both"), (96, FP16, 33, ""), (128, BF16, 2, "keys")]
)
def test_parity_packed(implementation: Implementation, d: int, dtype: torch.dtype, t: int, mask: str) -> None:
    options = hiding(mask, 3, t, implementation.device)
    covered = implementation.name != "cpu" or dtype == BF16
    contract.check_parity(implementation, attending_packed(**options), [make_packed(t, d, dtype, b=3)], covered)


@pytest.mark.parametrize("mask", ["", "both"])
def test_packed_is_as_apart(implementation: Implementation, mask: str) -> None:
    """The same bits, out of the one tensor and into one."""
    qkv = make_packed(70, 64).to(implementation.device).requires_grad_()
    apart = [x.detach().clone().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    options = hiding(mask, 2, 70, implementation.device)
    with contract.launching(implementation):
        packed, out = ops.causal_attention_packed(qkv, **options), ops.causal_attention(*apart, **options)[0]
    upstream = torch.randn_like(packed)
    packed.backward(upstream)
    out.backward(upstream.transpose(1, 2))
    assert torch.equal(packed, out.transpose(1, 2))
    gradients = torch.stack([x.grad for x in apart]).permute(1, 3, 0, 2, 4)
    if implementation.name != "reference":  # torch adds up other strides in another order
        assert qkv.grad.is_contiguous()
        assert torch.equal(qkv.grad, gradients)
    assert torch.allclose(qkv.grad, gradients, rtol=1e-2, atol=1e-2)


def test_starts_are_a_mask(implementation: Implementation) -> None:
    q, k, v = (x.to(implementation.device) for x in make(20, 30))
    starts = torch.tensor([0, 17], dtype=torch.int32, device=implementation.device)
    key_mask = torch.arange(30, device=implementation.device) >= starts[:, None]
    with contract.launching(implementation):
        found = ops.causal_attention(q, k, v, starts=starts)[0]
    assert torch.equal(found, ops.causal_attention(q, k, v, key_mask=key_mask)[0])
    weights = ops.causal_attention(q, k, v, starts=starts, need_weights=True)[1]
    assert torch.equal(weights, reference.causal_attention(q, k, v, 32**-0.5, starts=starts)[1])
    assert not weights[1, :, :, :17].any()


def test_no_copy_is_made(emulation: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a packed projection go in where they are; the output is one row of heads for each position."""

    def never(x: Tensor) -> Tensor:
        raise AssertionError(f"a copy of {tuple(x.shape)}, strides {x.stride()}")

    monkeypatch.setattr(dispatch, "dense", never)
    qkv = make_packed(10).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with contract.launching(emulation):
        out, _ = ops.causal_attention(q[:, :, 3:], k, v, starts=torch.zeros(2, dtype=torch.int32))
        assert out.transpose(1, 2).is_contiguous()
        out.transpose(1, 2).reshape(2, 7, 64).backward(torch.ones(2, 7, 64, dtype=BF16))
        ops.causal_attention_packed(qkv).backward(torch.ones(2, 10, 2, 32, dtype=BF16))


@pytest.mark.parametrize("mask", ["", "both"])
def test_layouts(implementation: Implementation, mask: str) -> None:
    options = hiding(mask, 2, 9, implementation.device)
    contract.check_layouts(implementation, attending(**options), make())
    contract.check_layouts(implementation, attending_packed(**options), [make_packed()])


def test_strides_of_masks_and_upstream(implementation: Implementation) -> None:
    """A mask of every other byte, starts of every other word, an upstream gradient that is one number."""
    leaves = [x.to(implementation.device).requires_grad_() for x in make(9, b=3)]
    options = hiding("both", 3, 9, implementation.device)
    expected = ops.causal_attention(*leaves, **options)[0]
    wanted = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    apart = {name: contract.strided(x) for name, x in options.items()}
    with contract.launching(implementation):
        found = ops.causal_attention(*leaves, **apart)[0]
    assert torch.equal(found, expected)
    one = torch.ones((), dtype=BF16, device=implementation.device).expand_as(found)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(found, leaves, one), wanted, strict=True))


def test_strides_of_dimensions_of_size_1(implementation: Implementation) -> None:
    """They say nothing, and may be no multiple of a vector."""
    for t_k in (1, 5):
        tensors = [x.to(implementation.device) for x in make(1, t_k, 64, b=1, h=3)]
        upstream = torch.randn(1, 3, 1, 64).to(implementation.device, BF16)
        expected = contract.with_gradients(attending(), tensors, [upstream])
        odd = [x if x.shape[2] > 1 else x.as_strided(x.shape, (7, 64, 1, 1)) for x in (*tensors, upstream)]
        with contract.launching(implementation):
            found = contract.with_gradients(attending(), odd[:3], odd[3:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), t_k


def test_compiles(implementation: Implementation) -> None:
    options = hiding("both", 2, 9, implementation.device)
    contract.check_compiles(implementation, attending(), make())
    contract.check_compiles(implementation, attending(**options), make(5, 9))
    contract.check_compiles(implementation, attending_packed(**options), [make_packed()])


def test_backward_in_another_thread(implementation: Implementation) -> None:
    contract.check_backward_keeps_the_choice(implementation, attending(), make())
    contract.check_backward_keeps_the_choice(implementation, attending_packed(), [make_packed()])


@pytest.mark.parametrize("packed", [False, True])
def test_portable_attention(emulation: Implementation, packed: bool) -> None:
    """The kernels that every GPU runs, where those for Hopper could; behind the block in the backward too."""
    call, inputs = (attending_packed(), [make_packed(d=64)]) if packed else (attending(), make(d=64))
    counted = []
    emulation.module.set_capability(90)
    try:
        for how in (backend.Launching(), backend.Launching(portable_attention=True)):
            leaves = [x.detach().requires_grad_() for x in inputs]
            for part in ("forward", "backward"):
                emulation.module.reset_counters()
                if part == "forward":
                    with backend.launching(how):
                        out = call(*leaves)
                else:
                    out.backward(torch.ones_like(out))
                counted.append([emulation.module.counters()[name] > 0 for name in ("wgmma", "mma")])
    finally:
        emulation.module.set_capability()
    assert counted == [[True, False]] * 2 + [[False, True]] * 2


def test_shapes_alone(implementation: Implementation) -> None:
    contract.check_shapes_alone(implementation, attending(), make(5, 9))
    contract.check_shapes_alone(implementation, attending_packed(), [make_packed()])


def test_second_derivative(emulation: Implementation) -> None:
    """A gradient that shall be differentiated again is the definition's."""
    starts = torch.tensor([0, 3], dtype=torch.int32)

    def penalty(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        first = torch.autograd.grad(function(*leaves).float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)

    def defined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.causal_attention(q, k, v, 32**-0.5, starts=starts)[0]

    tensors = make(6)
    with contract.launching(emulation):
        ours = penalty(attending(starts=starts), tensors)
        packed = penalty(attending_packed(starts=starts), [torch.stack(tensors).permute(1, 3, 0, 2, 4)])[0]
    plain, exact = penalty(defined, tensors), penalty(defined, [x.double() for x in tensors])
    apart = packed.permute(2, 0, 3, 1, 4).unbind(0)
    for mine, other, theirs, wanted in zip(ours, apart, plain, exact, strict=True):
        # The first gradients are those of another rounding of the output.
        room = 3 * (theirs - wanted).abs().max() + 0.02 * wanted.abs().max()
        assert wanted.any()
        assert (mine - wanted).abs().max() <= room
        assert (other - wanted).abs().max() <= room


def test_one_tensor_in_three_places(implementation: Implementation) -> None:
    """Its gradient is the sum of three, to be differentiated again or not."""
    x = make(6)[0].to(implementation.device).requires_grad_()
    with contract.launching(implementation):
        out = ops.causal_attention(x, x, x)[0]
    upstream = torch.randn_like(out)
    plain = torch.autograd.grad(out, x, upstream, retain_graph=True)[0]
    again = torch.autograd.grad(out, x, upstream, create_graph=True)[0]
    assert (again - plain).abs().max() <= 0.05 * plain.abs().max()
    assert again.requires_grad


def test_transforms_take_the_definition(implementation: Implementation) -> None:
    tensors = [torch.stack([x, x.flip(0)]).to(implementation.device) for x in make()]
    with backend.use_backend("reference"):
        expected = attending()(*(x[1] for x in tensors))
    with contract.launching(implementation, some=False):
        found = torch.vmap(attending())(*tensors)[1]
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_autocast(implementation: Implementation) -> None:
    """fp32 goes in, the kernels run in autocast's dtype, and the gradients are fp32: as of torch's own attention."""
    leaves = [x.to(implementation.device).requires_grad_() for x in make(12, dtype=torch.float32)]
    qkv = torch.stack(leaves).detach().permute(1, 3, 0, 2, 4).requires_grad_()
    with torch.autocast(implementation.device, BF16), contract.launching(implementation):
        out, packed = ops.causal_attention(*leaves)[0], ops.causal_attention_packed(qkv)
    assert out.dtype == packed.dtype == BF16
    low = [x.detach().to(BF16).requires_grad_() for x in leaves]
    expected = ops.causal_attention(*low)[0]
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    wanted = torch.autograd.grad(expected, low, upstream)
    assert all(g.dtype == torch.float32 and torch.equal(g, w.float()) for g, w in zip(gradients, wanted, strict=True))
    if implementation.name != "reference":
        assert torch.equal(packed, out.transpose(1, 2))
    wide = [x.double() for x in leaves]
    with torch.autocast(implementation.device, BF16), contract.launching(implementation, some=False):
        assert ops.causal_attention(*wide)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        (make(d=48), {}),
        (make(), {"upcast": True}),
        (make(), {"need_weights": True}),
        (make(), {"scale": -0.5}),
        (make(), {"scale": 0.0}),
        (make(), {"scale": 1e-50}),  # 0 in fp32
    ],
)
def test_what_no_kernel_covers_is_the_reference(
    implementation: Implementation, tensors: list[Tensor], options: dict[str, Any]
) -> None:
    contract.check_parity(implementation, attending(**options), tensors, covered=False)


def test_float32_has_kernels_on_a_cpu_alone(implementation: Implementation) -> None:
    with contract.launching(implementation, implementation.name == "cpu"):
        ops.causal_attention(*(x.to(implementation.device) for x in make(dtype=torch.float32)))


def test_an_infinite_scale_is_torchs(implementation: Implementation) -> None:
    with contract.launching(implementation, some=False):
        ops.causal_attention(*(x.to(implementation.device) for x in make()), scale=float("inf"))


def test_dropout_is_torchs(implementation: Implementation) -> None:
    qkv = make_packed().to(implementation.device)
    with contract.launching(implementation, some=False):
        leaf = qkv.clone().requires_grad_()
        nothing = ops.causal_attention_packed(leaf, dropout_p=1.0)
        assert torch.equal(nothing, torch.zeros_like(qkv[:, :, 0]))
        assert torch.equal(torch.autograd.grad(nothing.sum(), leaf)[0], torch.zeros_like(qkv))
        assert ops.causal_attention_packed(qkv, dropout_p=0.5).shape == (2, 9, 2, 32)
        assert ops.causal_attention_packed(qkv, upcast=True).shape == (2, 9, 2, 32)


@pytest.mark.parametrize(("b", "h", "t_q", "t_k"), [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 5), (2, 2, 0, 0)])
def test_nothing_to_do(implementation: Implementation, b: int, h: int, t_q: int, t_k: int) -> None:
    """An empty batch, or no query; keys that no query sees have gradients of zero."""
    shapes = [(b, h, t, 32) for t in (t_q, t_k, t_k)]
    leaves = [torch.randn(s).to(implementation.device, BF16).requires_grad_() for s in shapes]
    out = ops.causal_attention(*leaves, starts=torch.zeros(b, dtype=torch.int32, device=implementation.device))[0]
    assert out.shape == shapes[0]
    for leaf, gradient in zip(leaves, torch.autograd.grad(out, leaves, out), strict=True):
        assert gradient.shape == leaf.shape
        if t_q == 0:
            assert not gradient.any()


def test_opcheck(emulation: Implementation) -> None:
    options = hiding("both", 2, 5, "cpu")
    masks = options["key_mask"], options["starts"], 0.2
    tensors, qkv = make(3, 5), make_packed(5)
    leaves = [x.clone().requires_grad_() for x in (*tensors, qkv)]
    contract.check_opcheck(emulation, registered.causal_attention.default, (*leaves[:3], None, None, 0.2))
    contract.check_opcheck(emulation, registered.causal_attention_packed.default, (leaves[3], *masks))
    out, lse = registered.causal_attention(*tensors, *masks)
    contract.check_opcheck(emulation, registered.causal_attention_bwd.default, (out, *tensors, out, lse, *masks))
    out, lse = registered.causal_attention_packed(qkv, *masks)
    contract.check_opcheck(emulation, registered.causal_attention_packed_bwd.default, (out, qkv, out, lse, *masks))


def test_a_gradient_of_one_input(implementation: Implementation) -> None:
    q, k, v = (x.to(implementation.device) for x in make())
    k.requires_grad_()
    with contract.launching(implementation):
        ops.causal_attention(q, k, v)[0].sum().backward()
    assert k.grad is not None
    assert q.grad is None


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": torch.zeros(2, 4, 2, 2, 8)}, ValueError, r"qkv has shape \(2, 4, 2, 2, 8\); want \(B, T, 3, H, D\)"),
    ({"qkv": torch.zeros(2, 4, 3, 16)}, ValueError, r"qkv has shape \(2, 4, 3, 16\)"),
    ({"qkv": torch.zeros(2, 4, 3, 2, 8).long()}, TypeError, "qkv is torch.int64; want a floating-point tensor"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; want a number"),
    ({"key_mask": torch.ones(2, 5).bool()}, ValueError, r"key_mask has shape \(2, 5\); want \(B, T_k\) = \(2, 4\)"),
    ({"starts": torch.zeros(2).long()}, TypeError, "starts is torch.int64; want an int32 tensor"),
    ({"starts": [0, 1]}, TypeError, "starts is list; want an int32 tensor"),
    ({"starts": torch.zeros(3).int()}, ValueError, r"starts has shape \(3,\); want \(B,\) = \(2,\)"),
    ({"starts": torch.zeros(2, device="meta").int()}, ValueError, "starts is on meta, q on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISUSE, ids=range(len(MISUSE)))
def test_misuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="causal_attention_packed: " + message):
        ops.causal_attention_packed(**{"qkv": torch.zeros(2, 4, 3, 2, 8), **change})
