"""Decoders: a model that reads tokens one position at a time, behind one interface.

``prefill`` reads a primer in one go, ``step`` one more token of every image; both return the logits of the next
position. ``fork`` goes on with several images for each primer. ``ReferenceDecoder`` runs the PyTorch model on a static
key/value cache; it is right everywhere and the measure for the faster ones. ``CpuDecoder`` runs the compiled module's
decode step, ``CudaDecoder`` the CUDA kernels'. ``make_decoder`` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from igpt_fast import backend
from igpt_fast.decoders.cpu_decoder import CpuDecoder, packed_weights, why_not_cpu, why_not_shape
from igpt_fast.decoders.cuda_decoder import CudaDecoder, why_not_cuda
from igpt_fast.decoders.cuda_step import FUSED_DTYPES, forget, idle_bytes
from igpt_fast.decoders.plain_model import HOOKS, MODULES, blocks_of, weights_of, why_not_settings
from igpt_fast.decoders.protocol import DTYPES, Decoder, check_dtype
from igpt_fast.decoders.reference_decoder import ReferenceDecoder, cache_dtype

if TYPE_CHECKING:
    from igpt_fast.model import ImageGPTForCausalImageModeling

__all__ = [
    "DTYPES",
    "HOOKS",
    "MODULES",
    "CpuDecoder",
    "CudaDecoder",
    "Decoder",
    "ReferenceDecoder",
    "blocks_of",
    "cache_bytes",
    "check_dtype",
    "forget",
    "image_bytes",
    "make_decoder",
    "most_images",
    "packed_weights",
    "weights_of",
    "why_not_cpu",
    "why_not_cuda",
    "why_not_settings",
    "why_not_shape",
]

WORKSPACE_BYTES = 1 << 28  # of libraries and graphs, whatever the images


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
    config, kind = model.config, _chosen(model, dtype)[0]
    shares = kind == "cpu" or (kind == "cuda" and model.dtype in FUSED_DTYPES)
    shared = primer if shares and copies > 1 else 0
    item = cache_dtype(model).itemsize
    own_position = shared_position = 2 * config.n_embd * item
    if kind == "cpu" and dtype == "int8":
        own_position = shared_position = 2 * config.n_embd + 12 * config.n_head  # two scales and a sum for each head
    if kind == "cuda" and dtype == "fp8_values":
        own_position = config.n_embd * (item + 1) + 4 * config.n_head  # a scale for each head
    own, each = config.n_positions - shared, -(-shared // copies)
    return config.n_layer * (own * own_position + each * shared_position)


def most_images(
    model: ImageGPTForCausalImageModeling, dtype: str | None = None, primer: int = 1, copies: int = 1
) -> int | None:
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
    free += idle_bytes(model)
    # What torch holds without using it is free for it, though it may be in pieces.
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(0, int(0.9 * free - WORKSPACE_BYTES)) // image_bytes(model, dtype, primer, copies)


def image_bytes(
    model: ImageGPTForCausalImageModeling, dtype: str | None = None, primer: int = 1, copies: int = 1
) -> int:
    """Bytes that one more image takes while it is decoded, activations included; arguments as in ``cache_bytes``."""
    config = model.config
    inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    item = cache_dtype(model).itemsize
    # Of a position while it is computed: some ten tensors of n_embd at once, the MLP's two, and logits.
    position = item * (10 * config.n_embd + 2 * inner) + 16 * config.vocab_size
    # What was read is there twice for a moment: as it was read, and where the images keep it.
    read = 2 * config.n_layer * config.n_embd * item + position
    return cache_bytes(model, dtype, primer, copies) + position + -(-primer * read // copies)


def _chosen(model: ImageGPTForCausalImageModeling, dtype: str | None) -> tuple[str, str | None]:
    """The name of the fastest decoder that there is for a model, and why it is none of the native ones."""
    on_cuda, on_cpu = why_not_cuda(model, dtype), why_not_cpu(model, dtype)
    if on_cuda is None:
        return "cuda", None
    if on_cpu is None:
        return "cpu", None
    return "reference", on_cuda if model.device.type == "cuda" or dtype == "fp8_values" else on_cpu


def make_decoder(
    model: ImageGPTForCausalImageModeling, batch_size: int, capacity: int, dtype: str | None = None
) -> Decoder:
    """The fastest decoder there is for the model: ``CudaDecoder`` or ``CpuDecoder`` where ``why_not_cuda`` or
    ``why_not_cpu`` finds nothing against it, else ``ReferenceDecoder``.

    Args:
        model, batch_size, capacity: See ``ReferenceDecoder``.
        dtype: ``None`` for the model's; ``"int8"`` as ``CpuDecoder``, ``"fp8_values"`` as ``CudaDecoder`` has it.

    Raises:
        BackendUnavailableError: ``dtype`` is given and nothing offers it for this model.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.
    """
    name, reason = _chosen(model, dtype)
    if name == "cuda":
        return CudaDecoder(model, batch_size, capacity, dtype)
    if name == "cpu":
        return CpuDecoder(model, batch_size, capacity, dtype)
    if dtype is not None:
        raise backend.BackendUnavailableError(f"decoder: dtype {dtype!r} is not available: {reason}")
    return ReferenceDecoder(model, batch_size, capacity)
