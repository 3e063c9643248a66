"""What the benchmarks share: interleaved timing, the machine's description, and the result files.

Candidates take turns, round by round, so that a slow spell of the machine meets all of them; a figure is the median
over the rounds, beside the spread and the smallest. Ratios are taken within a run only.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def say(text: str) -> None:
    """Progress goes to stderr: stdout has the table alone."""
    print(text, file=sys.stderr, flush=True)


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, seconds: float = 0.05
) -> dict[str, dict[str, float]]:
    """Times callables in turns.

    Args:
        candidates: Name -> what to time. Each is warmed up once; their results are not compared here.
        rounds: Turns of each.
        seconds: A turn repeats a fast candidate until it has lasted about this long.

    Returns:
        Name -> ``ms`` (median), ``ms_min``, ``ms_spread`` (third minus first quartile), ``cpu_ms`` (median of the
        process's time on all cores; a busy machine lengthens ``ms``, and this much less), ``rounds``.
    """
    repeats = {}
    for name, run in candidates.items():
        say(f"  warming up {name}")
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-9)))
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        say(f"  round {number + 1} of {rounds}")
        for name, run in candidates.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                run()
            wall[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / repeats[name])
    return {name: _summary(wall[name], cpu[name]) for name in candidates}


def _summary(wall: Sequence[float], cpu: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(wall, n=4) if len(wall) > 1 else [wall[0]] * 3
    return {
        "ms": statistics.median(wall),
        "ms_min": min(wall),
        "ms_spread": quartiles[2] - quartiles[0],
        "cpu_ms": statistics.median(cpu),
        "rounds": len(wall),
    }


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    from igpt_fast import backend

    report = backend.config()
    device = report["devices"][-1]
    return {
        "commit": commit(),
        "processor": report["devices"][0]["processor"],
        "cores": os.cpu_count(),
        "isa": report["isa"]["live"],
        "device": device["processor"] if device["name"] != "cpu" else None,
        "build": {key: value for key, value in report["build"].items() if key != "file"},
        "versions": {**report["versions"], **_peers()},
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }


def _peers() -> dict[str, str]:
    """Versions of the peers that are installed."""
    versions = {}
    for name in ("transformers", "scipy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def commit() -> str:
    """The short hash, with ``+`` when files differ from it; "unknown" for a copy without ``.git``."""
    if not (ROOT / ".git").exists():  # git would answer for a repository around the copy
        return "unknown"
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if dirty else "")


def write(path: Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes the machine's description, ``more`` and the rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "rows": list(rows)}, indent=1) + "\n", "utf-8")
    say(f"wrote {path}")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as aligned text."""
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
