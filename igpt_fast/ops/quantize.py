"""Colours to tokens and back: the nearest colour cluster of a pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_fast import backend, reference
from igpt_fast.backend import OPS, Op
from igpt_fast.ops import colour_table, dispatch

OPS["quantize"] = Op(
    ("cpu", "cuda"),
    "uint8, fp32; uint8 from a table of all colours once a tensor of 16 to 65,536 clusters has met 2^29 / K pixels",
)
OPS["dequantize"] = Op(
    native=("cpu", "cuda"),
    covers="tokens int64, int32, int16, uint8; fp32 clusters, 8,192 at most",
    otherwise="torch indexing",
    covers_cpu="tokens int64, int32, int16, uint8; fp32 clusters, 8,192 at most",
)

# As csrc/cuda/ops.h numbers them.
TOKEN_TYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}


def quantize(x: Tensor, clusters: Tensor) -> Tensor:
    """Index of the nearest colour cluster, the lowest index on ties.

    Args:
        x: (..., 3). uint8: a value v stands for ``v / 127.5 - 1`` and is evaluated in float64, so the result is
            exact; float32: colours in [-1, 1], evaluated in float32.
        clusters: (K, 3) float32 on the device of ``x``, K >= 1.

    Returns:
        (...) int64 on the device of ``x``. Not differentiable.

    On a CUDA device uint8 pixels are looked up in a table of all colours, once the same ``clusters`` tensor has served
    enough of them to pay for it (about a million for 512 clusters); ``colour_table.py`` has the rules. It takes 32 MiB
    until the tensor goes. Before that, and for float32, every pixel is compared with every cluster. The tokens are the
    same. Bytes: 11 a pixel from the table; operations: 8 a pixel and cluster otherwise.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape, or two devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/utils.py ``color_quantize``; see ``reference.quantize``.
    """
    _check_quantize(x, clusters)
    if dispatch.is_plain(x, clusters):
        return _quantize(x, clusters)
    if dispatch.exporting():
        return reference.quantize(x, clusters)
    return torch.ops.igpt_fast.quantize(x, clusters)


def dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    """The colours of tokens: ``rint(127.5 (clusters[token] + 1))`` clipped to 0..255.

    Args:
        tokens: (...) integers in 0..K-1; as in torch's indexing, -K..-1 count from the end.
        clusters: (K, 3) floats in [-1, 1] on the device of ``tokens``.

    Returns:
        (..., 3) uint8. Not differentiable. Bytes: 11 a token, for int64 ones.

    Raises:
        TypeError: ``tokens`` are not integers.
        ValueError: ``clusters`` is not (K, 3), or two devices.
        IndexError: A token out of range. On a CUDA device, where nobody waits for the values, it ends the process's
            use of the device by an error at a later call, as torch's indexing does.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/run.py; the sampling code of transformers' documentation.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"dequantize: tokens has dtype {tokens.dtype}; want integers")
    if clusters.ndim != 2 or clusters.shape[1] != 3:
        raise ValueError(f"dequantize: clusters has shape {tuple(clusters.shape)}; want (K, 3)")
    if tokens.device != clusters.device:
        raise ValueError(f"dequantize: tokens is on {tokens.device}, clusters on {clusters.device}; want one device")
    clusters = clusters.detach()
    covered = tokens.dtype in TOKEN_TYPES and clusters.dtype == torch.float32 and clusters.shape[0] <= 8192
    if covered and dispatch.kernel_kind("dequantize", tokens, clusters):
        op = _dequantize if dispatch.is_plain(tokens, clusters) else torch.ops.igpt_fast.dequantize
        return op(tokens, clusters)
    return reference.dequantize(tokens, clusters)


def _check_quantize(x: Tensor, clusters: Tensor) -> None:
    if x.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"quantize: x has dtype {x.dtype}; want uint8 or float32")
    if clusters.dtype != torch.float32:
        raise TypeError(f"quantize: clusters has dtype {clusters.dtype}; want float32")
    if x.ndim == 0 or x.shape[-1] != 3:
        raise ValueError(f"quantize: x has shape {tuple(x.shape)}; want (..., 3)")
    if clusters.ndim != 2 or clusters.shape[1] != 3 or clusters.shape[0] < 1:
        raise ValueError(f"quantize: clusters has shape {tuple(clusters.shape)}; want (K, 3) with K >= 1")
    if x.device != clusters.device:
        raise ValueError(f"quantize: x is on {x.device}, clusters on {clusters.device}; want one device")


def _quantize(x: Tensor, clusters: Tensor) -> Tensor:
    """Checked tensors with memory behind them, on the CPU or a CUDA device."""
    kernels = backend.kernels("quantize", x.device)
    if kernels is None:
        return reference.quantize(x, clusters)
    is_u8, out = x.dtype == torch.uint8, torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    x, n = dispatch.dense(x) if kernels.kind == "cuda" else x.contiguous(), out.numel()
    table = colour_table.tables.get(clusters, n, kernels) if is_u8 and kernels.kind == "cuda" else None
    if table is not None:
        kernels.module.quantize_lookup_cuda(
            x=x.data_ptr(), table=table.data_ptr(), out=out.data_ptr(), n=n, place=kernels.place
        )
        return out
    clusters = clusters.contiguous()
    kernels.function("quantize")(
        x=x.data_ptr(),
        is_u8=is_u8,
        clusters=clusters.data_ptr(),
        out=out.data_ptr(),
        n=n,
        k=clusters.shape[0],
        work=0,
        place=kernels.place,
    )
    return out


def _dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    kernels = dispatch.native_kernels("dequantize", tokens)
    tokens, clusters = dispatch.dense(tokens), dispatch.dense(clusters)
    out = torch.empty((*tokens.shape, 3), dtype=torch.uint8, device=tokens.device)
    if kernels.kind == "cuda" or tokens.numel():
        kernels.function("dequantize")(
            tokens=tokens.data_ptr(),
            token=TOKEN_TYPES[tokens.dtype],
            clusters=clusters.data_ptr(),
            out=out.data_ptr(),
            n=tokens.numel(),
            k=clusters.shape[0],
            place=kernels.place,
        )
    return out


def _check_dequantize(tokens: Tensor, clusters: Tensor) -> None:
    covered = tokens.dtype in TOKEN_TYPES and clusters.ndim == 2 and clusters.shape[0] <= 8192
    dispatch.check_covered("dequantize", covered, tokens)
    dispatch.check_operand("dequantize", "clusters", clusters, tokens, torch.float32, (clusters.shape[0], 3))


def _checked_quantize(x: Tensor, clusters: Tensor) -> Tensor:
    _check_quantize(x, clusters)
    return _quantize(x, clusters)


def _fake_dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    return tokens.new_empty((*tokens.shape, 3), dtype=torch.uint8)


def _fake_quantize(x: Tensor, clusters: Tensor) -> Tensor:
    _check_quantize(x, clusters)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _vmap_quantize(
    info: Any, in_dims: tuple[int | None, int | None], x: Tensor, clusters: Tensor
) -> tuple[Tensor, int]:
    x_dim, clusters_dim = in_dims
    if x_dim is not None:
        x = x.movedim(x_dim, 0)
    if clusters_dim is None:
        return quantize(x, clusters), 0
    palettes = clusters.movedim(clusters_dim, 0)
    rows = x if x_dim is not None else [x] * info.batch_size
    return torch.stack([quantize(row, palette) for row, palette in zip(rows, palettes, strict=True)]), 0


dispatch.library.define("quantize(Tensor x, Tensor clusters) -> Tensor")
for _key in ("CPU", "CUDA", "MPS", "XPU"):  # by the definition where there is no kernel
    dispatch.library.impl("quantize", _checked_quantize, _key)
torch.library.register_fake("igpt_fast::quantize", _fake_quantize, lib=dispatch.library)
torch.library.register_autograd("igpt_fast::quantize", lambda ctx, grad: (None, None), lib=dispatch.library)
torch.library.register_vmap("igpt_fast::quantize", _vmap_quantize, lib=dispatch.library)

dispatch.register(
    "dequantize(Tensor tokens, Tensor clusters) -> Tensor", _dequantize, _fake_dequantize, check=_check_dequantize
)
