"""The palette: colours to tokens, tokens to colours, and the clusters themselves (fit, load, save).

A colour of value v in 0..255 stands at ``v / 127.5 - 1`` in each channel; clusters are points of that cube.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from igpt_fast import files, ops
from igpt_fast.checks import whole_number
from igpt_fast.files import shown

Array = TypeVar("Array", np.ndarray, Tensor)

MAX_CLUSTERS = 65536
_SAMPLE, _EACH = 400_000, 128  # pixels that clusters are fitted to: in all, or for each where that is more
_CHUNK = 1 << 18  # pixels whose colours are counted at once
FLOAT_SLACK = 1e-3  # how far past -1 or 1 a float may lie: interpolation and half precision round


def check_clusters(clusters: Any, minimum: int = 1, *, usual: bool = True) -> np.ndarray:
    """The clusters as a (K, 3) float32 numpy array.

    Args:
        clusters: Array or tensor of floats, or nested lists of them.
        minimum: The smallest K accepted; the largest is ``MAX_CLUSTERS``.
        usual: Whether colours are scaled to [-1, 1], so that clusters elsewhere are a mistake.

    Raises:
        TypeError: Not floats; integers are refused because colours in 0..255 are not clusters.
        ValueError: Not (K, 3), K out of bounds, not finite, or outside [-1, 1].
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
    if usual and np.abs(array).max() > 1.0 + FLOAT_SLACK:
        raise ValueError(
            f"clusters: values in {array.min():g}..{array.max():g}; want floats in [-1, 1], where a colour v in 0..255"
            " stands at v / 127.5 - 1"
        )
    return array


def eight_bit(values: np.ndarray, name: str = "image") -> np.ndarray:
    """The values of an image as uint8; see ``to_rgb`` for what each dtype means.

    Raises:
        TypeError: Another dtype; the message starts with ``name``.
        ValueError: A value out of range.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {values.dtype}; want integers, bool or floats")
    if not values.size:
        return values.astype(np.uint8)
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f" and low >= -FLOAT_SLACK and high <= 1.0 + FLOAT_SLACK:
        values = values.astype(np.float32, copy=False)
        return np.rint(np.clip(values, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
    # Written so that NaN fails too.
    if not (low >= 0 and high <= 255 and (values.dtype.kind != "f" or bool((values == np.rint(values)).all()))):
        wanted = "finite ones in [0, 1], or whole numbers in 0..255" if values.dtype.kind == "f" else "0..255"
        kind = "floats" if values.dtype.kind == "f" else "integers"
        raise ValueError(f"{name} holds {kind} from {low:g} to {high:g}; want {wanted}")
    return values.astype(np.uint8)


def _to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """A tensor of the array, which may be read-only, big-endian or reversed."""
    return torch.from_numpy(np.require(array, dtype=dtype, requirements=["C", "W"]))


def quantize(images: Array, clusters: np.ndarray | Tensor) -> Array:
    """The token of every colour: the index of the nearest cluster, the lowest one on ties.

    Args:
        images: (..., 3) numpy array or tensor: integers as ``to_rgb`` takes them (evaluated in float64, so exact), or
            floats in [-1, 1], which are rounded to float32 and evaluated in it.
        clusters: (K, 3) floats, rounded to float32.

    Returns:
        (...) int64, of the kind of ``images`` and on its device.

    Raises:
        TypeError: Neither an array nor a tensor, or neither integers nor floats.
        ValueError: Wrong shape, integers outside 0..255, floats not finite or outside [-1, 1], or unusable clusters.
    """
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(f"quantize: images is a {type(images).__name__}; want an array or tensor (see to_rgb)")
    if images.ndim == 0 or images.shape[-1] != 3:
        raise ValueError(f"quantize: images has shape {tuple(images.shape)}; want (..., 3)")
    palette = torch.from_numpy(check_clusters(clusters))
    if isinstance(images, Tensor) and (images.dtype == torch.uint8 or images.is_floating_point()):
        colours = images.detach()
    else:
        array = images.cpu().numpy() if isinstance(images, Tensor) else images
        if array.dtype.kind not in "iuf":
            raise TypeError(f"quantize: images has dtype {images.dtype}; want integers in 0..255 or floats in [-1, 1]")
        if array.dtype.kind == "f":
            colours = _to_tensor(array, np.float32)
        else:
            colours = _to_tensor(eight_bit(array, "quantize: images"), np.uint8)
        colours = colours.to(images.device) if isinstance(images, Tensor) else colours
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
        whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    elif isinstance(tokens, np.ndarray):
        whole = tokens.dtype.kind in "iu"
    else:
        raise TypeError(f"dequantize: tokens is a {type(tokens).__name__}; want an array or tensor")
    if not whole:
        raise TypeError(f"dequantize: tokens has dtype {tokens.dtype}; want integers")
    index = tokens.detach().to(torch.int64) if isinstance(tokens, Tensor) else _to_tensor(tokens, np.int64)
    if index.numel():
        low, high = (int(end) for end in torch.aminmax(index))
        if low < 0 or high >= len(palette):
            wrong, most = low if low < 0 else high, len(palette) - 1
            raise ValueError(f"dequantize: token {wrong} is not in 0..{most} (the start token is no colour)")
    colours = ops.dequantize(index, palette.to(index.device))
    return colours if isinstance(tokens, Tensor) else colours.numpy()


def fit_clusters(
    images: np.ndarray | Tensor,
    n_clusters: int,
    *,
    seed: int = 0,
    pinned: Sequence[Sequence[int]] = (),
    all_pixels: bool = False,
) -> np.ndarray:
    """Clusters of the colours of images, by scikit-learn's MiniBatchKMeans.

    Of many pixels it takes a sample, which depends on how often each colour occurs and on nothing else: neither on the
    order of the images nor on their shape.

    Args:
        images: (..., 3), of the dtypes and ranges that ``to_rgb`` takes.
        n_clusters: 2..65536, the pinned ones included.
        seed: Of the sample, the initial centres and the batches, 0..2^32-1.
        pinned: Colours (r, g, b) in 0..255 that become the first clusters as they are; their pixels are left
            out of the fit.
        all_pixels: Fit to every pixel, in the order given; far slower for millions, and 12 bytes for each. Otherwise
            to 400,000, or to 128 a cluster where that is more; and where these would have fewer colours than there are
            clusters, to each colour once.

    Returns:
        (n_clusters, 3) float32 in [-1, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: A dtype that ``to_rgb`` does not take, or n_clusters not an integer.
        ValueError: Wrong shape, n_clusters or seed out of bounds, bad pins, or fewer colours than clusters.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 0 or array.shape[-1] != 3:
        raise ValueError(f"fit_clusters: images has shape {array.shape}; want (..., 3)")
    pixels = eight_bit(array, "fit_clusters: images").reshape(-1, 3)
    pins = _check_pinned(pinned)
    if isinstance(n_clusters, bool) or not isinstance(n_clusters, Integral):
        raise TypeError(f"fit_clusters: n_clusters is {shown(n_clusters)}; want an integer")
    n_clusters = whole_number("fit_clusters: n_clusters", n_clusters, max(2, len(pins) + 1), MAX_CLUSTERS)
    seed = whole_number("fit_clusters: seed", seed, 0, (1 << 32) - 1)
    wanted = n_clusters - len(pins)
    counts = _colour_counts(pixels)
    counts[colour_codes(pins)] = 0
    colours = np.flatnonzero(counts)
    if len(colours) < wanted:
        most = len(colours) + len(pins)
        found = f"with the pinned ones there are {most} colours"
        raise ValueError(f"fit_clusters: {found}; want no more clusters (-k), not {n_clusters}")
    try:
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('fit_clusters needs scikit-learn: pip install "igpt_fast[train]"') from error
    if all_pixels:
        for pin in pins:
            pixels = pixels[(pixels != pin).any(axis=1)]
    else:
        chosen = _sample(colours, counts[colours], max(_SAMPLE, _EACH * wanted), seed)
        chosen = chosen if len(np.unique(chosen)) >= wanted else colours
        pixels = np.stack([chosen >> 16, chosen >> 8 & 255, chosen & 255], axis=1)
    km = MiniBatchKMeans(wanted, random_state=seed, batch_size=4096, n_init=3, max_iter=100)
    # A batch is too little work for several threads, which wait for each other: one is as fast, and on a busy machine
    # takes a fourth of the time.
    with threadpool_limits(None if all_pixels else 1):
        fitted = km.fit(_as_points(pixels)).cluster_centers_.astype(np.float32)
    return np.concatenate([_as_points(pins), fitted])


def _as_points(pixels: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] of integers in 0..255."""
    points = pixels.astype(np.float32)
    points /= 127.5
    points -= 1.0
    return points


def colour_codes(pixels: np.ndarray) -> np.ndarray:
    """(...) int32 of (..., 3) integers in 0..255, a number for each colour."""
    return pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _colour_counts(pixels: np.ndarray) -> np.ndarray:
    """(2^24,) integers: how many of the (N, 3) pixels have each colour."""
    counts = np.zeros(1 << 24, np.min_scalar_type(len(pixels)))
    for start in range(0, len(pixels), _CHUNK):
        codes, times = np.unique(colour_codes(pixels[start : start + _CHUNK]), return_counts=True)
        counts[codes] += times.astype(counts.dtype)
    return counts


def _sample(colours: np.ndarray, times: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Colours of ``size`` pixels, or of all: one of each of as many equal parts of the pixels in order of colour."""
    ends = np.cumsum(times, dtype=np.int64)
    if ends[-1] <= size:
        return np.repeat(colours, times)
    places = (np.arange(size) + np.random.default_rng(seed).random(size)) * (ends[-1] / size)
    return colours[np.searchsorted(ends[:-1], places.astype(np.int64), side="right")]


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
        FileNotFoundError, IsADirectoryError, PermissionError: As their names say.
        ValueError: Not such a file, or its clusters are unusable; the message names the file.
    """
    path = Path(path)
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
    most = MAX_CLUSTERS * 3 * 16 + 65536
    with files.open_input(path, most) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > most:
            raise ValueError(f"{path}: too large for {MAX_CLUSTERS} clusters")
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
