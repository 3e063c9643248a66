"""Likelihoods of images: this project against transformers fed SOS by hand, on the CPU.

    python benchmarks/bench_score.py --json benchmarks/results/score.json

The bundled model on its held-out emoji, 16x16 pixels; the nats of every pixel from tokens. transformers' way is what a
user of it writes: SOS in front, the logits of all positions, ``F.cross_entropy`` in float32. First the
nats are compared, each pixel's, with transformers' in float32: within 1e-4; in bfloat16 and int8 the mean within 0.01.

``times_same``: as many times faster than transformers in the same dtype, int8 than in bfloat16; ``times_hf``: than in
its best one.

``--heldout`` also gives the mean over all 380 emoji.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import peers
import torch
from torch import Tensor

from igpt_fast import Pipeline
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.files import BUNDLED
from igpt_fast.learning.data import load_tokens
from igpt_fast.likelihood.nats import image_nats, mean_nats

COLUMNS = ("batch", "dtype", "name", "ms", "ms_min", "ms_spread", "cpu_ms", "times_same", "times_hf", "images_s")
COLUMNS += ("error", "mean_error")
MOST_ERROR = {"float32": 1e-4, "bfloat16": 2.0, "int8": 2.0}  # of a pixel, in nats
MOST_MEAN_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-2}


def bench(tokens: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a batch."""
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for dtype in ("float32", "bfloat16"):
        model = Pipeline.from_pretrained(device="cpu", dtype=dtype).model
        theirs = peers.transformers_model(model)
        runs[dtype, "transformers"] = lambda theirs=theirs: peers.transformers_nats(theirs, tokens)
        runs[dtype, "igpt_fast"] = lambda model=model: image_nats(model, tokens)
    if forwards.why_not(model.transformer, tokens, dtype="int8") is None:
        runs["int8", "igpt_fast"] = lambda: image_nats(model, tokens, dtype="int8")
    want = runs["float32", "transformers"]()
    errors = {}
    for key, run in runs.items():
        common.say(f"  checking {common.label(key)}")
        got = run()
        errors[key] = float((got - want).abs().max()), abs(float(got.double().mean() - want.double().mean()))
        if not (errors[key][0] <= MOST_ERROR[key[0]] and errors[key][1] <= MOST_MEAN_ERROR[key[0]]):
            raise SystemExit(f"{common.label(key)}: its nats are wrong by {errors[key]}")
    rounds = options.rounds if len(tokens) > 1 else 5 * options.rounds
    times = common.interleave(runs, rounds, seconds=0.0, budget=options.seconds, warm=True)
    rows = []
    for (dtype, name), time in times.items():
        row = {"batch": len(tokens), "threads": torch.get_num_threads(), "dtype": dtype, "name": name, **time}
        row["times_same"] = times["bfloat16" if dtype == "int8" else dtype, "transformers"]["ms"] / time["ms"]
        row["images_s"] = 1e3 * len(tokens) / time["ms"]
        rows.append(row | {"error": errors[dtype, name][0], "mean_error": errors[dtype, name][1]})
    common.add_ratios(rows, ("batch",))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=60.0, help="a candidate takes no further turn after so long")
    parser.add_argument("--heldout", action="store_true", help="also the mean of all held-out emoji, in float32")
    parser.add_argument("--dry-run", action="store_true", help="one round")
    options = parser.parse_args()
    options.rounds = 1 if options.dry_run else options.rounds
    torch.set_num_threads(options.threads)
    data = load_tokens(BUNDLED.parent / "emoji16.npz")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in options.batch:
            common.say(f"batch {batch}")
            rows += bench(data.heldout_tokens[:batch].long(), options)
    print(common.table(rows, COLUMNS))
    more = {}
    if options.heldout:
        more["heldout_nats"] = mean_nats(Pipeline.from_pretrained(device="cpu").model, data.heldout_batches())
        print(f"held-out emoji: {more['heldout_nats']:.4f} nats/pixel")
    if options.json:
        common.write(options.json, rows, **more)


if __name__ == "__main__":
    common.tune_allocator()
    main()
