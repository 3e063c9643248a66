"""The picture of a run's log: nats of training and held-out images by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from igpt_fast import files
from igpt_fast.learning.probe_result import PLOTS, need_matplotlib

_MAX_LINE = 1 << 16  # bytes of a record


def plot(log: Path, path: Path, *, overwrite: bool = True) -> None:
    """Draws every figure of the log that is in nats.

    Args:
        log: A run's ``log.jsonl``.
        path: A name that ends in .png, .svg or .pdf.
        overwrite: Whether it may exist.

    Raises:
        FileExistsError: It exists and may not.
        FileNotFoundError: There is no such log.
        ImportError: matplotlib is not installed.
        ValueError: Another suffix, or a log without a figure in nats.
    """
    if path.suffix.lower() not in PLOTS:
        raise ValueError(f"{path}: the name must end in {', '.join(PLOTS)}")
    need_matplotlib()
    from matplotlib.figure import Figure

    curves = _curves(log)
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes: Any = figure.subplots()
    for name, points in curves.items():
        steps, values = [step for step, _ in points], [value for _, value in points]
        heldout = name.startswith("heldout")
        look = {"marker": "o", "markersize": 3.5, "linewidth": 1.8} if heldout else {"linewidth": 1.0, "alpha": 0.6}
        title = name.replace("heldout", "held-out") if heldout else f"training {name}"
        last = f"{title.replace('_', ' ')}: {values[-1]:.4f}"
        axes.plot(steps, values, label=last, **look)
    # The first steps are far above all that follows: a few of them may be cut off.
    ordered = sorted(value for points in curves.values() for _, value in points)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)))]
    axes.set_ylim(low - 0.05 * (high - low or 1.0), high + 0.1 * (high - low or 1.0))
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with files.replacing(path, overwrite=overwrite) as partial:
        figure.savefig(partial, format=path.suffix.lower()[1:], dpi=150)


def _curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """Figure -> its (step, value), in the order of the log; lines that are none are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    with files.open_input(log) as file:
        while line := file.readline(_MAX_LINE):
            try:
                record = json.loads(line)
                named = {name: float(value) for name, value in record.items() if name.endswith("nats")}
                step = int(record["step"])
            except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
                continue
            for name, value in named.items():
                if math.isfinite(value):
                    found.setdefault(name, []).append((step, value))
    if not found:
        raise ValueError(f"{log}: has no figure in nats")
    return found
