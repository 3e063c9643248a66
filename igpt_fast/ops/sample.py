"""Drawing tokens from logits."""

from __future__ import annotations

import math

from torch import Tensor

from igpt_fast import reference


def sample(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draws a token of each row: temperature, top-k, top-p, then the inverse of the cumulative distribution.

    Args:
        logits: (N, K), floating point.
        uniform: (N,) float32 in [0, 1), on the device of ``logits``; see ``reference.uniform``.
        temperature: Divides the logits; 0 takes the largest one.
        top_k: Keep the k largest logits; ``None`` keeps all.
        top_p: Keep the most likely tokens until their probability reaches it; ``None`` keeps all.

    Returns:
        (N,) int64. Not differentiable.

    Raises:
        ValueError: Shapes that do not fit, or a setting out of its range.

    Source: see ``reference.sample``.
    """
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)}, {tuple(uniform.shape)}"
        raise ValueError(f"sample: logits and uniform have shapes {shapes}; want (N, K) and (N,)")
    check_sampling(temperature, top_k, top_p)
    return reference.sample(logits.detach(), uniform, temperature, top_k, top_p)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError unless the settings are ones that ``sample`` takes."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature is {temperature}; want a finite number, 0 or above")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"sample: top_k is {top_k!r}; want an integer, 1 or above, or None")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample: top_p is {top_p}; want a number in (0, 1], or None")
