"""Folders of pictures as tokens: the palette, the classes, and what is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from igpt_fast.image.clusters import check_clusters, fit_clusters, quantize
from igpt_fast.image.folders import _read_pictures
from igpt_fast.learning.data import TokenData, _narrow


def held_out(name: str, fraction: float) -> bool:
    """Whether the image of that name is held out: decided by a hash of the name, so that files which are added
    later change nothing for those that were there."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def tokens_from_images(
    folder: str | os.PathLike[str],
    side: int,
    n_clusters: int,
    holdout: float = 0.1,
    seed: int = 0,
    clusters: np.ndarray | Tensor | None = None,
    *,
    skip_unreadable: bool = False,
    classes: bool = False,
    all_pixels: bool = False,
) -> TokenData:
    """Turns all images below a folder into tokens.

    Each picture is prepared as iGPT's training data was, less the random crop: the square in its middle is cut
    out and resized to ``side`` (the same as resizing the short side and cropping then).

    Args:
        folder: See ``find_images``.
        side: Height and width in pixels, 1..4096.
        n_clusters: Colours to fit to the part that is trained on.
        holdout: Expected fraction of the images that is held out, in [0, 1); see ``held_out``. The name that
            counts is the path below ``folder``.
        seed: Of the fit; the hold-out does not depend on it.
        clusters: (K, 3) floats to use instead of fitting; ``n_clusters`` must be K.
        skip_unreadable: Leave out files that are not readable images, with a warning of one line for each, instead
            of failing; ``skipped`` of the result is their number.
        classes: The sub-directories of ``folder``, in the order of their names, are classes.
        all_pixels: See ``fit_clusters``.

    Raises:
        NotADirectoryError: No such folder.
        ValueError: A value out of its range, no images, unreadable ones, too few colours for the clusters, or with
            ``classes`` an image in none of them.
    """
    if not 1 <= side <= 4096:
        raise ValueError(f"side is {side}; want 1..4096")
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout is {holdout}; want a fraction in [0, 1)")
    palette = None if clusters is None else check_clusters(clusters, minimum=2)
    if palette is not None and len(palette) != n_clusters:
        raise ValueError(f"n_clusters is {n_clusters}, but {len(palette)} clusters are given")
    folder = Path(folder)
    names, pictures, skipped = _read_pictures(folder, side, skip_unreadable)
    labels, class_names = _classes_of(folder, names) if classes else (None, [])
    heldout = np.array([held_out(name, holdout) for name in names])
    if heldout.all():
        raise ValueError(f"{folder}: holdout {holdout} leaves none of the {len(names)} images to train on")
    if palette is None:
        palette = fit_clusters(pictures[~heldout], n_clusters, seed=seed, all_pixels=all_pixels)
    tokens = quantize(pictures, palette).reshape(len(pictures), -1)
    narrow = _narrow(tokens, len(palette))
    return TokenData(narrow, palette, torch.from_numpy(heldout), skipped, labels, class_names)


def _classes_of(folder: Path, names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The class of every image by its name below the folder, and the names of the classes."""
    if loose := [name for name in names if "/" not in name]:
        raise ValueError(f"{folder / loose[0]}: lies in no class; those are the sub-directories of {folder}")
    own = [name.split("/")[0] for name in names]
    classes = sorted(set(own))
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[name] for name in own]), classes
