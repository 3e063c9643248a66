"""Completions of one image that share their primer's cache, against as many with a copy of it each.

    python benchmarks/bench_completions.py --json benchmarks/results/completions.json

iGPT-S with seeded weights, the upper half of an image given, whole completions as ``generate`` makes them: packing the
weights, reading the primer, 512 draws. The two take turns and draw with the same numbers; before that, the logits of
their first steps are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling
from igpt_fast.draws import Sampling
from igpt_fast.engines.cpu import weights
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.sampling.decoding import decode

COLUMNS = ("dtype", "threads", "n", "name", "seconds", "first_token", "step_ms_early", "step_ms_late", "times")
DTYPES = {"bf16": (torch.bfloat16, None), "int8": (torch.bfloat16, "int8")}
ERROR = 3e-2  # relative root-mean-square difference of logits that still counts as the same computation


def check(model: ImageGPTForCausalImageModeling, primer: Tensor, n: int, dtype: str | None) -> float:
    """The relative difference of the logits of a few steps; ends the program where they are not the same."""
    shared, apart = (CpuDecoder(model, batch, primer.shape[1] + 8, dtype) for batch in (1, n))
    shared.prefill(primer)
    shared.fork(n)
    apart.prefill(primer.expand(n, -1))
    tokens = torch.randint(512, (8, n), generator=torch.Generator().manual_seed(2))
    got, want = (torch.stack([decoder.step(row) for row in tokens]) for decoder in (shared, apart))
    error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    if not error <= ERROR:
        raise SystemExit(f"logits differ by {error:.1e}; the times mean nothing")
    return error


def whole(
    model: ImageGPTForCausalImageModeling, context: Tensor, uniforms: Tensor, dtype: str | None
) -> dict[str, float]:
    """Seconds of a completion and of its first token; milliseconds of a step in its first and last eighth."""
    times = [time.perf_counter()]
    decode(model, context, uniforms, Sampling(), lambda *_: times.append(time.perf_counter()), dtype)
    steps = [1e3 * (after - before) for before, after in pairwise(times[1:])]
    part = len(steps) // 8
    return {
        "seconds": times[-1] - times[0],
        "first_token": times[1] - times[0],
        "step_ms_early": statistics.median(steps[:part]),
        "step_ms_late": statistics.median(steps[-part:]),
    }


def bench(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype, name = DTYPES[kind]
    torch.manual_seed(0)
    model = ImageGPTForCausalImageModeling(ImageGPTConfig()).eval().to(dtype)
    half = model.config.n_positions // 2
    context = torch.nn.functional.pad(torch.randint(512, (1, half)), (1, 0), value=512)
    uniforms = torch.rand(options.n, half)
    error = check(model, context, options.n, name)
    contexts = {"shared": context, "a copy each": context.expand(options.n, -1)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contexts}
    for turn in range(options.rounds):
        common.say(f"{kind}: round {turn + 1} of {options.rounds}")
        for way, rows in contexts.items():
            found[way].append(whole(model, rows, uniforms, name))
    middle = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    row = {"dtype": kind, "threads": torch.get_num_threads(), "n": options.n, "error": error}
    slowest = middle["a copy each"]["seconds"]
    return [{**row, "name": way, **times, "times": slowest / times["seconds"]} for way, times in middle.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, default=8, help="completions")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    if reason := weights.no_native_decoder():
        raise SystemExit(f"there is no native decoder to measure: {reason}")
    torch.set_num_threads(options.threads)
    rows = []
    with torch.no_grad():
        for kind in options.dtype:
            rows += bench(kind, options)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    main()
