"""The CPU's norms, activations and loss on every instruction set: tails, rounding, extremes, processes and threads."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import contract
import pytest
import torch
import torch.nn.functional as F
from implementations import ISAS, Implementation
from torch import Tensor

from igpt_fast import backend, environment, ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# Whole registers of every width, one more and one less, and none.
WIDTHS = [1, 3, 4, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129]
ACTIVATIONS = [ops.quick_gelu, ops.gelu_tanh, ops.gelu_erf]


@pytest.fixture(params=ISAS)
def cpu(native_cpu: Implementation, request: pytest.FixtureRequest) -> Implementation:
    assert native_cpu.module.select_cpu_isa(request.param)
    return native_cpu


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, residual=residual)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.layer_norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_width(cpu: Implementation, n: int, dtype: torch.dtype) -> None:
    # Few rows: the rounding error of a sum over them, in one of few numbers, is a matter of luck.
    x, residual, weight, bias = (torch.randn(*shape, n).to(dtype) for shape in ((3,), (3,), (), ()))
    contract.check_parity(cpu, ops.rms_norm, [x, weight])
    contract.check_parity(cpu, add_rms_norm, [x, residual, weight])
    contract.check_parity(cpu, add_layer_norm, [x, residual, weight, bias])
    for op in ACTIVATIONS:
        contract.check_parity(cpu, op, [x])
        contract.check_parity(cpu, op, [x, bias])
    labels = torch.arange(3) % n
    contract.check_parity(cpu, lambda logits, labels: ops.cross_entropy(logits, labels), [x, labels])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 17, 31, 32, 33, 1030])
def test_sums_over_any_number_of_rows(cpu: Implementation, rows: int, dtype: torch.dtype) -> None:
    """The gradients of weights and biases: blocks of rows, whole and not, and none."""
    x, weight, bias = torch.randn(rows, 40).to(dtype), torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    contract.check_parity(cpu, ops.rms_norm, [x, weight])
    contract.check_parity(cpu, ops.layer_norm, [x, weight, bias])
    contract.check_parity(cpu, ops.quick_gelu, [x, bias])


def test_a_sum_over_rows_is_no_chain(cpu: Implementation) -> None:
    """Of one rounding after the other, whose error would be a third larger than torch's."""
    contract.check_sums_over_rows(cpu, ops.layer_norm, [torch.randn(32, 3000), torch.randn(3000), torch.randn(3000)])
    contract.check_sums_over_rows(cpu, ops.quick_gelu, [torch.randn(32, 3000), torch.randn(3000)])


@pytest.mark.parametrize("op", [ops.rms_norm, ops.layer_norm], ids=lambda op: op.__name__)
def test_a_weight_of_the_other_dtype(cpu: Implementation, op: Callable[..., Tensor]) -> None:
    """As under autocast, where the parameters stay fp32."""
    affine = [torch.randn(72)] * (1 if op is ops.rms_norm else 2)
    contract.check_parity(cpu, op, [torch.randn(9, 72).bfloat16(), *affine])
    contract.check_parity(cpu, op, [torch.randn(9, 72), *(t.bfloat16() for t in affine)])


def test_every_bf16_number_passes_through(cpu: Implementation) -> None:
    """A norm with weight, and of numbers, that change nothing: read and written, each of 2^16 comes back."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 64)
    _, total = ops.rms_norm(numbers, torch.ones(64).bfloat16(), residual=torch.zeros_like(numbers))
    wanted = numbers + torch.zeros_like(numbers)
    assert torch.equal(total.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(total.isnan(), wanted.isnan())


def test_bf16_is_rounded_to_even(cpu: Implementation) -> None:
    """Sums with a much smaller number: just below, at and just above the middle between two, as torch has it."""
    x = torch.randn(33, 67).bfloat16()
    for power in range(-10, -6):
        for factor in (1.0, 1.5, -1.0, -0.75):
            small = (x.float() * factor * 2.0**power).bfloat16()
            _, total = ops.rms_norm(x, torch.ones(67).bfloat16(), residual=small)
            assert torch.equal(total, x + small), (power, factor)


def test_nan_of_any_bits_stays(cpu: Implementation) -> None:
    """Its own low bits must not turn it into a number on the way, neither in a register nor in the part of one."""
    for bits in (0x7F800001, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -0x3FFFFF):
        for place in (0, 5, 18, 36):
            x = torch.randn(3, 37)
            x[1].view(torch.int32)[place] = bits
            assert x[1, place].isnan()
            weight = torch.ones(37)
            for rows in (ops.rms_norm(x, weight), ops.layer_norm(x, weight)):
                assert rows.isnan().all(-1).tolist() == [False, True, False]
            loss, gradient = contract.with_gradients(
                lambda logits: ops.cross_entropy(logits, torch.zeros(3).long(), reduction="none"), [x], [torch.ones(3)]
            )
            assert loss.isnan().tolist() == [False, True, False]
            assert gradient.isnan().all(-1).tolist() == [False, True, False]
            for op in ACTIVATIONS:
                for found in contract.with_gradients(op, [x], [torch.ones_like(x)]):
                    assert torch.equal(found.isnan(), x.isnan()), op.__name__


@pytest.mark.parametrize("op", ACTIVATIONS, ids=lambda op: op.__name__)
def test_activations_at_the_ends(cpu: Implementation, op: Callable[..., Tensor]) -> None:
    """Far out, and near zero: relative errors, with every exponent of fp32; bf16 within its rounding."""
    definition = getattr(reference, op.__name__)
    x = torch.cat([s * 2.0 ** torch.arange(-149.0, 128.0, 0.25) for s in (1.0, -1.0)]).float()
    found = op(x)
    exact = definition(x.double())
    assert torch.isfinite(found).all()
    large = exact.abs() > 1e-30
    relative = ((found - exact) / exact)[large].abs()
    assert relative[x[large].abs() < 5.0].max() < 2e-6
    assert (found - exact).abs()[~large].max() < 1e-18  # the definition, too, is exact to so much
    # A large negative one gives nothing, and a large one itself.
    assert torch.equal(found[x > 30.0], x[x > 30.0])
    assert found[x < -30.0].abs().max() < 1e-12
    half = x.bfloat16()
    assert ((op(half).double() - definition(half.double())).abs() <= 2.0**-8 * half.double().abs() + 1e-38).all()


def test_denormals_are_not_flushed(cpu: Implementation) -> None:
    x = torch.tensor([1e-40, -3e-39, 0.0, 5e-41] * 5).view(1, 20)
    assert torch.equal(ops.quick_gelu(x) != 0, x != 0)
    _, total = ops.rms_norm(x, torch.ones(20), residual=torch.zeros_like(x))
    assert torch.equal(total, x)
    half = x.bfloat16()
    _, total = ops.rms_norm(half, torch.ones(20).bfloat16(), residual=torch.zeros_like(half))
    assert half.count_nonzero() == 15
    assert torch.equal(total, half)


def test_infinite_and_large_rows(cpu: Implementation) -> None:
    """As the definition has it: an overflow of the squares gives 0, an infinite entry NaN for itself."""
    for value in (1e30, 3e38, torch.inf):
        x = torch.randn(3, 37)
        x[1, 33] = value
        for op in (ops.rms_norm, ops.layer_norm):
            wanted = getattr(reference, op.__name__)(x, torch.ones(37), *([None] if op is ops.layer_norm else []), 1e-5)
            assert torch.allclose(op(x, torch.ones(37)), wanted, equal_nan=True), (op.__name__, value)
    logits = torch.tensor([[torch.inf, 1.0, 2.0], [-torch.inf] * 3, [3e38, -3e38, 0.0]])
    labels = torch.tensor([0, 1, 0])
    found = ops.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(found, F.cross_entropy(logits, labels, reduction="none"), equal_nan=True)


def test_no_row_is_touched_but_its_own(cpu: Implementation) -> None:
    """NaN around the rows, before and behind, reaches nothing, and nothing is written there."""
    for n in (16, 37):
        memory, out = torch.full((34, n), torch.nan), torch.full((34, n), 7.0)
        rows = memory[1:33].copy_(torch.randn(32, n))
        module, weight = backend._C, torch.randn(n)
        places = {"x": rows.data_ptr(), "bias": 0, "out": out[1:].data_ptr(), "rows": 32, "dtype": 0, "place": 1}
        settings = {"residual": 0, "sum": 0, "eps": 1e-5, "centred": False, "x_dtype": 0}
        settings |= {"weight_dtype": 0, "out_dtype": 0}
        module.norm_fwd_cpu(**places, **settings, weight=weight.data_ptr(), n_embd=n)
        assert torch.allclose(out[1:33], reference.rms_norm(rows, weight, 1e-5), atol=1e-6)
        assert (out[[0, 33]] == 7.0).all()
        module.activation_fwd_cpu(**places, n=n, activation=0)
        assert torch.allclose(out[1:33], reference.quick_gelu(rows), atol=1e-6)
        assert (out[[0, 33]] == 7.0).all()


def test_labels_that_change_before_the_backward(native_cpu: Implementation) -> None:
    """They point into the gradient, and are looked at again."""
    logits, labels = torch.randn(3, 17, requires_grad=True), torch.tensor([0, 5, 16])
    loss = ops.cross_entropy(logits, labels)
    labels.data[1] = -505
    with pytest.raises(IndexError, match="label -505 is out of bounds"):
        loss.backward()


def test_small_inputs_run_on_torch(monkeypatch: pytest.MonkeyPatch, native_cpu: Implementation) -> None:
    """Where a call costs as much as the work."""
    least = backend.LEAST_CPU
    for name in ("rms_norm", "quick_gelu", "cross_entropy"):
        monkeypatch.setitem(backend.OPS, name, dataclasses.replace(backend.OPS[name], least_cpu=least))
    assert f"{least:,} elements" in environment.implementation("rms_norm", "cpu")[1]
    for count, some in ((least - 64, False), (least, True)):
        with contract.launching(native_cpu, some):
            ops.rms_norm(torch.ones(count // 64, 64), torch.ones(64))
        with contract.launching(native_cpu, some):
            ops.quick_gelu(torch.ones(count // 64, 64))
        with contract.launching(native_cpu, some):
            ops.cross_entropy(torch.ones(count // 64, 64), torch.zeros(count // 64).long())


def test_gelu_by_name_is_torchs(native_cpu: Implementation) -> None:
    """A single op that is as fast as ours; with a bias ours is faster."""
    x, bias = torch.randn(5, 64), torch.randn(64)
    with contract.launching(native_cpu, some=False):
        assert torch.equal(ops.activation(x, "gelu"), F.gelu(x))
    with contract.launching(native_cpu):
        ops.activation(x, "gelu", bias)


def work() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(700, 512, generator=generator), torch.randn(512, generator=generator)
    found = contract.with_gradients(ops.rms_norm, [x, weight], [x.flip(0)])
    found += contract.with_gradients(ops.quick_gelu, [x, weight], [x.flip(0)])
    return [*found, ops.cross_entropy(x, torch.arange(700) % 512)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(backend._C is None, reason=backend.native_reason)
def test_in_a_forked_child() -> None:
    """OpenMP's threads do not survive a fork: a region would wait for them forever."""
    code = """
import os, signal, torch
from igpt_fast import ops
torch.set_num_threads(2)
x, weight, labels = torch.randn(700, 512), torch.randn(512).requires_grad_(), torch.arange(700) % 512
def work():
    out = ops.rms_norm(x, weight)
    gradient = torch.autograd.grad(out, weight, x)[0]
    found = out.detach(), gradient, ops.quick_gelu(x), ops.cross_entropy(x, labels)
    return b"".join(t.numpy().tobytes() for t in found)
before = work()
if os.fork() == 0:
    signal.alarm(60)
    os._exit(int(work() != before))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


def test_several_threads_at_once(native_cpu: Implementation) -> None:
    expected, found = work(), {}

    def run(i: int) -> None:
        found[i] = [work() for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for i in range(4) for one in found[i] for a, b in zip(one, expected, strict=True))
