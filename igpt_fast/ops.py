"""The public ops: checks, choice of the implementation, and their registration with torch.

``reference.py`` defines each of them; ``backend.py`` says which implementation runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from igpt_fast import backend, reference

# transformers' ACT2FN but for "prelu" and "xielu", which have parameters of their own.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": reference.quick_gelu,
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "gelu_accurate": reference.gelu_tanh,
    "gelu_fast": reference.gelu_tanh,
    "gelu_new": reference.gelu_tanh,
    "gelu_python": reference.gelu_erf,
    "gelu_python_tanh": reference.gelu_tanh,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": reference.laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """iGPT's norm: ``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, not mean-centred.

    Args:
        x: (..., n_embd), floating point. The statistics are in fp32.
        weight: (n_embd,).
        eps: Added to the mean square.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: Not floating-point tensors.
        ValueError: ``weight`` does not fit ``x``, two devices, or a negative ``eps``.

    Source: openai/image-gpt src/model.py ``norm``; transformers ``ImageGPTLayerNorm``.
    """
    _check_floating("rms_norm", x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError("rms_norm: x has shape (); want at least one dimension")
    if not eps >= 0.0:
        raise ValueError(f"rms_norm: eps is {eps}; want 0 or above")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}; want {tuple(x.shape[-1:])}, x's last one")
    return reference.rms_norm(x, weight, eps)


def activation(x: Tensor, name: str) -> Tensor:
    """The activation a configuration names, element by element.

    Args:
        x: Any shape, floating point.
        name: A key of ``ACTIVATIONS``.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: An unknown name.

    Source: transformers ``ACT2FN``; ``quick_gelu`` is openai/image-gpt's ``gelu``.
    """
    _check_floating("activation", x=x)
    return ACTIVATIONS[check_activation(name)](x)


def check_activation(name: str) -> str:
    """The name of an activation.

    Raises:
        ValueError: It is not a key of ``ACTIVATIONS``.
    """
    if name not in ACTIVATIONS:
        own = " (it has parameters of its own)" if name in ("prelu", "xielu") else ""
        raise ValueError(f"activation: name is {name!r}{own}; want one of {', '.join(ACTIVATIONS)}")
    return name


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    upcast: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T + causal mask) v``; the queries are the last T_q of T_k positions.

    Args:
        q: (B, H, T_q, D), floating point.
        k, v: (B, H, T_k, D), T_k >= T_q, of the dtype of ``q``.
        scale: ``1 / sqrt(D)`` when ``None``.
        key_mask: (B, T_k) bool, True where a key may be seen. A query that sees none gives zero; what stands in
            a masked key, be it NaN, reaches nothing.
        dropout_p: Dropout probability of the softmax.
        upcast: Compute the scores in fp32 too, not only the softmax.
        need_weights: Return the softmax as well (written out, so slower).

    Returns:
        (B, H, T_q, D), and the (B, H, T_q, T_k) softmax or ``None``.

    Raises:
        TypeError: Not floating-point tensors, unlike dtypes, or a ``key_mask`` that is not bool.
        ValueError: Shapes that do not fit, two devices, or a ``dropout_p`` outside [0, 1].

    Source: openai/image-gpt src/model.py ``attn``; transformers ``ImageGPTAttention``.
    """
    _check_attention(q, k, v, key_mask, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    t_q, t_k = q.shape[-2], k.shape[-2]
    if need_weights or upcast:
        return reference.causal_attention(q, k, v, scale, key_mask, dropout_p, upcast)
    if key_mask is None and (t_q == t_k or t_q == 1):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=bool(t_q == t_k), scale=scale)
        return out, None
    k, v = reference.mask_keys(k, v, key_mask)
    visible = reference.visible_keys(t_q, t_k, key_mask, q.device)
    some = visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~some, dropout_p=dropout_p, scale=scale)
    return torch.where(some, out, torch.zeros((), dtype=out.dtype, device=out.device)), None


def quantize(x: Tensor, clusters: Tensor) -> Tensor:
    """Index of the nearest colour cluster, the lowest index on ties.

    Args:
        x: (..., 3). uint8: a value v stands for ``v / 127.5 - 1`` and is evaluated in float64, so the result is
            exact; float32: colours in [-1, 1], evaluated in float32.
        clusters: (K, 3) float32 on the device of ``x``, K >= 1.

    Returns:
        (...) int64 on the device of ``x``. Not differentiable.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape, or two devices.
        BackendUnavailableError: The chosen backend does not serve the device.

    Source: openai/image-gpt src/utils.py ``color_quantize``; see ``reference.quantize``.
    """
    _check_quantize(x, clusters)
    if _is_plain(x, clusters):
        return _quantize(x, clusters)
    return torch.ops.igpt_fast.quantize(x, clusters)


def dequantize(tokens: Tensor, clusters: Tensor) -> Tensor:
    """The colours of tokens: ``rint(127.5 (clusters[token] + 1))`` clipped to 0..255.

    Args:
        tokens: (...) integers in 0..K-1.
        clusters: (K, 3) floats in [-1, 1] on the device of ``tokens``.

    Returns:
        (..., 3) uint8.

    Raises:
        TypeError: ``tokens`` are not integers.
        ValueError: ``clusters`` is not (K, 3).

    Source: openai/image-gpt src/run.py.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"dequantize: tokens has dtype {tokens.dtype}; want integers")
    if clusters.ndim != 2 or clusters.shape[1] != 3:
        raise ValueError(f"dequantize: clusters has shape {tuple(clusters.shape)}; want (K, 3)")
    return reference.dequantize(tokens, clusters)


def sample(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draws a token of each row: temperature, top-k, top-p, then the inverse of the cumulative distribution.

    Args:
        logits: (N, K), floating point.
        uniform: (N,) float32 in [0, 1), on the device of ``logits``; see ``reference.uniform``.
        temperature: Divides the logits; 0 takes the largest one.
        top_k: Keep the k largest logits; ``None`` keeps all.
        top_p: Keep the most likely tokens until their probability reaches it; ``None`` keeps all.

    Returns:
        (N,) int64. Not differentiable.

    Raises:
        ValueError: Shapes that do not fit, or a setting out of its range.

    Source: see ``reference.sample``.
    """
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)}, {tuple(uniform.shape)}"
        raise ValueError(f"sample: logits and uniform have shapes {shapes}; want (N, K) and (N,)")
    check_sampling(temperature, top_k, top_p)
    return reference.sample(logits.detach(), uniform, temperature, top_k, top_p)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError unless the settings are ones that ``sample`` takes."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature is {temperature}; want a finite number, 0 or above")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"sample: top_k is {top_k!r}; want an integer, 1 or above, or None")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample: top_p is {top_p}; want a number in (0, 1], or None")


def _check_floating(op: str, **tensors: Tensor) -> None:
    """All are floating-point tensors on one device."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} is {got}; want a floating-point tensor")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, others on {first.device}; want one device")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dropout_p: float) -> None:
    op = "causal_attention"
    _check_floating(op, q=q, k=k, v=v)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"{op}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; want one dtype")
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"{op}: q, k, v have shapes {shapes}; want (B, H, T_q, D) and twice (B, H, T_k, D)")
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[2]} positions, q {q.shape[2]}; want at least as many")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; want a number in [0, 1]")
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"{op}: key_mask is {got}; want a bool tensor")
    want = (q.shape[0], k.shape[2])
    if key_mask.shape != want:
        raise ValueError(f"{op}: key_mask has shape {tuple(key_mask.shape)}; want (B, T_k) = {want}")
    if key_mask.device != q.device:
        raise ValueError(f"{op}: key_mask is on {key_mask.device}, q on {q.device}; want one device")


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
    module = backend.native("quantize", x.device)
    if module is None:
        return reference.quantize(x, clusters)
    x, clusters = x.contiguous(), clusters.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    is_u8, n, k = x.dtype == torch.uint8, out.numel(), clusters.shape[0]
    if x.device.type == "cpu":
        module.quantize_cpu(x.data_ptr(), is_u8, clusters.data_ptr(), out.data_ptr(), n, k, torch.get_num_threads())
    else:
        device = x.device.index
        stream = torch.cuda.current_stream(device).cuda_stream
        module.quantize_cuda(x.data_ptr(), is_u8, clusters.data_ptr(), out.data_ptr(), n, k, device, stream)
    return out


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing of torch's machinery has to see a call: eager, no mode, no transform, no subclass, no grad.

    Skipping the dispatcher saves about 4 microseconds of 6. A meta or fake tensor is not plain.
    """
    if torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() or _C._len_torch_function_stack():
        return False
    if _C._functorch.peek_interpreter_stack() is not None or _C._get_tracing_state() is not None:
        return False
    needs_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type not in ("cpu", "cuda"):
            return False
        if (needs_grad and tensor.requires_grad) or tensor.is_nested or tensor.layout != torch.strided:
            return False
        if tensor.is_neg():  # its memory holds the negated values, which only the dispatcher resolves
            return False
    return True


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


# FRAGMENT: other modules and packages may add to the namespace; the library lives as long as this module.
_library = torch.library.Library("igpt_fast", "FRAGMENT")
_library.define("quantize(Tensor x, Tensor clusters) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("quantize", _quantize, _key)
torch.library.register_fake("igpt_fast::quantize", _fake_quantize, lib=_library)
torch.library.register_autograd("igpt_fast::quantize", lambda ctx, grad: (None, None), lib=_library)
torch.library.register_vmap("igpt_fast::quantize", _vmap_quantize, lib=_library)
