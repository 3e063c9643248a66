"""cross_entropy: torch's, of logits in fp32; the kernels, labels that count for nothing or are none, errors."""

from __future__ import annotations

import contract
import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_fast import backend, ops

OP = "cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


def batch(*shape: int, dtype: torch.dtype = torch.float32, ignored: bool = True) -> list[torch.Tensor]:
    """Logits of a shape, and labels, some of which are ignored."""
    logits = (3 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1])
    if ignored and labels.numel() > 1:
        labels.view(-1)[::3] = -100
    return [logits, labels]


def reduced(reduction: str, ignore_index: int = -100):
    return lambda logits, labels: ops.cross_entropy(logits, labels, ignore_index, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_definition_is_torchs_of_wide_logits(dtype: torch.dtype, reduction: str) -> None:
    logits, labels = batch(3, 5, 17, dtype=dtype)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    wanted = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction=reduction)
    with backend.use_backend("reference"):
        loss = ops.cross_entropy(logits, labels, reduction=reduction)
    assert loss.dtype == wide.dtype
    assert torch.equal(loss.flatten(), wanted.flatten())
    assert loss.shape == (labels.shape if reduction == "none" else ())


def test_by_hand() -> None:
    """Of 512 equal logits the loss is the logarithm of 512."""
    assert torch.allclose(ops.cross_entropy(torch.zeros(4, 512), torch.arange(4)), torch.tensor(512.0).log())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    logits, labels = batch(2, 3, 5, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(reduced(reduction), (logits, labels))
    assert torch.autograd.gradgradcheck(reduced(reduction), (logits, labels))


@pytest.mark.every_isa
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 65, 512), (97, 40), (2, 2, 2, 13), (5, 1000), (3, 1029), (2, 1), (512,)])
def test_parity(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    covered = implementation.name != "cpu" or dtype != torch.float16
    contract.check_parity(implementation, reduced(reduction), batch(*shape, dtype=dtype), covered)


@pytest.mark.parametrize("shape", [(2, 65544), (2, 8)])
def test_what_no_kernel_covers_is_the_reference(implementation: Implementation, shape: tuple[int, ...]) -> None:
    dtype = torch.float64 if shape[-1] == 8 else torch.bfloat16
    covered = implementation.name == "cpu" and dtype == torch.bfloat16  # any number of classes
    contract.check_parity(implementation, reduced("mean"), batch(*shape, dtype=dtype, ignored=False), covered)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [512, 13, 1])
def test_far_from_zero(implementation: Implementation, dtype: torch.dtype, k: int) -> None:
    covered = implementation.name != "cpu" or dtype != torch.float16
    for offset in (300.0, -300.0):
        logits, labels = batch(6, k, dtype=torch.float32)
        contract.check_parity(implementation, reduced("none"), [(logits + offset).to(dtype), labels], covered)


@pytest.mark.parametrize("ignore_index", [-100, 3, 10**12])
def test_ignore_index(implementation: Implementation, ignore_index: int) -> None:
    """Any integer, a class as well."""
    logits, labels = batch(9, 16)
    labels = labels.masked_fill(labels == -100, ignore_index)
    for reduction in REDUCTIONS:
        contract.check_parity(implementation, reduced(reduction, ignore_index), [logits, labels])


@pytest.mark.parametrize("shape", [(4,), (0,), (3, 0)])
def test_nothing_counts(implementation: Implementation, shape: tuple[int, ...]) -> None:
    """As torch has it: 0 / 0 is NaN, a sum is 0, and neither has a gradient."""
    logits = torch.randn(*shape, 16, device=implementation.device, requires_grad=True)
    labels = torch.full(shape, -100, device=implementation.device)
    for reduction in REDUCTIONS:
        with contract.launching(implementation, reduction != "none" or labels.numel() > 0):
            loss = ops.cross_entropy(logits, labels, reduction=reduction)
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert not gradient.any()


def test_infinite_logits(implementation: Implementation) -> None:
    """Classes that are ruled out with -inf: no share, and no gradient."""
    logits, labels = batch(5, 512, ignored=False)
    logits[:, 100:] = -torch.inf
    contract_labels = labels % 100
    contract.check_parity(implementation, reduced("mean"), [logits, contract_labels])
    loss = ops.cross_entropy(logits.to(implementation.device), (contract_labels + 100).to(implementation.device))
    assert loss == torch.inf


@pytest.mark.parametrize("label", [16, -1, 2**40])
def test_a_label_that_is_none(implementation: Implementation, label: int) -> None:
    """The reference raises; the kernel cannot, and says so in the loss."""
    logits = torch.randn(3, 16, device=implementation.device, requires_grad=True)
    labels = torch.tensor([2, label, 5], device=implementation.device)
    if implementation.name in ("reference", "cpu"):
        with pytest.raises(IndexError, match="out of bounds"):
            ops.cross_entropy(logits, labels)
        return
    assert ops.cross_entropy(logits, labels).isnan()
    each = ops.cross_entropy(logits, labels, reduction="none")
    assert each.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(each, logits, torch.ones_like(each))
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_contract(implementation: Implementation, reduction: str) -> None:
    op = reduced(reduction)
    contract.check_layouts(implementation, op, batch(3, 5, 64))
    contract.check_layouts(implementation, op, batch(7, 13, dtype=torch.bfloat16))
    contract.check_compiles(implementation, op, batch(3, 5, 64, dtype=torch.bfloat16))
    contract.check_second_derivative(implementation, op, batch(3, 5, 16))
    contract.check_backward_keeps_the_choice(implementation, op, batch(3, 5, 64))
    contract.check_shapes_alone(implementation, op, batch(3, 5, 64, dtype=torch.float16))


def test_transforms(implementation: Implementation) -> None:
    for reduction in REDUCTIONS:
        contract.check_transforms(implementation, reduced(reduction), batch(3, 5, 16), mapped=2)


def test_autocast(implementation: Implementation) -> None:
    """16-bit logits, as a head gives them, and a loss in fp32."""
    logits, labels = (t.to(implementation.device) for t in batch(4, 64, dtype=torch.bfloat16))
    with torch.autocast(implementation.device, torch.bfloat16), contract.launching(implementation):
        assert ops.cross_entropy(logits, labels).dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(emulation: Implementation, reduction: str) -> None:
    logits, labels = batch(6, 24)
    registered = torch.ops.igpt_fast
    contract.check_opcheck(emulation, registered.cross_entropy.default, (logits, labels, -100, reduction))
    leaf = logits.clone().requires_grad_()
    contract.check_opcheck(emulation, registered.cross_entropy.default, (leaf, labels, -100, reduction))
    loss, count, statistics = registered.cross_entropy(logits, labels, -100, reduction)
    divisor = count if reduction == "mean" else None
    arguments = torch.ones_like(loss), logits, labels, statistics, divisor, -100
    contract.check_opcheck(emulation, registered.cross_entropy_bwd.default, arguments)


def test_the_backward_launches_its_kernel_alone(emulation: Implementation) -> None:
    """No zeros for the outputs that have no gradient."""
    logits, labels = batch(6, 24)
    loss = ops.cross_entropy(logits.requires_grad_(), labels)
    called: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    with Log():
        torch.autograd.grad(loss, logits, torch.ones(()))
    assert [name for name in called if name not in ("aten::ones", "aten::detach")] == ["igpt_fast::cross_entropy_bwd"]


def test_what_the_backward_keeps_has_no_gradient(emulation: Implementation) -> None:
    logits, labels = batch(6, 24)
    loss, count, statistics = torch.ops.igpt_fast.cross_entropy(logits.requires_grad_(), labels, -100, "mean")
    assert loss.requires_grad
    assert not count.requires_grad
    assert not statistics.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 8).long()}, TypeError, "logits is torch.int64; want a floating-point tensor"),
        ({"labels": torch.zeros(2)}, TypeError, "labels is torch.float32; want a tensor of int64"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, TypeError, "labels is torch.int32; want a tensor of int64"),
        ({"labels": [0, 0]}, TypeError, "labels is list; want a tensor of int64"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels has shape \(3,\); want \(2,\), logits' but the last"),
        ({"labels": torch.zeros(2, 8).long()}, ValueError, r"labels has shape \(2, 8\); want \(2,\)"),
        ({"labels": torch.zeros(2, device="meta").long()}, ValueError, "labels is on meta, logits on cpu"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits has shape \(\); want \(..., K\) with K >= 1"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits has shape \(2, 0\); want \(..., K\) with K >= 1"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index is 1.0; want an integer"),
        ({"ignore_index": True}, TypeError, "ignore_index is True; want an integer"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'; want one of mean, sum, none"),
    ],
)
def test_misuse(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="cross_entropy: " + message):
        ops.cross_entropy(**{"logits": torch.zeros(2, 8), "labels": torch.zeros(2).long()} | changes)


def test_a_registered_call_names_its_reduction(emulation: Implementation) -> None:
    with pytest.raises(ValueError, match="reduction is 'average'; want one of mean, sum, none"):
        torch.ops.igpt_fast.cross_entropy(torch.zeros(2, 8), torch.zeros(2).long(), -100, "average")
