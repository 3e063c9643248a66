"""From end to end: commands as they are typed, each a process of its own, on a GPU.

    python benchmarks/bench_commands.py --json benchmarks/results/commands.json
    python benchmarks/bench_commands.py --device cpu --quick --json /tmp/rows.json

Of a GPU's commands nothing but the CUDA kernels counts: ops that lack them raise, and another engine is an error.

``seconds``: of the whole process, Python, torch and the model's loading included. ``said``: what it printed of itself.
``error``: why there is no time. ``--quick``: next to nothing of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

NAMES, COLUMNS = ("part", "name"), ("part", "name", "seconds", "error")
NEEDED = ("numpy", "safetensors", "huggingface_hub", "tyro", "PIL", "tqdm")
SAID = ("engine", "dtype")  # besides numbers
LIMIT = 300.0  # seconds of a command
PARTS: dict[str, tuple[str, ...]] = {
    "sample": (
        "igpt sample -n 1 --seed 0",
        "igpt sample -n 256 --seed 0",
        "igpt sample -n 256 --seed 0 --dtype bfloat16",
    ),
    "train": ("igpt train --steps 50",),
}
QUICK: dict[str, tuple[str, ...]] = {
    "sample": ("igpt sample -n 1 --seed 0",),
    "train": ("igpt train --steps 2 --batch-size 2 --n-layer 1 --n-embd 32 --n-head 1",),
}


def run(command: str, device: str, folder: Path) -> dict[str, Any]:
    """Seconds of a command that writes into a folder, and what it printed.

    Raises:
        ModuleNotFoundError: A package that the command needs is not installed.
        RuntimeError: It failed, took too long, or drew on a GPU with another engine than the CUDA one.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")
    program, what, *rest = command.split()
    out = folder / ("run" if what == "train" else "samples.png")
    full = [sys.executable, "-m", "igpt_fast", what, *rest, "--out", str(out), "--device", device, "--json"]
    full += ["--backend", "cuda"] if device == "cuda" else []
    path = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    try:
        done = subprocess.run(
            full, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{program} {what} took more than {LIMIT:.0f} s") from None
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last[:300]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if device == "cuda" and said.get("engine", device) != "cuda":
        raise RuntimeError(f"the engine is {said['engine']!r}; want 'cuda'")
    kept = {name: value for name, value in said.items() if isinstance(value, int | float) or name in SAID}
    return {"seconds": seconds, "said": kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = common.device_options(parser, tuple(PARTS))
    rows = common.Rows(options.json, NAMES, options.resume)
    for part in options.only:
        for command in (QUICK if options.quick else PARTS)[part]:
            row = {"part": part, "name": command}
            if rows.has(row):
                continue
            common.say(command)
            with tempfile.TemporaryDirectory() as folder:
                found = rows.attempt(row, lambda c=command, f=folder: run(c, options.device, Path(f)))
            if found is not None:
                rows.add(row | found)
    print(common.table(rows.rows, COLUMNS))
    return rows.status("igpt")


if __name__ == "__main__":
    sys.exit(main())
