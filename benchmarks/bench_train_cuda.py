"""A training step on a GPU against its peers, of iGPT-S, M and L.

    python benchmarks/bench_train_cuda.py --json benchmarks/results/train_cuda.json
    python benchmarks/bench_train_cuda.py --device cpu --quick --json /tmp/rows.json

Forward, loss, backward and fused AdamW, under autocast to bfloat16 with float32 weights; 1,024 tokens an image, no
dropout. Ours, an expert's plain PyTorch with FlashAttention alone (peers.py), and transformers, whose attention writes
all scores out, in turns: ``eager``; ``compiled``: under torch.compile, ours with our ops as they are chosen there and
with every op opaque; ``graphs``: of ``reduce-overhead``, one CUDA graph for forward and one for backward.

The loss, the norm of the gradient and the token embedding's gradient are checked first, against float32 without
autocast: what is right is the expert's, which the tests hold against the model.

Columns as of bench_model_cuda.py; ``off``: relative error of loss and norm, ``gradient``: of the embedding's.
``of_ceiling``: three forward passes' multiplications over the time, over what a large product was measured to do (MFU).
"""

from __future__ import annotations

import sys
from typing import Any

import common
import peers
import torch.nn.functional as F
from bench_model import GRADIENT_ERROR, LOSS_ERROR, Training
from torch import Tensor, float32
from whole_models import OURS, SUFFIX, Case, Work, program, transformers_model

GRAPHS, OPAQUE = f"{SUFFIX}, graphs", f"{OURS}{SUFFIX}, opaque"
EAGER = ("transformers", "PyTorch", OURS)
PARTS = {
    "eager": (("training",), EAGER),
    "compiled": (("training",), (EAGER[0], *(name + SUFFIX for name in EAGER), OPAQUE)),
    "graphs": (("training",), (EAGER[0], *(name + GRAPHS for name in EAGER[1:]))),
}
# Model -> images of a batch: as many as leave transformers room for its scores.
BATCHES = {"training": {"S": 16, "M": 16, "L": 8}}


def training(case: Case, name: str, attend: peers.Attend = peers.flash) -> Training:
    """A candidate's step; ``attend``: the expert's attention."""
    model = case.make(float32).train().requires_grad_(True)
    who = name.partition(SUFFIX)[0]
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

    wte = network.wte if who == "PyTorch" else network.transformer.wte.weight
    call = case.compiled(loss, name, "reduce-overhead" if name.endswith(GRAPHS) else "default")
    return Training(network, wte, lambda: call(case.tokens), case.backend(name))


def right_step(case: Case) -> tuple[float, float, Tensor]:
    return training(case, "PyTorch", peers.causal).result(autocast=False)


def check_training(run: Training, right: tuple[float, float, Tensor]) -> dict[str, float]:
    loss, norm, gradient = right
    got = run.result()
    found = {"off": max(abs(got[0] / loss - 1), abs(got[1] / norm - 1))}
    found["gradient"] = common.relative_error(got[2], gradient)
    if not (found["off"] <= LOSS_ERROR and found["gradient"] <= GRADIENT_ERROR):
        raise common.Refused(f"its loss and gradient are wrong by {found}")
    return found


WORKS = {"training": Work(training, right_step, check_training, passes=3.0)}


def main() -> int:
    return program(__doc__, WORKS, PARTS, BATCHES)


if __name__ == "__main__":
    sys.exit(main())
