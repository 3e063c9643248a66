"""backend: the choice of an implementation, by process, block, thread and environment, and the report about it."""

import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import igpt_fast
from igpt_fast import backend, ops
from igpt_fast import environment as environment_module
from igpt_fast.engines import choice as decoders
from igpt_fast.engines.cuda.decoder import no_cuda_decoder
from igpt_fast.ops.dispatch import ACTIVATION_NUMBERS

CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(bool(backend.unavailable("cpu")), reason=f"no native CPU: {backend.unavailable('cpu')}")


@pytest.fixture(autouse=True)
def _the_backend_is_auto() -> None:
    assert backend.get_backend() == os.environ.get("IGPT_FAST_BACKEND", "auto"), "an earlier test left its backend on"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_compiled_module_is_there() -> None:
    """Without it most tests of kernels skip: a broken build must not look like a small one."""
    assert backend._C is not None, backend.native_reason


def test_set_backend_is_for_the_process() -> None:
    before = igpt_fast.get_backend()
    try:
        igpt_fast.set_backend("reference")
        assert backend.kernels("quantize", CPU) is None
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(backend.get_backend()))
        thread.start()
        thread.join()
        assert seen == ["reference"]
    finally:
        igpt_fast.set_backend(before)


def test_use_backend_ends_with_its_block() -> None:
    before = backend.get_backend()
    with igpt_fast.use_backend("reference"):
        assert backend.get_backend() == "reference"
        with igpt_fast.use_backend("auto"):
            assert backend.get_backend() == "auto"
        assert backend.get_backend() == "reference"
    with pytest.raises(KeyError), igpt_fast.use_backend("reference"):
        raise KeyError
    assert backend.get_backend() == before


def test_a_block_is_of_its_thread() -> None:
    """Two threads whose blocks overlap, each leaving before the other: neither sees nor undoes the other's choice."""
    inside, leave = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)
    seen: dict[str, str] = {}

    def work(name: str) -> None:
        with backend.use_backend(name):
            inside.wait()
            seen[name] = backend.get_backend()
            leave.wait()
        seen[f"after {name}"] = backend.get_backend()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = backend.get_backend()
    assert seen == {"reference": "reference", "auto": "auto", "after reference": now, "after auto": now}


def test_use_backend_is_a_decorator_too() -> None:
    @backend.use_backend("reference")
    def chosen() -> str:
        return backend.get_backend()

    assert [chosen(), chosen()] == ["reference", "reference"]


@pytest.mark.parametrize("name", ["", "AUTO", "gpu", "cpu "])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="choose from auto, reference, cpu, cuda"):
        backend.set_backend(name)
    with pytest.raises(ValueError, match="unknown backend"), backend.use_backend(name):
        pass


def module(**attributes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"has_cuda": True, "cuda_status": "nvcc", "cpu_isa": lambda: "avx2"} | attributes)


@pytest.mark.parametrize(
    ("built", "cuda_build", "capability", "reason"),
    [
        (module(has_cuda=False, cuda_status="off: no nvcc"), "13.0", (9, 0), "no CUDA part (off: no nvcc)"),
        (module(), None, None, "build without CUDA"),
        (module(), "13.0", None, "no CUDA device"),
        (module(), "13.0", (7, 5), "capability 7.5; want 8.0"),
        (module(), "13.0", (9, 0), None),
        (None, "13.0", (9, 0), "lost"),
    ],
)
def test_why_cuda_is_not_available(
    monkeypatch: pytest.MonkeyPatch,
    built: SimpleNamespace | None,
    cuda_build: str | None,
    capability: tuple[int, int] | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(backend, "_C", built)
    monkeypatch.setattr(backend, "native_reason", "lost")
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(backend, "_too_old", backend._too_old.__wrapped__)
    found, device = backend.unavailable("cuda"), torch.device("cuda", 0)
    if reason is None:
        assert found is None
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
        with backend.use_backend("cuda"):
            assert backend.kernels("quantize", device) == (built, "cuda", 0, 7, backend.Launching())
            with pytest.raises(backend.BackendUnavailableError, match="on cpu"):
                backend.kernels("quantize", CPU)
        runs, covers = environment_module.implementation("quantize", "cuda")
        assert (runs, covers) == ("native", f"for {backend.OPS['quantize'].covers}")
        return
    assert found is not None
    assert reason in found
    assert environment_module.implementation("quantize", "cuda") == ("reference", found)
    with pytest.raises(backend.BackendUnavailableError, match=r"'cuda' is not available: .*" + re.escape(reason)):
        backend.set_backend("cuda")
    if capability is not None:  # a tensor can be there: the ops run on the reference
        assert backend.kernels("quantize", device) is None


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its torch calls its devices "cuda", and nvcc may have been there when the module was built."""
    monkeypatch.setattr(backend, "_C", module())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, reason = torch.device("cuda", 0), "this torch is a build for ROCm 7.0"
    for op in (op for op, entry in backend.OPS.items() if "cuda" in entry.native):
        assert backend.kernels(op, device) is None
        assert environment_module.implementation(op, "cuda")[0] == "reference"
    assert reason in (backend.no_kernels("attention_decode", device) or "")
    assert reason in (no_cuda_decoder(device) or "")
    with pytest.raises(backend.BackendUnavailableError, match=reason):
        backend.set_backend("cuda")


def test_without_the_module_everything_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_C", None)
    monkeypatch.setattr(backend, "native_reason", "lost")
    assert backend.kernels("quantize", CPU) is None
    assert backend.unavailable("reference") is None
    assert environment_module.implementation("quantize", "cpu") == ("reference", "lost")
    with pytest.raises(backend.BackendUnavailableError, match="lost"), backend.use_backend("cpu"):
        pass
    assert "none: lost" in environment_module.format_config(environment_module.config())


@needs_cpu
def test_implementation_and_reason() -> None:
    with backend.use_backend("auto"):
        runs, reason = environment_module.implementation("quantize", "cpu")
    assert (runs, reason) == (f"native ({backend._C.cpu_isa()})", "")
    with backend.use_backend("reference"):
        assert environment_module.implementation("quantize", "cpu") == (
            "reference",
            "the backend 'reference' is chosen",
        )
    with backend.use_backend("cpu"):
        assert environment_module.implementation("quantize", "cuda") == ("none", "the backend 'cpu' is chosen")


def test_every_op_and_decoder_is_reported() -> None:
    named = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and not name.startswith("check_")}
    report = environment_module.config()
    assert set(report["ops"]) == named
    found = {
        value.name
        for name, value in vars(decoders).items()
        if name.endswith("Decoder") and not inspect.isabstract(value)
    }
    assert set(report["decoders"]) == found
    for by_device in report["ops"].values():
        for device, live in by_device.items():
            assert live["runs"]
            assert live["reason"] or live["runs"].startswith("native"), f"no reason why nothing faster runs on {device}"
    for live in (*report["decoders"].values(), *report["forwards"].values()):
        assert live["runs"]
        assert live["reason"]


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    igpt_fast.show_config()
    text = capsys.readouterr().out
    for part in ("igpt_fast", torch.__version__, "backend", "quantize", "decoder"):
        assert part in text
    if backend._C is not None:
        assert backend._C.cuda_status in text
        assert all(name in text for name, _ in backend._C.cpu_isas())


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_environment_chooses_the_backend(name: str) -> None:
    done = python("from igpt_fast import backend; print(backend.get_backend())", IGPT_FAST_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("IGPT_FAST_BACKEND", "abacus", "IGPT_FAST_BACKEND: unknown backend 'abacus'; choose from auto"),
        pytest.param("IGPT_FAST_ISA", "mmx", "IGPT_FAST_ISA=mmx: not available; this processor has", marks=needs_cpu),
    ],
)
def test_environment_with_a_wrong_value(variable: str, value: str, message: str) -> None:
    done = python("from igpt_fast import backend", **{variable: value})
    assert done.returncode != 0
    assert message in done.stderr


@needs_cpu
def test_the_module_and_the_package_speak_the_same() -> None:
    assert backend._C.interface == backend.INTERFACE
    assert backend._C.version == igpt_fast.__version__
    source = (Path(__file__).parents[1] / "csrc" / "bind" / "module.cpp").read_text("utf-8")
    assert f"kInterface = {backend.INTERFACE};" in source


@needs_cpu
def test_the_activations_have_the_same_numbers_on_both_sides() -> None:
    """csrc/bind/cuda.cpp holds the numbers of CUDA to those of the CPU while it compiles."""
    assert {name or "none": number for name, number in ACTIVATION_NUMBERS.items()} == backend._C.activations


@needs_cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 1}, "dequantize: there is no argument 'm'"),
        ({"k": None}, "dequantize: the argument 'k' is missing"),
        ({"k": "4"}, "dequantize: k: .*integer"),
        ({"k": 2**63}, "dequantize: k: .*too big"),
        ({"token": 2**31}, "dequantize: token: the number is too large"),
        ({"out": -1}, "dequantize: out: .*negative"),
    ],
)
def test_the_module_wants_every_argument_by_its_name(change: dict[str, object], message: str) -> None:
    arguments = {"tokens": 0, "token": 0, "clusters": 0, "out": 0, "n": 0, "k": 0, "place": 1}
    backend._C.dequantize_cpu(**arguments)
    with pytest.raises(TypeError, match=message):
        backend._C.dequantize_cpu(**{name: value for name, value in (arguments | change).items() if value is not None})
    with pytest.raises(TypeError, match="by name"):
        backend._C.dequantize_cpu(*arguments.values())


@needs_cpu
def test_a_module_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an editable install whose sources went on: it would be called with the wrong arguments."""
    monkeypatch.setattr(backend, "INTERFACE", backend.INTERFACE + 1)
    monkeypatch.setitem(sys.modules, "igpt_fast._C", backend._C)
    with pytest.raises(ImportError, match="install again"):
        backend._import_module()


def test_warns_once_without_the_module() -> None:
    """In a process in which the module cannot be imported, whatever is used of the package afterwards."""
    code = """
import importlib.metadata, sys, warnings
sys.modules["igpt_fast._C"] = None
importlib.metadata.distributions = lambda **_: []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import igpt_fast
    from igpt_fast import backend, ops
    import torch
    for _ in range(2):
        assert ops.quantize(torch.zeros(2, 3), torch.zeros(1, 3)).tolist() == [0, 0]
        igpt_fast.show_config()
print(sorted({w.category.__name__ for w in caught if "igpt_fast" in str(w.message)}),
      sum("igpt_fast" in str(w.message) for w in caught))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['RuntimeWarning'] 1"
