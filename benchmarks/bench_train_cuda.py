"""A training step on a GPU against its peers, of iGPT-S, M and L, and of the bundled model's size.

    python benchmarks/bench_train_cuda.py --json benchmarks/results/train_cuda.json
    python benchmarks/bench_train_cuda.py --device cpu --quick --json /tmp/rows.json

Forward, loss, backward and fused AdamW, under autocast to bfloat16 with float32 weights; 1,024 tokens an image, no
dropout. Ours, an expert's plain PyTorch with FlashAttention alone (peers.py), and transformers, whose attention writes
all scores out, in turns: ``eager``; ``compiled``: under torch.compile; ``opaque``: ours compiled as it is, and with
every op a call that the compiler does not look into; ``graphs``: of ``reduce-overhead``, one CUDA graph for the forward
and one for the backward. The loss, the norm of the gradient and the token embedding's gradient are checked first,
against float32 without autocast: what is right is the expert's, which the tests hold against the model.

``loop``: steps of ``igpt train``, which clips the gradient and looks for what is not finite, launched kernel by kernel
and as one CUDA graph (``--compile reduce-overhead``), and the expert's with clipping alone; none waits for the device.
The first loss is checked against float32.

Columns as of bench_model_cuda.py; ``off``: relative error of loss and norm, ``gradient``: of the embedding's.
``of_ceiling``: three forward passes' multiplications over the time, over what a large product was measured to do (MFU).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import common
import peers
import torch
import torch.nn.functional as F
from bench_model import GRADIENT_ERROR, LOSS_ERROR, Training
from torch import Tensor
from whole_models import OURS, SUFFIX, Case, Work, program, transformers_model

from igpt_fast import backend

GRAPHS, OPAQUE = f"{SUFFIX}, graphs", f"{SUFFIX}, opaque"
EAGER = ("transformers", "PyTorch", OURS)
PARTS = {
    "eager": (("training",), EAGER),
    "compiled": (("training",), (EAGER[0], *(name + SUFFIX for name in EAGER))),
    "opaque": (("training",), (OURS + SUFFIX, OURS + OPAQUE)),
    "graphs": (("training",), (EAGER[0], *(name + GRAPHS for name in EAGER[1:]))),
    "loop": (("loop",), ("PyTorch", OURS, f"{OURS}, graph")),
}
# Model -> images of a batch: as many as leave transformers room for its scores.
BATCHES = {"training": {"S": 16, "M": 16, "L": 8}, "loop": {"bundled": 16, "S": 16}}
REPLAYS = 3  # calls until one is a replay: of torch's graphs the first is eager, the second captured


# ---- A step -------------------------------------------------------------------------------------------------


def training(case: Case, name: str, attend: peers.Attend = peers.flash) -> Training:
    """A candidate's step; ``attend``: the expert's attention."""
    model = case.make(torch.float32).train().requires_grad_(True)
    who, tokens = name.partition(SUFFIX)[0], case.tokens
    network: Any = model
    if who == "PyTorch":
        network = peers.Expert(model).train().requires_grad_(True)
    elif who == "transformers":
        network = transformers_model(model).requires_grad_(True)

    def loss(ids: Tensor) -> Tensor:
        if who == "PyTorch":
            logits = network(ids, attend=attend)[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return network(ids, labels=ids, use_cache=False).loss

    # What torch has compiled it keeps with the code, and would give to the next candidate of the same classes.
    loss.__code__ = loss.__code__.replace(co_name=name)
    call = case.compiled(loss, name, "reduce-overhead" if name.endswith(GRAPHS) else "default")

    def chosen() -> Tensor:
        with backend.compiled_ops("opaque" if name.endswith(OPAQUE) else "plain"):
            return call(tokens)

    wte = network.wte if who == "PyTorch" else network.transformer.wte.weight
    run = Training(network, wte, chosen, case.backend(name))
    run.graphs = name.endswith(GRAPHS) and case.device.type == "cuda"  # type: ignore[attr-defined]
    return run


def right_step(case: Case) -> tuple[float, float, Tensor]:
    return training(case, "PyTorch", peers.causal).result(autocast=False)


def check_training(run: Training, right: tuple[float, float, Tensor]) -> dict[str, float]:
    loss, norm, gradient = right
    graphs, skipped = getattr(run, "graphs", False), peers.graphs_skipped()
    for _ in range(REPLAYS if graphs else 1):
        got = run.result()
    if graphs and peers.graphs_skipped() > skipped:
        raise common.Refused("torch has compiled something without the CUDA graph that was asked for")
    found = {"off": max(abs(got[0] / loss - 1), abs(got[1] / norm - 1))}
    found["gradient"] = common.relative_error(got[2], gradient)
    if not (found["off"] <= LOSS_ERROR and found["gradient"] <= GRADIENT_ERROR):
        raise common.Refused(f"its loss and gradient are wrong by {found}")
    return found


def loop(name: str) -> Any:
    """A function of training_loop.py, which wants pillow, as the other parts do not."""
    return lambda *arguments: getattr(importlib.import_module("training_loop"), name)(*arguments)


WORKS = {
    "training": Work(training, right_step, check_training, passes=3.0, learns=True),
    "loop": Work(loop("Loop"), loop("right_loss"), loop("check_loop"), passes=3.0, learns=True),
}


def main() -> int:
    return program(__doc__, WORKS, PARTS, BATCHES)


if __name__ == "__main__":
    sys.exit(main())
