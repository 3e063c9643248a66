"""Decoders: a model that reads tokens one position at a time, behind one interface.

``prefill`` reads a primer in one go, ``step`` one more token of every image; both return the logits of the next
position. ``fork`` goes on with several images for each primer. ``ReferenceDecoder`` runs the PyTorch model on a static
key/value cache; it is right everywhere and the measure for the faster ones. ``CpuDecoder`` runs the compiled module's
decode step, ``CudaDecoder`` the CUDA kernels'. ``make_decoder`` chooses.
"""

from __future__ import annotations

from igpt_fast import backend
from igpt_fast.engines.cpu.decoder import CpuDecoder, why_not_cpu
from igpt_fast.engines.cuda.decoder import CudaDecoder, why_not_cuda
from igpt_fast.engines.decoder import Decoder
from igpt_fast.engines.network import Model
from igpt_fast.engines.reference import ReferenceDecoder


def _chosen(model: Model, dtype: str | None) -> tuple[str, str | None]:
    """The name of the fastest decoder that there is for a model, and why it is none of the native ones."""
    on_cuda, on_cpu = why_not_cuda(model, dtype), why_not_cpu(model, dtype)
    if on_cuda is None:
        return "cuda", None
    if on_cpu is None:
        return "cpu", None
    return "reference", on_cuda if model.device.type == "cuda" or dtype == "fp8_values" else on_cpu


def make_decoder(model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> Decoder:
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
    return ReferenceDecoder(model, batch_size, capacity, reason)


# Every decoder of igpt_fast.engines.choice, the faster one first: what it covers.
DECODERS: dict[str, str] = {
    "cuda": "for CUDA models in bf16, fp16 or fp32, and dtype='fp8_values' of the first two; quick_gelu, gelu,"
    " gelu_new; head_dim 32, 64, 96, 128; n_embd and n_inner multiples of 8; no autocast or mode, no hook,"
    " wrapper, subclass or replaced module or method in between; five kernels a layer for 8 images at most in bf16 and"
    " fp16, else torch's products with the rest fused; CUDA graphs",
    "cpu": "for CPU models in fp32 or bf16, and dtype='int8'; quick_gelu, gelu, gelu_new; n_embd a multiple of 16,"
    " n_inner of 8, head_dim of 8 to 256; no autocast or mode, no hook, wrapper, subclass or replaced module or method"
    " in between",
    "reference": "for everything else: it calls the model, and with it whatever is around it",
}
# Every forward pass of igpt_fast.engines.cpu.forward, the faster one first: what it covers.
FORWARDS: dict[str, str] = {
    "cpu": "for CPU models in bf16 and eval mode, without gradient, as the decoder covers them; token ids alone: no"
    " mask, cache to extend, embeddings, positions or attention weights; sequences of 8 positions or more, or 8 of them"
    " at most; no compiling or transforms",
    "torch": "for everything else",
}
