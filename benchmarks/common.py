"""What the benchmarks share: interleaved timing, the machine's description, and the result files.

Candidates take turns, round by round, so that a slow spell of the machine meets all of them; a figure is the median
over the rounds, beside the spread and the smallest. Ratios are taken within a run only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
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

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def say(text: str) -> None:
    """Progress goes to stderr: stdout has the table alone."""
    print(text, file=sys.stderr, flush=True)


# glibc gives large blocks back to the system and faults their pages in again, up to half of PyTorch's time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


# What holds the peers' libraries to the instruction set that IGPT_FAST_ISA chooses: oneDNN, torch's own kernels, MKL.
LIMITS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def tune_allocator() -> None:
    """Starts the program anew with an allocator that keeps its memory, for everybody who is measured, and with nobody
    beyond the instruction set that is asked for."""
    wanted = ALLOCATOR | LIMITS.get(os.environ.get("IGPT_FAST_ISA", ""), {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def plain_allocator() -> dict[str, str]:
    """The environment without ``tune_allocator``'s part."""
    return {name: value for name, value in os.environ.items() if name not in ALLOCATOR}


def interleave(
    candidates: Mapping[Any, Callable[[], Any]],
    rounds: int = 7,
    seconds: float = 0.05,
    *,
    warm: bool = False,
    budget: float = 60.0,
    settle: Mapping[Any, Callable[[], Any]] | None = None,
) -> dict[Any, dict[str, float]]:
    """Times callables in turns.

    Args:
        candidates: Name -> what to time. Their results are not compared here.
        rounds: Turns of each.
        seconds: A turn repeats a fast candidate until it has lasted about this long.
        warm: The candidates have run before, and one call makes a turn. Else each is warmed up.
        budget: Seconds after which a slow candidate takes no further turn.
        settle: What begins a candidate's turn, untimed: it finds caches and threads as another one left them.

    Returns:
        Name -> ``ms`` (median), ``ms_min``, ``ms_spread`` (third minus first quartile), ``cpu_ms`` (median of the
        process's time on all cores; a busy machine lengthens ``ms``, and this much less), ``rounds``.
    """
    repeats = dict.fromkeys(candidates, 1)
    for name, run in {} if warm else candidates.items():
        say(f"  warming up {label(name)}")
        took = _timed(run)
        took = _timed(run) if took < 5 else took
        repeats[name] = max(1, round(seconds / max(took, 1e-9)))
    wall: dict[Any, list[float]] = {name: [] for name in candidates}
    cpu: dict[Any, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        say(f"  round {number + 1} of {rounds}")
        for name, run in candidates.items():
            if sum(wall[name]) * repeats[name] > 1e3 * budget:
                continue
            if settle and name in settle:
                settle[name]()
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                run()
            wall[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / repeats[name])
    return {name: _summary(wall[name], cpu[name]) for name in candidates}


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def label(name: Any) -> str:
    """A candidate's name as one reads it: its parts, the dtype last."""
    return name if isinstance(name, str) else ", ".join(map(str, reversed(name)))


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
    from igpt_fast import environment

    report = environment.config()
    device = report["devices"][-1]
    return {
        "commit": commit(),
        "processor": report["devices"][0]["processor"],
        "family_model": _family_model(),
        "cores": os.cpu_count(),
        "isa": report["isa"]["live"],
        "device": device["processor"] if device["name"] != "cpu" else None,
        "build": {key: value for key, value in report["build"].items() if key != "file"},
        "versions": {**report["versions"], **_peers()},
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }


def _family_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's, such as "25, 17", which tell generations apart that have one name; ``None`` where none are."""
    if not cpuinfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in cpuinfo.read_text("utf-8").splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in lines.items()}
    return f"{found['cpu family']}, {found['model']}" if "cpu family" in found else None


def _peers() -> dict[str, str]:
    """Versions of the peers that are installed."""
    versions = {}
    for name in ("transformers", "scipy", "scikit-learn", "openvino", "nncf", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# From the most exact to the least: a candidate is compared with those that are at least as exact as it is.
DTYPES = ("float32", "bfloat16", "int8")
REFERENCE = "streaming read"


def add_ratios(rows: Sequence[dict[str, Any]], group: Sequence[str]) -> None:
    """Adds to rows of equal ``group`` columns, where they have a time:

    - ``times_hf``: as many times faster than transformers in its best dtype;
    - ``times_peer``: than the strongest of the others, transformers and this project aside, in the same dtype or a more
      exact one;
    - ``of_limit``: the roofline's time (``limit_ms``) over the row's.
    """
    for row in rows:
        if "ms" not in row:
            continue
        same = [other for other in rows if "ms" in other and all(other.get(c) == row.get(c) for c in group)]
        exact = DTYPES[: DTYPES.index(row["dtype"]) + 1]
        hf = [other["ms"] for other in same if other["name"].startswith("transformers")]
        peers = [
            other["ms"]
            for other in same
            if not other["name"].startswith(("transformers", "igpt_fast", REFERENCE)) and other["dtype"] in exact
        ]
        if hf:
            row["times_hf"] = min(hf) / row["ms"]
        if peers:
            row["times_peer"] = min(peers) / row["ms"]
        if row.get("limit_ms"):
            row["of_limit"] = row["limit_ms"] / row["ms"]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of ``want``."""
    return float((got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt())


class Refused(Exception):
    """A candidate whose result is wrong: its time means nothing."""


class Lost(Exception):
    """After a candidate's failure the CUDA context does not work: what fails from here on is that candidate's doing."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def check_context(name: str, text: str) -> None:
    """Raises Lost after a candidate's failure, unless others can go on."""
    if not context_works():
        raise Lost(name, text)


def attempt(name: Any, run: Callable[[], Any]) -> Any:
    """What ``run`` returns; ``None`` for a peer that fails or is refused, which is named on stderr.

    Raises:
        SystemExit: It is this project's.
    """
    try:
        return run()
    except Exception as error:  # a peer may fail in any way
        text = (
            f"{label(name)}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        )
        if "igpt_fast" in label(name):
            raise SystemExit(text) from error
        say(f"  left out: {text}")
        return None


def installed(name: str) -> bool:
    """Whether an optional peer's package is there; one that is not is named on stderr."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        say(f"without {name}, which is not installed: pip install 'igpt_fast[bench]'")
    return found


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
    replace(path, {"machine": machine(), **more, "rows": list(rows)})
    say(f"wrote {path}")


def replace(path: Path, content: Any) -> None:
    """Writes JSON in place of what a file has, at once: who is ended meanwhile leaves the old or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class Rows:
    """The rows of a run that may be cut short: each is in the file as soon as it is known.

    Args:
        path: The file; ``None`` for none.
        names: The columns by which a row is known.
        resume: Goes on with the rows that the file has.
        more: What the file says besides.
    """

    def __init__(self, path: Path | None, names: Sequence[str], resume: bool = False, **more: Any) -> None:
        self.path, self.names, self.more = path, names, {"machine": machine(), **more}
        self.rows: list[dict[str, Any]] = []
        if path is not None and resume:
            self.rows = json.loads(path.read_text("utf-8"))["rows"]
        elif path is not None:
            replace(path, {**self.more, "rows": []})  # those of an earlier run must not pass for this one's

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        if self.path is not None:
            replace(self.path, {**self.more, "rows": self.rows})

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether there is one of the same names."""
        return any(all(other.get(name) == row.get(name) for name in self.names) for other in self.rows)

    def attempt(self, row: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """What ``run`` returns; ``None`` where it fails, and the row, with the error, is all that it costs: of ``Lost``
        the candidate's that it names, with ``lost``.

        A failed kernel leaves a CUDA context in which nothing works any more: then the program starts anew, with
        ``--resume``, and goes on behind that row.
        """
        try:
            return run()
        except Exception as failure:  # whatever it is, the other rows are still measured
            text = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:300]}"
            if isinstance(failure, Lost):
                row = {**row, "name": failure.name, "lost": True}
        say(f"  {label(tuple(str(row[name]) for name in reversed(self.names) if name in row))}: {text}")
        self.add({**row, "error": text})
        if self.path is not None and not context_works():
            say("  the CUDA context is lost: starting anew")
            os.execve(sys.executable, [sys.executable, *sys.argv, "--resume"], dict(os.environ))
        return None

    def status(self, mine: str = "igpt_fast") -> int:
        """Of the program: 1 if one of our rows has an error, or there is no row; a peer may be missing."""
        wrong = [row for row in self.rows if "error" in row and row["name"].startswith(mine)]
        return int(bool(wrong) or not self.rows)


def chosen(names: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument's type: some of the names, with commas between."""

    def parse(text: str) -> list[str]:
        wanted = [name for name in text.split(",") if name]
        if unknown := [name for name in wanted if name not in names]:
            raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
        return [name for name in names if name in wanted]

    return parse


def device_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> argparse.Namespace:
    """The options of a benchmark that is for a GPU, and runs small without: device, quick, json, only, resume.

    Raises:
        SystemExit: A usage error; or 3, there is no GPU.
    """
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few turns")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file, as they come")
    parser.add_argument("--only", type=chosen(parts), default=list(parts), metavar="PART,...", help=", ".join(parts))
    parser.add_argument("--resume", action="store_true", help="go on with the rows that the file has")
    options = parser.parse_args()
    if options.resume and options.json is None:
        parser.error("--resume: want --json, the file that has the rows")
    if options.device == "cuda" and not torch.cuda.is_available():
        say("there is no GPU to measure; --device cpu --quick runs without")
        raise SystemExit(3)
    return options


def context_works() -> bool:
    """Whether torch can go on with its CUDA device, or has not begun to use one."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as aligned text."""
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
