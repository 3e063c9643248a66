"""What is here and what runs: versions, build, devices, and the live implementation of every op, decoder and forward
pass, with the reason where a faster one is not.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import igpt_fast
from igpt_fast import backend
from igpt_fast.engines.choice import DECODERS, FORWARDS
from igpt_fast.engines.cpu.weights import no_native_decoder
from igpt_fast.engines.cuda.capture import failed
from igpt_fast.engines.cuda.decoder import no_cuda_decoder


def implementation(op: str, device_type: str) -> tuple[str, str]:
    """What runs for an op on ``"cpu"`` or ``"cuda"`` under the chosen backend, and why nothing faster does.

    Returns:
        (implementation, reason). Where the native one runs, the reason says what it covers, and is empty where that
        is everything.
    """
    entry, chosen = backend.OPS[op], backend.get_backend()
    if chosen == "reference" and entry.native:
        return "reference", "the backend 'reference' is chosen"
    if chosen not in ("auto", "reference", device_type) and entry.native:
        return "none", f"the backend {chosen!r} is chosen"
    if device_type not in entry.native:
        return entry.otherwise, f"there is no kernel for {device_type} tensors in this version"
    reason = backend.unavailable(device_type)
    if reason is not None:
        return "reference", reason
    assert backend._C is not None
    if device_type == "cpu" and entry.least_cpu == backend.NEVER:
        return entry.otherwise, "the kernel is not known to be faster on this processor"
    if device_type == "cpu":
        least = f"; {entry.least_cpu:,} elements or more" if entry.least_cpu else ""
        return f"native ({backend._C.cpu_isa()})", f"for {entry.covers_cpu}{least}" if entry.covers_cpu else ""
    return "native", f"for {entry.covers}"


# What runs for the decoders and forward passes that are plain PyTorch.
_PLAIN = {"reference": "the PyTorch model with a static key/value cache", "torch": "the PyTorch layers"}


def _engine(name: str, covers: str, no_native: Callable[[], str | None]) -> tuple[str, str]:
    """As ``implementation``, for a decoder or a forward pass; the reason says what it covers, where it runs."""
    if name in _PLAIN:
        return _PLAIN[name], covers
    if name == "cuda":
        if reason := backend.unavailable("cuda"):
            return "none", reason
        device = torch.device("cuda", torch.cuda.current_device())
        if reason := no_cuda_decoder(device):
            return "none", reason
        return "native", f"{failed[device][1]}; {covers}" if device in failed else covers
    if reason := no_native():
        return "none", reason
    assert backend._C is not None
    return f"native ({backend._C.cpu_isa()})", covers


def _products(name: str) -> tuple[str, str]:
    """What products of numbers of a dtype are computed in on the CPU, and why."""
    reason = backend.no_products(getattr(torch, name), torch.device("cpu"))
    return ("float32", reason) if reason else (name, "")


def _row(live: tuple[str, str]) -> dict[str, str]:
    return {"runs": live[0], "reason": live[1]}


def config() -> dict[str, Any]:
    """Versions, build, devices, instruction sets and the live implementation of every op, as plain values."""
    import numpy

    native = backend._C
    build: dict[str, Any] = {"compiled": native is not None}
    if native is None:
        build["reason"] = backend.native_reason
    else:
        build |= {"compiler": native.compiler, "openmp": native.openmp, "cuda": native.cuda_status}
        build["file"] = native.__file__
    devices = [{"name": "cpu", "processor": _processor(), "threads": torch.get_num_threads()}]
    if native is not None:
        mask, quota = native.cpu_limits()
        devices[0] |= {"affinity mask": mask or "unknown", "quota": round(quota, 2) or "none"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
            devices.append({"name": f"cuda:{i}", "processor": torch.cuda.get_device_name(i), "capability": capability})
    return {
        "versions": {
            "igpt_fast": igpt_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "build": build,
        "devices": devices,
        "isa": {"compiled": dict(native.cpu_isas()), "live": native.cpu_isa()}
        if native
        else {"compiled": {}, "live": None},
        "products": {name: _row(_products(name)) for name in ("bfloat16", "float16")},
        "backend": backend.get_backend(),
        "unavailable": {name: reason for name in ("cpu", "cuda") if (reason := backend.unavailable(name))},
        "ops": {op: {device: _row(implementation(op, device)) for device in ("cpu", "cuda")} for op in backend.OPS},
        "decoders": {name: _row(_engine(name, covers, no_native_decoder)) for name, covers in DECODERS.items()},
        "forwards": {name: _row(_engine(name, covers, no_native_decoder)) for name, covers in FORWARDS.items()},
    }


def format_config(report: dict[str, Any]) -> str:
    """``config()`` as text."""
    lines = [" ".join(f"{name} {version}" for name, version in report["versions"].items())]
    build = report["build"]
    if build["compiled"]:
        lines.append(f"build      {build['compiler']}; OpenMP {build['openmp']}; CUDA {build['cuda']}")
    else:
        lines.append(f"build      none: {build['reason']}")
    for device in report["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("name", "processor"))
        lines.append(f"device     {device['name']}: {device['processor']} ({rest})")
    isas = [name if has else f"{name} (not on this processor)" for name, has in report["isa"]["compiled"].items()]
    lines.append(f"isa        {report['isa']['live'] or 'none'} of {', '.join(isas) or 'none'}")
    lines += [f"products   of {name:<9} cpu: in {_line(live)}" for name, live in report["products"].items()]
    lines.append(f"backend    {report['backend']}")
    lines += [f"           {name} is not available: {reason}" for name, reason in report["unavailable"].items()]
    wide = 1 + max(map(len, [*report["ops"], *report["decoders"], *report["forwards"]]))
    for op, by_device in report["ops"].items():
        lines += [f"op         {op:<{wide}}{device:<5} {_line(live)}" for device, live in by_device.items()]
    lines += [f"decoder    {name:<{wide}}      {_line(live)}" for name, live in report["decoders"].items()]
    lines += [f"forward    {name:<{wide}}      {_line(live)}" for name, live in report["forwards"].items()]
    return "\n".join(lines)


def show_config() -> None:
    """Prints versions, build, devices, instruction sets and what runs for every op, decoder and forward pass."""
    print(format_config(config()))


def _line(live: dict[str, str]) -> str:
    return f"{live['runs']} [{live['reason']}]" if live["reason"] else live["runs"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
