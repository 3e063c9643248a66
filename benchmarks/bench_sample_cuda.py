"""Sampling on a GPU: tokens drawn by iGPT-S in bf16, against transformers eager.

    python benchmarks/bench_sample_cuda.py --json benchmarks/results/sample_cuda.json

Drawn are the 256 tokens around the middle of an image, in turns, from a context of 384: a step's time grows linearly
with its position, so that 1,024 such steps are an image's. Everybody's logits are checked first, against the model's in
float32. Each draws on the device in its own way: transformers' step with torch's softmax and multinomial, ours with
``draw`` and ``step_drawn``; nobody waits for the device within a turn.

- ``us``: microseconds a token of the whole batch; ``img_s``: images a second at 1,024 tokens each.
- ``of_kv_limit``: the time in which the bytes of weights and cache stream at the bandwidth that a copy was measured to
  have, over the row's.

``--dry-run`` lets everybody draw a few tokens with a tiny model on the CPU, and says nothing about speed.
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

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ops
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.reference import ReferenceDecoder

COLUMNS = ("batch", "name", "us", "us_spread", "img_s", "of_kv_limit", "times_hf", "error")
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}
ERROR = 3e-2  # relative root mean square that still counts as the same computation
TURNS, CONTEXT = 8, 3 / 8  # of a quarter of the positions; of the positions


def make_model(config: ImageGPTConfig, device: str, dtype: torch.dtype) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(config).eval().requires_grad_(False).to(device, dtype)


def candidates(model: ImageGPTForCausalImageModeling, batch: int, hf: bool) -> dict[str, Callable[[], Any]]:
    """What makes each decoder, the one that the others are compared with first."""
    capacity = model.config.n_positions
    found: dict[str, Callable[[], Any]] = {}
    if hf:
        found["transformers"] = lambda: peers.Transformers(peers.transformers_model(model).to(model.device))
    found["igpt_fast, PyTorch layers"] = lambda: ReferenceDecoder(model, batch, capacity)
    found["igpt_fast"] = lambda: make_decoder(model, batch, capacity)
    return found


class Drawing:
    """Goes on drawing from where it was, a number of tokens at a time."""

    def __init__(self, decoder: Any, context: Tensor) -> None:
        self.decoder, self.logits = decoder, decoder.prefill(context)
        self.streams = torch.arange(len(context), device=context.device)

    def next(self) -> Tensor:
        """One token more; the logits after it."""
        if getattr(self.decoder, "draws", False):
            self.decoder.draw(self.logits, 0, self.streams)
            self.logits = self.decoder.step_drawn()
        elif isinstance(self.decoder, peers.Transformers):
            self.logits = self.decoder.step(torch.multinomial(self.logits.float().softmax(dim=-1), 1)[:, 0])
        else:
            uniform = torch.rand(len(self.streams), device=self.streams.device)
            self.logits = self.decoder.step(ops.sample(self.logits, uniform))
        return self.logits

    def turn(self, count: int) -> None:
        for _ in range(count):
            self.next()
        if self.logits.is_cuda:
            torch.cuda.synchronize(self.logits.device)


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


def checked(name: str, make: Callable[[], Any], context: Tensor, want: Tensor) -> tuple[Any, float]:
    """A decoder whose logits after a context and one token are the wanted ones, and their error.

    Raises:
        ValueError: They are others.
    """
    decoder = make()
    decoder.prefill(context[:, :-1])
    error = common.relative_error(decoder.step(context[:, -1]), want)
    if not error < ERROR:
        raise ValueError(f"{name} is off by {error:.3g}")
    return decoder, error


def bench(config: ImageGPTConfig, batch: int, device: str, hf: bool, bandwidth: float | None) -> list[dict[str, Any]]:
    """The rows of a batch size."""
    common.say(f"sampling: batch {batch}")
    dtype, positions = torch.bfloat16, config.n_positions
    length, steps = int(CONTEXT * positions), positions // 4 // TURNS
    context = torch.randint(config.vocab_size - 1, (batch, length), device=device)
    context[:, 0] = config.sos_token_id
    exact = make_model(config, device, torch.float32)
    want = torch.cat([exact(part).logits[:, -1] for part in context.split(8)])
    del exact
    model = make_model(config, device, dtype)
    runs, errors = {}, {}
    for name, make in candidates(model, batch, hf).items():
        found = common.attempt(name, lambda n=name, m=make: checked(n, m, context, want))
        if found is None:
            continue
        decoder, errors[name] = found
        del decoder, found
        drawing = common.attempt(name, lambda m=make: Drawing(m(), context))
        if drawing is not None and common.attempt(name, drawing.next) is not None:  # captures, and makes workspaces
            runs[name] = lambda d=drawing: d.turn(steps)
    times = common.interleave(runs, TURNS, warm=True)
    weights = sum(parameter.numel() for parameter in model.transformer.h.parameters()) + model.lm_head.weight.numel()
    moved = 2 * (weights + batch * config.n_layer * config.n_embd * positions)  # bf16; half the positions, K and V
    rows = []
    for name, time in times.items():
        us = 1e3 * time["ms"] / steps
        row = {"batch": batch, "name": name, "us": us, "us_spread": 1e3 * time["ms_spread"] / steps}
        row |= {"img_s": batch / (us * 1e-6 * positions), "error": errors[name]}
        if bandwidth is not None:
            row["of_kv_limit"] = 1e6 * moved / bandwidth / us
        rows.append(row)
    theirs = [row["us"] for row in rows if row["name"] == "transformers"]
    for row in rows:
        row["times_hf"] = theirs[0] / row["us"] if theirs else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--dry-run", action="store_true", help="everybody a few tokens, a tiny model on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no GPU to measure; --dry-run runs without")
    hf = common.installed("transformers")
    config, device, bandwidth = ImageGPTConfig(), "cuda", None
    if options.dry_run:
        config, device, options.batch = ImageGPTConfig(**TINY), "cpu", options.batch[:1]
    else:
        bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in options.batch:
            rows += bench(config, batch, device, hf, bandwidth)
    print(common.table(rows, COLUMNS))
    if options.json:
        common.write(options.json, rows, bandwidth=bandwidth)


if __name__ == "__main__":
    main()
