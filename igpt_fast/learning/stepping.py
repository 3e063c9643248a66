"""One step of a run after the other: its inputs, all a function of the step alone, and what is computed of them."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from igpt_fast.learning.distributed import Team
from igpt_fast.learning.graphs import StepGraph
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.resident import nearby
from igpt_fast.learning.schedule import augmented, chosen_at, generator_at, learning_rate, mix
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.learning.state import TrainState
from igpt_fast.learning.watch import DivergedError, Watch
from igpt_fast.world import World

_AHEAD = 2  # steps that a GPU may have before it, so that it has work while the host prepares the next


def optimizer_for(model: torch.nn.Module, config: TrainConfig, captured: bool = False) -> torch.optim.AdamW:
    """AdamW(0.9, 0.95) of what learns; weight decay on matrices only. ``captured``: with its learning rate on the
    device, for a CUDA graph."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    rate = torch.tensor(config.lr, dtype=torch.float32, device=learning[0].device) if captured else config.lr
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def seed(value: int, device: torch.device) -> None:
    """Seeds what the device draws from like ``torch.manual_seed``, which would seed every other GPU as well."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


def own_generators(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch's global generators are the run's; afterwards they go on as if nothing had been drawn."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def inputs_at(step: int, data: Data, config: TrainConfig, objective: Objective) -> tuple[Tensor, ...]:
    """What the objective's losses take at a step, a function of the step alone, on the device of the data's tokens."""
    tokens, labels = data.train_batch(chosen_at(step, data.n_train, config))
    tokens = augmented(step, tokens, data.height, data.width, config)
    return objective.inputs(tokens, labels, generator_at(4, step, config))


def captures(config: TrainConfig, device: torch.device, world: World, execution: Execution) -> bool:
    """Whether steps are one CUDA graph each.

    Warns: RuntimeWarning: It was asked for, and several processes have collective operations in their steps.

    Raises:
        ValueError: It was asked for where there are none, or with activations that are computed again with dropout.
    """
    if config.compile != REDUCE_OVERHEAD:
        return False
    if device.type != "cuda":
        raise ValueError(
            f"compile is {REDUCE_OVERHEAD!r}, a CUDA graph of each step, and the device {device}; want True"
        )
    if execution.checkpointing and config.dropout:
        raise ValueError(
            f"compile is {REDUCE_OVERHEAD!r}, with checkpointing and dropout, whose state the host puts back for the"
            " second time, and a CUDA graph has no host; want compile True, no checkpointing or dropout 0"
        )
    if world.size > 1:
        said = f"compile {REDUCE_OVERHEAD}: only for one process; goes on with torch.compile and without CUDA graphs"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    return world.size == 1


class Stepper:
    """Makes the steps of a run. On a GPU nothing in a step waits for the device, but for the step before the last, or
    Ctrl-C would wait for all that were launched: what a step was is asked for by ``figures``, and until then none after
    one that is not finite changes anything.

    Args:
        state: Advanced in place.
        data: The images.
        config: The run.
        objective: What is learned.
        team: What computes it, with ``state.model``.
    """

    def __init__(self, state: TrainState, data: Data, config: TrainConfig, objective: Objective, team: Team) -> None:
        self.state, self.config, self.objective, self.team = state, config, objective, team
        learning = [p for group in state.optimizer.param_groups for p in group["params"]]
        wanted = 12 * sum(p.numel() for p in learning)  # bytes of gradients and moments, float32
        self._data = nearby(data, team.device, (config.steps - state.step) * config.batch_size, wanted)
        self._event = torch.cuda.Event if team.device.type == "cuda" else None
        self._launched: list[torch.cuda.Event] = []  # the ends of steps that nobody has waited for
        self.watch = Watch(team.device, team.world.size > 1, state.step)
        self._rates = [group["lr"] for group in state.optimizer.param_groups if isinstance(group["lr"], Tensor)]
        self._run = StepGraph(self._compute, state.optimizer, team.device) if self._rates else self._compute

    def step(self) -> None:
        """Makes one.

        It seeds torch's global generators of the CPU and of the model's device, for the dropout.

        Raises:
            DivergedError: Where that is known at once, see ``figures``.
        """
        step, config = self.state.step, self.config
        if len(self._launched) == _AHEAD:
            self._launched.pop(0).synchronize()
        seed(mix(config.seed, self.team.stream, step), self.team.device)  # dropout
        inputs = inputs_at(step, self._data, config, self.objective)
        self._set_rate(learning_rate(step, config))
        self._run(inputs)
        if self._event is not None:
            self._launched.append(self._event())
            self._launched[-1].record()
        self.state.step = step + 1

    def _set_rate(self, rate: float) -> None:
        for tensor in self._rates:
            tensor.fill_(rate)
        if self.team.device.type == "cuda":  # rounded as those are, so that a graph changes no bit
            rate = float(np.float32(rate))
        for group in self.state.optimizer.param_groups if not self._rates else ():
            group["lr"] = rate

    def _compute(self, inputs: tuple[Tensor, ...]) -> None:
        optimizer = self.state.optimizer
        optimizer.zero_grad(set_to_none=True)
        self.watch.see(self.team.backward(inputs), self.team.clip())
        if self.watch.prompt:
            self.figures(self.state.step + 1)
        else:
            optimizer.found_inf = self.watch.skip  # type: ignore[attr-defined] # as torch's GradScaler hands it over
        optimizer.step()

    def figures(self, step: int) -> dict[str, float]:
        """The record of the last of ``step`` steps for the log; waits until it is computed.

        Raises:
            DivergedError: The loss or its gradient was not finite in it or in one before; ``state`` is as it was before
                the first such step.
        """
        try:
            loss, norm = self.watch.read(step)
        except DivergedError:
            self.state.step = self.watch.steps
            self._set_rate(learning_rate(self.state.step - 1, self.config) if self.state.step else self.config.lr)
            raise
        rate = learning_rate(step - 1, self.config)
        return {"step": step, self.objective.figure: loss, "grad_norm": norm, "lr": rate}
