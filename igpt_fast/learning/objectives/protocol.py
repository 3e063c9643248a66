"""What the loop that trains asks of an objective, and what both ask of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

from torch import Generator, Tensor

from igpt_fast.config import ImageGPTConfig


class Data(Protocol):
    """Images as tokens, of which a part is held out."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def vocabulary(self) -> int:
        """Tokens of pixels are below it."""

    @property
    def n_classes(self) -> int:
        """0: the images have none."""

    @property
    def class_names(self) -> Sequence[str]:
        """As many."""

    @property
    def n_train(self) -> int:
        """Images to train on."""

    @property
    def n_heldout(self) -> int:
        """Images that are held out."""

    def train_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(B, T) int64 tokens of these of the ``n_train`` images, and their classes, (B,) int64."""

    def heldout_batches(self, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All held-out images, in order, as ``train_batch`` has them; the last batch may be smaller."""

    def fingerprint(self) -> str:
        """A hash of all that a run depends on."""


class Objective(Protocol):
    """What a run learns: immutable, its own settings among its fields, which are part of the run's identity."""

    name: ClassVar[str]  # of the command line
    figure: ClassVar[str]  # what the mean of ``losses`` is called in the log

    def settings(self, data: Data) -> dict[str, Any]:
        """Entries of the configuration that follow from the objective and the data: vocabulary, classes, direction."""

    def model(self, config: ImageGPTConfig) -> Any:
        """A new model, its weights drawn from torch's global generator of the CPU."""

    def identity(self) -> dict[str, int | float]:
        """What of it a run and its continuation must share, besides the run's configuration."""

    def inputs(self, tokens: Tensor, labels: Tensor | None, generator: Generator) -> tuple[Tensor, ...]:
        """What ``losses`` takes for the (B, T) augmented images of a whole step: tensors whose first dimension is B.

        Drawn from the generator alone, of the CPU, for the whole step, so that any number of processes can each take a
        part; on the device of the images, for which nothing may be waited (``transfer.sent``).
        """

    def losses(self, model: Any, *inputs: Tensor) -> Tensor:
        """The loss of each image, (B,), whose mean is minimised."""

    def evaluate(self, model: Any, data: Data) -> dict[str, float]:
        """Figures of the held-out images for the log, with names that begin with ``heldout``; of none, if there are
        none."""
