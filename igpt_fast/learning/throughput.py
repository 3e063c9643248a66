"""How fast a run goes: images, tokens and operations a second, and what part that is of what the device can do.

Counted as nanoGPT and PaLM count it: 6 operations for each weight of a matrix product and token, forward and backward,
and 12 T n_embd for each layer and token of attention, as if it were not causal. What is computed again for less memory
does not count. Time is that of the steps alone, without evaluation and saving.

Source: "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022), appendix B; the peaks are those of
NVIDIA's data sheets, dense bfloat16.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# In order: the first that is found in the device's name.
_PEAKS = (
    (r"B200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"(?:H100|H200) NVL", 835e12),
    (r"H100|H200|GH200", 989.4e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 4090", 165.2e12),
)
_EMBEDDINGS = ("wte.weight", "wpe.weight")


def peak_operations(device: torch.device) -> float | None:
    """Operations a second in bfloat16 at the most; ``None`` where it is not known, as of a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})\b", name)), None)


def image_operations(model: Any) -> float:
    """Operations that an image costs, forward and backward."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(_EMBEDDINGS))
    pixels = config.n_positions
    return pixels * (6.0 * weights + 12.0 * config.n_layer * config.n_embd * pixels)


class Meter:
    """The figures of a run's steps since they were last asked for.

    Args:
        model: Before it is wrapped.
        device: Where it is trained.
        batch_size: Images of a step, of all processes together.
        processes: How many there are.
        bf16: Whether products are in bfloat16, which the peak is of; else in float32.
    """

    def __init__(self, model: Any, device: torch.device, batch_size: int, processes: int, bf16: bool) -> None:
        self._device, self._batch, self._processes = device, batch_size, processes
        self._pixels, self._operations = model.config.n_positions, image_operations(model)
        self._precision = "bfloat16" if bf16 else "float32"
        self._peak = peak_operations(device) if bf16 else None
        self._seconds = self._images = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, and the reading of its figures where they are read: a GPU computes behind the host, whose time
        is that of the steps from one reading to the next, and nothing here waits for it."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        self._images += self._batch

    def figures(self) -> dict[str, float | int | str | None]:
        """``mfu`` is ``None`` where the device's peak is not known, and in float32."""
        rate = self._images / self._seconds if self._seconds else 0.0
        self._seconds = self._images = 0.0
        operations = rate * self._operations
        return {
            "world_size": self._processes,
            "precision": self._precision,
            "images_per_second": round(rate, 2),
            "tokens_per_second": round(rate * self._pixels, 1),
            "flops_per_second": operations,
            "mfu": None if self._peak is None else round(operations / (self._peak * self._processes), 4),
            "peak_memory": self._memory(),
        }

    def _memory(self) -> int | None:
        """Bytes at the most so far: of the GPU, as torch's allocator has them; else of this process, where the system
        tells."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if sys.platform == "win32":
            return None
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
