"""What all tests share: GPU tests skip with a reason, threads are bounded, seeds are fixed."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never reach for the network
# Networks this small are slower on several threads, and far slower on busy cores. Tests of threads ask for theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, each of which imports torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import compiling
import pytest
import torch
from implementations import ISAS, CountedModule, Implementation, isas_of

from igpt_fast import backend

# A shell's background jobs ignore Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of the mutations run every Nth only")
    parser.addoption("--soak", action="store_true", help="marker soak, and more of the same in other tests")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own, which reads the groups, comes after it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mutations = [item for item in items if item.get_closest_marker("mutation")]
    left_out = set(mutations) - set(mutations[:: config.getoption("--every")])
    if not config.getoption("--soak"):
        left_out |= {item for item in items if item.get_closest_marker("soak")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    reason = backend.unavailable("cuda")
    for item in items:
        # Of two groups pytest-xdist makes a third, which another process may run beside either.
        if item.get_closest_marker("clock") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("clock"))
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of this machine, each in turn, which the CPU kernels use meanwhile."""
    assert backend._C is not None
    before = backend._C.cpu_isa()
    assert backend._C.select_cpu_isa(request.param)
    yield request.param
    assert backend._C.select_cpu_isa(before)


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    reason = compiling.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return compiling.emulated()


@pytest.fixture
def emulation(emulated_module: ModuleType) -> Iterator[Implementation]:
    """The CUDA kernels serve the tensors of the CPU."""
    emulated_module.set_schedule("fifo", 0)
    with backend.use_backend("auto"), backend.emulate(emulated_module):
        yield Implementation("emulated", "cpu", emulated_module)


@pytest.fixture
def native_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Implementation]:
    """The CPU kernels, counted, for small inputs too: of the instruction set of the parameter, or the fastest."""
    if backend._C is None:
        pytest.skip(backend.native_reason)
    module, before = CountedModule(backend._C), backend._C.cpu_isa()
    monkeypatch.setattr(backend, "_C", module)
    every_size = {name: dataclasses.replace(op, least_cpu=0, least_queries_cpu=0) for name, op in backend.OPS.items()}
    monkeypatch.setattr(backend, "OPS", every_size)
    assert module.select_cpu_isa(getattr(request, "param", None) or ISAS[-1])
    with backend.use_backend("auto"):
        yield Implementation("cpu", "cpu", module)
    module.select_cpu_isa(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``implementation``: the definition, the CPU kernels where the op has them, those on the emulator, on a GPU.

    The test's module names the op, ``OP = "rms_norm"``. A test that is marked ``every_isa`` meets the CPU kernels of
    every instruction set of this machine, another those of the fastest.
    """
    if "implementation" not in metafunc.fixturenames:
        return
    kinds: list[Any] = ["reference", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
    op = getattr(metafunc.module, "OP", None)
    if op not in backend.OPS:
        raise pytest.UsageError(
            f"{metafunc.definition.path}: a test with the fixture implementation needs OP, one of backend.OPS, in its "
            f"module; it is {op!r}"
        )
    if isas := isas_of(op):
        every = metafunc.definition.get_closest_marker("every_isa") is not None
        kinds[1:1] = [f"cpu-{isa}" for isa in isas] if every else ["cpu"]
    metafunc.parametrize("implementation", kinds, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    kind, _, isa = request.param.partition("-")
    if kind == "emulated":
        yield request.getfixturevalue("emulation")
    elif kind == "cpu":
        found = request.getfixturevalue("native_cpu")
        assert not isa or found.module.select_cpu_isa(isa)
        yield found
    else:
        with backend.use_backend(kind):
            yield Implementation(kind, "cuda" if kind == "cuda" else "cpu")
