"""Decoders: a model that reads tokens one position at a time, behind one interface.

``prefill`` reads a primer in one go, ``step`` one more token of every image; both return the logits of the next
position. ``fork`` goes on with several images for each primer. ``TorchDecoder`` runs the PyTorch model on a static
key/value cache; it is right everywhere and the measure for the faster ones. ``CpuDecoder`` runs the compiled module's
decode step. ``make_decoder`` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpt_fast import backend
from igpt_fast.decoders.cpu_decoder import CpuDecoder, packed_weights, why_not_cpu, why_not_shape
from igpt_fast.decoders.plain_model import HOOKS, MODULES, blocks_of, weights_of, why_not_settings
from igpt_fast.decoders.protocol import DTYPES, Decoder, check_dtype
from igpt_fast.decoders.reference_decoder import TorchDecoder, cache_dtype

if TYPE_CHECKING:
    from igpt_fast.model import ImageGPTForCausalImageModeling

__all__ = [
    "DTYPES",
    "HOOKS",
    "MODULES",
    "CpuDecoder",
    "Decoder",
    "TorchDecoder",
    "blocks_of",
    "cache_bytes",
    "check_dtype",
    "make_decoder",
    "packed_weights",
    "weights_of",
    "why_not_cpu",
    "why_not_settings",
    "why_not_shape",
]


def cache_bytes(
    model: ImageGPTForCausalImageModeling, dtype: str | None = None, primer: int = 0, copies: int = 1
) -> int:
    """Bytes of key/value cache that one whole image takes, on average where several share a primer.

    Args:
        model: The model.
        dtype: As in ``make_decoder``.
        primer: Positions that are read before the fork.
        copies: Images made of each primer.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    config = model.config
    native = why_not_cpu(model, dtype) is None
    positions = config.n_positions - (primer - -(-primer // copies) if native else 0)
    a_position = 2 * config.n_embd * cache_dtype(model).itemsize
    if native and dtype == "int8":
        a_position = 2 * config.n_embd + 12 * config.n_head  # two scales and a sum for each head
    return config.n_layer * positions * a_position


def make_decoder(
    model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int, dtype: str | None = None
) -> Decoder:
    """The fastest decoder there is for the model: ``CpuDecoder`` where ``why_not_cpu`` finds nothing against it.

    Args:
        model, batch_size, capacity: See ``TorchDecoder``.
        dtype: ``None`` for the model's; ``"int8"`` as ``CpuDecoder`` has it.

    Raises:
        BackendUnavailableError: ``dtype`` is given and nothing offers it for this model.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.
    """
    reason = why_not_cpu(model, dtype)
    if reason is None:
        return CpuDecoder(model, batch_size, capacity, dtype)
    if dtype is not None:
        raise backend.BackendUnavailableError(f"decoder: dtype {dtype!r} is not available: {reason}")
    return TorchDecoder(model, batch_size, capacity)
