"""What every op with a kernel has to stand up to, one small call each: see cases.py."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, CPU_CASES, Case
from implementations import Implementation, isas_of
from torch import Tensor

from igpt_fast import backend

SCHEDULES = [("random", 1), ("random", 2), ("skewed", 1), ("skewed", 2)]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# On the emulator and, where the op has kernels there, on the CPU.
EACH_NATIVE = pytest.mark.parametrize(
    ("native", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{case.name}")
        for kind in ("emulation", "native_cpu")
        for case in (*CASES, *CPU_CASES)
        if ("cuda" in backend.OPS[case.op].native if kind == "emulation" else isas_of(case.op))
    ],
    indirect=["native"],
)


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Implementation:
    return request.getfixturevalue(request.param)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4))
        for a, b in zip(first, second, strict=True)
    )


def test_every_op_with_a_kernel_has_a_case() -> None:
    cases = [*CASES, *CPU_CASES]
    assert {case.op for case in cases} == {name for name, op in backend.OPS.items() if op.native}
    assert {case.op for case in CPU_CASES} == {name for name, op in backend.OPS.items() if op.native == ("cpu",)}
    assert len({case.name for case in cases}) == len(cases), "a case stands there twice"


@EACH
def test_the_same_bits_under_every_schedule(emulation: Implementation, case: Case) -> None:
    assert emulation.module is not None
    emulation.module.reset_counters()
    expected = case.run(case.on("cpu"))
    assert emulation.module.counters()["launches"] > 0, "no kernel ran"
    for order, seed in SCHEDULES:
        emulation.schedule(order, seed)
        assert same(case.run(case.on("cpu")), expected), (order, seed)


@pytest.mark.skipif(backend._C is None, reason=backend.native_reason)
@pytest.mark.parametrize(
    ("case", "isa"),
    [pytest.param(case, isa, id=f"{case.name}-{isa}") for case in (*CASES, *CPU_CASES) for isa in isas_of(case.op)],
)
def test_the_same_bits_with_any_number_of_threads(native_cpu: Implementation, case: Case, isa: str) -> None:
    """Of 300 times as many rows, so that there are shares for all threads; more of them than cores too."""
    assert native_cpu.module.select_cpu_isa(isa)
    before = torch.get_num_threads()
    tensors = [case.enlarged(300) for _ in range(4)]
    try:
        results = []
        for threads, inputs in zip((1, 2, 3, 7), tensors, strict=True):
            torch.set_num_threads(threads)
            native_cpu.module.reset_counters()
            results.append(case.run(inputs))
            assert native_cpu.module.counters()["launches"] > 0, "no kernel ran"
    finally:
        torch.set_num_threads(before)
    assert all(same(result, results[0]) for result in results[1:])


@EACH_NATIVE
def test_the_reference_can_be_chosen(native: Implementation, case: Case) -> None:
    """``set_backend("reference")`` and the environment variable turn the kernel off."""
    native.module.reset_counters()
    with backend.use_backend("reference"):
        found = case.run(case.on("cpu"))
    assert native.module.counters()["launches"] == 0
    shapes = [(result.shape, result.dtype) for result in case.run(case.on("cpu"))]
    assert shapes == [(result.shape, result.dtype) for result in found]


@EACH_NATIVE
def test_fake_tensors_never_reach_a_kernel(native: Implementation, case: Case) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = case.run(case.on("cpu"))
    native.module.reset_counters()
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in case.on("cpu")]
        fake = case.run(tensors)
    assert native.module.counters()["launches"] == 0
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@EACH_NATIVE
def test_meta_tensors(native: Implementation, case: Case) -> None:
    shapes = [(r.shape, r.dtype) for r in case.run(case.on("cpu"))]
    meta = case.run(case.on("meta"))
    assert all(result.is_meta for result in meta)
    assert [(result.shape, result.dtype) for result in meta] == shapes


@pytest.mark.gpu
@EACH
def test_graph_capture(case: Case) -> None:
    """Captured once, replayed with other values: neither allocation behind torch's back nor a wait for the device."""
    tensors = case.on("cuda")
    case.run(tensors)  # what is made once, such as a look-up table, exists before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(tensors)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.copy_(tensor.flip(0))
    fresh = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, case.run(fresh))


@pytest.mark.gpu
@EACH
def test_no_wait_for_the_device(case: Case) -> None:
    tensors = case.on("cuda")
    case.run(tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@EACH
def test_the_current_stream(case: Case) -> None:
    """Inputs that are written late on another stream are read after that."""
    expected = case.run(case.on("cuda"))
    late = [torch.zeros_like(tensor).requires_grad_(tensor.requires_grad) for tensor in case.on("cuda")]
    ready = case.on("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for target, source in zip(late, ready, strict=True):
                target.copy_(source)
        found = case.run(late)
    stream.synchronize()
    assert same(found, expected)


@pytest.mark.gpu
@EACH
def test_another_device(case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    before = torch.cuda.current_device()
    found = [result.cpu() for result in case.run(case.on("cuda:1"))]
    assert torch.cuda.current_device() == before
    assert same(found, [result.cpu() for result in case.run(case.on("cuda:0"))])


@pytest.mark.gpu
@EACH
def test_a_thousand_times_the_same_bits(case: Case) -> None:
    """Alone, and with a second stream that runs the same."""
    expected = case.run(case.on("cuda"))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for i in range(1000):
        with torch.cuda.stream(streams[i % 2 if i >= 500 else 0]):
            for a, b in zip(case.run(case.on("cuda")), expected, strict=True):
                differ += (a.nan_to_num(7e4) != b.nan_to_num(7e4)).sum()
    torch.cuda.synchronize()
    assert differ.item() == 0
