"""What a training run depends on besides its data. Standard library only, so that ``igpt --help`` stays light."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults are those of the bundled model.

    Args:
        n_layer: Transformer blocks.
        n_embd: Width; a multiple of ``n_head``.
        n_head: Attention heads.
        steps: Optimizer steps.
        batch_size: Images a step.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up; a cosine down to zero follows.
        weight_decay: Of the matrices.
        dropout: After each attention and MLP.
        clip: Largest norm of the gradient.
        flip: Augmentation: mirror half of the training images, or not.
        shift: Largest shift of a training image along each axis, in pixels; the border repeats.
        label_dropout: With classes: probability that an image is learned without its class, which is what guidance
            compares with.
        seed: Of the initial weights, the batches, the augmentation and the dropout.
        bf16: Precision: autocast to bfloat16, or train in float32 throughout.
        compile: Speed: compile the network with torch.compile, or run it as it is.
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
    warmup_steps: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip: float = 1.0
    flip: bool = True
    shift: int = 1
    label_dropout: float = 0.1
    seed: int = 0
    bf16: bool = True
    compile: bool = False
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field.name} is {value!r}; want an integer")
            if field.type == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{field.name} is {value!r}; want a number")
        for name in ("n_layer", "n_embd", "n_head", "steps", "batch_size", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; want 1 or more")
        for name in ("lr", "clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; want a number above 0")
        for name in ("warmup_steps", "weight_decay", "shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; want 0 or more")
        for name in ("dropout", "label_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; want a probability in [0, 1)")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; want 0..2^32-1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}; want a multiple of n_head, {self.n_head}")
