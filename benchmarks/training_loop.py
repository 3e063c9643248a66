"""Steps of ``igpt train`` for bench_train_cuda.py: ours, and the expert's with clipping, of the same images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import numpy as np
import peers
import torch
import torch.nn.functional as F
from bench_model import LOSS_ERROR
from torch import Tensor
from whole_models import OURS, Case

from igpt_fast.learning.data import TokenData
from igpt_fast.learning.distributed import Team
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.learning.state import TrainState
from igpt_fast.learning.stepping import Stepper, inputs_at, optimizer_for
from igpt_fast.learning.train import new_model
from igpt_fast.likelihood.nats import image_nats
from igpt_fast.world import World


def settings(case: Case, name: str) -> TrainConfig:
    sizes = {key: getattr(case.config, key) for key in ("n_layer", "n_embd", "n_head")}
    how = REDUCE_OVERHEAD if name.endswith("graph") and case.device.type == "cuda" else False
    return TrainConfig(**sizes, batch_size=case.batch, dropout=0.0, flip=False, shift=0, compile=how, lr=1e-4)


def images(case: Case) -> TokenData:
    """Four batches of random images."""
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
