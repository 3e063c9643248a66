"""Images a second on the CPU, as one asks for them: ``generate`` of transformers and of this project.

    python benchmarks/bench_sample.py --json benchmarks/results/sample.json

The bundled model (16x16 pixels) and iGPT-S with seeded weights (32x32); whole images, drawn from the full distribution,
as many together as the batch says; the weights have been packed before. Peers: transformers in the dtype in which it
draws faster, and this project's reference engine. Before that, both draw a greedy image in float32, and each has to
find the other's tokens the likeliest. ``--speculate``: at batch 1 also without guessing pixels ahead, which draws the
same (checked), in turn with the others; and how many pixels a step gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import peers
import torch
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.draws import Sampling
from igpt_fast.engines.cpu import weights
from igpt_fast.files import BUNDLED
from igpt_fast.sampling.decoding import decode
from igpt_fast.sampling.rules import RandomStreams

COLUMNS = (
    "model",
    "batch",
    "dtype",
    "name",
    "seconds",
    "seconds_spread",
    "images_s",
    "times_hf",
    "times_reference",
    "kept",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIE = 1e-3  # nats between two tokens that rounding may exchange
REFERENCE = "igpt_fast, reference"
IMAGES = 16  # one after the other, where guessing ahead is measured
PLAIN = "igpt_fast, speculate=False"
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}


def make_model(name: str, dtype: str) -> ImageGPTForCausalImageModeling:
    if name == "bundled":
        return ImageGPTForCausalImageModeling.from_pretrained(BUNDLED, dtype=DTYPES[dtype]).requires_grad_(False)
    torch.manual_seed(0)
    config = ImageGPTConfig() if name == "s" else ImageGPTConfig(**TINY)
    return ImageGPTForCausalImageModeling(config).eval().requires_grad_(False).to(DTYPES[dtype])


def theirs_draws(model: Any, context: Tensor, **settings: Any) -> Tensor:
    return model.generate(context, attention_mask=torch.ones_like(context), **settings)


def check(ours: ImageGPTForCausalImageModeling, theirs: Any) -> None:
    """Ends the program unless each finds the other's greedy image the likeliest, token by token."""
    length, sos = ours.config.n_positions + 1, ours.config.vocab_size - 1
    context = torch.full((1, 1), sos)
    greedy = {
        "transformers": theirs_draws(theirs, context, max_length=length, do_sample=False),
        "igpt_fast": ours.generate(context),
    }
    for reader, drawer in ((ours, "transformers"), (theirs, "igpt_fast")):
        tokens = greedy[drawer]
        logits = reader(tokens[:, :-1]).logits
        gap = logits.amax(-1) - logits.gather(2, tokens[:, 1:, None])[:, :, 0]
        if not float(gap.max()) <= TIE:
            raise SystemExit(f"{drawer} draws a token that is {float(gap.max()):.1e} nats from the likeliest")


def faster(models: dict[str, Any], batch: int) -> str:
    """The dtype in which transformers draws faster in the middle of an image."""
    config = next(iter(models.values())).config
    colours = config.vocab_size - 1 - getattr(config, "n_classes", 0)
    context = torch.randint(colours, (batch, config.n_positions // 2))
    seconds = {}
    for dtype, model in models.items():
        theirs_draws(model, context, max_new_tokens=2, do_sample=True, top_k=0)
        start = time.perf_counter()
        theirs_draws(model, context, max_new_tokens=8, do_sample=True, top_k=0)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


def candidates(
    models: dict[str, Any], theirs: dict[str, Any], batch: int, turns: int
) -> dict[tuple[str, str], Callable[[], Any]]:
    """What draws ``batch`` images, by dtype and name; this package once a turn, other ones each time."""
    config = models["float32"].config
    context = torch.full((batch, 1), config.vocab_size - 1)
    best = faster(theirs, batch)
    settings = {"max_length": config.n_positions + 1, "do_sample": True, "top_k": 0}

    def reference() -> None:
        with backend.use_backend("reference"):
            models["float32"].generate(context, do_sample=True, seed=0)

    found: dict[tuple[str, str], Callable[[], Any]] = {
        (best, "transformers"): lambda: theirs_draws(theirs[best], context, **settings),
        ("float32", REFERENCE): reference,
    }
    for dtype, model in models.items():
        found[dtype, "igpt_fast"] = drawing(model, turns, context)
    found["int8", "igpt_fast"] = drawing(models["bfloat16"], turns, context, dtype="int8")
    return found


def drawing(model: Any, turns: int, *context: Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: [model.generate(*context, do_sample=True, seed=seed, **options) for seed in range(turns)]


def without_speculation(models: dict[str, Any]) -> tuple[dict[Any, Callable[[], Any]], dict[str, float]]:
    """What draws one image position by position; by dtype the pixels that a step gives where they are guessed ahead.

    Ends the program where that draws another image.
    """
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    kept = {}
    for dtype, source, rounded in (("float32", "float32", None), ("int8", "bfloat16", "int8")):
        model = models[source]
        sos = torch.full((1, 1), model.config.sos_token_id)
        steps = 0
        for seed in range(IMAGES):
            numbers = RandomStreams(seed, torch.arange(1), 0, model.config.n_positions)
            drawn = [decode(model, sos, numbers, Sampling(), dtype=rounded, speculate=on) for on in (True, False)]
            if not torch.equal(drawn[0].tokens, drawn[1].tokens):
                raise SystemExit(f"{dtype}: another image is drawn where it is guessed ahead")
            steps += drawn[0].steps or drawn[0].tokens.numel()
        kept[dtype] = IMAGES * model.config.n_positions / steps
        found[dtype, PLAIN] = drawing(model, IMAGES, dtype=rounded, speculate=False)
    return found, kept


def bench(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    models = {dtype: make_model(name, dtype) for dtype in DTYPES}
    theirs = {dtype: peers.transformers_model(model).eval() for dtype, model in models.items()}
    common.say(f"{name}: checking")
    check(models["float32"], theirs["float32"])
    rows = []
    for batch in options.batch:
        common.say(f"{name}: batch {batch}")
        turns = IMAGES if options.speculate and batch == 1 else 1  # how well pixels are guessed, differs by image
        runs, kept = candidates(models, theirs, batch, turns), {}
        if turns > 1:
            more, kept = without_speculation(models)
            runs |= more
        times = common.interleave(runs, options.rounds, warm=True, budget=options.seconds)
        for (_, other), time_ in times.items():
            for figure in ("ms", "ms_spread") if other in ("igpt_fast", PLAIN) else ():
                time_[figure] /= turns
        base = {other: time["ms"] for (_, other), time in times.items() if other in ("transformers", REFERENCE)}
        for (dtype, other), time_ in times.items():
            row = {"model": name, "batch": batch, "dtype": dtype, "name": other, "threads": torch.get_num_threads()}
            row |= {"seconds": time_["ms"] / 1e3, "seconds_spread": time_["ms_spread"] / 1e3, "rounds": time_["rounds"]}
            row |= {"images_s": 1e3 * batch / time_["ms"], "times_hf": base["transformers"] / time_["ms"]}
            row |= {"kept": kept[dtype]} if other == "igpt_fast" and dtype in kept else {}
            rows.append(row | {"times_reference": base[REFERENCE] / time_["ms"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="a candidate takes no further turn after so long")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", nargs="+", choices=("bundled", "s"), default=["bundled", "s"])
    parser.add_argument("--speculate", action="store_true", help="at batch 1 also without guessing pixels ahead")
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    options = parser.parse_args()
    if reason := weights.no_native_decoder():
        raise SystemExit(f"there is no native decoder to measure: {reason}")
    torch.set_num_threads(options.threads)
    if options.dry_run:
        options.model, options.rounds = ["tiny"], 1
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in options.model:
            rows += bench(name, options)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows)


if __name__ == "__main__":
    common.tune_allocator()
    main()
