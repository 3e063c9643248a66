"""Capturing in CUDA graphs beside whatever else a process does: streams, workspaces and failures.

*Streams.* torch hands its streams out in turn, 32 of them, and each may be anybody's: what another thread launches on
the one that is captured becomes part of the graph. So a step is captured on streams that the compiled module has made.

*Workspaces.* cuBLAS's has an address that a graph keeps, and torch has a table of them, by handle and stream, which
others may clear (``torch.compile`` does, around its own graphs), and of which a graph of newer versions clears its
stream's when it goes. A user's live graph may need what stands there, so nothing here clears it; and ours stand in a
pool of memory that lives as long as the streams, so that clearing leaves the memory where it is.

*Failures.* Where a capture cannot be ended, torch's allocator would go on as if it were captured.

Source: torch's c10/cuda/CUDAStream.h ("stream pool"), aten/src/ATen/cuda/CublasHandlePool.cpp and CUDAGraph.cpp, 2.6 to
2.13; github.com/pytorch/pytorch/issues/193402.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from igpt_fast import backend
from igpt_fast.locks import Lock

T = TypeVar("T")


class Place(NamedTuple):
    """Where one owner at a time captures: two streams, and the memory of the workspaces on them."""

    streams: tuple[torch.cuda.Stream, torch.cuda.Stream]
    workspaces: Any  # a torch.cuda.MemPool; None where torch's own allocator is not in use


_lock = Lock()  # one capture at a time: torch can do no more
# Device -> places that nobody has. There are as many as steps were ever captured side by side, and they are never given
# back: a stream's workspaces outlive it in torch's table.
_places: dict[torch.device, list[Place]] = {}

# Device -> what decoders go on without since a capture on it failed, as fields of ``CudaOptions``, and why.
failed: dict[torch.device, tuple[dict[str, Any], str]] = {}


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, of the compiled module, which never destroys it; without its kernels torch's."""
    kernels = backend.kernels("attention_decode", device)
    if kernels is None:
        return torch.cuda.Stream(device)
    return torch.cuda.ExternalStream(kernels.module.make_stream(kernels.device), device)


def take_place(device: torch.device, owner: object) -> Place:
    """A place, which goes to another when its owner is gone: a capture waits for all that the device does."""
    free = _places.setdefault(device, [])
    try:
        place = free.pop()
    except IndexError:
        native = torch.cuda.get_allocator_backend() == "native"
        with torch.cuda.device(device):  # a pool is of the device that is the current one when it is made
            first, second = (own_stream(device) for _ in range(2))
            place = Place((first, second), torch.cuda.MemPool() if native else None)
    weakref.finalize(owner, free.append, place)
    return place


def make_workspaces(place: Place, count: int, device: torch.device, dtype: torch.dtype) -> None:
    """Makes those that products of this thread need on a place's first streams, of cuBLAS and of cuBLASLt."""
    with _lock, torch.cuda.device(device):
        torch.cuda.synchronize()  # a graph of the place's last owner may still run, in the same workspace
        for stream in place.streams[:count]:
            own = place.workspaces is not None
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(place.workspaces) if own else nullcontext():
                small = torch.zeros(16, 16, dtype=dtype, device=device)
                torch.addmm(small[0], small @ small, small)


def capture(place: Place, device: torch.device, pool: Any, compute: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """What ``compute`` launches, as a graph, and what it returns; the graph's memory is in ``pool``.

    Raises:
        torch.OutOfMemoryError: Memory does not suffice.
        RuntimeError: Anything else of CUDA's; the streams and the allocator are as before.
        BaseException: Another one of ``compute``'s, such as Ctrl-C's, also where the capture could not end after it.
    """
    graph, outside = torch.cuda.CUDAGraph(), sys.exc_info()[1]
    first: BaseException | None = None
    # The outer stream: torch does not put it back where the end of a capture fails.
    with _lock, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool, place.streams[0], capture_error_mode="thread_local"):
                result = compute()
            return graph, result
        except RuntimeError as error:
            _end_recording(device, pool)
            first = error  # after which neither halves could be joined nor the capture end
            while (earlier := first.__context__) is not None and earlier is not outside:
                if first.__suppress_context__:
                    break
                first = earlier
            if first is error:
                raise
            if isinstance(first, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            if not isinstance(first, RuntimeError):
                raise first from None
            # A new one: the end's frame holds the other, which would hold that frame, and all would stay.
            kind = torch.OutOfMemoryError if isinstance(first, torch.OutOfMemoryError) else RuntimeError
            raise kind(str(first)) from None
        finally:
            first = None


def _end_recording(device: torch.device, pool: Any) -> None:
    """What torch's ``capture_end`` does after the end, which it leaves out where that fails."""
    older = "_cuda_endAllocateCurrentStreamToPool"  # its name in torch 2.6
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, older)
    with suppress(RuntimeError):  # it was left out not
        end(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


class Order:
    """The order of what is launched on one stream after another."""

    def __init__(self) -> None:
        self._last: torch.cuda.Stream | None = None

    def follow(self, device: torch.device, held: Callable[[], Iterable[Tensor]]) -> None:
        """What is launched from now on comes behind what was before, whatever streams those are.

        Args:
            device: Where; on a CPU there are no streams.
            held: The tensors that what is launched reads or writes, which were made on a stream before.
        """
        if device.type != "cuda":
            return
        if self._last is not None and self._last.cuda_stream == torch._C._cuda_getCurrentRawStream(device.index):
            return
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_stream(self._last)
            for tensor in held():
                tensor.record_stream(stream)  # its memory is nobody's before this stream is done with it, too
        self._last = stream


def numerics() -> tuple[Any, ...]:
    """The settings of torch's that say how products are rounded, and by whom they are computed; a graph has them."""
    matmul = torch.backends.cuda.matmul
    # The older name raises where the newer one was used.
    names = ["fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32", "allow_fp16_accumulation"]
    for dtype in ("fp16", "bf16"):
        names += [f"allow_{dtype}_reduced_precision_reduction{end}" for end in ("", "_split_k")]
    blas = torch.backends.cuda.preferred_blas_library()
    return *(getattr(matmul, name, None) for name in names), blas, torch.are_deterministic_algorithms_enabled()
