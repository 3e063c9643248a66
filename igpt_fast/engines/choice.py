"""Which decoder serves a model: the fastest that nothing stands against, chosen with its reason in one place.

``ReferenceDecoder`` runs the PyTorch model on a static key/value cache; it is right everywhere and the measure for the
faster ones. ``CpuDecoder`` runs the compiled module's decode step, ``CudaDecoder`` the CUDA kernels'.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from igpt_fast import backend
from igpt_fast.engines.cpu.decoder import CpuDecoder, why_not_cpu
from igpt_fast.engines.cuda.capture import failed
from igpt_fast.engines.cuda.decoder import CudaDecoder, why_not_cuda
from igpt_fast.engines.decoder import SCALED, Decoder
from igpt_fast.engines.network import Model
from igpt_fast.engines.reference import ReferenceDecoder


class Choice(NamedTuple):
    """The decoder for a model, and where it is the reference, why it is none of the native ones."""

    engine: type[Decoder]
    reason: str | None


# Model -> the decoder of its last images, at rest, and what it keeps for the next; whoever decodes takes it out.
_kept: WeakKeyDictionary[Any, tuple[Decoder, int]] = WeakKeyDictionary()


def choose(model: Model, dtype: str | None = None) -> Choice:
    """The fastest decoder there is for a model: ``CudaDecoder`` or ``CpuDecoder`` where ``why_not_cuda`` or
    ``why_not_cpu`` finds nothing against it, else ``ReferenceDecoder``.

    Raises:
        ValueError: An unknown ``dtype``.
    """
    on_cuda, on_cpu = why_not_cuda(model, dtype), why_not_cpu(model, dtype)
    if on_cuda is None:
        return Choice(CudaDecoder, None)
    if on_cpu is None:
        return Choice(CpuDecoder, None)
    return Choice(ReferenceDecoder, on_cuda if model.device.type == "cuda" or dtype in SCALED else on_cpu)


def make_decoder(model: Model, batch_size: int, capacity: int, dtype: str | None = None) -> Decoder:
    """The decoder that ``choose`` names, new or that of the model's last images, started anew.

    Args:
        model, batch_size, capacity: See ``Decoder``.
        dtype: ``None`` for the model's; ``"int8"`` as ``CpuDecoder``, ``"fp8_values"`` or ``"fp8_cache"`` as
            ``CudaDecoder`` has it.

    Raises:
        BackendUnavailableError: ``dtype`` is given and nothing offers it for this model.
        ValueError: ``capacity`` exceeds ``n_positions``, or an unknown ``dtype``.
    """
    engine, reason = choose(model, dtype)
    if dtype is not None and reason is not None:
        raise backend.BackendUnavailableError(f"decoder: dtype {dtype!r} is not available: {reason}")
    decoder, _ = _kept.pop(model, (None, 0))
    if decoder is not None and type(decoder) is engine:
        decoder.start(model, batch_size, capacity, dtype)
    else:
        decoder = engine(model, batch_size, capacity, dtype)
    decoder.reason = reason
    return decoder


def keep(decoder: Decoder) -> None:
    """Leaves a decoder that is done to the model's next images, if it has something for them."""
    model = decoder.model
    if size := decoder.rest():
        _kept[model] = decoder, size


def kept_bytes(model: Model) -> int:
    """Of what is kept for the model's next images, which use or drop it."""
    return _kept.get(model, (None, 0))[1]


def forget() -> None:
    """Drops what is kept for all models' next images, and what failed, perhaps by it: memory does not suffice."""
    _kept.clear()
    failed.clear()


# Every decoder of igpt_fast.engines.choice, the faster one first: what it covers.
DECODERS: dict[str, str] = {
    "cuda": "for CUDA models in bf16, fp16 or fp32, and dtype='fp8_values' or 'fp8_cache' of the first two; quick_gelu,"
    " gelu, gelu_new; head_dim 32, 64, 96, 128; n_embd and n_inner multiples of 8; nothing around a module or in its"
    " place: hooks, wrappers, subclasses, methods, modes, autocast; five kernels a layer for 64 images at most in bf16"
    " and fp16, else torch's products with the rest fused; CUDA graphs",
    "cpu": "for CPU models in fp32, bf16 or fp16 (packed wider, in fp32), and dtype='int8'; quick_gelu, gelu, gelu_new;"
    " n_embd a multiple of 16, n_inner of 8, head_dim of 8 to 256; nothing around a module or in its place;"
    " an image alone is guessed ahead and drawn exactly, in fp32 and, where integers are multiplied, int8",
    "reference": "for everything else that is causal: it calls the model, and with it whatever is around it",
}
# Every forward pass of igpt_fast.engines.cpu.forward, the faster one first: what it covers.
FORWARDS: dict[str, str] = {
    "cpu": "for CPU models in fp32, bf16 or fp16 (computed in fp32) and eval mode, without gradient, as the decoder"
    " covers them; token ids alone: no mask, cache to extend, embeddings, positions or attention weights; in fp32"
    " a sequence of 8 positions or more, or several of 24, in bf16 and fp16 of 8 or 8 of them at most; no compiling or"
    " transforms; features and likelihoods in 8 bits by dtype='int8',"
    " which is not faster where bytes or 16-bit integers are not multiplied (generic, neon)",
    "torch": "for everything else",
}
