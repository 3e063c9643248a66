"""The switches of the CUDA decoder, each of which a benchmark can flip against the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CudaOptions:
    """How ``CudaDecoder`` computes a step. What it draws is the same up to rounding, whichever way.

    Attributes:
        graphs: Capture each step in a CUDA graph. Not on the emulator, which has none.
        dependent, ring, cluster: As of ``backend.Launching``; ``dependent`` where all of a step's kernels are ours.
        halves: Compute two halves of the images on two streams of a graph, so that products of one hide behind the
            attention of the other; ``"auto"``: of 64 images or more whose products are torch's. Without graphs one half
            comes after the other.
        drawing: Draw the next token within the step's graph.
        gemv_rows: So many images, at most, go through the fused kernels, as far as those take them.
    """

    graphs: bool = True
    dependent: Literal["none", "late", "early"] = "early"
    ring: bool = True
    cluster: bool = True
    halves: bool | Literal["auto"] = "auto"
    drawing: bool = True
    gemv_rows: int = 64
