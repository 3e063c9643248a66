"""The whole network on a GPU against its peers: the forward pass, and a training step, of iGPT-S, M and L.

    python benchmarks/bench_model_cuda.py --json benchmarks/results/model_cuda.json
    python benchmarks/bench_model_cuda.py --device cpu --quick --json /tmp/rows.json

1,024 tokens an image, seeded weights, no dropout. Ours and an expert's plain PyTorch (peers.py), each eager and under
torch.compile, and transformers, whose attention writes all scores out. One after another, since a step of L takes the
memory of the GPU; ``compiled`` has both works of the two that are compiled, which takes longer than the measuring, and
of transformers, where there are no rows of it.

- ``forward``: the logits of every position, in bfloat16. They are checked first, against float32, by the rule of the
  ops: an error of at most twice that of the plain expression in bfloat16, and one unit of rounding.
- ``training``: forward, loss, backward and fused AdamW, under autocast to bfloat16 with float32 weights. The loss, the
  norm of the gradient and the token embedding's gradient are checked first, against float32 without autocast.

What is right is the expert's, which the tests hold against the model. ``path``: whose kernels ran; of ours on a GPU the
CUDA ones, or an op raises. ``ms``: of a batch, the median over turns; ``img_s``, ``tflop_s`` (of multiplications);
``times_hf``: as many times faster than transformers; ``off``: relative error of the logits, or of loss and norm;
``prepared_s``: seconds until the first result was checked, compiling among them; ``error``: why a row has no time.
Every row is in the file as soon as it is known.

``--quick``: a tiny model, two turns; where the device is no GPU, torch.compile traces and compiles nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import peers
import torch
import torch.nn.functional as F
from bench_model import GRADIENT_ERROR, LOSS_ERROR, NO_DROPOUT, Training, flops
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.config import PRESETS

NAMES = ("work", "model", "batch", "name")
COLUMNS = (
    "work",
    "model",
    "batch",
    "name",
    "path",
    "ms",
    "ms_spread",
    "img_s",
    "tflop_s",
    "times_hf",
    "off",
    "prepared_s",
)
COLUMNS += ("error",)
OURS, SUFFIX = "igpt_fast", ", compiled"
EAGER, COMPILED = ("transformers", OURS, "PyTorch"), ("transformers", OURS + SUFFIX, "PyTorch" + SUFFIX)
PARTS = ("forward", "training", "compiled")
# Model -> images of a batch: as many as leave transformers room for its scores.
BATCHES = {"forward": {"S": 32, "M": 16, "L": 8}, "training": {"S": 16, "M": 16, "L": 8}}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32, "vocab_size": 41}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A work at one size, on a device: what everybody's result is compared with, and how."""

    work: str
    model: str
    batch: int
    config: ImageGPTConfig
    device: torch.device

    @property
    def row(self) -> dict[str, Any]:
        return {"work": self.work, "model": self.model, "batch": self.batch}

    @functools.cached_property
    def tokens(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        shape = self.batch, self.config.n_positions
        return torch.randint(self.config.n_colours, shape, generator=generator, device=self.device)

    def make(self, dtype: torch.dtype) -> ImageGPTForCausalImageModeling:
        """In bfloat16 the weights of float32, rounded."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return ImageGPTForCausalImageModeling(self.config).eval().requires_grad_(False).to(dtype)

    def backend(self, name: str) -> str:
        """The backend under which a candidate runs: of ours on a GPU the one that raises where the kernels are not."""
        return "cuda" if name.startswith(OURS) and self.device.type == "cuda" else "auto"

    def path(self, name: str) -> str:
        """Whose kernels a candidate runs."""
        with backend.use_backend(self.backend(name)):
            kernels = backend.kernels("rms_norm", self.device) if name.startswith(OURS) else None
        return "PyTorch" if kernels is None else f"{kernels.kind} kernels"

    def compiled(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return peers.compiled(function, self.device) if name.endswith(SUFFIX) else function


def transformers_model(model: ImageGPTForCausalImageModeling) -> Any:
    if not common.installed("transformers"):
        raise ModuleNotFoundError("transformers is not installed")
    return peers.transformers_model(model)


# ---- Forward ------------------------------------------------------------------------------------------------


def forward(case: Case, name: str) -> Callable[[], Tensor]:
    """The call that makes a candidate's (B, T, K) logits."""
    model, tokens = case.make(DTYPE), case.tokens
    who = name.removesuffix(SUFFIX)
    if who == "PyTorch":
        return functools.partial(case.compiled(peers.Expert(model).requires_grad_(False), name), tokens)
    network: Any = transformers_model(model) if who == "transformers" else model
    call = case.compiled(lambda ids: network(ids, use_cache=False).logits, name)
    return lambda: call(tokens)


def right_logits(case: Case) -> tuple[Tensor, float]:
    """The logits in float32 of an eighth of the batch, and how far from them a result may be."""
    model, some = case.make(DTYPE), case.tokens[: max(1, case.batch // 8)]
    plain = peers.Expert(model)(some).float()
    want = peers.Expert(model.float())(some)
    return want, 2 * common.relative_error(plain, want) + torch.finfo(DTYPE).eps


def check_forward(run: Callable[[], Tensor], right: tuple[Tensor, float]) -> dict[str, float]:
    want, limit = right
    off = common.relative_error(run()[: len(want)], want)
    if not off <= limit:
        raise common.Refused(f"its logits are off by {off:.2e}; want {limit:.2e} at most")
    return {"off": off}


# ---- Training -----------------------------------------------------------------------------------------------


def training(case: Case, name: str) -> Training:
    """A candidate's step."""
    model, tokens = case.make(torch.float32).train().requires_grad_(True), case.tokens
    who = name.removesuffix(SUFFIX)
    network: Any = model
    if who == "PyTorch":
        network = peers.Expert(model).train().requires_grad_(True)
    elif who == "transformers":
        network = transformers_model(model).requires_grad_(True)

    def loss(ids: Tensor) -> Tensor:
        if who == "PyTorch":
            return F.cross_entropy(network(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return network(ids, labels=ids, use_cache=False).loss

    wte = network.wte if who == "PyTorch" else network.transformer.wte.weight
    call = case.compiled(loss, name)
    return Training(network, wte, lambda: call(tokens), case.backend(name))


def right_step(case: Case) -> tuple[float, float, Tensor]:
    return training(case, "PyTorch").result(autocast=False)


def check_training(run: Training, right: tuple[float, float, Tensor]) -> dict[str, float]:
    loss, norm, gradient = right
    got = run.result()
    found = {"off": max(abs(got[0] / loss - 1), abs(got[1] / norm - 1))}
    found["gradient"] = common.relative_error(got[2], gradient)
    if not (found["off"] <= LOSS_ERROR and found["gradient"] <= GRADIENT_ERROR):
        raise common.Refused(f"its loss and gradient are wrong by {found}")
    return found


# What makes a candidate, what is right, and the check.
WORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "forward": (forward, right_logits, check_forward),
    "training": (training, right_step, check_training),
}


# ---- Time ---------------------------------------------------------------------------------------------------


def measure(case: Case, name: str, right: Any, turns: int, seconds: float) -> dict[str, Any]:
    """A candidate's figures.

    Raises:
        Refused: Its result is wrong.
    """
    make, _, check = WORKS[case.work]
    start, run = time.perf_counter(), make(case, name)
    found = {"path": case.path(name)} | check(run, right)
    found["prepared_s"] = round(time.perf_counter() - start, 2)

    def several(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            run()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    several(2)  # allocates, and makes the optimizer's state
    count = max(1, min(100, round(seconds / several(1))))
    spent = common.interleave({name: lambda: several(count)}, turns, warm=True)[name]
    ms = spent["ms"] / count
    work = (3.0 if case.work == "training" else 1.0) * flops(case.config, case.batch)
    found |= {"ms": ms, "ms_spread": spent["ms_spread"] / count, "img_s": 1e3 * case.batch / ms}
    return found | {"tflop_s": work / ms / 1e9}


def tidy(device: torch.device) -> None:
    """Gives back the memory of the one before."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench(case: Case, names: tuple[str, ...], rows: common.Rows, turns: int, seconds: float) -> None:
    """The rows of some of the candidates."""
    shared = case.row | {"name": f"{OURS} and others"}  # where what is right cannot be computed
    makers = [name for name in names if not rows.has(case.row | {"name": name})]
    if not makers or rows.has(shared):
        return
    grad = torch.enable_grad if case.work == "training" else torch.no_grad
    with grad():
        common.say(f"{case.work}: {case.model}, batch {case.batch}; what is right")
        right = rows.attempt(shared, lambda: WORKS[case.work][1](case))
        for name in makers if right is not None else ():
            tidy(case.device)
            common.say(f"{case.work}: {case.model}, batch {case.batch}; {name}")
            row = case.row | {"name": name}
            with backend.use_backend(case.backend(name)):
                found = rows.attempt(row, functools.partial(measure, case, name, right, turns, seconds))
            if found is not None:
                theirs = [r["ms"] for r in rows.rows if case.row.items() <= r.items() and r["name"] == "transformers"
                          and "ms" in r]  # fmt: skip
                rows.add(row | found | ({"times_hf": theirs[0] / found["ms"]} if theirs else {}))
    tidy(case.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = common.device_options(parser, PARTS)
    rows = common.Rows(options.json, NAMES, options.resume)
    models = {name: ImageGPTConfig(**PRESETS[name.lower()], **NO_DROPOUT) for name in ("S", "M", "L")}
    batches, turns, seconds = BATCHES, 5, 0.3
    if options.quick:
        models, turns, seconds = {"tiny": ImageGPTConfig(**TINY, **NO_DROPOUT)}, 2, 0.0
        batches = {part: {"tiny": 2} for part in WORKS}
    for part in options.only:
        works, names = (tuple(WORKS), COMPILED) if part == "compiled" else ((part,), EAGER)
        for name, config in models.items():
            for work in works:
                case = Case(work, name, batches[work][name], config, torch.device(options.device))
                bench(case, names, rows, turns, seconds)
    print(common.table(rows.rows, COLUMNS))
    return rows.status(OURS)


if __name__ == "__main__":
    sys.exit(main())
