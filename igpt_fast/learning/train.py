"""Trains an iGPT: tokens -> model. The loop behind ``igpt train``.

What is learned stands in ``objectives``; AdamW(0.9, 0.95), linear warm-up, cosine decay to zero, gradient
clipping, optional bf16 autocast. The budget is in steps. Each step draws its images, augmentations and dropouts from
generators seeded with (seed, step): a resumed run is bit-identical to one that was never interrupted, if as many
processes compute it in as many parts. Otherwise it is so up to rounding, and with dropout draws other masks.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 3 and appendix.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import check_writable
from igpt_fast.interrupts import delayed_interrupt
from igpt_fast.learning.distributed import Team, autocasts, check_same
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.settings import Execution, TrainConfig
from igpt_fast.learning.state import Output, TrainState, computed_by, same_run
from igpt_fast.learning.stepping import Stepper, captures, optimizer_for, own_generators, seed
from igpt_fast.learning.throughput import Meter
from igpt_fast.world import World

LOG_EVERY = 50  # steps

Progress = Callable[[dict[str, Any]], None]
# Called after each step, on the first process, with its number and what gives its figures, which waits for the device.
OnStep = Callable[[int, Callable[[], dict[str, Any]]], None]


class InterruptedTraining(KeyboardInterrupt):
    """Ctrl-C between two steps, of which the last one, number ``step``, is saved."""

    def __init__(self, step: int) -> None:
        super().__init__("interrupted")
        self.step = step


def new_model(data: Data, config: TrainConfig, objective: Objective) -> Any:
    """A model for the data, on the CPU, with the run's initial weights.

    Raises:
        ValueError: A network that ``ImageGPTConfig`` refuses.
    """
    shape = ImageGPTConfig(
        n_positions=data.height * data.width,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=config.dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **objective.settings(data),
    )
    cpu = torch.device("cpu")
    with own_generators(cpu):
        seed(config.seed, cpu)
        return objective.model(shape)


def train(
    data: Data,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    world: World | None = None,
) -> Any:
    """Trains a model and returns it.

    Ctrl-C takes effect between two steps, with the last one saved; a second Ctrl-C at once, without. Torch's global
    generators are left as they were.

    Args:
        data: What to train and evaluate on; the same on all processes.
        out: Directory for ``train.pt`` (model, optimizer, step; of several processes, ``checkpoint/``) and
            ``log.jsonl``; made with the first of them. All processes see the same directory.
        config: The run.
        objective: What is learned; the next pixel if not given.
        device: Where to train.
        resume: Continue from what ``out`` holds, which must come from the same ``config``, data and objective; not from
            as many processes, of which a warning says that it is not bit-identical.
        progress: Called with each record of the log, on the first process.
        stop_after: Save and return after this step, as an interruption would.
        execution: How it is computed.
        world: The processes, see ``world.world``; this one alone if not given.

    Returns:
        The model; of the processes of FSDP the first alone has it, others get ``None``.

    Raises:
        DivergedError: The loss is no longer finite; what was saved last is that from before. On a GPU it is raised when
            the figures are next read, at most 50 steps later, and names the first such step; those after it change
            nothing.
        FileNotFoundError: ``resume`` without a run.
        InterruptedTraining: On Ctrl-C; a second one is a plain KeyboardInterrupt.
        OSError: ``out`` cannot be made or written to, or not any more; what was saved last is there.
        PeerGoneError: Another process is gone; what was saved last is there.
        ValueError: ``resume`` with another configuration or other data, or from a file that is damaged; fewer images in
            a batch than processes; processes that were given different things; ``reduce-overhead`` without
            a GPU, or with activations that are computed again with dropout.
    """
    objective = objective or NextPixel(config.label_dropout)
    return _train(
        data, Path(out), config, objective, device, resume, progress, stop_after, (), execution, world or World()
    ).model


@dataclass(frozen=True)
class Trained:
    """What a run leaves in the memory."""

    model: Any  # whole, in evaluation mode; None on other processes than the first under FSDP
    heldout: dict[str, float]  # the figures after the last step, if it was made here
    throughput: dict[str, Any]  # of the steps since the last record but one, if there were some


def _train(
    data: Data,
    out: Path,
    config: TrainConfig,
    objective: Objective,
    device: str | torch.device,
    resume: bool,
    progress: Progress | None,
    stop_after: int | None = None,
    outdated: Sequence[Path] = (),
    execution: Execution = Execution(),  # noqa: B008 - a frozen value
    world: World | None = None,
    on_evaluation: Callable[[Any, dict[str, Any]], None] | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """``train``, which also takes files to remove when the first new one is written; what is called after each step;
    and, of one process, what is called with the model and its record, which is in the log by then, after each
    evaluation."""
    check_writable(out)
    world = world or World()
    identity = same_run(config, data, objective)
    device = torch.device(device)
    bf16 = autocasts(config, device)
    check_same(world, f"{identity} {execution} {bf16}")
    if bf16 != config.bf16 and world.first:
        warnings.warn("trains in float32 throughout: products of bfloat16 are, see igpt env", stacklevel=3)
    captured = captures(config, device, world, execution)
    with own_generators(device), world.watched():
        model = new_model(data, config, objective)
        meter = Meter(model, device, config.batch_size, world.size, bf16)
        team = Team(model, device, objective, config, execution, world)
        computed = computed_by(world, execution, "" if bf16 == config.bf16 else ", float32")
        state = TrainState(model, optimizer_for(model, config, captured), 0, identity, computed)
        output = Output(out, outdated, world, execution.tensorboard)
        clock = time.monotonic() - (output.load(state) if resume else 0.0)
        end = config.steps if stop_after is None else min(stop_after, config.steps)
        try:
            loop = Loop(data, config, objective, team, state, output, meter, clock, progress, on_evaluation, on_step)
            heldout, throughput = loop.run(end)
        except BaseException:
            with suppress(BaseException):  # what is being written may become whole
                output.finish()
            raise
        whole = team.whole_model()
        return Trained(whole if whole is None else whole.eval(), heldout, throughput)


@dataclass
class Loop:
    """Steps, and what is done between them."""

    data: Data
    config: TrainConfig
    objective: Objective
    team: Team
    state: TrainState
    output: Output
    meter: Meter
    clock: float  # when the run would have begun, had it not been interrupted
    progress: Progress | None
    on_evaluation: Callable[[Any, dict[str, Any]], None] | None
    on_step: OnStep | None

    def run(self, end: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Goes on to a step; returns the held-out figures of the run's last, and the throughput."""
        team, state, output = self.team, self.state, self.output
        heldout: dict[str, float] = {}
        throughput: dict[str, Any] = {}
        state.model.train()
        stepper = Stepper(state, self.data, self.config, self.objective, team)
        # torchrun passes on the Ctrl-C that the terminal has sent to all.
        with delayed_interrupt(echo=2.0 if team.world.size > 1 else 0.0) as interrupted:
            stopping = False
            team.stop = lambda: stopping or output.failed or interrupted()
            while state.step < end and not (team.stopped if team.world.size > 1 else team.stop()):
                step, last = state.step + 1, state.step + 1 == self.config.steps
                evaluated = bool(self.data.n_heldout) and (step % self.config.eval_every == 0 or last)
                logged = evaluated or step % LOG_EVERY == 0 or last
                saved = step % self.config.save_every == 0
                record: dict[str, Any] = {}
                with self.meter.step():
                    stepper.step()
                    if logged or saved:  # else nothing waits for the device
                        record = stepper.figures(step)
                if evaluated:
                    measured = team.evaluate(self.data)
                    record.update(measured)
                    heldout = measured if last else {}
                if logged:
                    throughput = self.meter.figures()
                    record |= throughput
                    record["seconds"] = round(time.monotonic() - self.clock, 2)
                    output.append(record)
                if evaluated and self.on_evaluation is not None:
                    self.on_evaluation(state.model, record)
                # After the log: a step that is saved has its record, and one that is not is cut off when resuming.
                if saved:
                    output.save(state)
                if logged and self.progress is not None and team.world.first:
                    try:
                        self.progress(record)
                    except KeyboardInterrupt:  # by which a program says that it shall stop
                        stopping = True
                if self.on_step is not None and team.world.first:
                    self.on_step(step, functools.partial(stepper.figures, step))
            if state.step and state.saved != state.step:
                stepper.figures(state.step)
                output.save(state)
            output.finish()
            if team.stopped or stopping:
                raise InterruptedTraining(state.step)
        return heldout, throughput
