"""The ops against their peers.

    python benchmarks/bench_ops.py --json benchmarks/results/ops.json
    python benchmarks/bench_ops.py --device cuda --ops rms_norm gemv --json benchmarks/results/ops_cuda.json

On a GPU: the calls of cuda_ops.py, timed as cuda_timing.py says, with their share of what the GPU was measured to do at
its best. ``--dry-run`` makes every candidate of them once on the CPU, at small sizes, and compares the results.

On the CPU: the calls of cpu_ops.py against torch's expression, torch's own fused op and torch.compile, each result
checked first by its error to float64; and ``quantize``. Its peers: transformers' numpy path (``color_quantize`` of its
ImageGPT image processor, on a whole batch as the processor calls it, and cut into pieces that stay in the cache),
torch's ``cdist`` + ``argmin`` in chunks, scipy's ``cKDTree``. Every peer's tokens are checked first, by distance.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import workloads

from igpt_fast import backend, ops

COLUMNS = ("op", "content", "pixels", "dtype", "threads", "name", "ms", "ms_spread", "cpu_ms", "mpixel_s", "times_hf")
CUDA_COLUMNS = (
    *("op", "pass", "size", "name", "us", "us_spread", "gb_s", "of_bandwidth", "tflop_s", "of_bf16"),
    *("times_best_peer", "cold", "error"),
)
CPU_COLUMNS = (
    *("op", "pass", "size", "threads", "name", "ms", "ms_spread", "cpu_ms", "gb_s", "of_copy", "tflop_s"),
    *("times_best_peer", "error"),
)
CLUSTERS = 512


def images(content: str, count: int, side: int) -> torch.Tensor:
    """(count, side, side, 3) uint8: uniform noise, or crops of a photograph, turned and mirrored."""
    if content == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    from PIL import Image
    from skimage import data

    photograph = Image.fromarray(data.astronaut())
    whole = 16 * side if count > 1 else side
    pixels = torch.from_numpy(np.array(photograph.resize((whole, whole), Image.Resampling.BICUBIC)))
    return pixels.unfold(0, side, side).unfold(1, side, side).permute(0, 1, 3, 4, 2).reshape(-1, side, side, 3)[:count]


def palette() -> torch.Tensor:
    return torch.rand(CLUSTERS, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def chunked_cdist(x: torch.Tensor, clusters: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    return torch.cat([torch.cdist(part, clusters).argmin(dim=1) for part in x.split(chunk)])


def candidates(x: torch.Tensor, clusters: torch.Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """Everybody starts from what it takes best: ours from uint8 and float32, the peers from float32."""
    from scipy.spatial import cKDTree
    from threadpoolctl import threadpool_limits
    from transformers.models.imagegpt.image_processing_pil_imagegpt import color_quantize

    x = x.reshape(-1, 3).contiguous()
    x32 = x.float() / 127.5 - 1.0
    array, rows, tree = x32.numpy(), clusters.numpy(), cKDTree(clusters.numpy())

    def numpy_path(rows_at_once: int) -> np.ndarray:
        parts = [array[i : i + rows_at_once] for i in range(0, len(array), rows_at_once)]
        with threadpool_limits(threads):
            return np.concatenate([color_quantize(part, rows) for part in parts])

    return {
        "igpt_fast uint8": lambda: ops.quantize(x, clusters),
        "igpt_fast float32": lambda: ops.quantize(x32, clusters),
        # The processor hands its whole batch over at once; 512 distances a pixel, so a megapixel is cut to fit.
        "transformers numpy": lambda: numpy_path(1 << 18),
        "transformers numpy, cut": lambda: numpy_path(1 << 10),
        "torch cdist": lambda: chunked_cdist(x32, clusters),
        "scipy cKDTree": lambda: tree.query(array, workers=threads)[1],
    }


def check(name: str, tokens: Any, x: torch.Tensor, clusters: torch.Tensor, exact: torch.Tensor) -> None:
    """Raises if a candidate's tokens are farther away than the rounding of ``a^2 - 2ab + b^2`` in float32 explains."""
    colours = x.reshape(-1, 3).double() / 127.5 - 1.0
    mine = (colours - clusters.double()[torch.as_tensor(tokens).reshape(-1)]).square().sum(-1)
    best = (colours - clusters.double()[exact]).square().sum(-1)
    if float((mine - best).max()) > 1e-5:
        raise SystemExit(f"{name}: tokens are not those of the nearest clusters; its time means nothing")


def bench_quantize(content: str, count: int, side: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one content and size."""
    common.say(f"quantize: {content}, {count} of {side}x{side}, {threads} thread(s)")
    torch.set_num_threads(threads)
    x, clusters = images(content, count, side), palette()
    runs = candidates(x, clusters, threads)
    exact = ops.quantize(x.reshape(-1, 3), clusters)
    for name, run in runs.items():
        check(name, run(), x, clusters, exact)
    times = common.interleave(runs, rounds)
    pixels, hf = x.numel() // 3, times["transformers numpy"]["ms"]
    return [
        {
            "op": "quantize",
            "content": content,
            "pixels": pixels,
            "clusters": CLUSTERS,
            "dtype": "uint8" if "uint8" in name else "float32",
            "threads": threads,
            "name": name,
            **time,
            "mpixel_s": pixels / time["ms"] / 1e3,
            "times_hf": hf / time["ms"],
            "times_hf_cpu": times["transformers numpy"]["cpu_ms"] / time["cpu_ms"],
        }
        for name, time in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the 256 images, and S with one image, alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="with --device cuda: compares small results on the CPU")
    parser.add_argument("--resume", action="store_true", help="with --device cuda: go on with the rows that --json has")
    options = parser.parse_args()
    if options.resume and (options.json is None or options.device == "cpu"):
        parser.error("--resume: want --device cuda, and --json, the file that has the rows")
    if options.device == "cuda" and options.dry_run:
        return dry_run(options.ops)
    if options.device == "cuda":
        return bench_cuda(options.ops, options.json, options.resume)
    return bench_cpu(options)


def bench_cpu(options: argparse.Namespace) -> int:
    import cpu_ops
    import palettes

    if options.dry_run:
        raise SystemExit("--dry-run is for the calls of --device cuda")
    if reason := backend.unavailable("cpu"):
        common.say(f"without the compiled module, igpt_fast's rows are the reference's: {reason}")
    threads = list(dict.fromkeys(options.threads))
    rows = []
    if options.ops is None or "quantize" in options.ops:
        sizes = [(256, 32)] if options.quick else [(256, 32), (1, 1024)]
        for number in threads:
            for count, side in sizes:
                for content in ("random", "photograph"):
                    rows += bench_quantize(content, count, side, number, options.rounds)
        print(common.table(rows, COLUMNS))
        crowded = [row for number in threads for row in palettes.bench(number, options.rounds)]
        print(common.table(crowded, palettes.COLUMNS))
        rows += crowded
    copies = {number: cpu_ops.copy_gb_s(number) for number in threads}
    others: list[dict[str, Any]] = []
    for workload in workloads.workloads(cpu_ops.MAKERS, options.ops, cpu_ops.QUICK if options.quick else cpu_ops.SIZES):
        for number in threads:
            others += cpu_ops.bench(workload, number, options.rounds, copies[number])
    print(common.table(others, CPU_COLUMNS))
    if options.json:
        common.write(options.json, rows + others, copy_gb_s={str(number): speed for number, speed in copies.items()})
    return failures(others) if others else int(not rows)


def bench_cuda(names: list[str] | None, path: Path | None, resume: bool) -> int:
    """The rows of every workload are in the file as soon as they are known; one that fails costs no other. A peer that
    ended the CUDA context is left out of its workload after the new start.
    """
    import cuda_ops
    import cuda_timing

    if reason := backend.unavailable("cuda"):
        common.say(f"no kernel can be measured: {reason}")
        return 3
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = cuda_timing.measure_ceilings(device)
    common.say(f"copy {ceilings.copy_gb_s:.0f} GB/s, bf16 matmul {ceilings.bf16_tflop_s:.0f} TFLOP/s")
    rows = common.Rows(path, ("op", "size"), resume, ceilings=dataclasses.asdict(ceilings))
    for workload in workloads.workloads(cuda_ops.MAKERS, names, cuda_ops.SIZES):
        row = {"op": workload.op, "size": workload.size}
        found = [other for other in rows.rows if row.items() <= other.items()]
        lost = {other["name"] for other in found if other.get("lost")} & workload.peers.keys()
        if all(other["name"] in lost for other in found):
            peers = {name: peer for name, peer in workload.peers.items() if name not in lost}
            workload = dataclasses.replace(workload, peers=peers)
            measure = functools.partial(cuda_timing.bench, workload, device, ceilings)
            for found in rows.attempt(row | {"pass": "all", "name": workloads.OURS}, measure) or ():
                rows.add(found)
    print(common.table(rows.rows, CUDA_COLUMNS))
    return failures(rows.rows)


def dry_run(names: list[str] | None) -> int:
    """Every candidate of every op once, on the CPU."""
    import cuda_ops

    rows = []
    for workload in workloads.workloads(cuda_ops.MAKERS, names, cuda_ops.TINY):
        for direction in workloads.passes(workload):
            wrong = workloads.check(workload, torch.device("cpu"), direction)
            rows += [
                {"op": workload.op, "pass": direction, "size": workload.size, "name": name, "error": wrong.get(name)}
                for name in workloads.everybody(workload)
            ]
    print(common.table(rows, ("op", "pass", "size", "name", "error")))
    return int(not rows or any(row["error"] for row in rows))


def failures(rows: list[dict[str, Any]]) -> int:
    """1 if an op of ours is wrong or did not run; a peer may be missing."""
    wrong = [row for row in rows if row["name"] == workloads.OURS and "error" in row]
    for row in wrong:
        common.say(f"{row['op']} {row['pass']}, {row['size']}: {row['error']}")
    return int(bool(wrong) or not rows)


if __name__ == "__main__":
    sys.exit(main())
