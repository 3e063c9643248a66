"""transformers' own ``generate`` on an accelerated model: against transformers as it is, and against ours.

    python benchmarks/bench_accelerate.py --json benchmarks/results/accelerate.json

iGPT-S with seeded weights, sampled with ``generate`` of each, which is called as a user calls it: the weights are
packed before, looked at in every call. Milliseconds a token over the first positions of an image, a call a turn. First
greedy choice gives the same tokens: in float32 all of them, in bfloat16, where near ties fall either way, as the
teacher-forced logits of transformers in float32 have it, to ``TIES`` of their spread.

``times_hf``: as many times as fast as transformers in the same dtype; ``of_ours``: its time over that of our own
``generate``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from peers import transformers_model
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, hf
from igpt_fast.engines.cpu import weights

COLUMNS = ("batch", "dtype", "name", "ms", "ms_min", "ms_spread", "cpu_ms", "times_hf", "of_ours", "rounds")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIES = 0.1
TINY = ImageGPTConfig(n_layer=2, n_embd=64, n_head=2, n_positions=64)
NAMES = ("transformers", "accelerated", "igpt_fast")


def check(tokens: dict[str, Tensor], exact: bool, model: Any) -> None:
    """Ends the program where the tokens are not the greedy choice."""
    with torch.no_grad():
        for name, drawn in tokens.items():
            logits = model(drawn[:, :-1]).logits
            chosen = logits.gather(2, drawn[:, 1:, None])[..., 0]
            behind = float(((logits.amax(2) - chosen) / logits.std(2)).max())
            if (exact and not torch.equal(drawn, tokens["transformers"])) or not behind <= (0.0 if exact else TIES):
                raise SystemExit(f"{name}: other tokens, {behind:.1e} of the logits' spread behind the best")


def bench(config: ImageGPTConfig, batch: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    common.say(f"batch {batch}, {dtype}")
    torch.manual_seed(0)
    whole = ImageGPTForCausalImageModeling(config).eval().requires_grad_(False)
    ours = copy.deepcopy(whole).to(DTYPES[dtype])
    plain = transformers_model(ours)
    fast = hf.accelerate(copy.deepcopy(plain))
    (row,) = [row for row in hf.accelerated(fast) if row.part == "generate"]
    if row.by != "cpu":
        raise SystemExit(f"accelerated: generate runs on {row.by}: {row.reason}")
    count = options.tokens or config.n_positions
    context = torch.full((batch, 1), config.vocab_size - 1)

    def run(model: Any, greedy: bool = False) -> Callable[[], Tensor]:
        how = {"do_sample": False} if greedy else {"do_sample": True, **({} if model is ours else {"top_k": 0})}
        return lambda: model.generate(context, max_length=count + 1, **how)

    models = dict(zip(NAMES, (plain, fast, ours), strict=True))
    check({name: run(model, True)() for name, model in models.items()}, dtype == "float32", transformers_model(whole))
    runs = {name: run(model) for name, model in models.items()}
    times = common.interleave(runs, options.rounds, warm=True, budget=options.seconds)
    common_part = {"batch": batch, "dtype": dtype, "tokens": count, "threads": torch.get_num_threads()}
    rows = []
    for name, time in times.items():
        per_token = {key: value / count if "ms" in key else value for key, value in time.items()}
        ratios = {
            "times_hf": times["transformers"]["ms"] / time["ms"],
            "of_ours": time["ms"] / times["igpt_fast"]["ms"],
        }
        rows.append({**common_part, "name": name, **per_token, **ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="no further turn of a candidate after so long")
    parser.add_argument("--tokens", type=int, default=None, help="of an image; all of them where it is not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="64 tokens, batch 1")
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    options = parser.parse_args()
    if reason := weights.no_native_decoder():
        raise SystemExit(f"there is no native decoder to measure: {reason}")
    torch.set_num_threads(options.threads)
    config = ImageGPTConfig()
    if options.quick:
        options.batch, options.tokens = [1], 64
    if options.dry_run:
        config, options.rounds, options.tokens = TINY, 1, 16
    rows = []
    for batch in options.batch:
        for dtype in options.dtype:
            rows += bench(config, batch, dtype, options)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    common.tune_allocator()
    main()
