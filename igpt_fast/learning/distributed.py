"""One step of training, computed by one process or by several, of which each takes a part of every batch.

The batch of a step does not depend on how many there are; process r takes the r-th part of it. Each one reads and
augments the whole, so that all draw alike and leave out the same pictures: many processes want tokens that are ready
(igpt tokenize). A loss is divided by the size of the whole batch, so that parts may be of unequal length, and gradients
are summed. Weights, moments and sums stay in float32: bf16 is autocast alone, under FSDP as well (no
``MixedPrecisionPolicy``: its parameters of the norms would be rounded too, and the figures would be other ones than one
process's).

Source: torch.nn.parallel.DistributedDataParallel; torch.distributed.fsdp.fully_shard (FSDP2).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast.files import listed
from igpt_fast.learning.objectives.protocol import Data, Objective
from igpt_fast.learning.settings import Execution, FinetuneConfig, TrainConfig
from igpt_fast.likelihood.transfer import sent
from igpt_fast.ops.dispatch import multiplies
from igpt_fast.world import World


class Learner(nn.Module):
    """A model and what it learns, as one module whose forward is the losses: what DDP and FSDP wrap."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *inputs: Tensor, heldout: Data | None = None) -> Any:
        """The (B,) losses of the inputs; or the figures of the held-out images."""
        if heldout is not None:
            return self.objective.evaluate(self.model, heldout)
        return self.objective.losses(self.model, *inputs)


class Team:
    """What the processes of a run do together; with one process, each of it is what it would be alone.

    Args:
        model: With the same weights on every process; it is put on the device, and under FSDP its parameters become
            parts, one block after the other.
        device: This process's.
        objective: What it learns.
        config, execution: The run.
        world: The processes.

    Raises:
        ValueError: A batch with fewer images than there are parts.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        objective: Objective,
        config: TrainConfig,
        execution: Execution,
        world: World,
    ) -> None:
        parts = world.size * execution.accumulate
        if config.batch_size < parts:
            raise ValueError(
                f"batch_size is {config.batch_size}; want at least {parts}, an image for each of {world.size}"
                f" process{'es' if world.size > 1 else ''} and --accumulate {execution.accumulate}"
            )
        self.model, self.world, self.config, self._accumulate = model, world, config, execution.accumulate
        self._bf16 = autocasts(config, device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.stop: Callable[[], bool] = lambda: False  # whether this process has been asked to stop
        self.stopped = False  # whether one has, as all know
        if execution.checkpointing:
            model.gradient_checkpointing_enable()
        self._learner = Learner(model, objective)
        self._sharded = world.size > 1 and execution.parallel == "fsdp"
        self._replicated = world.size > 1 and not self._sharded
        self._module = self._wrapped()

    def _wrapped(self) -> nn.Module:
        learner, device = self._learner, self.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what collective operations of objects go by
        if self._sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.world.size,))
            for block in self.model.base_model.h:
                if self.config.compile:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(learner, mesh=mesh)
            return learner
        module: nn.Module = learner.to(device)
        if self._replicated:
            from torch.nn.parallel import DistributedDataParallel

            devices = [device] if device.type == "cuda" else None
            module = DistributedDataParallel(learner, device_ids=devices, gradient_as_bucket_view=True)
        if self.config.compile:
            module.compile()
        return module

    @property
    def stream(self) -> int:
        """Number of the stream of random numbers (see ``schedule.generator_at``) that this process's dropout draws."""
        return 3 if self.world.first else 1000 + self.world.rank

    def backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Adds the gradients of a whole batch; returns its mean loss, (), of which NaN is seen by all processes. It
        stays on the device, which is not waited for.

        Raises:
            ValueError: Under DDP, a parameter that learns has no part in the loss.
        """
        size = len(inputs[0])
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        part = self.world.share(size)
        micro = [tensor[part.start : part.stop].tensor_split(self._accumulate) for tensor in inputs]
        for i in range(self._accumulate):
            with self._syncing(i + 1 == self._accumulate):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
                    losses = self._module(*(sent(parts[i], self.device) for parts in micro))
                    loss = losses.sum() / size
                (loss * self.world.size).backward()  # of several, DDP and FSDP take the mean
            total += loss.detach()
        if self._replicated:  # DDP itself would fail at the next step, without a name
            unused = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                what = f"no gradient of {listed(unused, 3)}; the objective {self._learner.objective.name}"
                raise ValueError(f"--parallel ddp: {what} does not use it: freeze it (requires_grad_), or take fsdp")
        return self._agreed(total)

    def _syncing(self, last: bool) -> AbstractContextManager[None]:
        """DDP adds gradients up in each process until the last part. FSDP shares every part's: a process would have to
        keep whole gradients otherwise."""
        skip = self._replicated and not last
        return self._module.no_sync() if skip else contextlib.nullcontext()  # type: ignore[operator]

    def _agreed(self, loss: Tensor) -> Tensor:
        """The sum of all processes' parts; and whether one of them has been asked to stop, which they tell each other
        from host to host, without their devices."""
        if self.world.size == 1:
            self.stopped = self.stop()
            return loss
        (stop,) = self.world.total([float(self.stop())])
        self.stopped = stop > 0.0
        return self.world.summed(loss.double())

    def clip(self) -> Tensor:
        """Bounds the norm of all gradients together; returns what it was, (), on the device."""
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))

    def evaluate(self, data: Data) -> dict[str, float]:
        """The objective's figures. Every process computes all of them: they are those of one process, whatever an
        objective's figures are, and no process would have had anything else to do."""
        if not self._sharded:
            return self._learner.objective.evaluate(self.model, data)
        with torch.no_grad():
            figures = self._module(heldout=data)
        self._module.reshard()  # type: ignore[operator] # which the backward would have done
        return figures

    def whole_model(self) -> Any:
        """The model with whole weights: of parts, a new one on the CPU, on the first process; ``None`` on others."""
        if not self._sharded:
            return self.model
        state = {}
        for name, value in self.model.state_dict().items():
            full = whole(value)
            if self.world.first:
                state[name] = full.cpu()
        if not self.world.first:
            return None
        model = self._learner.objective.model(self.model.config)
        model.load_state_dict(state)
        return model


def autocasts(config: TrainConfig | FinetuneConfig, device: torch.device) -> bool:
    """Whether the run's products are in bfloat16: it asks for that, and the device multiplies such numbers."""
    return config.bf16 and multiplies(torch.bfloat16, device)


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which each process has a part: a collective operation; others as they are."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else full()


def check_same(world: World, what: str) -> None:
    """Fails where a process was given something else than the first.

    Raises:
        ValueError: It was.
    """
    number = zlib.crc32(what.encode())
    if world.agree("same", number) != number:
        raise ValueError(
            f"rank {world.rank} was given other settings or other data than rank 0, or multiplies other numbers"
        )
