"""Trains an iGPT: tokens -> model. The loop behind ``igpt train``.

What is learned stands in ``objectives``; AdamW(0.9, 0.95), linear warm-up, cosine decay to zero, gradient
clipping, optional bf16 autocast. The budget is in steps. Each step draws its images, augmentations and dropouts from
generators seeded with (seed, step): a resumed run is bit-identical to one that was never interrupted.

Source: "Generative Pretraining from Pixels" (Chen et al., 2020), section 3 and appendix.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_fast.config import ImageGPTConfig
from igpt_fast.files import check_writable
from igpt_fast.interrupts import delayed_interrupt
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.schedule import augmented, chosen_at, generator_at, learning_rate, mix
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.learning.state import Output, TrainState, same_run

LOG_EVERY = 50  # steps

Progress = Callable[[dict[str, Any]], None]


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


def optimizer_for(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW(0.9, 0.95) of what learns; weight decay on matrices only."""
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


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
    with _own_generators(cpu):
        _seed(config.seed, cpu)
        return objective.model(shape)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what the device draws from like ``torch.manual_seed``, which would seed every other GPU as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _own_generators(device: torch.device) -> AbstractContextManager[None]:
    """Inside, torch's global generators are the run's; afterwards they go on as if nothing had been drawn."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def inputs_at(step: int, data: Data, config: TrainConfig, objective: Objective) -> tuple[Tensor, ...]:
    """What the objective's losses take at a step, all a function of the step alone."""
    tokens, labels = data.train_batch(chosen_at(step, data.n_train, config))
    tokens = augmented(step, tokens, data.height, data.width, config)
    return objective.inputs(tokens, labels, generator_at(4, step, config))


def train_step(
    state: TrainState, data: Data, config: TrainConfig, objective: Objective, losses: Callable[..., Tensor]
) -> dict[str, Any]:
    """One optimizer step; returns its record for the log.

    It seeds torch's global generators of the CPU and of the model's device, for the dropout.

    Args:
        state: Advanced in place by one step.
        data: The images.
        config: The run.
        objective: What is learned.
        losses: Its ``losses``, or that compiled.

    Raises:
        DivergedError: The loss or its gradient is not finite; ``state`` is as it was.
    """
    step, model, device = state.step, state.model, state.model.device
    _seed(mix(config.seed, 3, step), device)  # dropout
    inputs = inputs_at(step, data, config, objective)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
        loss = losses(model, *(part.to(device) for part in inputs)).mean()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    record = {
        "step": step + 1,
        objective.figure: loss.item(),
        "grad_norm": norm.item(),
        "lr": learning_rate(step, config),
    }
    if not (math.isfinite(record[objective.figure]) and math.isfinite(record["grad_norm"])):
        what = f"the loss is {record[objective.figure]} and its gradient's norm {record['grad_norm']}"
        raise DivergedError(f"step {step + 1}: {what}; try a lower learning rate")
    for group in state.optimizer.param_groups:
        group["lr"] = record["lr"]
    state.optimizer.step()
    state.step = step + 1
    return record


def train(
    data: Data,
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
    objective: Objective | None = None,
) -> Any:
    """Trains a model and returns it.

    Ctrl-C takes effect between two steps, with the last one saved; a second Ctrl-C at once, without. Torch's global
    generators are left as they were.

    Args:
        data: What to train and evaluate on.
        out: Directory for ``train.pt`` (model, optimizer, step) and ``log.jsonl``; made with the first of them.
        config: The run.
        device: Where to train.
        resume: Continue from ``out/train.pt``, which must come from the same ``config`` and data.
        progress: Called with each record of the log.
        stop_after: Save and return after this step, as an interruption would.
        objective: What is learned; the next pixel if not given.

    Raises:
        DivergedError: The loss is no longer finite; ``train.pt`` is the last one saved before.
        FileNotFoundError: ``resume`` without a ``train.pt``.
        KeyboardInterrupt: On Ctrl-C.
        NotADirectoryError, PermissionError: ``out`` cannot be made or written to.
        ValueError: ``resume`` with another configuration or other data, or from a file that is damaged.
    """
    return _train(data, Path(out), config, device, resume, progress, stop_after, objective=objective)[0]


def _train(
    data: Data,
    out: Path,
    config: TrainConfig,
    device: str | torch.device,
    resume: bool,
    progress: Progress | None,
    stop_after: int | None = None,
    outdated: Sequence[Path] = (),
    objective: Objective | None = None,
    on_evaluation: Callable[[Any, dict[str, Any]], None] | None = None,
) -> tuple[Any, dict[str, float]]:
    """``train``, which also takes files to remove when the first new one is written, and what to call with the model
    and its record after each evaluation; and returns the held-out figures of the last step if it was made here."""
    check_writable(out)
    objective = NextPixel(config.label_dropout) if objective is None else objective
    model = new_model(data, config, objective).to(device)
    state = TrainState(model, optimizer_for(model, config), 0, same_run(config, data, objective))
    output = Output(out, outdated)
    clock = time.monotonic()
    if resume:
        state.load(output.checkpoint)
        clock -= output.resume(state.step)
    losses = torch.compile(objective.losses) if config.compile else objective.losses
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    final: dict[str, float] = {}
    model.train()
    with _own_generators(model.device), delayed_interrupt() as interrupted:
        while state.step < end and not interrupted():
            record = train_step(state, data, config, objective, losses)
            step, last = state.step, state.step == config.steps
            evaluated = bool(data.n_heldout) and (step % config.eval_every == 0 or last)
            logged = evaluated or step % LOG_EVERY == 0 or last
            if evaluated:
                measured = objective.evaluate(model, data)
                record.update(measured)
                final = measured if last else {}
            if logged:
                record["seconds"] = round(time.monotonic() - clock, 2)
                output.append(record)
            if evaluated and on_evaluation is not None:
                on_evaluation(model, record)
            # After the log: a step that is saved has its record, and one that is not is cut off when resuming.
            if step % config.save_every == 0:
                output.save(state)
            if logged and progress is not None:
                try:
                    progress(record)
                except KeyboardInterrupt:  # by which a program says that it shall stop
                    output.save(state)
                    raise
        if state.step and state.saved != state.step:
            output.save(state)
    return model.eval(), final
