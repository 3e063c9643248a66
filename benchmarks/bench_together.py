"""Two processes at once on the same cores, against one alone: images a second of the bundled model on the CPU.

    python benchmarks/bench_together.py --json benchmarks/results/together.json

Every process does one kind of work again and again (drawing, likelihoods, training steps) until each has done it some
times and some seconds have passed. ``alone`` is one process with all threads, ``share`` the sum of what those at once
did, each against itself alone: 1 means that together they do what one does, 0.5 half of it. Settings take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import common
import torch
from bench_sample import make_model

from igpt_fast.__main__ import sleep_soon

COLUMNS = ("batch", "dtype", "work", "threads", "images_s", "spread", "share", "rounds")
WORKS = ("draw", "score", "train")
ENOUGH = 3  # times that every process has done its work, at least


def worker(work: str, batch: int, dtype: str, name: str) -> Callable[[], Any]:
    """What one process does, over and over, with the model of a name."""
    from igpt_fast.likelihood.nats import image_nats

    model = make_model(name, "float32" if dtype == "float32" else "bfloat16").requires_grad_(work == "train")
    config = model.config
    tokens = torch.randint(config.n_colours, (batch, config.n_positions))
    if work == "draw":
        sos, more = torch.full((batch, 1), config.vocab_size - 1), {"dtype": "int8"} if dtype == "int8" else {}
        return lambda: model.generate(sos, do_sample=True, seed=0, **more)
    if work == "score":
        return lambda: image_nats(model, tokens)
    steps = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        steps.step()
        steps.zero_grad()

    return step


def serve(work: str, batch: int, dtype: str, threads: int, name: str) -> None:
    """Writes the time at which each turn of the work was done, until nobody reads it."""
    torch.set_num_threads(threads)
    run = worker(work, batch, dtype, name)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt), torch.set_grad_enabled(work == "train"):
        run()
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            run()
            print(time.monotonic(), flush=True)


@contextlib.contextmanager
def started(works: tuple[str, ...], *words: str) -> Iterator[list[Any]]:
    found: list[subprocess.Popen[str]] = []
    sleep_soon()  # as `igpt` does
    try:
        for work in works:
            command, pipe = [sys.executable, __file__, "--serve", work, *words], subprocess.PIPE
            found.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        for process in found:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"a process that should {works} has failed")
        yield found
    finally:
        for process in found:
            process.kill()
        for process in found:
            process.communicate()


def rates(works: tuple[str, ...], batch: int, dtype: str, threads: int, options: argparse.Namespace) -> list[float]:
    """Images a second of each process."""
    words = ["--batch", str(batch), "--dtype", dtype, "--threads", str(threads)] + ["--dry-run"] * options.dry_run
    with started(works, *words) as found:
        stamps: list[list[float]] = [[] for _ in found]

        def read(which: int) -> None:
            stamps[which].extend(map(float, found[which].stdout))

        for process in found:
            process.stdin.write("go\n")
            process.stdin.flush()
        start = time.monotonic()
        readers = [Thread(target=read, args=(which,), daemon=True) for which in range(len(found))]
        for reader in readers:
            reader.start()
        while time.monotonic() - start < options.seconds or min(map(len, stamps)) < ENOUGH:
            time.sleep(0.05)
            if any(process.poll() is not None for process in found):
                raise SystemExit(f"a process that should {works} has ended")
        end = min(each[-1] for each in stamps)  # all of them ran until then
        within = [[stamp for stamp in each if stamp <= end] for each in stamps]
        return [batch * len(each) / (each[-1] - start) for each in within]


def bench(batch: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: each setting's rate of all its processes, and ``share``."""
    settings = [((work,), threads) for work in options.work for threads in options.threads]
    settings += [((a, b), t) for i, a in enumerate(options.work) for b in options.work[i:] for t in options.threads]
    got: dict[Any, list[list[float]]] = {setting: [] for setting in settings}
    for number in range(options.rounds):
        for setting in settings:
            got[setting].append(rates(setting[0], batch, dtype, setting[1], options))
            common.say(f"  round {number + 1}: {batch}, {setting}: {got[setting][-1]}")
    most = max(options.threads)
    alone = {work: statistics.median(each[0] for each in got[(work,), most]) for work in options.work}
    rows = []
    for works, threads in settings:
        sums = [sum(each) for each in got[works, threads]]
        shares = [
            sum(rate / alone[work] for work, rate in zip(works, each, strict=True)) for each in got[works, threads]
        ]
        row = {"batch": batch, "dtype": dtype, "work": " + ".join(works), "threads": threads, "rounds": len(sums)}
        row |= {"images_s": statistics.median(sums), "spread": max(sums) - min(sums)}
        rows.append(row | {"share": statistics.median(shares)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="what a turn lasts at least")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", nargs="+", choices=common.DTYPES, default=["float32"])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=["draw"])
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    parser.add_argument("--serve", choices=WORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run:
        options.rounds, options.seconds = 1, 0.0
    if options.serve:
        name = "tiny" if options.dry_run else "bundled"
        return serve(options.serve, options.batch[0], options.dtype[0], options.threads[0], name)
    rows = [row for batch in options.batch for dtype in options.dtype for row in bench(batch, dtype, options)]
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    main()
