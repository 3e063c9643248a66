"""What every op with a kernel has to stand up to, as functions that take the op and tensors for it.

``implementation`` is the fixture's: the same is asked of the definition and of the kernels; the launches of emulated
ones and of the CPU's are counted, so that the one cannot pass for the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from implementations import Implementation
from tolerance import assert_parity, compare
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from igpt_fast import backend

Function = Callable[..., Any]


@contextmanager
def launching(implementation: Implementation, some: bool = True) -> Iterator[None]:
    """Asserts that kernels run in the block, or that none does, where they are counted."""
    if implementation.module is None:
        yield
        return
    implementation.module.reset_counters()
    yield
    launches = implementation.module.counters()["launches"]
    assert (launches > 0) == some, f"{launches} launches"


def outputs_of(function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = function(*tensors)
    return out if isinstance(out, tuple) else (out,)


def with_gradients(function: Function, tensors: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients by all floating-point tensors."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = outputs_of(function, leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, wanted, upstream)]


def upstream_for(function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for each output."""
    with backend.use_backend("reference"), torch.no_grad():
        return [torch.randn(t.shape).to(t.dtype).to(t.device) for t in outputs_of(function, tensors)]


def wider(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check_parity(implementation: Implementation, op: Function, tensors: Sequence[Tensor], covered: bool = True) -> None:
    """Outputs and gradients by the tolerance rule, against the definition in the same dtype and in float64."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)
    with launching(implementation, covered):
        ours = with_gradients(op, tensors, upstream)
    with torch.no_grad(), launching(implementation, covered and tensors[0].numel() > 0):
        direct = outputs_of(op, tensors)
    with backend.use_backend("reference"):
        plain = with_gradients(op, tensors, upstream)
        exact = with_gradients(op, wider(tensors), wider(upstream))
    for i, (mine, theirs, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert_parity(mine, theirs, wanted, f"result {i}")
    assert all(torch.equal(a, b) for a, b in zip(direct, ours, strict=False)), "the direct path differs"


def check_sums_over_rows(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """The gradients of weight and bias err no more than torch's, over as many columns as leave nothing to luck."""
    upstream = upstream_for(op, tensors)
    with launching(implementation):
        ours = with_gradients(op, tensors, upstream)
    with backend.use_backend("reference"):
        plain = with_gradients(op, tensors, upstream)
        exact = with_gradients(op, wider(tensors), wider(upstream))
    for got in map(compare, ours[2:], plain[2:], exact[2:]):
        assert got.ours_rms <= got.theirs_rms, got


def check_layouts(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """Strides, and storage that begins where no vector may: the same bits as of dense tensors."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)
    expected = with_gradients(op, tensors, upstream)
    # Torch adds up strided rows in another order.
    near = lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=8 * float(torch.finfo(a.dtype).eps))  # noqa: E731
    same = near if implementation.name == "reference" else torch.equal
    for other in (strided, misaligned):
        for i in range(len(tensors)):
            moved = [other(t) if i == j else t for j, t in enumerate(tensors)]
            with launching(implementation):
                found = with_gradients(op, moved, upstream)
            assert all(same(a, b) for a, b in zip(found, expected, strict=True)), (other.__name__, i)
            with torch.no_grad():
                direct = outputs_of(op, moved)
            assert all(same(a, b) for a, b in zip(direct, expected, strict=False)), (other.__name__, i)
        found = with_gradients(op, tensors, [other(t) for t in upstream])
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), other.__name__


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of its memory."""
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element after an aligned address."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def check_compiles(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """One whole graph with the kernel in it, forward and backward, with the same bits as eagerly."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    expected = with_gradients(op, tensors, upstream)
    with launching(implementation), backend.compiled_ops("opaque"):
        found = with_gradients(compiled, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_second_derivative(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """The gradient of a gradient penalty is the definition's."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)

    def penalty(tensors: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(outputs_of(op, leaves), wanted, upstream, create_graph=True)
        # A bias has no part in a gradient of a norm, so that its second derivative may be none.
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(second, wanted, strict=True)]

    with launching(implementation):
        ours = penalty(tensors, upstream)
    with backend.use_backend("reference"):
        plain = penalty(tensors, upstream)
        exact = penalty(wider(tensors), wider(upstream))
    assert any(g.any() for g in exact)
    for mine, theirs, wanted in zip(ours, plain, exact, strict=True):
        # The first gradients, which enter, are the kernel's on one side: twice the rule's room.
        assert (mine - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 1e-5 * wanted.abs().max()


def check_transforms(implementation: Implementation, op: Function, tensors: Sequence[Tensor], mapped: int = 1) -> None:
    """torch.func goes the way of the definition: vmap over the first ``mapped`` tensors, grad, forward-mode.

    Inside a compiled function as well."""
    tensors = [t.to(implementation.device) for t in tensors]
    dims = tuple(0 if i < mapped else None for i in range(len(tensors)))
    with backend.use_backend("reference"):
        rows = [outputs_of(op, [*(t[i] for t in tensors[:mapped]), *tensors[mapped:]]) for i in range(len(tensors[0]))]
        total = lambda *inputs: sum(t.square().sum() for t in outputs_of(op, inputs))  # noqa: E731
        leaf = tensors[0].detach().requires_grad_()
        (wanted,) = torch.autograd.grad(total(leaf, *tensors[1:]), leaf)
        one = lambda x: outputs_of(op, [x, *tensors[1:]])[0]  # noqa: E731
        tangent = torch.func.jvp(one, (tensors[0],), (tensors[0],))[1]
    with launching(implementation, some=False):
        found = torch.vmap(lambda *inputs: outputs_of(op, inputs), dims)(*tensors)
        assert all(torch.allclose(a, torch.stack(b)) for a, b in zip(found, zip(*rows, strict=True), strict=True))
        assert torch.allclose(torch.func.grad(total)(*tensors), wanted)
        along = lambda x: torch.func.jvp(one, (x,), (x,))[1]  # noqa: E731
        assert torch.allclose(along(tensors[0]), tangent)
        for function, inputs, result in ((torch.func.grad(total), tensors, wanted), (along, tensors[:1], tangent)):
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            assert torch.allclose(compiled(*inputs), result, atol=1e-6)


def check_backward_keeps_the_choice(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """The backward runs in another thread, where another backend is chosen: it goes the way of its forward."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)
    expected = with_gradients(op, tensors, upstream)
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    out = outputs_of(op, leaves)

    def backward() -> None:
        with backend.use_backend("reference"):
            torch.autograd.backward(out, upstream)

    with launching(implementation):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    found = [*(t.detach() for t in out), *(leaf.grad for leaf in leaves if leaf.requires_grad)]
    assert all(g is not None and torch.equal(g, e) for g, e in zip(found, expected, strict=True))


def check_shapes_alone(implementation: Implementation, op: Function, tensors: Sequence[Tensor]) -> None:
    """Meta and fake tensors give shapes and dtypes, forward and backward, and reach no kernel."""
    tensors = [t.to(implementation.device) for t in tensors]
    upstream = upstream_for(op, tensors)
    expected = [(t.shape, t.dtype) for t in with_gradients(op, tensors, upstream)]
    with launching(implementation, some=False):
        if implementation.device == "cpu":
            found = with_gradients(op, [t.to("meta") for t in tensors], [t.to("meta") for t in upstream])
            assert [(t.shape, t.dtype) for t in found] == expected
            assert all(t.device.type == "meta" for t in found)
        with FakeTensorMode() as mode:
            fake = [[mode.from_tensor(t) for t in group] for group in (tensors, upstream)]
            found = with_gradients(op, *fake)
            assert [(t.shape, t.dtype) for t in found] == expected


def check_opcheck(implementation: Implementation, op: Any, arguments: tuple[Any, ...]) -> None:
    """torch.library's own tests of a registered op."""
    arguments = tuple(a.to(implementation.device) if isinstance(a, Tensor) else a for a in arguments)
    with launching(implementation):
        torch.library.opcheck(op, arguments)
