"""The linear layer's kernel for the CPU at every instruction set: sizes, layouts, gradients, threads, and the rest."""

from __future__ import annotations

import dataclasses

import contract
import pytest
import torch
from implementations import ISAS, Implementation
from torch import Tensor

from igpt_fast import backend, environment, ops
from igpt_fast.model.layers import Conv1D

# Parts of registers, tiles, blocks, strips and depths, in each of the three roles.
SIZES = [(1, 1, 1), (7, 5, 3), (6, 64, 64), (259, 70, 33), (33, 517, 130), (517, 17, 65)]


@pytest.fixture(params=ISAS)
def cpu(native_cpu: Implementation, request: pytest.FixtureRequest) -> Implementation:
    assert native_cpu.module.select_cpu_isa(request.param)
    return native_cpu


def some(rows: int, n_in: int, n_out: int) -> list[Tensor]:
    return [torch.randn(rows, n_in), torch.randn(n_in, n_out), torch.randn(n_out)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(cpu: Implementation, sizes: tuple[int, int, int]) -> None:
    tensors = some(*sizes)
    contract.check_parity(cpu, ops.linear, tensors)
    contract.check_parity(cpu, ops.linear, tensors[:2])
    x, weight, bias = tensors
    contract.check_parity(cpu, lambda x, w, b: ops.linear(x[None], w.t(), b), [x, weight.t().contiguous(), bias])


def test_layouts(cpu: Implementation) -> None:
    contract.check_layouts(cpu, ops.linear, some(37, 70, 33))
    x, weight, bias = some(37, 70, 33)
    expected = ops.linear(x, weight, bias)
    assert torch.equal(ops.linear(x.t().contiguous().t(), weight, bias), expected)
    for way in (x[:1].expand(37, 70), x[:, :1].expand(37, 70)):
        assert torch.equal(ops.linear(way, weight, bias), ops.linear(way.contiguous(), weight, bias))


def test_the_rest_of_the_contract(native_cpu: Implementation) -> None:
    tensors = some(5, 12, 7)
    contract.check_second_derivative(native_cpu, ops.linear, tensors)
    contract.check_transforms(native_cpu, ops.linear, [t.mul(2).round() for t in tensors])  # exact in any order
    contract.check_backward_keeps_the_choice(native_cpu, ops.linear, tensors)
    contract.check_shapes_alone(native_cpu, ops.linear, tensors)
    leaves = tuple(t.requires_grad_() for t in tensors)
    contract.check_opcheck(native_cpu, torch.ops.igpt_fast.linear, leaves)


def test_the_same_bits_whatever_stands_beside(cpu: Implementation) -> None:
    """A row does not depend on others, nor on how many threads share them."""
    x, weight, bias = some(500, 70, 40)
    whole = ops.linear(x, weight, bias)
    assert torch.equal(ops.linear(x[123:130], weight, bias), whole[123:130])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ops.linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row(cpu: Implementation) -> None:
    x, weight, bias = some(9, 37, 20)
    x[3, 5], x[4, 36] = torch.nan, torch.inf
    found = ops.linear(x, weight, bias)
    assert found.isfinite().all(1).tolist() == [row not in (3, 4) for row in range(9)]
    assert found[3].isnan().all()
    assert torch.equal(found[4], torch.inf * weight[36].sign())


def test_gradients_that_nobody_wants_are_not_computed(native_cpu: Implementation) -> None:
    layer = Conv1D(24, 16)
    torch.nn.init.normal_(layer.weight)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 5, 16, requires_grad=True)
    native_cpu.module.reset_counters()
    layer(x).square().sum().backward()
    assert native_cpu.module.counters() == {"launches": 2, "matmul_cpu": 2}
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_what_it_leaves_to_torch(native_cpu: Implementation) -> None:
    x, weight, bias = some(5, 12, 7)
    with contract.launching(native_cpu, some=False):
        for dtype in (torch.float64, torch.bfloat16):
            wide = [t.to(dtype) for t in (x, weight, bias)]
            assert torch.equal(ops.linear(*wide), torch.addmm(wide[2], *wide[:2]))
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(torch.compile(ops.linear, backend="eager")(x, weight, bias), torch.addmm(bias, x, weight))
    for empty in ((0, 12, 7), (5, 0, 7), (5, 12, 0)):
        tensors = some(*empty)
        assert torch.equal(torch.ops.igpt_fast.linear(*tensors), torch.addmm(tensors[2], *tensors[:2]))


def test_little_work_is_left_to_torch(native_cpu: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.OPS, "linear", dataclasses.replace(backend.OPS["linear"], least_cpu=60))
    for rows, served in ((4, False), (5, True)):
        with contract.launching(native_cpu, some=served):
            ops.linear(*some(rows, 12, 7))
    monkeypatch.setitem(backend.OPS, "linear", dataclasses.replace(backend.OPS["linear"], least_cpu=backend.NEVER))
    assert environment.implementation("linear", "cpu")[0] == "torch addmm"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 11)}, ValueError, r"linear: x has shape \(5, 11\); want \(..., 12\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"linear: x has shape \(\)"),
        ({"weight": torch.randn(12)}, ValueError, r"linear: weight has shape \(12,\); want \(n_in, n_out\)"),
        ({"bias": torch.randn(8)}, ValueError, r"linear: bias has shape \(8,\); want \(7,\)"),
        ({"x": torch.ones(5, 12, dtype=torch.int64)}, TypeError, "linear: x is torch.int64"),
        ({"weight": torch.randn(12, 7, device="meta")}, ValueError, "linear: weight is on meta"),
    ],
)
def test_wrong_inputs(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    x, weight, bias = some(5, 12, 7)
    with pytest.raises(error, match=message):
        ops.linear(**{"x": x, "weight": weight, "bias": bias, **change})


@pytest.mark.skipif(backend._C is None, reason=backend.native_reason)
def test_the_registered_op_refuses_what_no_kernel_takes() -> None:
    x, weight, bias = some(5, 12, 7)
    op = torch.ops.igpt_fast.linear
    for wrong in ((x[None], weight, bias), (x, weight[:11], bias), (x, weight[0], bias), (x, weight, bias[:6])):
        with pytest.raises(ValueError, match="linear: "):
            op(*wrong)
    for wrong in ((x.double(), weight, bias), (x, weight.half(), bias), (x, weight, bias.double())):
        with pytest.raises((TypeError, ValueError), match="linear: "):
            op(*wrong)
