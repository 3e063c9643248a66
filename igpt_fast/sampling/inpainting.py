"""Inpainting: which pixels are given, and which of several candidates suits the given pixels that follow.

Images are drawn in raster order. The pixels given before the first drawn one are a primer, which the model reads as it
reads any context. Of those that come later a drawn pixel knows nothing: they are only clamped, each read in place of a
drawn one once it is its turn. What is drawn that way is not a sample of ``p(unknown | known)``, which would need the
model's likelihood of everything that follows. Sampling-importance-resampling comes closer to it: of m candidates, each
drawn with the known pixels clamped, one is taken with a probability in proportion to

    w = prod over the known pixels t behind the first drawn one of p(x_t | x_0 .. x_(t-1)).

At temperature 1 without filters and guidance, this is what importance sampling asks for, and the candidate taken is a
draw of ``p(unknown | known)`` as m grows; for a finite m, and other settings, it is an approximation. The effective
sample size, ``(sum w)^2 / sum w^2`` in 1..m, says how many candidates had a say: near 1, more of them would help.

Source: "A noniterative sampling/importance resampling alternative" (Rubin, 1987); effective sample size: Kong, Liu and
Wong (1994).
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast import reference


def kept_rows(keep: float, height: int) -> int:
    """How many of ``height`` rows a fraction, or an integer number of rows, is.

    Raises:
        ValueError: Not a float in [0, 1) or an integer below ``height``, or none of the rows would be left to draw.
    """
    whole = isinstance(keep, Integral)
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 <= float(keep) < (height if whole else 1.0):
        raise ValueError(f"keep is {keep!r}; want a fraction in [0, 1), a number of rows below {height}, or a mask")
    rows = int(keep) if whole else round(float(keep) * height)
    if rows == height:
        raise ValueError(f"keep is {keep}; want a fraction that leaves a row of {height} to draw")
    return rows


def given_pixels(keep: Any, count: int, height: int, width: int) -> Tensor:
    """(count, height * width) bool: which pixels of each of ``count`` images are given.

    Args:
        keep: A fraction or number of rows, see ``kept_rows``; or a bool array, (height, width) or (count, height,
            width), true where a pixel is given.
        count: Number of images.
        height, width: Their size.

    Raises:
        TypeError: A mask that is not boolean.
        ValueError: A value out of its range, or a mask of another shape or one that leaves nothing to draw.
    """
    if not isinstance(keep, np.ndarray | Tensor | list):
        return (torch.arange(height * width, device="cpu") < kept_rows(keep, height) * width).expand(count, -1)
    mask = keep.cpu() if isinstance(keep, Tensor) else torch.from_numpy(np.array(keep))
    if mask.dtype != torch.bool:
        raise TypeError(f"keep is an array of {mask.dtype}; want a mask of bool, true where a pixel is given")
    if mask.shape not in ((height, width), (count, height, width)):
        wanted = f"({height}, {width}) or ({count}, {height}, {width})"
        raise ValueError(f"keep is a mask of shape {tuple(mask.shape)}; want {wanted}")
    mask = mask.reshape(-1, height * width).expand(count, -1)
    if bool(mask.all(dim=1).any()):
        raise ValueError("keep is a mask that gives every pixel of an image; want one that leaves some to draw")
    return mask


def primer_lengths(given: Tensor) -> Tensor:
    """(N,) int64: how many pixels stand before the first that is drawn, from the (N, T) bool of those given."""
    return (~given).to(torch.int8).argmax(dim=1)


def following(given: Tensor) -> Tensor:
    """(N, T) bool: the given pixels behind the first that is drawn."""
    return given & (torch.arange(given.shape[1], device=given.device) >= primer_lengths(given)[:, None])


def resample(logweights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Takes one of m candidates by their weights, which is drawn as a token is.

    Args:
        logweights: (N, m) float64, log w of each.
        uniform: (N,) float32 in [0, 1).

    Returns:
        (N,) int64, and the (N,) float32 effective sample sizes.
    """
    size = torch.exp(2 * torch.logsumexp(logweights, dim=1) - torch.logsumexp(2 * logweights, dim=1))
    centred = logweights - logweights.amax(dim=1, keepdim=True)
    return reference.sample(centred, uniform), size.float()
