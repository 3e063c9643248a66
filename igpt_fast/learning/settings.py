"""What a training run depends on besides its data. Standard library only, so that ``igpt --help`` stays light."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from igpt_fast.checks import finite_number, whole_number

REDUCE_OVERHEAD = "reduce-overhead"


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are those of the bundled model's first part.

    Args:
        n_layer: Transformer blocks.
        n_embd: Width; a multiple of ``n_head``.
        n_head: Attention heads.
        steps: Optimizer steps.
        batch_size: Images a step.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up; a cosine down to zero follows. 200, and no more than a tenth of the
            steps, if not given.
        weight_decay: Of the matrices.
        dropout: After each attention and MLP.
        clip: Largest norm of the gradient.
        flip: Augmentation: mirror half of the training images, or not.
        shift: Largest shift of a training image along each axis, in pixels; the border repeats.
        label_dropout: With classes: probability that an image is learned without its class, which is what guidance
            compares with.
        seed: Of the initial weights, the batches, the augmentation and the dropout.
        bf16: Precision: autocast to bfloat16 where the device multiplies it (igpt env), or train in float32 throughout.
        compile: Speed: run the network as it is, compile it with torch.compile (alone: True), or on a GPU, by one
            process, capture each step in a CUDA graph as well (reduce-overhead): for small networks.
        eval_every: Steps between two evaluations of the held-out images.
        save_every: Steps between two checkpoints.

    Raises:
        ValueError: A field is out of its range.
    """

    n_layer: int = 8
    n_embd: int = 192
    n_head: int = 3
    steps: int = 6000
    batch_size: int = 16
    lr: float = 2e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip: float = 1.0
    flip: bool = True
    shift: int = 1
    label_dropout: float = 0.1
    seed: int = 0
    bf16: bool = True
    compile: bool | Literal["reduce-overhead"] = False
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for field in fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type == "int" or (name == "warmup_steps" and value is not None):
                whole_number(name, value, int(name not in ("seed", "shift", "warmup_steps")), (1 << 32) - 1)
            elif name in ("dropout", "label_dropout"):
                finite_number(name, value, 0, 1, without=(1,))
            elif field.type == "float":
                finite_number(name, value, 0, without=() if name == "weight_decay" else (0,))
        if not isinstance(self.compile, bool) and self.compile != REDUCE_OVERHEAD:
            raise ValueError(f"compile is {self.compile!r}; want True, False or {REDUCE_OVERHEAD}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}; want a multiple of n_head, {self.n_head}")

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or what stands for it."""
        return min(200, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class Execution:
    """How a run is computed: a continuation may have another. It changes the result by rounding, and with dropout
    another ``accumulate`` or number of processes draws other masks.

    Args:
        parallel: Under torchrun: ddp, every process holds the whole model; fsdp, each a part of it (FSDP2).
        accumulate: Parts that a process computes its share of a batch in, one after the other, for less memory; with
            dropout, another number draws other masks.
        checkpointing: Memory: compute activations again in the backward pass, or keep them.
        tensorboard: Log: for TensorBoard as well, in tensorboard/ of the run's directory, or in log.jsonl alone.

    Raises:
        ValueError: A field is out of its range.
    """

    parallel: Literal["ddp", "fsdp"] = "ddp"
    accumulate: int = 1
    checkpointing: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        whole_number("accumulate", self.accumulate, 1, (1 << 32) - 1)
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel is {self.parallel!r}; want ddp or fsdp")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of a model to classify; the defaults are for some ten images of a class; more want more steps.

    Args:
        gen_weight: Of the pixels' nats in the loss, beside the class's; 0 learns the classes alone, and the model
            forgets how to draw.
        shots: So many images of each class, drawn by the seed, instead of all; they include those for validation.
        validation: Fraction of each class, rounded down, that chooses the best step and is not trained on; the last
            step is kept where there is none. The held-out images choose nothing.
        freeze_below: So many of the first blocks, and the embeddings, stay as they are; 0 learns all.
        steps: Optimizer steps.
        batch_size: Images a step.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up; a cosine down to zero follows. 200, and no more than a
            tenth of the steps, if not given.
        weight_decay: Of the matrices.
        dropout: After each attention and MLP.
        clip: Largest norm of the gradient.
        flip: Augmentation: mirror half of the training images, or not; not for digits and letters.
        shift: Largest shift of a training image along each axis, in pixels; the border repeats.
        seed: Of the choice of images, the batches, the augmentation and the dropout.
        bf16: Precision: autocast to bfloat16 where the device multiplies it (igpt env), or float32 throughout.
        eval_every: Steps between two evaluations of the images for validation.
        save_every: Steps between two checkpoints.

    Raises:
        ValueError: A field is out of its range.
    """

    gen_weight: float = 1.0
    shots: int | None = None
    validation: float = 0.1
    freeze_below: int = 0
    steps: int = 100
    batch_size: int = 20
    lr: float = 5e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip: float = 1.0
    flip: bool = True
    shift: int = 1
    seed: int = 0
    bf16: bool = False
    eval_every: int = 20
    save_every: int = 100

    def __post_init__(self) -> None:
        finite_number("gen_weight", self.gen_weight, 0)
        finite_number("validation", self.validation, 0, 1, without=(1,))
        whole_number("freeze_below", self.freeze_below, 0, (1 << 32) - 1)
        if self.shots is not None:
            whole_number("shots", self.shots, 1, (1 << 32) - 1)
        self.training(1, 1, 1)

    def training(self, n_layer: int, n_embd: int, n_head: int) -> TrainConfig:
        """What the loop is given, for a network of this size."""
        shared = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(self)}
        return TrainConfig(n_layer, n_embd, n_head, **{name: getattr(self, name) for name in shared})
