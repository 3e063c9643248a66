"""How much memory decoding takes, and how many images a device has room for."""

from __future__ import annotations

import torch

from igpt_fast.engines.choice import choose, kept_bytes
from igpt_fast.engines.decoder import cache_dtype, check_dtype
from igpt_fast.engines.network import Model

WORKSPACE_BYTES = 1 << 28  # of libraries and graphs, whatever the images


def cache_bytes(model: Model, dtype: str | None = None, primer: int = 0, copies: int = 1) -> int:
    """Bytes of key/value cache that one whole image takes, on average where several share a primer.

    Args:
        model: The model.
        dtype: As in ``make_decoder``.
        primer: Positions that are read before the fork.
        copies: Images made of each primer.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    position = choose(model, dtype).engine.position_bytes(model, dtype)
    shared = primer if position.shared is not None and copies > 1 else 0
    own, each = model.config.n_positions - shared, -(-shared // copies)
    return model.config.n_layer * (own * position.own + each * (position.shared or 0))


def most_images(model: Model, dtype: str | None = None, primer: int = 1, copies: int = 1) -> int | None:
    """How many images can be decoded together in the memory that a model's CUDA device has free; 0 where not one can.

    Args:
        model, dtype, primer, copies: As in ``cache_bytes``.

    Returns:
        ``None`` for a model on another device, whose memory is not known.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    check_dtype(dtype)
    if model.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(model.device)
    free += kept_bytes(model)
    free += _idle(model.device)
    return max(0, int(0.9 * free - WORKSPACE_BYTES)) // image_bytes(model, dtype, primer, copies)


def _idle(device: torch.device) -> int:
    """What torch holds without using it, which is free for it, though it may be in pieces; that in a pool of graphs is
    free for these alone.
    """
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.get_allocator_backend() == "native":
        for segment in torch.cuda.memory_snapshot():
            if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0):
                idle -= segment["total_size"] - segment["allocated_size"]
    return idle


def image_bytes(model: Model, dtype: str | None = None, primer: int = 1, copies: int = 1) -> int:
    """Bytes that one more image takes while it is decoded, activations included; arguments as in ``cache_bytes``."""
    config = model.config
    item = cache_dtype(model).itemsize
    # Of a position while it is computed: some ten tensors of n_embd at once, the MLP's two, and logits.
    position = item * (10 * config.n_embd + 2 * config.inner) + 16 * config.vocab_size
    # What was read is there twice for a moment: as it was read, and where the images keep it.
    read = 2 * config.n_layer * config.n_embd * item + position
    # Tokens and log-probabilities: the caller's, the decoder's, and the copy of these at the end.
    drawn = 3 * (8 + 4) * config.n_positions
    return cache_bytes(model, dtype, primer, copies) + position + drawn + -(-primer * read // copies)
