"""Which implementations exist, which one runs, and why.

An op has up to three: ``reference`` (plain PyTorch, always there), ``cpu`` (C++, for tensors on the CPU) and
``cuda`` (for tensors on a CUDA device). The chosen *backend* decides among them:

* ``auto``: the native implementation for the tensor's device where there is one, else the reference.
* ``reference``: always the reference.
* ``cpu``, ``cuda``: the native implementation; where the compiled module or the device lacks it, an op raises
  ``BackendUnavailableError`` instead of falling back.

It is set by ``set_backend``, for a block by ``use_backend``, or at start by the environment variable
``IGPT_FAST_BACKEND``. ``IGPT_FAST_ISA`` picks the instruction set of the CPU ops.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # before _C, so that its OpenMP code joins torch's thread pool

BACKENDS = ("auto", "reference", "cpu", "cuda")
MIN_CUDA_CAPABILITY = (8, 0)

# Ops with native implementations, by the device type they are for.
NATIVE_OPS: dict[str, tuple[str, ...]] = {"quantize": ("cpu", "cuda")}
# Ops that are PyTorch everywhere, and what of PyTorch they are.
TORCH_OPS: dict[str, str] = {
    "dequantize": "torch indexing",
    "rms_norm": "torch expression",
    "activation": "torch expression",
    "causal_attention": "torch scaled_dot_product_attention; the written-out softmax with output_attentions or upcast",
}
DECODERS: dict[str, str] = {"static_cache": "the PyTorch model with a static key/value cache"}


class BackendUnavailableError(RuntimeError):
    """The requested backend, or instruction set, is not there; the message says why."""


_C: ModuleType | None
try:
    from igpt_fast import _C  # type: ignore[attr-defined,no-redef]

    native_reason = ""
except ImportError as error:
    _C = None
    native_reason = f"the compiled module igpt_fast._C cannot be imported: {error}"


def unavailable(backend: str) -> str | None:
    """Why ``"reference"``, ``"cpu"`` or ``"cuda"`` cannot run here; ``None`` when it can."""
    if backend == "reference":
        return None
    if _C is None:
        return native_reason
    if backend == "cpu":
        return None
    if not _C.has_cuda:
        return f"the compiled module has no CUDA part ({_C.cuda_status})"
    if not torch.cuda.is_available():
        return "torch has no CUDA device" if torch.version.cuda else "this torch is a build without CUDA"
    if torch.cuda.get_device_capability() < MIN_CUDA_CAPABILITY:
        return f"the device is older than compute capability {'.'.join(map(str, MIN_CUDA_CAPABILITY))}"
    return None


_backend = "auto"


def get_backend() -> str:
    """The chosen backend."""
    return _backend


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``; see the module.

    Raises:
        ValueError: Another name.
        BackendUnavailableError: It cannot run here.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    reason = None if name == "auto" else unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    _backend = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend`` for the length of a ``with`` block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def native(op: str, device: torch.device) -> ModuleType | None:
    """The compiled module if ``op`` shall run there for tensors on ``device``, else ``None`` for the reference.

    Raises:
        BackendUnavailableError: The chosen backend is ``cpu`` or ``cuda`` and does not serve ``device``.
    """
    if _backend == "auto":
        if _C is None or device.type not in NATIVE_OPS[op] or (device.type == "cuda" and unavailable("cuda")):
            return None
        return _C
    if _backend == "reference":
        return None
    if device.type != _backend:
        raise BackendUnavailableError(f"{op}: backend {_backend!r} is chosen, but the tensor is on {device}")
    return _C


def implementation(op: str, device_type: str) -> tuple[str, str]:
    """What runs for an op on ``"cpu"`` or ``"cuda"`` under the chosen backend, and why nothing faster does.

    Returns:
        (implementation, reason); the reason is empty when the native one runs.
    """
    if op in TORCH_OPS:
        return TORCH_OPS[op], "no native kernel in this version"
    if _backend == "reference":
        return "reference", "the backend 'reference' is chosen"
    if _backend not in ("auto", device_type):
        return "none", f"the backend {_backend!r} is chosen"
    reason = unavailable(device_type)
    if reason is not None:
        return "reference", reason
    assert _C is not None
    return f"native ({_C.cpu_isa()})" if device_type == "cpu" else "native", ""


def config() -> dict[str, Any]:
    """Versions, build, devices, instruction sets and the live implementation of every op, as plain values."""
    import numpy

    import igpt_fast

    build: dict[str, Any] = {"compiled": _C is not None}
    if _C is None:
        build["reason"] = native_reason
    else:
        build |= {"compiler": _C.compiler, "openmp": _C.openmp, "cuda": _C.cuda_status}
    devices = [{"name": "cpu", "processor": _processor(), "threads": torch.get_num_threads()}]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices.append(
                {"name": f"cuda:{i}", "processor": torch.cuda.get_device_name(i), "capability": f"{major}.{minor}"}
            )
    ops = {
        op: {
            device: dict(zip(("runs", "reason"), implementation(op, device), strict=True)) for device in ("cpu", "cuda")
        }
        for op in (*NATIVE_OPS, *TORCH_OPS)
    }
    return {
        "versions": {
            "igpt_fast": igpt_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "build": build,
        "devices": devices,
        "isa": {
            "compiled": dict(_C.cpu_isas()) if _C is not None else {},
            "live": _C.cpu_isa() if _C is not None else None,
        },
        "backend": _backend,
        "unavailable": {name: reason for name in ("cpu", "cuda") if (reason := unavailable(name))},
        "ops": ops,
        "decoders": {
            name: {"runs": what, "reason": "no native decoder in this version"} for name, what in DECODERS.items()
        },
    }


def format_config(report: dict[str, Any]) -> str:
    """``config()`` as text."""
    lines = [" ".join(f"{name} {version}" for name, version in report["versions"].items())]
    build = report["build"]
    lines.append(
        f"build      {build['compiler']}; OpenMP {build['openmp']}; CUDA {build['cuda']}"
        if build["compiled"]
        else f"build      none: {build['reason']}"
    )
    for device in report["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("name", "processor"))
        lines.append(f"device     {device['name']}: {device['processor']} ({rest})")
    isas = ", ".join(
        name if has else f"{name} (not on this processor)" for name, has in report["isa"]["compiled"].items()
    )
    lines.append(f"isa        {report['isa']['live'] or 'none'} of {isas or 'none'}")
    lines.append(f"backend    {report['backend']}")
    lines += [f"           {name} is not available: {reason}" for name, reason in report["unavailable"].items()]
    for op, by_device in report["ops"].items():
        for device, live in by_device.items():
            lines.append(f"op         {op:<17}{device:<5} {_line(live)}")
    lines += [f"decoder    {name:<17}      {_line(live)}" for name, live in report["decoders"].items()]
    return "\n".join(lines)


def show_config() -> None:
    """Prints versions, build, devices, instruction sets and the live implementation of every op and decoder."""
    print(format_config(config()))


def _line(live: dict[str, str]) -> str:
    return f"{live['runs']} [{live['reason']}]" if live["reason"] else live["runs"]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _start() -> None:
    """Applies the environment variables; says once if everything runs on the reference."""
    if _C is None:
        warnings.warn(f"igpt_fast runs on plain PyTorch: {native_reason}", RuntimeWarning, stacklevel=2)
    isa = os.environ.get("IGPT_FAST_ISA")
    if isa and _C is not None and not _C.select_cpu_isa(isa):
        names = ", ".join(name for name, supported in _C.cpu_isas() if supported)
        raise BackendUnavailableError(f"IGPT_FAST_ISA={isa}: not available; this processor has {names}")
    if name := os.environ.get("IGPT_FAST_BACKEND"):
        try:
            set_backend(name)
        except ValueError as error:
            raise BackendUnavailableError(f"IGPT_FAST_BACKEND: {error}") from error


_start()
