"""Data sets that outgrow memory: tokens of many pictures, and how soon and in how much memory a run begins.

Makes JPEGs of 64x64, turns them into shards as ``igpt tokenize`` does, and takes the first step of a run from the
shards and from the directory itself, each in a process of its own. Memory is the sum of the resident sets of the
process and its children, shared pages counted in each, so that it is rather too large; processor time is theirs
together, which a busy machine changes less than the seconds.

    python benchmarks/bench_data.py --images 100000 --workers 2
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

FIRST_STEP = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.train import train
kind, data, out = sys.argv[1:]
if kind == "shards":
    from igpt_fast.learning.shards import ShardData
    images = ShardData(data)
else:
    from igpt_fast.learning.lazy import FolderData
    from igpt_fast.learning.sources.folder import Folder
    from igpt_fast.learning.tokenize import Taking
    images = FolderData(Folder.open(Path(data)), Taking(n_clusters=512))
opened = time.perf_counter() - start
train(images, out, TrainConfig(n_layer=2, n_embd=32, n_head=2), stop_after=1)
counts = {"images": images.n_train + images.n_heldout, "read": getattr(images, "n_read", None)}
print(json.dumps({"opened_s": opened, "first_step_s": time.perf_counter() - start, **counts}))
"""


def make(folder: Path, first: int, count: int) -> None:
    """Pictures whose colours differ from one to the next."""
    rng = np.random.default_rng(first)
    for i in range(first, first + count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:07d}.jpg", quality=85)


def measured(*command: str | Path) -> dict:
    """The object that a command prints, with its seconds, processor seconds and MiB at most."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], resident(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    printed, _ = process.communicate()
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {"wall_s": time.perf_counter() - start, "processor_s": spent, "most_mib": most[0]}
    return {**json.loads(printed), **figures}


def resident(pid: int) -> float:
    """MiB of a process and its children, of which some may end while they are counted."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):
        return 0.0
    return pages * resource.getpagesize() / (1 << 20) + sum(resident(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        folder = work / "images"
        folder.mkdir()
        starts = range(0, options.images, 1000)
        with ProcessPoolExecutor(options.workers) as pool:
            counts = [min(1000, options.images - start) for start in starts]
            list(pool.map(make, [folder] * len(starts), starts, counts))
        igpt = [sys.executable, "-m", "igpt_fast"]
        how = ["-k", "512", "--workers", str(options.workers), "--json"]
        rows = {"tokenize": measured(*igpt, "tokenize", folder, "--out", work / "shards", *how)}
        for kind, data in {"shards": work / "shards", "folder": folder}.items():
            rows[f"first step, {kind}"] = measured(sys.executable, "-c", FIRST_STEP, kind, data, work / kind[:1])
        for row, figures in rows.items():
            figures.pop("out", None)
            print(
                json.dumps({"row": row, **{k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}})
            )


if __name__ == "__main__":
    main()
