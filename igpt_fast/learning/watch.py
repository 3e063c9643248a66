"""Whether a run's steps are finite, known where they are computed: a step that is not changes nothing, and so do all
after it, until the host looks."""

from __future__ import annotations

import torch
from torch import Tensor


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


class Watch:
    """The figures of the last step, or of the first that was not finite.

    Args:
        device: Where the steps are computed.
        several: Whether the loss is a sum over processes, in float64.
        steps: How many there have been.
    """

    def __init__(self, device: torch.device, several: bool, steps: int = 0) -> None:
        # Elsewhere than on a GPU nothing is gained by looking later, and a run ends at the step that diverges.
        self.prompt = device.type != "cuda"
        self.steps = steps  # that count, as of the last look
        self.skip = torch.zeros((), dtype=torch.float32, device=device)  # 1: neither this step nor one after it counts
        self._figures = torch.zeros(2, dtype=torch.float64 if several else torch.float32, device=device)
        self._counted = torch.zeros((), dtype=torch.float32, device=device)  # since the last look

    def see(self, loss: Tensor, norm: Tensor) -> None:
        """Takes a step's loss and the norm of its gradient, both (), before its update. Waits for nothing."""
        self._figures.copy_(torch.where(self.skip > 0, self._figures, torch.stack((loss, norm))))
        self.skip.copy_((self._figures - self._figures).sum() != 0)  # of a number 0, of NaN and infinity NaN
        self._counted += 1 - self.skip

    def read(self, step: int) -> tuple[float, float]:
        """Loss and norm of the last of ``step`` steps; waits until it is computed.

        Raises:
            DivergedError: The first that was not finite; ``steps`` is the number of those before it.
        """
        loss, norm = self._figures.tolist()
        self.steps += int(self._counted)
        self._counted.zero_()
        if self.steps < step:
            what = f"the loss is {loss} and its gradient's norm {norm}"
            raise DivergedError(f"step {self.steps + 1}: {what}; try a lower learning rate")
        return loss, norm
