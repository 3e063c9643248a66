"""Tables of all 2^24 colours for quantize's CUDA kernel: when one is built, how long it lives.

A table (32 MiB, ``csrc/cuda/quantize_table.cu``) belongs to a tensor of clusters. It is built from them on their device
when they have served as many pixels as it costs, stays there for the following calls, and goes with the tensor. Pixels
that come before it, or that it does not serve, are compared with every cluster; both ways give the same tokens.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igpt_fast.backend import Kernels
from igpt_fast.locks import Lock

ENTRIES = 1 << 24
MAX_CLUSTERS = 1 << 16  # an entry has 16 bits
MIN_CLUSTERS = 16  # with fewer, comparing with all of them is as fast as memory is

# Pixels times clusters after which a table is built: about as many comparisons as building one takes. Whoever goes on
# quantizing has waited for the work of two tables at most; whoever stops has lost none. An estimate from operation
# counts: 2^15 cells with 2 bounds a cluster, and 2^24 colours with about a dozen candidates each.
WORK = 1 << 29

# Tables at a time, on all devices: 128 MiB. The least recently used one makes room.
MAX_TABLES = 4


@dataclass
class _Entry:
    """What is known of a tensor of clusters."""

    clusters: weakref.ref[Tensor]
    state: tuple[Any, ...]
    pixels: int = 0
    table: Tensor | None = None
    stream: int = 0  # on which the table was built
    ready: torch.cuda.Event | None = None

    def use(self, device: torch.device) -> Tensor | None:
        """The table, once the current stream waits for what fills it."""
        if self.table is None or self.ready is None:
            return self.table
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != self.stream:
            stream.wait_event(self.ready)
            self.table.record_stream(stream)
        return self.table


class ColourTables:
    """The tables of a process, by tensor of clusters. Safe to call from several threads."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by id, the most recently used last
        self._lock = Lock()

    def __len__(self) -> int:
        """How many tables there are."""
        with self._lock:
            return sum(entry.table is not None for entry in list(self._entries.values()))

    def clear(self) -> None:
        """Forgets all tables and counts."""
        with self._lock:
            self._entries.clear()

    def get(self, clusters: Tensor, pixels: int, kernels: Kernels) -> Tensor | None:
        """The table to look ``pixels`` pixels up in, or ``None``: compare them with every cluster.

        ``None`` while the pixels that these clusters have served, times their number, are below ``WORK``; for fewer
        than ``MIN_CLUSTERS`` or more than ``MAX_CLUSTERS``; for an inference tensor, which does not count its changes;
        and while a CUDA graph is captured, since a replay must not depend on a table that may be gone by then.

        A table is built anew when its clusters have changed in place, which torch counts (``Tensor._version``), or have
        other memory. A change past that count, through ``.data`` or another library, is not seen.

        Args:
            clusters: (K, 3) float32, the very tensor of the caller: its identity is the key.
            pixels: Of this call.
            kernels: To build with, on its stream.
        """
        k = clusters.shape[0]
        if pixels == 0 or not MIN_CLUSTERS <= k <= MAX_CLUSTERS or clusters.is_inference():
            return None
        if clusters.is_cuda:
            with torch.cuda.device(clusters.device):
                if torch.cuda.is_current_stream_capturing():
                    return None
        with self._lock:
            entry = self._find(clusters)
            entry.pixels += pixels
            if entry.table is None and entry.pixels * k >= WORK:
                self._make_room()
                _build(entry, clusters, kernels)
            return entry.use(clusters.device)

    def _find(self, clusters: Tensor) -> _Entry:
        # The state differs when the values may.
        state = clusters._version, clusters.data_ptr(), clusters.shape, clusters.stride(), clusters.device
        key = id(clusters)
        entry = self._entries.pop(key, None)
        if entry is None or entry.state != state or entry.clusters() is not clusters:
            entry = _Entry(weakref.ref(clusters, lambda gone: self._forget(key, gone)), state)
        self._entries[key] = entry
        return entry

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        """Releases what belongs to a tensor that is gone, unless another one has its id by now."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.clusters is gone:
                del self._entries[key]

    def _make_room(self) -> None:
        """Releases the least recently used tables until one more may be built; their counts begin anew."""
        holders = [entry for entry in list(self._entries.values()) if entry.table is not None]
        for entry in holders[: max(0, len(holders) - MAX_TABLES + 1)]:
            entry.table, entry.ready, entry.pixels = None, None, 0


def _build(entry: _Entry, clusters: Tensor, kernels: Kernels) -> None:
    table = torch.empty(ENTRIES, dtype=torch.uint16, device=clusters.device)
    dense = clusters.contiguous()
    kernels.launch("quantize_table", {"clusters": dense, "table": table}, k=clusters.shape[0])
    entry.table, entry.stream = table, kernels.stream
    if clusters.is_cuda:
        entry.ready = torch.cuda.Event()
        entry.ready.record(torch.cuda.current_stream(clusters.device))


tables = ColourTables()
