"""Which implementations exist, which one runs, and why.

An op has up to three: ``reference`` (plain PyTorch, always there), ``cpu`` (C++, for tensors on the CPU) and
``cuda`` (for tensors on a CUDA device). The chosen *backend* decides among them:

* ``auto``: the native implementation for the tensor's device where there is one, else the reference.
* ``reference``: always the reference.
* ``cpu``, ``cuda``: the native implementation; where the compiled module or the device lacks it, an op raises
  ``BackendUnavailableError`` instead of falling back.

It is set by ``set_backend`` for the process, by ``use_backend`` for a block, or at start by the environment variable
``IGPT_FAST_BACKEND``. ``IGPT_FAST_ISA`` picks the instruction set of the CPU ops.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch  # before _C, so that its OpenMP code joins torch's thread pool

import igpt_fast

BACKENDS = ("auto", "reference", "cpu", "cuda")
MIN_CUDA_CAPABILITY = (8, 0)

# The number of the interface of _C that this package speaks; csrc/bind/module.cpp has its twin.
INTERFACE = 14


@dataclass(frozen=True)
class Op:
    """Where an op has an implementation of our own, and what it does elsewhere.

    Attributes:
        native: Device types with a native implementation.
        covers: What the native implementation on a CUDA device takes; the rest goes the other way.
        otherwise: What of PyTorch runs where there is none.
        covers_cpu: As ``covers``, of the native implementation on the CPU; empty: everything.
        least_cpu: Elements of the first tensor from which that one serves it: below, a call costs as much as the work.
        least_queries_cpu: As ``least_cpu``, of attention: queries in bf16 without tiles; fp32 takes four times as many.
        fuses: A compiler can put its definition into one kernel with what stands beside it: ``dispatch.decomposes``.
    """

    native: tuple[str, ...] = ()
    covers: str = ""
    otherwise: str = "torch expression"
    covers_cpu: str = ""
    least_cpu: int = 0
    least_queries_cpu: int = 0
    fuses: bool = False


# Below, a kernel on the CPU is not a seventh faster than what torch has: benchmarks/bench_ops.py.
LEAST_CPU = 1 << 16
NEVER = 1 << 62  # as least_cpu: nowhere on this processor is the kernel known to be faster

# Every op of igpt_fast.ops: each file there adds the rows of its ops.
OPS: dict[str, Op] = {}


class BackendUnavailableError(RuntimeError):
    """The requested backend, or instruction set, is not there; the message says why."""


def _installed_module() -> Path | None:
    """The file of ``_C`` for this Python in an installed igpt_fast of this version."""
    names = {f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    for distribution in importlib.metadata.distributions(name="igpt_fast"):
        if distribution.version != igpt_fast.__version__:
            continue
        for file in distribution.files or ():
            if file.parent.name == "igpt_fast" and file.name in names:
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    return path
    return None


def _import_module() -> ModuleType:
    """``_C`` from beside this file, or else from where igpt_fast is installed.

    Python run from the root of the repository finds the sources there before an installed package, and a plain
    ``pip install`` leaves no compiled module among them.

    Raises:
        ImportError: There is none, it cannot be loaded, or it was built from other sources than these.
    """
    name = "igpt_fast._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        path = _installed_module() if error.name == name else None
        spec = importlib.util.spec_from_file_location(name, path) if path else None
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    built = getattr(module, "version", "?"), getattr(module, "interface", "?")
    wanted = igpt_fast.__version__, INTERFACE
    if built != wanted:
        sys.modules.pop(name, None)
        raise ImportError(
            f"{module.__file__} was built for igpt_fast {built[0]}, interface {built[1]}, and this is {wanted[0]}, "
            f"interface {wanted[1]}: install again"
        )
    return module


_C: ModuleType | None = None
native_reason = ""
try:
    _C = _import_module()
except ImportError as error:
    native_reason = f"the compiled module igpt_fast._C cannot be used: {error}"


def unavailable(backend: str) -> str | None:
    """Why ``"reference"``, ``"cpu"`` or ``"cuda"`` cannot run here; ``None`` when it can."""
    if backend == "reference":
        return None
    if _C is None:
        return native_reason
    if backend == "cpu":
        return None
    if torch.version.hip:
        return f"this torch is a build for ROCm {torch.version.hip}, for whose devices there are no kernels"
    if not _C.has_cuda:
        return f"the compiled module has no CUDA part ({_C.cuda_status})"
    if not torch.cuda.is_available():
        return "torch has no CUDA device" if torch.version.cuda else "this torch is a build without CUDA"
    return _too_old(torch.cuda.current_device())


@functools.cache
def _too_old(device_index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    if (major, minor) >= MIN_CUDA_CAPABILITY:
        return None
    want = ".".join(map(str, MIN_CUDA_CAPABILITY))
    return f"cuda:{device_index} has compute capability {major}.{minor}; want {want} or above"


_process_backend = "auto"
# A block's choice is of its own thread (or asyncio task), so that two threads do not undo each other's. A thread that
# is started inside a block begins with the process's choice.
_block_backend: ContextVar[str | None] = ContextVar("igpt_fast_backend", default=None)


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    reason = None if name == "auto" else unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")


def get_backend() -> str:
    """The chosen backend: the surrounding ``use_backend`` block's, or the process's."""
    return _block_backend.get() or _process_backend


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process. Inside a ``use_backend`` block it shows after the block.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``; see the module.

    Raises:
        ValueError: Another name.
        BackendUnavailableError: It cannot run here.
    """
    global _process_backend
    _check(name)
    _process_backend = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the backend for a ``with`` block, in the thread that runs it.

    An op with a gradient keeps the choice of its forward for its backward, which torch may run in another thread.

    Raises:
        ValueError: An unknown name.
        BackendUnavailableError: It cannot run here.
    """
    _check(name)
    token = _block_backend.set(name)
    try:
        yield
    finally:
        _block_backend.reset(token)


def keep_choice(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the backend that is chosen now, whenever and in whatever thread it is called.

    For what torch calls again in the backward, such as a block whose activations are recomputed.
    """
    name = get_backend()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        with use_backend(name):
            return function(*args, **kwargs)

    return chosen


@dataclass(frozen=True)
class Launching:
    """How kernels are launched on a CUDA device, those of a decode step and of attention: what a benchmark compares.

    Attributes:
        dependent: Whether, on sm_90, a launch may begin before the one before has ended: ``"late"`` when all of that
            one's blocks have read what they read, ``"early"`` when they have begun. For ``gemv`` and
            ``attention_decode``, whose kernels wait before they read what launches before them have written; ``gemv``
            reads weights and bias, and ``attention_decode`` by its ring the position, the starts, and the old keys
            and values, before they wait, so those must not come from launches that may still be running. No launch
            before the first of a step is one where that one is launched with ``"none"``.
        ring: Whether ``attention_decode`` copies the cache through a ring in shared memory, asynchronously, on sm_90
            and later; else it goes straight into registers. In float32 it always does.
        cluster: With ``ring``, whether the parts of a head's keys are put together within a cluster of blocks, on
            sm_90, where one has room; else by a kernel of its own.
        portable_attention: Whether ``causal_attention`` takes the kernels that every GPU runs, forward and backward,
            also where those for Hopper could. The backward keeps its forward's choice, but where it is compiled.
    """

    dependent: Literal["none", "late", "early"] = "none"
    ring: bool = False
    cluster: bool = False
    portable_attention: bool = False


_launching: ContextVar[Launching] = ContextVar("igpt_fast_launching", default=Launching())  # noqa: B039 - frozen


@contextmanager
def launching(how: Launching) -> Iterator[None]:
    """For a ``with`` block, in its thread: how kernels are launched."""
    token = _launching.set(how)
    try:
        yield
    finally:
        _launching.reset(token)


def get_launching() -> Launching:
    """The surrounding ``launching`` block's choice."""
    return _launching.get()


CompiledOps = Literal["plain", "opaque"]
_compiled_ops: ContextVar[CompiledOps] = ContextVar("igpt_fast_compiled_ops", default="plain")


@contextmanager
def compiled_ops(how: CompiledOps) -> Iterator[None]:
    """For a ``with`` block, in its thread: what torch.compile sees of the ops that it can fuse with their neighbours.

    Args:
        how: ``"plain"``: their definitions, as everywhere else; ``"opaque"``: the kernels, as single calls. A compiled
            function keeps what held when it was traced: ``torch.compiler.reset`` lets another be made.
    """
    token = _compiled_ops.set(how)
    try:
        yield
    finally:
        _compiled_ops.reset(token)


def get_compiled_ops() -> CompiledOps:
    """The surrounding ``compiled_ops`` block's choice."""
    return _compiled_ops.get()


class Kernels(NamedTuple):
    """What an op calls: the compiled module, whose functions of it, and where to launch."""

    module: ModuleType
    kind: str  # "cpu" or "cuda": which of the module's functions
    device: int  # number of the CUDA device
    stream: int  # the current one's address
    launching: Launching = Launching()

    def function(self, name: str) -> Callable[..., None]:
        """The module's function of this kind. Both kinds take the same arguments, by the same names."""
        return getattr(self.module, f"{name}_{self.kind}")

    def launch(self, name: str, tensors: dict[str, torch.Tensor | None], **arguments: Any) -> None:
        """Calls a function of this kind with the addresses of tensors by their names, 0 for none, and with the rest."""
        for key, tensor in tensors.items():
            arguments[key] = 0 if tensor is None else tensor.data_ptr()
        self.function(name)(**arguments, place=self.place)

    @property
    def dependent(self) -> int:
        """``Launching.dependent`` as the launchers take it."""
        return ("none", "late", "early").index(self.launching.dependent)

    @property
    def place(self) -> tuple[int, int] | int:
        """A function's argument of this name: where a CUDA one launches, how many threads one of the CPU may take."""
        return (self.device, self.stream) if self.kind == "cuda" else torch.get_num_threads()


# Set by the tests: the CUDA kernels compiled for the CPU, which then serve its tensors.
_emulated: ModuleType | None = None


@contextmanager
def emulate(module: ModuleType) -> Iterator[None]:
    """For a ``with`` block, of all threads: ``module``'s CUDA functions serve the tensors of the CPU. For tests."""
    global _emulated
    before, _emulated = _emulated, module
    try:
        yield
    finally:
        _emulated = before


def kernels(op: str, device: torch.device, forced: bool = False) -> Kernels | None:
    """The native implementation if ``op`` shall run there for tensors on ``device``, else ``None``: the reference.

    Args:
        op: A key of ``OPS``.
        device: Of the op's tensors.
        forced: Whatever backend is chosen; and where there is none, that is an error.

    Raises:
        BackendUnavailableError: The chosen backend is ``cpu`` or ``cuda`` and does not serve ``device``, or ``forced``.
    """
    chosen = "auto" if forced else get_backend()
    if chosen == "reference":
        return None
    if _emulated is not None and device.type == "cpu" and "cuda" in OPS[op].native:
        return Kernels(_emulated, "cuda", 0, 0, get_launching())
    if chosen not in ("auto", device.type):
        raise BackendUnavailableError(f"{op}: backend {chosen!r} is chosen, but the tensor is on {device}")
    reason = no_kernels(op, device)
    if reason is not None:
        if forced or (chosen == "cuda" and "cuda" in OPS[op].native):
            raise BackendUnavailableError(f"{op}: {reason}")
        return None
    assert _C is not None
    if device.type == "cpu":
        return Kernels(_C, "cpu", 0, 0)
    # Not torch.cuda.current_stream, which makes an object of it each time: this is on the way of every call.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return Kernels(_C, "cuda", device.index, stream, get_launching())


def no_kernels(op: str, device: torch.device) -> str | None:
    """Why the compiled module does not serve an op on a device."""
    if _C is None:
        return native_reason
    if device.type not in OPS[op].native:
        return f"there is no kernel for tensors on {device}"
    if device.type != "cuda":
        return None
    return _too_old(device.index) if _C.has_cuda and not torch.version.hip else unavailable("cuda")


def no_products(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why products of numbers of a dtype on a device are computed in float32; ``None`` where they are not.

    On a CPU that does not multiply such numbers torch's products of them take up to forty times as long. The
    instruction set that is in use decides; where there is no compiled module, none is known to lack bfloat16. The
    backend ``reference`` leaves all as it is.
    """
    if device.type != "cpu" or get_backend() == "reference":
        return None
    if dtype == torch.float16:
        return "this package multiplies no float16 on a CPU"
    if dtype != torch.bfloat16 or _C is None or _C.cpu_bf16_products():
        return None
    return f"the instruction set {_C.cpu_isa()!r} does not multiply bfloat16"


def show_config() -> None:
    """``igpt_fast.show_config``, by the name under which it is imported from here."""
    igpt_fast.show_config()


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
