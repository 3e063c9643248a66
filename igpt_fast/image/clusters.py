"""The palette: colours to tokens, tokens to colours, and the clusters themselves (fit, load, save).

A colour of value v in 0..255 stands at ``v / 127.5 - 1`` in each channel; clusters are points of that cube.
Import these names from ``igpt_fast.image``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files, ops
from igpt_fast.checks import whole_number

Array = TypeVar("Array", np.ndarray, Tensor)

MAX_CLUSTERS = 65536
FLOAT_SLACK = 1e-3  # how far past -1 or 1 a float may lie: interpolation and half precision round


def check_clusters(clusters: Any, minimum: int = 1) -> np.ndarray:
    """The clusters as a (K, 3) float32 numpy array.

    Args:
        clusters: Array or tensor of floats, or nested lists of them.
        minimum: The smallest K accepted; the largest is ``MAX_CLUSTERS``.

    Raises:
        TypeError: Not floats; integers are refused because colours in 0..255 are not clusters.
        ValueError: Not (K, 3), K out of bounds, or not finite.
    """
    if isinstance(clusters, Tensor):
        clusters = clusters.detach().cpu()
        clusters = clusters.float().numpy() if clusters.is_floating_point() else clusters.numpy()
    try:
        array = np.asarray(clusters)
    except (TypeError, ValueError, OverflowError) as error:  # rows of different lengths
        raise TypeError(f"clusters: want K rows of three numbers: {error}") from error
    if array.dtype.kind != "f":  # nor are strings, booleans or null taken for numbers
        raise TypeError(f"clusters: dtype {array.dtype}; want floats in [-1, 1]")
    if array.ndim != 2 or array.shape[1] != 3 or not minimum <= len(array) <= MAX_CLUSTERS:
        raise ValueError(f"clusters: shape {array.shape}; want (K, 3) with K in {minimum}..{MAX_CLUSTERS}")
    with np.errstate(over="ignore"):
        array = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError("clusters: not all values are finite")
    return array


def _to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """A tensor of the array, which may be read-only, big-endian or reversed."""
    return torch.from_numpy(np.require(array, dtype=dtype, requirements=["C", "W"]))


def quantize(images: Array, clusters: np.ndarray | Tensor) -> Array:
    """The token of every colour: the index of the nearest cluster, the lowest one on ties.

    Args:
        images: (..., 3) numpy array or tensor, uint8 (evaluated in float64, so exact) or floats in [-1, 1], which
            are rounded to float32 and evaluated in it.
        clusters: (K, 3) floats, rounded to float32.

    Returns:
        (...) int64, of the kind of ``images`` and on its device.

    Raises:
        TypeError: Neither an array nor a tensor, or a dtype other than uint8 and floats.
        ValueError: Wrong shape, floats not finite or outside [-1, 1], or unusable clusters.
    """
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(f"quantize: images is a {type(images).__name__}; want an array or tensor (see to_rgb)")
    if images.ndim == 0 or images.shape[-1] != 3:
        raise ValueError(f"quantize: images has shape {tuple(images.shape)}; want (..., 3)")
    palette = torch.from_numpy(check_clusters(clusters))
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"quantize: images has dtype {images.dtype}; want uint8 or floats in [-1, 1]")
        colours = images.detach()
    else:
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise TypeError(f"quantize: images has dtype {images.dtype}; want uint8 or floats in [-1, 1]")
        colours = _to_tensor(images, np.uint8 if images.dtype == np.uint8 else np.float32)
    if colours.dtype != torch.uint8:
        colours = colours.to(torch.float32)
        if not bool((colours.abs() <= 1.0 + FLOAT_SLACK).all()):
            raise ValueError("quantize: images holds floats outside [-1, 1] or not finite; scale by x / 127.5 - 1")
    tokens = ops.quantize(colours, palette.to(colours.device))
    return tokens if isinstance(images, Tensor) else tokens.numpy()


def dequantize(tokens: Array, clusters: np.ndarray | Tensor) -> Array:
    """The colours of tokens.

    Args:
        tokens: (...) numpy array or tensor of integers in 0..K-1.
        clusters: (K, 3) floats.

    Returns:
        (..., 3) uint8, of the kind of ``tokens`` and on its device.

    Raises:
        TypeError: Neither an array nor a tensor, or not integers.
        ValueError: A token out of range, as the start token is, or unusable clusters.
    """
    palette = torch.from_numpy(check_clusters(clusters))
    if isinstance(tokens, Tensor):
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"dequantize: tokens has dtype {tokens.dtype}; want integers")
        index = tokens.detach().to(torch.int64)
    elif isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"dequantize: tokens has dtype {tokens.dtype}; want integers")
        index = _to_tensor(tokens, np.int64)
    else:
        raise TypeError(f"dequantize: tokens is a {type(tokens).__name__}; want an array or tensor")
    if index.numel():
        low, high = (int(end) for end in torch.aminmax(index))
        if low < 0 or high >= len(palette):
            raise ValueError(
                f"dequantize: token {low if low < 0 else high} is not in 0..{len(palette) - 1}"
                " (the start token is no colour)"
            )
    colours = ops.dequantize(index, palette.to(index.device))
    return colours if isinstance(tokens, Tensor) else colours.numpy()


def fit_clusters(
    images: np.ndarray | Tensor, n_clusters: int, *, seed: int = 0, pinned: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Clusters of the colours of images, by scikit-learn's MiniBatchKMeans.

    Args:
        images: (..., 3) uint8.
        n_clusters: 2..65536, the pinned ones included.
        seed: Of the initial centres and the batches, 0..2^32-1.
        pinned: Colours (r, g, b) in 0..255 that become the first clusters as they are; their pixels are left
            out of the fit.

    Returns:
        (n_clusters, 3) float32 in [-1, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: ``images`` is not uint8, or n_clusters not an integer.
        ValueError: Wrong shape, n_clusters or seed out of bounds, bad pins, or fewer colours than clusters.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        raise TypeError(f"fit_clusters: images has dtype {array.dtype}; want uint8")
    if array.ndim == 0 or array.shape[-1] != 3:
        raise ValueError(f"fit_clusters: images has shape {array.shape}; want (..., 3)")
    colours = _check_pinned(pinned)
    if isinstance(n_clusters, bool) or not isinstance(n_clusters, int):
        raise TypeError(f"fit_clusters: n_clusters is {n_clusters!r}; want a whole number")
    if not 2 <= n_clusters <= MAX_CLUSTERS or n_clusters <= len(colours):
        raise ValueError(
            f"fit_clusters: n_clusters is {n_clusters}; want 2..{MAX_CLUSTERS}, more than the {len(colours)} pinned"
        )
    seed = whole_number("fit_clusters: seed", seed, 0, (1 << 32) - 1)
    seen = np.zeros((256, 256, 256), dtype=bool)
    seen[tuple(array.reshape(-1, 3).T)] = True
    seen[tuple(colours.T)] = False
    distinct = int(seen.sum())
    if distinct < n_clusters - len(colours):
        raise ValueError(
            f"fit_clusters: {distinct} colours beside the pinned ones; not enough for {n_clusters} clusters"
        )
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError('fit_clusters needs scikit-learn: pip install "igpt_fast[train]"') from error
    pixels = array.reshape(-1, 3).astype(np.float32) / 127.5 - 1.0
    pins = colours.astype(np.float32) / 127.5 - 1.0
    for pin in pins:
        pixels = pixels[(pixels != pin).any(axis=1)]
    km = MiniBatchKMeans(n_clusters - len(pins), random_state=seed, batch_size=4096, n_init=3, max_iter=100)
    return np.concatenate([pins, km.fit(pixels).cluster_centers_.astype(np.float32)])


def _check_pinned(pinned: Any) -> np.ndarray:
    """(N, 3) integers in 0..255, all rows different."""
    try:
        colours = np.asarray(pinned) if len(pinned) else np.zeros((0, 3), np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fit_clusters: pinned is not a list of (r, g, b): {error}") from error
    if colours.ndim != 2 or colours.shape[1] != 3:
        raise ValueError(f"fit_clusters: pinned has shape {colours.shape}; want (N, 3)")
    if colours.dtype.kind not in "iu" or (colours < 0).any() or (colours > 255).any():
        raise ValueError("fit_clusters: pinned holds something else than integers in 0..255")
    if len(np.unique(colours, axis=0)) != len(colours):
        raise ValueError("fit_clusters: pinned names a colour twice")
    return colours


def load_clusters(path: str | os.PathLike[str]) -> np.ndarray:
    """The clusters in a ``.npy`` file, or in a ``preprocessor_config.json``.

    Returns:
        (K, 3) float32.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, or its clusters are unusable; the message names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file")
    if path.suffix.lower() == ".json":
        clusters = files.read_json(path).get("clusters")
        if clusters is None:
            raise ValueError(f"{path}: has no clusters")
    else:
        clusters = _read_npy(path)
    try:
        return check_clusters(clusters, minimum=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_npy(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size > MAX_CLUSTERS * 3 * 16 + 65536:
        raise ValueError(f"{path}: too large for {MAX_CLUSTERS} clusters")
    with path.open("rb") as file:
        try:
            return files.read_npy(file, size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def save_clusters(clusters: np.ndarray | Tensor, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Writes clusters as a float32 ``.npy`` file, whole or not at all.

    Raises:
        ValueError, TypeError: Unusable clusters, or ``path`` does not end in ``.npy``.
        FileExistsError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"{path}: want a name that ends in .npy")
    array = check_clusters(clusters, minimum=2)
    with files.replacing(path, overwrite=overwrite) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
