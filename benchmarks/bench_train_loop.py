"""igpt_fast's training loop against one written by hand: what do its checks, log and figures cost?

    python benchmarks/bench_train_loop.py --rounds 20 --threads 2

Both train the same model on the same images with the same loss, AdamW and clipping. First their losses must be equal,
step by step. Then they take turns of some steps in one process; a turn of ours lies between two records of its log, and
contains all that it does there but evaluation and saving.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
import torch

from igpt_fast.learning import train as recipe
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.schedule import chosen_at, learning_rate
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.likelihood.nats import image_nats

COLUMNS = ("name", "ms", "ms_min", "ms_spread", "cpu_ms", "rounds", "ratio", "cpu_ratio")
NAMES = ("igpt_fast", "by hand")


def plain_loop(data: TokenData, config: TrainConfig) -> Iterator[float]:
    """As one would write it: the loss of each step."""
    model = recipe.new_model(data, config, NextPixel()).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    for step in range(config.steps):
        tokens, _ = data.train_batch(chosen_at(step, data.n_train, config))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = image_nats(model, tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        yield loss.item()


def now() -> tuple[float, float]:
    """Milliseconds that have gone by, and that this process has computed, which a busy machine lengthens much less."""
    return 1e3 * time.perf_counter(), 1e3 * time.process_time()


class Turns:
    """What our loop calls with each record: has the other one do as many steps, and takes the times of both."""

    def __init__(self, other: Iterator[float], steps: int) -> None:
        self._other, self._steps = other, steps
        self.times: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        self._since = now()

    def __call__(self, record: dict[str, Any]) -> None:
        middle = now()
        for _ in range(self._steps):
            loss = next(self._other)
        end = now()
        if abs(loss - record["nats"]) > 1e-5 * abs(loss):
            raise SystemExit(f"step {record['step']}: the loss is {record['nats']}, by hand {loss}")
        for name, a, b in zip(NAMES, (self._since, middle), (middle, end), strict=True):
            self.times[name].append(((b[0] - a[0]) / self._steps, (b[1] - a[1]) / self._steps))
        common.say(f"  step {record['step']}")
        self._since = now()


def bench(config: TrainConfig, data: TokenData, steps: int) -> list[dict[str, Any]]:
    turns = Turns(plain_loop(data, config), steps)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(recipe, "LOG_EVERY", steps):
        recipe.train(data, Path(folder) / "run", config, progress=turns)
    times = {name: found[1:] for name, found in turns.times.items()}  # the first turn warms up
    rows = []
    for name, found in times.items():
        wall, cpu = zip(*found, strict=True)
        quartiles = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
        ratios = [
            statistics.median(ours[i] / by_hand[i] for ours, by_hand in zip(found, times["by hand"], strict=True))
            for i in range(2)
        ]
        row = {"name": name, "ms": statistics.median(wall), "ms_min": min(wall), "cpu_ms": statistics.median(cpu)}
        row |= {"rounds": len(wall), "ms_spread": quartiles[2] - quartiles[0]}
        rows.append(row | {"ratio": ratios[0], "cpu_ratio": ratios[1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes: dict[str, Any] = {"n_layer": 4, "n_embd": 128, "n_head": 2, "batch_size": 8}
    if options.dry_run:
        sizes, options.rounds, options.steps = {"n_layer": 1, "n_embd": 32, "n_head": 2, "batch_size": 2}, 1, 2
    steps = options.steps * (options.rounds + 1)
    fixed: dict[str, Any] = {"flip": False, "shift": 0, "dropout": 0.0, "bf16": False}
    # Saved once, after the last turn.
    config = TrainConfig(**sizes, **fixed, steps=steps, save_every=steps + 1, eval_every=steps)
    tokens = torch.randint(0, 64, (256, 256), generator=torch.Generator().manual_seed(0))
    clusters = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
    rows = bench(config, TokenData(tokens, clusters, torch.zeros(256, dtype=torch.bool)), options.steps)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    common.tune_allocator()
    main()
