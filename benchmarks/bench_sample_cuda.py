"""Sampling on a GPU, in bf16: iGPT-S, M and L, a token of the whole batch at a time.

    python benchmarks/bench_sample_cuda.py --json benchmarks/results/sample_cuda.json
    python benchmarks/bench_sample_cuda.py --device cpu --quick --json /tmp/rows.json

Drawn are the tokens around the middle of an image, in turns: a token's time grows linearly with its position, so that
1,024 such tokens are an image's. Nobody waits for the device within a turn.

- ``sampling``: in turns with transformers, token by token and by its ``generate`` (both on its own, growing cache; a
  call of one token is taken off those of more), and with this project's PyTorch layers. ``gpt-fast``: in turns with an
  expert's PyTorch in that form. Everybody's logits are checked first, against the model's in float32, by the rule of
  the ops: an error of at most twice that of the plain expression in the same dtype, and one unit of rounding. The
  tokens that our engine draws are checked against those of the definition, from the same numbers, and the logits
  behind them as the others.
- ``steps``: the CUDA engine launched kernel by kernel, in CUDA graphs, and with dependent launches in them (up to 64
  rows, whose kernels have them); the logits of all are compared with each other, and of some rows with float32.
- ``ab``, or ``--ab`` for it alone: the CUDA engine as it is by default, in turns with itself with one switch of
  ``CudaOptions`` flipped, each that has a meaning for the rows; ``times`` over 1: the default is faster. Checked as
  ``steps``.
- ``profile``: the kernels of a token: microseconds and launches of each, and what the device was busy in all.

Columns: ``path``: how it drew; on a GPU nothing of ours is timed but the engine's own ``draw`` and ``step_drawn``.
``us``: microseconds a token of the whole batch. ``img_s``: images a second at an image's tokens each. ``of_kv_limit``:
the time in which the bytes of weights and cache stream at the bandwidth that a copy was measured to have, over the
row's. ``times``: our row over this peer's, or over the default's. ``off``: relative root mean square of the logits to
float32. ``interleaved``: whether all ways had room in memory together, and took turns. ``at``: which tokens are drawn,
where they are not those in the middle. ``error``: why a row has no time; the others are measured all the same. Every
row is in the file as soon as it is known. ``--quick``: a tiny model and a few tokens, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import common
import peers
import torch
from drawings import Compiled, Drawing, Generate, Ours, TokenByToken
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, use_backend
from igpt_fast.config import PRESETS
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cuda.decoder import CudaDecoder, why_not_cuda
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.memory import most_images
from igpt_fast.engines.reference import ReferenceDecoder

COLUMNS = ("part", "model", "batch", "at", "name", "path", "us", "us_spread", "img_s", "of_kv_limit", "times")
COLUMNS += ("interleaved", "off", "error")
NAMES = ("part", "model", "batch", "at", "name")  # by which a row is known
OURS, DEFAULT = "igpt_fast", ", default"
DTYPE = torch.bfloat16
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32, "vocab_size": 41}
FEW_ROWS, KERNELS = 8, 12  # rows that one tile of the fused kernels has; the longest kernels of a profile
EXACT_ROWS = 8  # of a batch, whose logits are compared with float32 after every way's tokens


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes:
        device: "cuda" or "cpu".
        models: Name -> configuration.
        batches: Part -> model -> its batch sizes.
        turns, tokens, warm: Turns of each, tokens in a turn, and tokens that are drawn before.
        call: Tokens in a turn of who sets up anew at each call; a turn of one token is taken off.
        bandwidth: Bytes a second of a copy; ``None``: not measured.
        rows: Where the rows go.
    """

    device: str
    models: dict[str, ImageGPTConfig]
    batches: dict[str, dict[str, tuple[int, ...]]]
    turns: int
    tokens: int
    call: int
    warm: int
    bandwidth: float | None
    rows: common.Rows

    def each(self, part: str) -> Iterator[tuple[str, ImageGPTConfig, int]]:
        """Model, configuration and batch size, one after another."""
        for name, sizes in self.batches[part].items():
            for batch in sizes:
                common.say(f"{part}: {name}, batch {batch}")
                yield name, self.models[name], batch


BATCHES: dict[str, dict[str, tuple[int, ...]]] = {
    "sampling": {"S": (1, 8, 32, 256), "M": (1, 32), "L": (1, 32)},
    "gpt-fast": {"S": (1, 32, 256)},  # each is compiled, which takes longer than all that is measured
    "steps": {"S": (1, 8, 32, 128, 256, 512, 1024), "M": (1, 8, 32, 128), "L": (1, 8, 32, 128)},
    "ab": {"S": (1, 8, 32, 256), "M": (1, 32), "L": (1, 32)},
    "profile": {"S": (1, 32, 256)},
}


# ---- Who draws ----------------------------------------------------------------------------------------------


def ours(model: ImageGPTForCausalImageModeling, batch: int) -> Ours:
    """The engine that generation takes; on a GPU the CUDA one alone."""
    if model.device.type == "cuda" and (reason := why_not_cuda(model)):
        raise TypeError(f"the CUDA engine does not take the model: {reason}")
    return Ours(make_decoder(model, batch, model.config.n_positions), model.device.type)


def rivals(model: ImageGPTForCausalImageModeling, batch: int) -> dict[str, dict[str, Callable[[], Drawing]]]:
    """Part -> name of one that ours is measured in turns with -> what makes it."""
    capacity = model.config.n_positions

    def transformers() -> peers.Transformers:
        if not common.installed("transformers"):
            raise ModuleNotFoundError("transformers is not installed")
        return peers.Transformers(peers.transformers_model(model))

    return {
        "sampling": {
            "transformers": lambda: TokenByToken(transformers()),
            "transformers, generate": lambda: Generate(transformers()),
            "PyTorch layers": lambda: TokenByToken(ReferenceDecoder(model, batch, capacity)),
        },
        "gpt-fast": {"gpt-fast form": lambda: Compiled(peers.GptFast(peers.Expert(model), batch, capacity))},
    }


# ---- Equality -----------------------------------------------------------------------------------------------


def make_model(config: ImageGPTConfig, device: str) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    with torch.device(device):
        model = ImageGPTForCausalImageModeling(config)
    return model.eval().requires_grad_(False).to(DTYPE)


def make_context(run: Run, config: ImageGPTConfig, batch: int, at: str | None = None) -> Tensor:
    """(B, T) tokens, SOS first, after which the timed ones lie around the middle, or are the first or last ones."""
    timed = run.turns * run.tokens
    length = {"first": 2, "last": config.n_positions - run.warm - timed}.get(
        at or "", config.n_positions // 2 - run.warm - timed // 2
    )
    generator = torch.Generator(run.device).manual_seed(1)
    context = torch.randint(config.n_colours, (batch, length), generator=generator, device=run.device)
    context[:, 0] = config.sos_token_id
    return context


def right(model: ImageGPTForCausalImageModeling, context: Tensor) -> tuple[Tensor, float]:
    """The logits in float32, and how far those of the plain expression in the model's dtype may be from them, twice."""
    with use_backend("reference"):
        exact = copy.deepcopy(model).float()
        want = torch.cat([exact(part, use_cache=False).logits[:, -1] for part in context.split(8)])
        plain = torch.cat([model(part, use_cache=False).logits[:, -1] for part in context.split(8)])
    return want, 2 * common.relative_error(plain, want) + torch.finfo(model.dtype).eps


def near(logits: Tensor, want: Tensor, limit: float, whose: str = "those in float32") -> float:
    """The relative error; raises Refused where it is above the limit."""
    off = common.relative_error(logits, want)
    if not off <= limit:
        raise common.Refused(f"its logits are off by {off:.2e} from {whose}; want {limit:.2e} at most")
    return off


def check_drawn(model: ImageGPTForCausalImageModeling, drawing: Ours, context: Tensor, count: int) -> None:
    """Draws tokens; raises Refused unless they are right, and the logits behind them, of the step that is timed."""
    tokens = torch.cat([context, drawing.check_tokens(count)], dim=1)
    near(some(drawing.logits), *right(model, some(tokens)), "those in float32 of what it drew")


def some(rows: Tensor) -> Tensor:
    """At most EXACT_ROWS, from the first to the last."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), EXACT_ROWS), device=rows.device).long()]


# ---- Parts --------------------------------------------------------------------------------------------------


def bench_sampling(run: Run, part: str) -> None:
    """Ours in turns with its peers."""
    for name, config, batch in run.each(part):
        row = {"part": part, "model": name, "batch": batch}
        group = row | {"name": f"{OURS} and others"}  # where what they share fails
        if not run.rows.has(group):
            run.rows.attempt(group, functools.partial(_sampling, run, row, config))
        tidy()


def _sampling(run: Run, row: dict[str, Any], config: ImageGPTConfig) -> None:
    batch, model = row["batch"], make_model(config, run.device)
    makers: dict[str, Callable[[], Drawing]] = {
        OURS: lambda: ours(model, batch),
        **rivals(model, batch)[row["part"]],
    }
    makers = {name: make for name, make in makers.items() if not run.rows.has(row | {"name": name})}
    context = make_context(run, config, batch)
    want, limit = right(model, context) if makers else (context, 0.0)

    def prepare(make: Callable[[], Drawing]) -> tuple[Drawing, dict[str, Any]]:
        start, drawing = time.perf_counter(), make()
        off = near(drawing.begin(context), want, limit)
        if isinstance(drawing, Ours):
            check_drawn(model, drawing, context, run.warm)
        else:
            drawing.turn(run.warm)
        return drawing, {"path": drawing.path, "off": off, "prepared_s": round(time.perf_counter() - start, 2)}

    drawings, more = {}, {}
    for name, make in makers.items():
        found = run.rows.attempt(row | {"name": name}, functools.partial(prepare, make))
        if found is not None:
            drawings[name], more[name] = found
    times = turns(run, row, drawings)
    mine = times.get(OURS, {}).get("us")
    for name, spent in times.items():
        found = row | {"name": name} | more[name] | spent | rates(run, config, batch, spent["us"])
        if mine is not None and name != OURS:
            found["times"] = spent["us"] / mine
        run.rows.add(found)


def bench_steps(run: Run, part: str) -> None:
    """The engine against itself: kernel by kernel, in graphs, with dependent launches; or with a switch flipped."""
    for name, config, batch in run.each(part):
        # What is best for few keys need not be for many, where one image has to fill the device.
        for at in (None, "first", "last") if part == "ab" and batch == 1 else (None,):
            row = {"part": part, "model": name, "batch": batch} | ({"at": at} if at else {})
            group = row | {"name": f"{OURS} and others"}  # where what they share fails
            if not run.rows.has(group):
                run.rows.attempt(group, functools.partial(_steps, run, row, config))
            tidy()


def variants(batch: int) -> dict[str, CudaOptions]:
    """Name -> how the engine goes on by a token."""
    ways = {"eager": CudaOptions(graphs=False, dependent="none"), "graph": CudaOptions(dependent="none")}
    return ways | ({"graph, dependent": CudaOptions()} if batch <= CudaOptions().gemv_rows else {})


def switches(batch: int) -> dict[str, CudaOptions]:
    """The default, and each way to flip one of its switches that means something for so many rows."""
    plain = CudaOptions()
    flipped: dict[str, dict[str, Any]] = {"no ring": {"ring": False}, "drawing apart": {"drawing": False}}
    flipped |= {"no cluster": {"cluster": False}} if batch <= FEW_ROWS else {}
    if batch <= plain.gemv_rows:
        flipped |= {"late": {"dependent": "late"}, "no dependent": {"dependent": "none"}}
    if FEW_ROWS < batch <= plain.gemv_rows:
        flipped["cuBLAS"] = {"gemv_rows": FEW_ROWS}
    if batch > FEW_ROWS:
        flipped |= {"halves": {"halves": True}, "whole": {"halves": False}}
        # Blocks that stay leave no room for another's products beside them.
        flipped |= {f"{name}, no ring": flipped[name] | {"ring": False} for name in ("halves", "whole")}
    return {"default": plain} | {name: replace(plain, **one) for name, one in flipped.items()}


def makers_of(run: Run, part: str, model: ImageGPTForCausalImageModeling, batch: int) -> dict[str, Callable[[], Ours]]:
    """Name -> what makes it. Without the CUDA kernels, on a CPU, whichever engine there is."""
    if why_not_cuda(model) is not None:
        return {OURS: lambda: ours(model, batch)}

    def make(options: CudaOptions) -> Ours:
        return Ours(CudaDecoder(model, batch, model.config.n_positions, options=options), run.device)

    every = (switches if part == "ab" else variants)(batch)
    return {f"{OURS}, {name}": functools.partial(make, options) for name, options in every.items()}


def _steps(run: Run, row: dict[str, Any], config: ImageGPTConfig) -> None:
    batch, model = row["batch"], make_model(config, run.device)
    context = make_context(run, config, batch, row.get("at"))
    room = most_images(model, primer=context.shape[1])
    every = makers_of(run, row["part"], model, batch)
    makers = {name: make for name, make in every.items() if not run.rows.has(row | {"name": name})}
    together = room is None or (len(makers) + 1) * batch <= room
    want, limit = right(model, some(context)) if makers else (context, 0.0)
    same = [r for r in run.rows.rows if row.items() <= r.items() and row.get("at") == r.get("at")]
    timed = [r["name"] for r in same if "error" not in r]
    seen: list[Tensor] = []
    if timed and makers:  # before this program was started anew
        seen.append(every[timed[0]]().begin(context).float())
        tidy()

    def prepare(make: Callable[[], Ours]) -> Ours:
        drawing = make()
        logits = drawing.begin(context).float()
        near(some(logits), want, limit)
        seen.append(logits)
        near(logits, seen[0], torch.finfo(DTYPE).eps, "those of the first way")
        check_drawn(model, drawing, context, run.warm)
        return drawing

    def measure(drawings: dict[str, Drawing]) -> None:
        for name, spent in turns(run, row, drawings).items():
            found = {"path": drawings[name].path, "interleaved": together} | spent
            found |= rates(run, config, batch, spent["us"])
            same = [r for r in run.rows.rows if row.get("at") == r.get("at") and row.items() <= r.items() and "us" in r]
            default = [r["us"] for r in same if r["name"].endswith(DEFAULT)]
            run.rows.add(row | {"name": name} | found | ({"times": spent["us"] / default[0]} if default else {}))

    drawings: dict[str, Drawing] = {}
    for name, make in makers.items():
        drawing = run.rows.attempt(row | {"name": name}, functools.partial(prepare, make))
        if drawing is not None:
            drawings[name] = drawing
        if not together:  # the memory has room for one
            measure(drawings)
            del drawing
            drawings.clear()
            tidy()
    measure(drawings)


def bench_profile(run: Run, part: str) -> None:
    """The kernels of a token."""
    for name, config, batch in run.each(part):
        row = {"part": part, "model": name, "batch": batch, "name": OURS}
        if not run.rows.has(row):
            run.rows.attempt(row, functools.partial(_profile, run, row, config))
        tidy()


def _profile(run: Run, row: dict[str, Any], config: ImageGPTConfig) -> None:
    model = make_model(config, run.device)
    drawing = ours(model, row["batch"])
    drawing.begin(make_context(run, config, row["batch"]))
    drawing.turn(run.warm)
    times = turns(run, row, {OURS: drawing})
    if not times:
        return
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if run.device == "cuda" else activity.CPU]) as profile:
        drawing.turn(run.tokens)
        wait(run.device)
    kernels = [
        {"name": event.key[:120], "us": spent / run.tokens, "launches": event.count / run.tokens}
        for event in profile.key_averages()
        if (spent := event.self_device_time_total if run.device == "cuda" else event.self_cpu_time_total) > 0
    ]
    kernels.sort(key=lambda kernel: -kernel["us"])
    more = {"path": drawing.path, "us": times[OURS]["us"], "busy_us": sum(kernel["us"] for kernel in kernels)}
    more["launches"] = sum(kernel["launches"] for kernel in kernels)
    run.rows.add(row | more | {"kernels": kernels[:KERNELS]})


Bench = Callable[[Run, str], None]
PARTS: dict[str, Bench] = dict(
    zip(BATCHES, (bench_sampling, bench_sampling, bench_steps, bench_steps, bench_profile), strict=True)
)


# ---- Time ---------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def tidy() -> None:
    """Gives back the memory of what is measured no more."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def turns(run: Run, row: dict[str, Any], drawings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Name -> ``us`` of a token and ``us_spread``. Who fails has a row with the error, and no time."""
    failed: set[str] = set()

    def turn(name: str, count: int) -> None:
        def tokens() -> bool:
            drawings[name].turn(count)
            wait(run.device)
            return True

        if name not in failed and run.rows.attempt(row | {"name": name}, tokens) is None:
            failed.add(name)

    counts = {name: run.call if isinstance(who, Generate) else run.tokens for name, who in drawings.items()}
    keys = [(name, n) for name, who in drawings.items() for n in (counts[name], *([1] * isinstance(who, Generate)))]
    spent = common.interleave({key: functools.partial(turn, *key) for key in keys}, run.turns, warm=True)
    found = {}
    for name in (name for name in drawings if name not in failed):
        count, us, spread = counts[name], *(1e3 * spent[name, counts[name]][key] for key in ("ms", "ms_spread"))
        if isinstance(drawings[name], Generate):  # less the set-up of a call, and one token
            one = spent[name, 1]
            count, us, spread = count - 1, us - 1e3 * one["ms"], spread + 1e3 * one["ms_spread"]
        if us > 0:
            found[name] = {"us": us / count, "us_spread": spread / count}
        else:
            run.rows.add(row | {"name": name, "error": f"{count} tokens more took no longer"})
    return found


def rates(run: Run, config: ImageGPTConfig, batch: int, us: float) -> dict[str, float]:
    """Images a second; the limit of the bandwidth over the row's time."""
    found = {"img_s": batch / (us * 1e-6 * config.n_positions)}
    if run.bandwidth:
        weights = config.n_layer * 12 * config.n_embd**2 + config.n_colours * config.n_embd
        moved = 2 * (
            weights + batch * config.n_layer * config.n_embd * config.n_positions
        )  # half of K and V's positions
        found["of_kv_limit"] = 1e6 * moved / run.bandwidth / us
    return found


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, the best of 20."""
    source, target = (torch.empty(1 << 28, device="cuda") for _ in range(2))
    best = 0.0
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() * 4 / (start.elapsed_time(end) / 1e3))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ab", action="store_true", help="the part ab alone")
    options = common.device_options(parser, PARTS)
    options.only = ["ab"] if options.ab else options.only
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    rows = common.Rows(options.json, NAMES, options.resume, bandwidth=bandwidth)
    models = {name: ImageGPTConfig(**PRESETS[name.lower()]) for name in ("S", "M", "L")}
    run = Run(options.device, models, BATCHES, turns=5, tokens=12, call=12, warm=10, bandwidth=bandwidth, rows=rows)
    if options.quick:
        few = {"sampling": (2,), "gpt-fast": (2,), "steps": (2, 9), "ab": (1, 9), "profile": (1,)}
        tiny = {"models": {"tiny": ImageGPTConfig(**TINY)}, "batches": {p: {"tiny": few[p]} for p in PARTS}}
        run = replace(run, **tiny, turns=2, tokens=2, call=6, warm=3)
    with torch.no_grad():
        for part in options.only:
            PARTS[part](run, part)
    print(common.table(rows.rows, COLUMNS))
    return rows.status(OURS)


if __name__ == "__main__":
    sys.exit(main())
