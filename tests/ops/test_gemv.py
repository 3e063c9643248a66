"""gemv: the definition against its parts, the kernels against the definition."""

from __future__ import annotations

import checks_gemv as checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_fast import backend, ops, reference

OP = "gemv"
LAUNCHES_NOTHING = {"test_empty_batch", "test_fake_and_meta", "test_gradients", "test_many_rows"}


@pytest.fixture(autouse=True)
def _launched(request: pytest.FixtureRequest):
    """Under the emulator a test that calls the op shall have launched a kernel."""
    if "implementation" not in request.fixturenames or request.node.originalname in LAUNCHES_NOTHING:
        yield
        return
    implementation = request.getfixturevalue("implementation")
    if implementation.module is not None:
        implementation.module.set_capability(90)  # clusters and dependent launches
        implementation.module.reset_counters()
    yield
    if implementation.module is not None:
        implementation.module.set_capability()
        assert implementation.module.counters()["launches"] > 0


@pytest.mark.parametrize("transposed", [False, True], ids=["conv1d", "linear"])
@pytest.mark.parametrize(("rows", "n_in", "n_out"), checks.SHAPES + checks.MANY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes(implementation, dtype: torch.dtype, rows: int, n_in: int, n_out: int, transposed: bool) -> None:
    checks.check_shape(implementation.device, dtype, rows, n_in, n_out, transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv1d", "linear"])
@pytest.mark.parametrize("rows", [2, 9])
def test_options(implementation, transposed: bool, rows: int) -> None:
    checks.check_options(implementation.device, transposed, rows)


@pytest.mark.parametrize("rows", [2, 9])
def test_range_of_float16(implementation, rows: int) -> None:
    checks.check_range(implementation.device, rows)


@pytest.mark.parametrize("rows", [3, 17])
def test_nan_stays_in_its_row_and_column(implementation, rows: int) -> None:
    checks.check_nan_stays(implementation.device, rows)


@pytest.mark.parametrize("rows", [2, 9])
def test_slices_of_a_weight(implementation, rows: int) -> None:
    checks.check_slices(implementation.device, rows)


def test_rows_of_other_numbers(emulation) -> None:
    checks.check_rows_of_other_numbers(emulation.device)


def test_one_rounding(emulation) -> None:
    checks.check_one_rounding(emulation.device)


def test_digits_of_the_norm(emulation) -> None:
    checks.check_digits_of_the_norm(emulation.device)


@pytest.mark.parametrize(("order", "seed"), [("random", 3), ("skewed", 3)])
def test_schedules(emulation, order: str, seed: int) -> None:
    emulation.schedule(order, seed)
    checks.check_shape("cpu", torch.bfloat16, 7, 1032, 24, False)
    checks.check_shape("cpu", torch.bfloat16, 7, 1032, 24, True)
    checks.check_shape("cpu", torch.bfloat16, 17, 520, 24, order == "skewed")


def test_definition_is_its_parts() -> None:
    x, weight, bias = torch.randn(3, 16), torch.randn(16, 8), torch.randn(8)
    norm_weight, residual = torch.randn(16), torch.randn(3, 8)
    assert torch.equal(ops.gemv(x, weight), x @ weight)
    assert torch.equal(ops.gemv(x, weight, bias), F.linear(x, weight.T, bias))
    normed = ops.rms_norm(x, norm_weight, 1e-3)
    assert torch.equal(ops.gemv(x, weight, norm_weight=norm_weight, eps=1e-3), normed @ weight)
    for name in ("quick_gelu", "gelu_tanh", "gelu_erf"):
        want = getattr(reference, name)(F.linear(x, weight.T, bias)) + residual
        assert torch.equal(ops.gemv(x, weight, bias, activation=name, residual=residual), want)


def test_leading_dimensions(implementation) -> None:
    named = checks.operands(implementation.device, torch.bfloat16, 6, 72, 24, False)
    want = ops.gemv(**named)
    more = {name: named[name].view(2, 3, -1) for name in ("x", "residual")}
    assert torch.equal(ops.gemv(**(named | more)), want.view(2, 3, -1))
    one = {name: named[name][0] for name in ("x", "residual")}
    assert torch.allclose(ops.gemv(**(named | one)).float(), want[0].float(), atol=0.05)


def test_layouts_that_are_copied(implementation) -> None:
    """Strided rows, and addresses that a kernel cannot load vectors from."""
    named = checks.operands(implementation.device, torch.bfloat16, 2, 72, 24, False)
    want = ops.gemv(**named)

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return memory[1:].view(tensor.shape).copy_(tensor)

    assert torch.equal(ops.gemv(**{name: shifted(tensor) for name, tensor in named.items()}), want)
    spread = {name: tensor[..., None].expand(*tensor.shape, 2).contiguous()[..., 0] for name, tensor in named.items()}
    assert torch.equal(ops.gemv(**(spread | {"weight": named["weight"]})), want)


def test_empty_batch(implementation) -> None:
    x, weight = (torch.zeros(shape, dtype=torch.bfloat16, device=implementation.device) for shape in ((0, 16), (16, 8)))
    assert ops.gemv(x, weight, activation="gelu_erf").shape == (0, 8)


def test_many_rows(implementation) -> None:
    """65 rows are torch's."""
    checks.check(checks.operands(implementation.device, torch.bfloat16, 65, 72, 24, False), "quick_gelu")


def test_gradients(implementation) -> None:
    """With a gradient to be recorded torch's ops run, whatever the backend."""
    named = checks.operands(implementation.device, torch.bfloat16, 2, 72, 24, True)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
    out = ops.gemv(**leaves, activation="quick_gelu")
    ours = torch.autograd.grad(out.sum(), leaves.values())
    theirs = torch.autograd.grad(reference.gemv(**leaves, activation="quick_gelu").sum(), leaves.values())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradcheck() -> None:
    named = checks.operands("cpu", torch.float64, 2, 16, 8, False)
    leaves = [tensor.requires_grad_() for tensor in named.values()]

    def run(*tensors: Tensor) -> Tensor:
        return ops.gemv(**dict(zip(named, tensors, strict=True)), activation="gelu_tanh")

    assert torch.autograd.gradcheck(run, leaves)


def test_parameters_without_gradients(implementation) -> None:
    named = checks.operands(implementation.device, torch.bfloat16, 2, 72, 24, True)
    parameters = named | {"weight": torch.nn.Parameter(named["weight"].T).T}
    with torch.no_grad():
        assert torch.equal(ops.gemv(**parameters), ops.gemv(**named))


def test_opcheck(emulation) -> None:
    for transposed in (False, True):
        named = checks.operands("cpu", torch.bfloat16, 2, 72, 24, transposed)
        arguments = *(named[name] for name in ("x", "weight", "bias", "norm_weight", "residual")), "quick_gelu", 1e-5
        torch.library.opcheck(torch.ops.igpt_fast.gemv.default, arguments)
    arguments = named["x"], named["weight"], None, None, None, None, 1e-5
    torch.library.opcheck(torch.ops.igpt_fast.gemv.default, arguments)


def test_compile(implementation) -> None:
    named = checks.operands(implementation.device, torch.bfloat16, 2, 72, 24, True)

    def layer(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, residual: Tensor) -> Tensor:
        options = {"norm_weight": norm_weight, "residual": residual, "activation": "quick_gelu"}
        return ops.gemv(x, weight, bias, **options) * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**named), layer(**named))


def test_autocast(implementation) -> None:
    """In low precision as without; a float32 layer is autocast by torch's linear."""
    device = implementation.device
    named = checks.operands(device, torch.bfloat16, 2, 72, 24, True)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.gemv(**named), ops.gemv(**named))
        wide = ops.gemv(named["x"], named["weight"].float(), named["bias"].float())
    assert wide.dtype == torch.bfloat16


def test_vmap(implementation) -> None:
    """torch's ops serve it."""
    named = checks.operands(implementation.device, torch.bfloat16, 4, 72, 24, True)
    want = ops.gemv(named["x"], named["weight"])
    each = torch.vmap(lambda row: ops.gemv(row, named["weight"]))(named["x"])
    assert torch.allclose(each.float(), want.float(), atol=0.05)


def test_fake_and_meta(implementation) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    named = checks.operands(implementation.device, torch.bfloat16, 2, 72, 24, True)
    with FakeTensorMode() as mode:
        out = ops.gemv(**{name: mode.from_tensor(tensor) for name, tensor in named.items()})
    assert (out.shape, out.dtype, out.device.type) == ((2, 24), torch.bfloat16, implementation.device)
    with backend.use_backend("auto"):
        out = ops.gemv(**{name: tensor.to("meta") for name, tensor in named.items()})
    assert (out.shape, out.device.type) == ((2, 24), "meta")


def test_what_the_kernel_does_not_cover_goes_the_other_way(emulation) -> None:
    emulation.module.reset_counters()
    checks.check(checks.operands("cpu", torch.float32, 2, 72, 24, False))
    checks.check(checks.operands("cpu", torch.bfloat16, 2, 71, 24, False))
    checks.check(checks.operands("cpu", torch.bfloat16, 2, 72, 28, True))
    named = checks.operands("cpu", torch.bfloat16, 2, 72, 24, False)
    checks.check(named | {"norm_weight": named["norm_weight"].float()})
    checks.check(named | {"weight": named["weight"].repeat(2, 2)[::2, ::2]})
    assert emulation.module.counters()["launches"] == 0


@pytest.mark.gpu
def test_graph_and_repeats() -> None:
    named = checks.operands("cuda", torch.bfloat16, 5, 1544, 40, False)
    with backend.use_backend("cuda"):
        want = ops.gemv(**named, activation="quick_gelu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.gemv(**named, activation="quick_gelu")
        for _ in range(1000):
            graph.replay()
            assert torch.equal(out, want)


MISUSE = {
    "x's type": ({"x": [1.0]}, TypeError, "x is list; want a floating-point tensor"),
    "integers": ({"weight": torch.zeros(16, 8).long()}, TypeError, "weight is torch.int64; want"),
    "weight's dtype": ({"weight": torch.zeros(16, 8).half()}, TypeError, "weight is torch.float16; want torch.float32"),
    "bias's dtype": ({"bias": torch.zeros(8).half()}, TypeError, "bias is torch.float16; want torch.float32, x's"),
    "weight's shape": ({"weight": torch.zeros(16)}, ValueError, r"weight has shape \(16,\); want \(n_in, n_out\)"),
    "x's shape": ({"x": torch.zeros(2, 15)}, ValueError, r"x has shape \(2, 15\); want \(..., 16\)"),
    "bias's shape": ({"bias": torch.zeros(16)}, ValueError, r"bias has shape \(16,\); want \(8,\)"),
    "norm's shape": ({"norm_weight": torch.zeros(8)}, ValueError, r"norm_weight has shape \(8,\); want \(16,\)"),
    "residual's": ({"residual": torch.zeros(8)}, ValueError, r"residual has shape \(8,\); want \(2, 8\)"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0; want 0 or above"),
    "activation": ({"activation": "relu"}, ValueError, "activation is 'relu'; want one of None, 'quick_gelu'"),
    "devices": ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta, others on cpu"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    changes, error, message = MISUSE[name]
    arguments = {"x": torch.zeros(2, 16), "weight": torch.zeros(16, 8)}
    with pytest.raises(error, match="gemv: " + message):
        ops.gemv(**(arguments | changes))
