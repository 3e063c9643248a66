"""Features of images: what a network makes of them, pooled, of some of its layers, in batches and bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_fast.checks import whole_number
from igpt_fast.files import listed, shown
from igpt_fast.learning.objectives.masked import VOTES, vote
from igpt_fast.likelihood.nats import evaluating
from igpt_fast.likelihood.transfer import Arriving, one_ahead, sent
from igpt_fast.model import ImageGPTModel

Progress = Callable[[int, int], None]


def load_network(name: str, device: Any = None, dtype: Any = torch.float32) -> ImageGPTModel:
    """The network of a folder or of a hub name, without its head; see ``from_pretrained``."""
    return ImageGPTModel.from_pretrained(name, device=device, dtype=dtype)


def fed(config: Any, tokens: Tensor, sos: bool = True) -> Tensor:
    """What a network is fed to see images: (B, T) int64, as it was trained.

    A causal one gets ``[SOS, x_0 .. x_(T-2)]``, without ``sos`` the image alone. A bidirectional one was trained
    without SOS and gets the image in any case; parts of it are masked, see ``check_masks``.
    """
    if config.bidirectional or not sos:
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], config.sos_token_id), tokens[:, :-1]], dim=1)


def check_masks(masks: int | None, config: Any) -> int:
    """How many masks an image is seen under, which vote: a bidirectional network was trained on masked images.

    Args:
        masks: 0 shows the whole image; ``None``: 5 to a bidirectional network, and 0 to a causal one.
        config: The network's.

    Raises:
        ValueError: No number, one out of its range, or masks for a causal network.
    """
    if masks is None:
        return VOTES if config.bidirectional else 0
    if whole_number("masks", masks, 0, 1000) and not config.bidirectional:
        raise ValueError(f"masks is {masks}, and the network is causal: it was trained on whole images; want 0")
    return masks


def check_layers(layers: str | int | Sequence[int] | None, n_layer: int) -> list[int]:
    """The numbers of layers, ascending and each once, of what a caller or a command line gives.

    Layer l is the paper's: what stands behind l blocks, after the norm that comes next; 0 are the embeddings.

    Args:
        layers: ``"all"`` or ``None``: 1..L. ``"2,4,6"``, a number, or numbers.
        n_layer: L.

    Raises:
        ValueError: No number, none at all, one twice, or one that is not in 0..L.
    """
    if layers is None or layers == "all":
        return list(range(1, n_layer + 1))
    if isinstance(layers, str):
        if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", layers, re.ASCII):
            raise ValueError(f"layers is {shown(layers)}; want 'all', or numbers in 0..{n_layer} with commas between")
        layers = [int(number) for number in layers.split(",")]
    numbers = layers if isinstance(layers, Sequence | np.ndarray) else [layers]
    found = sorted(whole_number("layers", i, 0, n_layer) for i in numbers)
    if not found:
        raise ValueError("layers: none are given; want one at least")
    if twice := {layer for layer in found if found.count(layer) > 1}:
        raise ValueError(f"layers: {listed(twice)} twice")
    return found


def check_concat(concat: int, layers: Sequence[int]) -> int:
    """How many of the layers are put side by side: 0, or 2 and more; ``ValueError`` else."""
    if whole_number("concat", concat, 0, len(layers)) == 1:
        raise ValueError("concat is 1; want 2 layers or more, or 0 for none")
    return concat


def check_bands(bands: int, config: Any, pool: str | None = "mean") -> int:
    """Into how many bands an image is cut; ``ValueError`` where that does not divide its positions, or nothing is
    pooled."""
    if config.n_positions % whole_number("bands", bands):
        raise ValueError(f"bands is {bands}; want a number that divides the {config.n_positions} positions")
    if bands != 1 and pool is None:
        raise ValueError(f"bands is {bands}, and nothing is pooled; want 1")
    return bands


def check_tokens(tokens: Any, config: Any, shorter: bool = False) -> Tensor:
    """Images as tokens that a network can be fed: (N, T) of their own integer type.

    Args:
        tokens: Of anything.
        config: The network's.
        shorter: Whether parts of images will do, their first positions.

    Raises:
        TypeError: Neither array nor tensor.
        ValueError: Not (N, T) integers, no image, or one of another length or with other colours than the network's.
    """
    if not isinstance(tokens, np.ndarray | Tensor):
        raise TypeError(f"tokens is a {type(tokens).__name__}; want an array or tensor (N, T)")
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise ValueError(f"tokens must be (N, T) integers, N and T at least 1, got {array.shape} {array.dtype}")
    length, wanted = array.shape[1], config.n_positions
    if length > wanted or (length < wanted and not shorter):
        raise ValueError(f"tokens are {length} an image; the model takes {wanted}{' at most' if shorter else ''}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.n_colours:
        raise ValueError(f"token {low if low < 0 else high} is not in 0..{config.n_colours - 1}, the model's colours")
    return torch.from_numpy(
        np.require(array, requirements=["C", "W"]) if array.dtype != np.uint16 else array.astype(int)
    )


def feature_batches(
    model: Any,
    tokens: Tensor,
    layers: Sequence[int],
    *,
    sos: bool = True,
    bands: int = 1,
    pool: str | None = "mean",
    masks: int | None = None,
    batch_size: int = 64,
    dtype: str | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The features of images, a batch at a time, all layers from one pass in inference mode.

    Args:
        model: One of the three classes; it is computed in eval mode and on its device.
        tokens: (N, T) integers, as ``check_tokens`` has them.
        layers: As ``check_layers`` has them.
        sos: See ``fed``.
        bands, pool, dtype: See ``forward_intermediates``.
        masks: See ``check_masks``; the features are the mean over them, and each costs a pass. The masks are those of
            ``fixed_masks``: an image's are the same in every batch, order and process.
        batch_size: Images that are computed together.

    Yields:
        Which images, and (B, len(layers), F) float32 on the model's device; F is ``bands * n_embd``. Without pooling
        (B, len(layers), T, n_embd).
    """
    how: dict[str, Any] = {"pool": pool, "bands": bands, "embedding": layers[0] == 0, "dtype": dtype}
    how["indices"] = [layer - 1 for layer in layers if layer > 0]
    masks = check_masks(masks, model.config)

    def read(batch: Tensor) -> Tensor:
        batch = sent(batch, model.device)
        return torch.stack([item.float() for item in model.forward_intermediates(batch, **how)], dim=1)

    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            part = slice(start, min(start + batch_size, len(tokens)))
            with torch.inference_mode():
                batch = fed(model.config, tokens[part].long(), sos)  # on the host, where the masks are made
                found = vote(read, model.config, batch, masks) if masks else read(batch)
            yield part, found.flatten(2) if pool else found  # (B, L, [bands,] n_embd) or (B, L, T, n_embd)


def extract(
    model: Any,
    tokens: Any,
    layers: str | int | Sequence[int] | None = None,
    *,
    sos: bool = True,
    bands: int = 1,
    pool: str | None = "mean",
    masks: int | None = None,
    batch_size: int = 64,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The features of images, of all ``layers`` from one pass.

    Args:
        model: ``ImageGPTModel``, or one of the models that have it.
        tokens: (N, T) integers, colours alone; ``sos`` is added here.
        layers: See ``check_layers``; ``None``: 1..L.
        sos, bands, pool, masks, batch_size, dtype: See ``feature_batches``.
        progress: Called with the number of images done and of all.

    Returns:
        (N, len(layers), F) float32, F = ``bands * n_embd``; without pooling (N, len(layers), T, n_embd).

    Raises:
        BackendUnavailableError: ``dtype`` is given, and nothing here computes this model in it.
        FloatingPointError: A feature is not finite.
        TypeError, ValueError: See ``check_tokens``, ``check_layers``, ``check_masks`` and ``forward_intermediates``.
    """
    numbers = check_layers(layers, model.config.n_layer)
    images = check_tokens(tokens, model.config)
    batch_size = whole_number("batch_size", batch_size)
    how: dict[str, Any] = {"sos": sos, "bands": bands, "pool": pool, "masks": masks, "batch_size": batch_size}
    how["dtype"] = dtype
    return collect(model, images, numbers, progress, **how)


def collect(
    model: Any, images: Tensor, layers: Sequence[int], progress: Progress | None = None, **how: Any
) -> np.ndarray:
    """As ``extract``, of what has been checked, by ``check_tokens`` and ``check_layers``; ``how`` as of
    ``feature_batches``."""
    found: np.ndarray | None = None
    coming = ((part, Arriving(batch)) for part, batch in feature_batches(model, images, layers, **how))
    for part, arriving in one_ahead(coming, model.device):
        batch = arriving.get().numpy()
        if found is None:
            found = np.empty((len(images), *batch.shape[1:]), dtype=np.float32)
        found[part] = batch
        if not np.isfinite(found[part]).all():
            raise FloatingPointError(f"features of images {part.start}..{part.stop - 1} are not finite")
        if progress is not None:
            progress(part.stop, len(images))
    assert found is not None
    return found


def random_twin(model: Any, seed: int = 0) -> Any:
    """A network of the same configuration, dtype and device with the initial weights that training would start from:
    what features must beat.

    Torch's global generators are left as they were.
    """
    body = model.base_model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(whole_number("seed", seed, 0, (1 << 63) - 1))
        twin = type(body)(model.config)
    return twin.to(device=model.device, dtype=model.dtype).eval()
