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

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import peers
import torch
import torch.nn.functional as F
from bench_model import GRADIENT_ERROR, LOSS_ERROR, Training
from torch import Tensor
from whole_models import OURS, SUFFIX, Case, Work, program, transformers_model

from igpt_fast import backend
from igpt_fast.learning.distributed import Team
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.learning.state import TrainState
from igpt_fast.learning.stepping import Stepper, inputs_at, optimizer_for
from igpt_fast.learning.train import new_model
from igpt_fast.likelihood.nats import image_nats
from igpt_fast.world import World

if TYPE_CHECKING:
    from igpt_fast.learning.data import TokenData

GRAPHS, OPAQUE, GRAPH = f"{SUFFIX}, graphs", f"{SUFFIX}, opaque", f"{OURS}, graph"
EAGER = ("transformers", "PyTorch", OURS)
PARTS = {
    "eager": (("training",), EAGER),
    "compiled": (("training",), (EAGER[0], *(name + SUFFIX for name in EAGER))),
    "opaque": (("training",), (OURS + SUFFIX, OURS + OPAQUE)),
    "graphs": (("training",), (EAGER[0], *(name + GRAPHS for name in EAGER[1:]))),
    "loop": (("loop",), ("PyTorch", OURS, GRAPH)),
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


# ---- The loop -----------------------------------------------------------------------------------------------


def settings(case: Case, name: str) -> TrainConfig:
    sizes = {key: getattr(case.config, key) for key in ("n_layer", "n_embd", "n_head")}
    how = REDUCE_OVERHEAD if name == GRAPH and case.device.type == "cuda" else False
    return TrainConfig(**sizes, batch_size=case.batch, dropout=0.0, flip=False, shift=0, compile=how, lr=1e-4)


def images(case: Case) -> TokenData:
    """Four batches of random images."""
    from igpt_fast.learning.data import TokenData  # wants pillow, which the other parts do without

    colours, generator = case.config.n_colours, torch.Generator().manual_seed(1)
    tokens = torch.randint(0, colours, (4 * case.batch, case.config.n_positions), generator=generator)
    clusters = np.random.default_rng(0).uniform(-1, 1, (colours, 3)).astype(np.float32)
    return TokenData(tokens, clusters, torch.zeros(len(tokens), dtype=torch.bool))


class Loop:
    """Steps of ``igpt train``, or the expert's of the same weights and images."""

    def __init__(self, case: Case, name: str) -> None:
        self.config, self.data, self.device, self.done = settings(case, name), images(case), case.device, 0
        objective = NextPixel()
        model = new_model(self.data, self.config, objective).train()
        self.step: Callable[[], Any] = self._plain
        if name == "PyTorch":
            self.network = peers.Expert(model.to(case.device)).train().requires_grad_(True)
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.config.lr, fused=True)
            self.tokens = self.data.tokens.to(case.device)
            return
        team = Team(model, case.device, objective, self.config, Execution(), World())
        optimizer = optimizer_for(model, self.config, bool(self.config.compile))
        self.stepper = Stepper(TrainState(model, optimizer, 0, {}, ""), self.data, self.config, objective, team)
        self.step = self.stepper.step

    def first(self) -> float:
        """The loss of the first step."""
        loss = self.step()
        return float(self.stepper.figures(1)["nats"] if loss is None else loss)

    def __call__(self) -> None:
        self.step()

    def _plain(self) -> Tensor:
        size = self.config.batch_size
        tokens = self.tokens[self.done % 4 * size :][:size]
        self.done += 1
        with torch.autocast(self.device.type, torch.bfloat16):
            sos = torch.full_like(tokens[:, :1], len(self.network.wte) - 1)
            logits = self.network(torch.cat([sos, tokens[:, :-1]], dim=1), attend=peers.flash)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        return loss.detach()


def right_loss(case: Case) -> tuple[float, float]:
    """Of the first batch of either: ours is drawn by the seed, the expert's are the first images."""
    config, data = settings(case, OURS), images(case)
    model = new_model(data, config, NextPixel()).to(case.device)
    with torch.no_grad():
        ours, *_ = inputs_at(0, data, config, NextPixel())
        batches = (ours, data.tokens[: case.batch])
        return tuple(float(image_nats(model, batch.to(case.device)).mean()) for batch in batches)  # type: ignore[return-value]


def check_loop(run: Loop, right: tuple[float, float]) -> dict[str, float]:
    got = run.first()
    off = abs(got / right[run.step == run._plain] - 1)
    if not off <= LOSS_ERROR:
        raise common.Refused(f"its first loss is wrong by {off:.2e}; want {LOSS_ERROR:.2e} at most")
    return {"off": off}


WORKS = {
    "training": Work(training, right_step, check_training, passes=3.0, learns=True),
    "loop": Work(Loop, right_loss, check_loop, passes=3.0, learns=True),
}


def main() -> int:
    return program(__doc__, WORKS, PARTS, BATCHES)


if __name__ == "__main__":
    sys.exit(main())
