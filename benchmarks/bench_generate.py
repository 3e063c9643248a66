"""Decoding on the CPU against its peers: milliseconds a token, whole images, and memory.

    python benchmarks/bench_generate.py --json benchmarks/results/generate.json

iGPT-S with seeded weights. Peers: transformers, an expert's plain PyTorch (peers.py) eager, under torch.compile and
with torchao's int8 weights, OpenVINO, and this project's own PyTorch model. Everybody's logits are checked first,
against transformers in float32; a peer that is wrong, or fails, is named and left out.

- ``step``: one more token at a position, in the midst of an image. A turn goes on where the last one ended, so that all
  turns of all candidates lie around the position; it begins with four steps that are not timed, which bring the
  weights back into the processor's caches, from which the others' have driven them.
- ``image``: 1,024 tokens with sampling; transformers and this project by their own ``generate``, the others by a loop,
  as far as their steps were the fastest.
- ``memory``: the largest resident set of a fresh process that loads a checkpoint and draws an image, Python and torch
  included, in MB.

``of_limit``: the time in which the bytes of the weights and the cache stream through the processor, measured in turn
with the candidates, over the candidate's; 1 is the limit. For images the sum over the steps, by the ceilings that were
measured at the start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings as limits
import common
import peers
import torch
from ceilings import Ceilings, Work
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cpu import weights as weights_module
from igpt_fast.engines.reference import ReferenceDecoder

COLUMNS = ("work", "batch", "position", "dtype", "name", "ms", "ms_spread", "cpu_ms", "times_hf", "times_peer")
COLUMNS += ("of_limit", "error", "mb")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# Relative root-mean-square error of logits that still counts as the same computation.
ERRORS = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 5e-2}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}

SETTLE = 4  # steps, or reads, that begin a turn and are not timed

Key = tuple[str, str]  # dtype, name
Makers = dict[Key, Callable[[], Any]]


def make_model(config: ImageGPTConfig, dtype: str) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(config).eval().requires_grad_(False).to(DTYPES[dtype])


def decoders(config: ImageGPTConfig, batch: int, capacity: int, options: argparse.Namespace) -> Makers:
    """What makes each of them, transformers in float32 first."""
    made = {name: make_model(config, name) for name in DTYPES}
    found: Makers = {}
    for name, model in made.items():
        found[name, "transformers"] = lambda model=model: peers.Transformers(peers.transformers_model(model))
    for name, model in made.items():
        expert = peers.Expert(model)
        found[name, "PyTorch"] = lambda e=expert: peers.ExpertDecoder(e, batch, capacity, compiled=False)
        if options.compiled:
            found[name, "PyTorch, compiled"] = lambda e=expert: peers.ExpertDecoder(e, batch, capacity, compiled=True)
        if options.openvino:
            whole = peers.Expert(made["float32"])
            found[name, "OpenVINO"] = lambda name=name, e=whole: peers.OpenVino(e, batch, name)
        found[name, "igpt_fast, PyTorch"] = lambda model=model: ReferenceDecoder(model, batch, capacity)
        found[name, "igpt_fast"] = lambda model=model: make_decoder(model, batch, capacity)
    if options.openvino:
        found["int8", "OpenVINO"] = lambda: peers.OpenVino(peers.Expert(made["float32"]), batch, "int8")
    if options.torchao:
        for kind, dynamic in (("weights", False), ("dynamic", True)):
            found["int8", f"torchao, {kind}"] = lambda dynamic=dynamic: peers.ExpertDecoder(
                peers.quantized(peers.Expert(made["bfloat16"]), dynamic), batch, capacity, compiled=True
            )
    found["int8", "igpt_fast"] = lambda: make_decoder(made["bfloat16"], batch, capacity, "int8")
    return found


def moved(config: ImageGPTConfig, batch: int, position: int, dtype: str) -> Work:
    """What a step reads and multiplies: the weights once, and the cache of every sequence."""
    weights = config.n_layer * 12 * config.n_embd**2 + (config.vocab_size - 1) * config.n_embd
    cache = 2 * config.n_layer * position * config.n_embd
    return Work(read=BYTES[dtype] * (weights + batch * cache), flops=2.0 * batch * (weights + cache))


def check(key: Key, decoder: Any, tokens: Tensor, start: int, want: Tensor | None) -> tuple[Tensor, float]:
    """Reads the tokens, all after the first ``start`` by steps; the logits and their error."""
    common.say(f"  checking {common.label(key)}")
    decoder.prefill(tokens[:, :start])
    logits = torch.stack([decoder.step(column).float() for column in tokens[:, start:].unbind(1)], 1)
    error = common.relative_error(logits, logits if want is None else want)
    if not error <= ERRORS[key[0]]:
        raise common.Refused(f"its logits are wrong by {error:.1e}")
    return logits, error


def bench_steps(
    config: ImageGPTConfig, batch: int, position: int, measured: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds of a step around a position."""
    common.say(f"step: batch {batch}, position {position}")
    torch.compiler.reset()
    length, rounds = options.steps, options.rounds
    start = position - (length + SETTLE) * (rounds + 1) // 2
    total = start + length + rounds * (length + SETTLE)
    tokens = torch.randint(config.vocab_size - 1, (batch, total), generator=_seeded())
    runs: dict[Key, Callable[[], Any]] = {}
    settle: dict[Key, Callable[[], Any]] = {}
    errors: dict[Key, float] = {}
    works = {dtype: moved(config, batch, position, dtype) for dtype in BYTES}
    memory = limits.Memory(max(int(work.read) for work in works.values()), torch.get_num_threads())
    want = None
    for key, make in decoders(config, batch, tokens.shape[1], options).items():
        if key in options.left_out:
            continue

        def prepare(
            key: Key = key, make: Callable[[], Any] = make, want: Tensor | None = want
        ) -> tuple[Any, Tensor, float]:
            decoder = make()
            return decoder, *check(key, decoder, tokens[:, : start + length], start, want)

        if (ready := common.attempt(key, prepare)) is None:
            options.left_out.add(key)  # at other batches as well: it takes a minute to find out
            continue
        decoder, logits, errors[key] = ready
        want = logits if want is None else want
        settle[key], runs[key] = turns(decoder, tokens[:, start + length :].split(length + SETTLE, dim=1))
        if key[1] == "igpt_fast":  # its limit has the next turn, of the same spell of the machine
            bound, count = (key[0], common.REFERENCE), int(works[key[0]].read)
            settle[bound], runs[bound] = (
                lambda times=times, count=count: [memory.read(count) for _ in range(times)]
                for times in (SETTLE, length)
            )
    times = common.interleave(runs, rounds, warm=True, settle=settle)
    row = {"work": "step", "batch": batch, "position": position, "threads": torch.get_num_threads()}
    rows = []
    for (dtype, name), time in times.items():
        time = {k: v / length if "ms" in k else v for k, v in time.items()}
        read_ms = times[dtype, common.REFERENCE]["ms"] / length
        peak = measured.peak(dtype)
        limit = max(read_ms, works[dtype].flops / peak / 1e9 if peak else 0.0)
        rows.append(
            {**row, "dtype": dtype, "name": name, **time, "limit_ms": limit, "error": errors.get((dtype, name))}
        )
    common.add_ratios(rows, ("work", "batch", "position"))
    return rows


def turns(decoder: Any, parts: tuple[Tensor, ...]) -> tuple[Callable[[], None], Callable[[], None]]:
    """What reads the first tokens of the next part, and what reads the rest of it, by steps."""
    columns = (part.unbind(1) for part in parts)
    rest: list[Tensor] = []

    def settle() -> None:
        part = next(columns)
        for column in part[:SETTLE]:
            decoder.step(column)
        rest[:] = part[SETTLE:]

    def run() -> None:
        for column in rest:
            decoder.step(column)

    return settle, run


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def drawing(decoder: Any, context: Tensor, count: int) -> Callable[[], Tensor]:
    """The loop that one writes around a decoder."""

    def run() -> Tensor:
        decoder.restart()
        logits, tokens = decoder.prefill(context), [context[:, 0]]
        for position in range(count):
            tokens.append(torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0])
            if position + 1 < count:
                logits = decoder.step(tokens[-1])
        return torch.stack(tokens, 1)

    return run


def strongest(rows: list[dict[str, Any]], batch: int) -> set[Key]:
    """Who draws whole images: transformers and the plain expert in the dtype in which their steps were fastest, and of
    the others the fastest, with 8 bits and without."""
    steps = [row for row in rows if row["work"] == "step" and row["batch"] == batch]
    steps = [row for row in steps if not row["name"].startswith(("igpt_fast", common.REFERENCE))]
    plain = ("transformers", "PyTorch")
    others = [row for row in steps if row["name"] not in plain]
    kinds = [[row for row in steps if row["name"] == name] for name in plain]
    kinds += [[row for row in others if (row["dtype"] == "int8") == int8] for int8 in (True, False)]
    fastest = (min(kind, key=lambda row: row["ms"]) for kind in kinds if kind)
    return {(row["dtype"], row["name"]) for row in fastest}


def bench_images(
    config: ImageGPTConfig,
    batch: int,
    steps: list[dict[str, Any]],
    measured: Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Whole images by those whom ``strongest`` names, and by us."""
    common.say(f"image: batch {batch}")
    torch.compiler.reset()
    count = config.n_positions
    context = torch.full((batch, 1), config.vocab_size - 1)
    chosen = strongest(steps, batch)
    runs: dict[Key, Callable[[], Tensor]] = {}
    for name in DTYPES:
        model = make_model(config, name)
        if (name, "transformers") in chosen:
            theirs = peers.transformers_model(model)
            settings = {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(context)}
            runs[name, "transformers"] = lambda m=theirs, s=settings: m.generate(context, max_length=count + 1, **s)
        runs[name, "igpt_fast"] = lambda m=model: m.generate(context, do_sample=True, seed=0)
    runs["int8", "igpt_fast"] = lambda m=model: m.generate(context, do_sample=True, seed=0, dtype="int8")
    for key, make in decoders(config, batch, count, options).items():
        if key in chosen and key not in runs:
            decoder = common.attempt(key, make)
            if decoder is None or common.attempt(key, drawing(decoder, context, 2)) is None:  # the second step compiles
                continue
            runs[key] = drawing(decoder, context, count)

    def checked(key: Key, run: Callable[[], Tensor]) -> Callable[[], None]:
        def draw() -> None:
            tokens = run()
            if tokens.shape != (batch, count + 1) or int(tokens[:, 1:].max()) >= config.vocab_size - 1:
                raise SystemExit(f"{common.label(key)}: no image")

        return draw

    times = common.interleave(
        {key: checked(key, run) for key, run in runs.items()}, options.rounds, warm=True, budget=options.image_seconds
    )
    row = {"work": "image", "batch": batch, "threads": torch.get_num_threads()}
    rows = []
    for (dtype, name), time in times.items():
        limit = sum(measured.limit_ms(moved(config, batch, t, dtype), dtype) or 0.0 for t in range(count))
        rows.append({**row, "dtype": dtype, "name": name, **time, "limit_ms": limit})
    common.add_ratios(rows, ("work", "batch"))
    return rows


# What is run in a process of its own: no part of the benchmark is in its memory.
DRAW = """
import sys
import torch
if sys.argv[1] == "transformers":
    from transformers import ImageGPTForCausalImageModeling as Model
    more = {"attention_mask": torch.ones(1, 1, dtype=torch.int64), "top_k": 0}
else:
    from igpt_fast import ImageGPTForCausalImageModeling as Model
    more = {"dtype": "int8"} if sys.argv[3] == "int8" else {}
model = Model.from_pretrained(sys.argv[2], dtype=torch.float32 if sys.argv[3] == "float32" else torch.bfloat16).eval()
context = torch.full((1, 1), model.config.vocab_size - 1)
model.generate(context, max_length=model.config.n_positions + 1, do_sample=True, **more)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def bench_memory(config: ImageGPTConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest resident sets, with the allocator as the system has it."""
    kinds = [("int8", "igpt_fast")] if options.dry_run else [(dtype, "igpt_fast") for dtype in BYTES]
    kinds += [] if options.quick or options.dry_run else [("bfloat16", "transformers")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(config, "bfloat16").save_pretrained(folder)
        for dtype, name in kinds:
            common.say(f"memory: {name}, {dtype}")
            command = [sys.executable, "-c", DRAW, name, folder, dtype]
            printed = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=common.plain_allocator()
            )
            rows.append({"work": "memory", "batch": 1, "dtype": dtype, "name": name, "mb": int(printed.stdout) / 1e3})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--position", type=int, nargs="+", default=[512])
    parser.add_argument("--image-seconds", type=float, default=20.0, help="no further image after so long")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="nothing under torch.compile")
    parser.add_argument("--quick", action="store_true", help="batch 1, and no whole images")
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    options = parser.parse_args()
    if reason := weights_module.no_native_decoder():
        raise SystemExit(f"there is no native decoder to measure: {reason}")
    torch.set_num_threads(options.threads)
    options.openvino = common.installed("openvino") and common.installed("nncf")
    options.torchao = options.compiled and common.installed("torchao")
    options.left_out = set()
    config = ImageGPTConfig()
    if options.quick:
        options.batch = [1]
    if options.dry_run:
        config, options.rounds, options.steps, options.position = ImageGPTConfig(**TINY), 1, 2, [32]
    seconds = 0.01 if options.dry_run else 0.15
    measured = limits.measure(options.threads, (80, 160, 320), seconds)
    limits.report(measured)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in options.batch:
            steps = [row for at in options.position for row in bench_steps(config, batch, at, measured, options)]
            rows += steps
            if not options.quick:
                rows += bench_images(config, batch, steps, measured, options)
    rows += bench_memory(config, options)
    print(common.table(rows, COLUMNS))
    if not options.dry_run:
        measured.check_steady(limits.measure(options.threads, (80, 160, 320), seconds))
    if options.json:
        common.write(options.json, rows, ceilings=limits.report(measured))


if __name__ == "__main__":
    common.tune_allocator()
    main()
