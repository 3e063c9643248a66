"""The whole network on the CPU against its peers: the forward pass, and a training step.

    python benchmarks/bench_model.py --json benchmarks/results/model.json

iGPT-S with seeded weights, 1,024 tokens an image, no dropout. Peers: transformers, an expert's plain PyTorch (peers.py)
eager and under torch.compile, OpenVINO, and this project's model on the plain PyTorch of its reference backend.

- ``forward``: the logits of every position. They are checked first, against transformers in float32.
- ``train``: forward, loss, backward and fused AdamW, in float32, and under autocast to bfloat16 with float32 weights.
  The loss and the gradient are checked first, against transformers in float32.

``of_limit``: the roofline's time over the candidate's. The roofline is the multiplications at the peak of the
processor's fastest unit for the dtype, measured at the start of the run, and for training a pass of AdamW over weights
and moments at the speed of a copy.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings as limits
import common
import peers
import torch
import torch.nn.functional as F
from bench_generate import DTYPES, ERRORS, TINY, Key, make_model
from ceilings import Ceilings, Work
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig, use_backend

COLUMNS = (
    "work",
    "batch",
    "dtype",
    "name",
    "ms",
    "ms_spread",
    "cpu_ms",
    "times_hf",
    "times_peer",
    "of_limit",
    "tflop_s",
)
COLUMNS += ("error", "gradient")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Of the loss and of the gradient's norm, relative; of the token embedding's gradient, relative root mean square.
LOSS_ERROR, GRADIENT_ERROR = 1e-2, 1e-1
TRAINING_ERRORS = {"float32": (1e-4, 1e-3), "bfloat16": (LOSS_ERROR, GRADIENT_ERROR)}
LEARNING_RATE = 1e-6  # the steps that are timed shall not move the weights far

Run = Callable[[], Any]


def flops(config: ImageGPTConfig, batch: int) -> float:
    """Of a forward pass: the linear layers, the half of attention that is not masked, the head."""
    length, width = config.n_positions, config.n_embd
    layer = 24.0 * length * width**2 + 2.0 * length * (length + 1) * width
    return batch * (config.n_layer * layer + 2.0 * length * width * (config.vocab_size - 1))


def weights(config: ImageGPTConfig) -> int:
    return config.n_layer * 12 * config.n_embd**2 + (2 * config.vocab_size - 1 + config.n_positions) * config.n_embd


def forwards(config: ImageGPTConfig, tokens: Tensor, options: argparse.Namespace) -> dict[Key, Callable[[], Run]]:
    """What makes each candidate, transformers in float32 first; a candidate returns logits."""
    found: dict[Key, Callable[[], Run]] = {}

    def ours(dtype: str, name: str) -> Run:
        model = make_model(config, dtype)

        def run() -> Tensor:
            with use_backend(name):
                return model(tokens, use_cache=False).logits

        return run

    def transformers(dtype: str) -> Run:
        model = peers.transformers_model(make_model(config, dtype))
        return lambda: model(tokens, use_cache=False).logits

    def expert(dtype: str, compiled: bool) -> Run:
        model = peers.Expert(make_model(config, dtype)).requires_grad_(False)
        call = peers.compile_frozen(model) if compiled else model
        return lambda: call(tokens)

    def openvino(dtype: str) -> Run:
        import openvino as ov

        model = ov.convert_model(
            peers.Expert(make_model(config, "float32")), example_input=tokens, input=[list(tokens.shape)]
        )
        request = peers.compile_openvino(model, dtype).create_infer_request()
        return lambda: torch.from_numpy(request.infer([tokens.numpy()])[0])

    for dtype in options.dtype:
        found[dtype, "transformers"] = lambda dtype=dtype: transformers(dtype)
    for dtype in options.dtype:
        found[dtype, "PyTorch"] = lambda dtype=dtype: expert(dtype, False)
        if options.compiled:
            found[dtype, "PyTorch, compiled"] = lambda dtype=dtype: expert(dtype, True)
        found[dtype, "igpt_fast, PyTorch"] = lambda dtype=dtype: ours(dtype, "reference")
        found[dtype, "igpt_fast"] = lambda dtype=dtype: ours(dtype, "auto")
        if options.openvino:
            found[dtype, "OpenVINO"] = lambda dtype=dtype: openvino(dtype)
    return found


def bench_forward(
    config: ImageGPTConfig, batch: int, measured: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds of the logits of a batch."""
    common.say(f"forward: batch {batch}")
    torch.compiler.reset()
    tokens = torch.randint(
        config.vocab_size - 1, (batch, config.n_positions), generator=torch.Generator().manual_seed(1)
    )
    runs: dict[Key, Run] = {}
    errors: dict[Key, float] = {}
    want = None
    for key, make in forwards(config, tokens, options).items():
        common.say(f"  checking {common.label(key)}")

        def prepare(
            key: Key = key, make: Callable[[], Run] = make, want: Tensor | None = want
        ) -> tuple[Run, Tensor, float]:
            run = make()
            logits = run().float()
            error = common.relative_error(logits, logits if want is None else want)
            if not error <= ERRORS[key[0]]:
                raise common.Refused(f"its logits are wrong by {error:.1e}")
            return run, logits, error

        if (ready := common.attempt(key, prepare)) is not None:
            runs[key], logits, errors[key] = ready
            want = logits if want is None else want
    times = common.interleave(runs, options.rounds, budget=options.seconds, warm=True)
    work = Work(flops=flops(config, batch))
    return finish("forward", batch, times, work, measured, {key: {"error": error} for key, error in errors.items()})


def finish(
    what: str,
    batch: int,
    times: dict[Key, dict[str, float]],
    work: Work,
    measured: Ceilings,
    more: dict[Key, dict[str, float]],
) -> list[dict[str, Any]]:
    rows = []
    for (dtype, name), time in times.items():
        row = {"work": what, "batch": batch, "threads": measured.threads, "dtype": dtype, "name": name, **time}
        row |= {"limit_ms": measured.limit_ms(work, dtype), "tflop_s": work.flops / time["ms"] / 1e9}
        rows.append(row | more[dtype, name])
    common.add_ratios(rows, ("work", "batch"))
    return rows


class Training:
    """A training step.

    Args:
        model: With gradients.
        wte: The weight of the token embedding, whose gradient everything else's passes through on its way.
        loss: Of its parameters, as they are now.
        backend: The one that this project's ops use.
    """

    autocast = True  # to bfloat16

    def __init__(self, model: nn.Module, wte: nn.Parameter, loss: Callable[[], Tensor], backend: str = "auto") -> None:
        self.loss, self.wte, self.backend, self.parameters = loss, wte, backend, list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)

    def backward(self, autocast: bool) -> Tensor:
        """Computes the gradients; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with use_backend(self.backend):
            with torch.autocast(self.wte.device.type, torch.bfloat16, enabled=autocast):
                loss = self.loss()
            loss.backward()
        return loss.detach()

    def result(self, autocast: bool | None = None) -> tuple[float, float, Tensor]:
        """The loss, the norm of the gradient, and the part of it that is the token embedding's."""
        loss = self.backward(self.autocast if autocast is None else autocast).item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        assert self.wte.grad is not None
        return loss, float(norm), self.wte.grad.clone()

    def __call__(self) -> None:
        self.backward(self.autocast)
        self.optimizer.step()


def trainings(config: ImageGPTConfig, tokens: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Training]]:
    def loss(model: Any) -> Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    def ours(backend: str) -> Training:
        model = make_model(config, "float32").train().requires_grad_(True)
        return Training(model, model.transformer.wte.weight, lambda: loss(model), backend)

    def transformers() -> Training:
        model = peers.transformers_model(make_model(config, "float32").train()).requires_grad_(True)
        return Training(model, model.transformer.wte.weight, lambda: loss(model))

    def expert(compiled: bool) -> Training:
        model = peers.Expert(make_model(config, "float32")).train().requires_grad_(True)

        def plain() -> Tensor:
            return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

        return Training(model, model.wte, torch.compile(plain, fullgraph=True, dynamic=False) if compiled else plain)

    found: dict[str, Callable[[], Training]] = {"transformers": transformers, "PyTorch": lambda: expert(False)}
    if options.compiled:
        found["PyTorch, compiled"] = lambda: expert(True)
    return found | {"igpt_fast, PyTorch": lambda: ours("reference"), "igpt_fast": lambda: ours("auto")}


def bench_train(
    config: ImageGPTConfig, batch: int, dtype: str, measured: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds of a training step, of one dtype: two dtypes' models and moments would not fit into 24 GB."""
    common.say(f"train: batch {batch}, {dtype}")
    torch.compiler.reset()
    config = ImageGPTConfig(**{**config.to_dict(), **NO_DROPOUT})
    tokens = torch.randint(
        config.vocab_size - 1, (batch, config.n_positions), generator=torch.Generator().manual_seed(1)
    )
    makers = trainings(config, tokens, options)
    common.say("  what is right: transformers, float32")
    loss, norm, gradient = makers["transformers"]().result(autocast=False)
    runs: dict[Key, Run] = {}
    errors: dict[Key, dict[str, float]] = {}
    for key in [(dtype, name) for name in makers]:
        common.say(f"  checking {common.label(key)}")

        def prepare(key: Key = key) -> tuple[Run, dict[str, float]]:
            training = makers[key[1]]()
            training.autocast = key[0] == "bfloat16"
            got = training.result()
            error = max(abs(got[0] / loss - 1), abs(got[1] / norm - 1))
            found = {"error": error, "gradient": common.relative_error(got[2], gradient)}
            if not (error <= TRAINING_ERRORS[key[0]][0] and found["gradient"] <= TRAINING_ERRORS[key[0]][1]):
                raise common.Refused(f"its loss and gradient are wrong by {found}")
            training()  # makes the optimizer's state
            return training, found

        gc.collect()
        if (ready := common.attempt(key, prepare)) is not None:
            runs[key], errors[key] = ready
    times = common.interleave(runs, options.rounds, budget=options.seconds, warm=True)
    # Read: weights, gradient and two moments; written: all but the gradient.
    work = Work(flops=3 * flops(config, batch), copied=4.0 * 7 * weights(config))
    return finish("train", batch, times, work, measured, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the forward pass")
    parser.add_argument("--train-batch", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES, help="training: under autocast")
    parser.add_argument("--seconds", type=float, default=20.0, help="a candidate takes no further turn after so long")
    parser.add_argument("--work", choices=("forward", "train"), nargs="+", default=["forward", "train"])
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="nothing under torch.compile")
    parser.add_argument("--quick", action="store_true", help="the forward pass at batch 1 and training, three rounds")
    parser.add_argument("--dry-run", action="store_true", help="everybody once, with a tiny model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.openvino = common.installed("openvino")
    config = ImageGPTConfig()
    if options.quick:
        options.batch, options.rounds = [1], 3
    if options.dry_run:
        config, options.rounds = ImageGPTConfig(**TINY), 1
    seconds = 0.01 if options.dry_run else 0.15
    measured = limits.measure(options.threads, (80, 160, 320), seconds)
    limits.report(measured)
    rows: list[dict[str, Any]] = []
    if "forward" in options.work:
        with torch.no_grad():
            for batch in options.batch:
                rows += bench_forward(config, batch, measured, options)
    if "train" in options.work:
        for dtype in options.dtype:
            rows += bench_train(config, options.train_batch, dtype, measured, options)
    print(common.table(rows, COLUMNS))
    if not options.dry_run:
        measured.check_steady(limits.measure(options.threads, (80, 160, 320), seconds))
    if options.json:
        common.write(options.json, rows, ceilings=limits.report(measured))


if __name__ == "__main__":
    common.tune_allocator()
    main()
