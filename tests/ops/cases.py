"""One small call of every op with a kernel: what the tests of all ops together run, and the checks on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.draws import Sampling
from igpt_fast.ops.attention_decode import quantize_e4m3

BF16 = torch.bfloat16


def _normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _codes_and_scales(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values of 8 bits, as bytes: torch does hardly anything with float8."""
    codes, scales = quantize_e4m3(_normal(*shape, seed=seed))
    return codes.view(torch.uint8), scales


def _hidden(b: int, t: int) -> tuple[Tensor, Tensor]:
    """starts and key_mask for an attention."""
    return torch.arange(b, dtype=torch.int32) * t // b, torch.arange(b * t).remainder(5).ne(2).view(b, t)


def _step(*tensors: Tensor) -> tuple[Tensor, ...]:
    ops.sample_step(*tensors)
    return ()


def _by_ring(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, k_scale: Tensor, values: Tensor, v_scale: Tensor, position: Tensor
) -> Tensor:
    """attention_decode with its keys in parts, which a cluster puts together."""
    caches = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    with backend.launching(backend.Launching(ring=True, cluster=True)):
        return ops.attention_decode(q, k, v, *caches, position, v_scale=v_scale, k_scale=k_scale)


def _pixels(n: int) -> Tensor:
    return torch.arange(3 * n).mul(7).remainder(256).to(torch.uint8).view(n, 3)


@dataclass(frozen=True)
class Case:
    """A call of an op.

    Attributes:
        op: A key of ``backend.OPS``.
        name: Of the case.
        inputs: Makes its tensors, on the CPU; the same ones every time.
        call: The op with them.
        differentiable: How many of the tensors, from the first on, it is differentiated by.
        mutated: Which of the tensors the op writes.
    """

    op: str
    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    differentiable: int = 0
    mutated: tuple[int, ...] = ()

    def on(self, device: str) -> list[Tensor]:
        """Its tensors on a device, ready to be differentiated by."""
        tensors = [tensor.to(device, copy=True) for tensor in self.inputs()]
        return [tensor.requires_grad_(i < self.differentiable) for i, tensor in enumerate(tensors)]

    def enlarged(self, times: int) -> list[Tensor]:
        """Its tensors on the CPU, those that have as many rows as the first with ``times`` as many."""
        tensors = self.on("cpu")
        rows = tensors[0].shape[0]
        return [
            torch.cat([t.detach()] * times).requires_grad_(t.requires_grad) if len(t) == rows else t for t in tensors
        ]

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Everything that comes out: results, what was written, gradients for an upstream gradient of 1, 2, ... ."""
        found = self.call(*tensors)
        results = [found] if isinstance(found, Tensor) else list(found)
        out = [result.detach() for result in results]
        if self.differentiable:
            smooth = [result for result in results if result.requires_grad]
            upstream = [
                torch.arange(1, r.numel() + 1, device=r.device).remainder(7).sub(2.5).to(r.dtype).view(r.shape)
                for r in smooth
            ]
            out += torch.autograd.grad(smooth, tensors[: self.differentiable], upstream)
        return out + [tensors[i].detach().clone() for i in self.mutated]


# Of ops that have a kernel on the CPU alone.
CPU_CASES = [
    Case(
        "linear",
        "linear",
        lambda: (
            _normal(5, 70, dtype=torch.float32),
            _normal(70, 37, dtype=torch.float32, seed=1),
            _normal(37, dtype=torch.float32, seed=2),
        ),
        ops.linear,
        3,
    )
]
CASES = [
    Case("rms_norm", "rms_norm", lambda: (_normal(5, 1032), _normal(1032, seed=1)), ops.rms_norm, 2),
    Case(
        "rms_norm",
        "rms_norm_residual",
        lambda: (_normal(7, 72), _normal(72, seed=1), _normal(7, 72, seed=2)),
        lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual),
        3,
    ),
    Case(
        "rms_norm",
        "rms_norm_autocast",
        lambda: (_normal(7, 72), _normal(72, dtype=torch.float32), _normal(7, 72, dtype=torch.float32, seed=2)),
        lambda x, weight, residual: ops.rms_norm(x, weight, residual=residual, dtype=BF16),
        3,
    ),
    Case("layer_norm", "layer_norm", lambda: (_normal(5, 1032), _normal(1032), _normal(1032)), ops.layer_norm, 3),
    Case(
        "layer_norm",
        "layer_norm_residual",
        lambda: (_normal(7, 72), _normal(72, seed=1), _normal(7, 72, seed=2)),
        lambda x, weight, residual: ops.layer_norm(x, weight, residual=residual),
        3,
    ),
    Case("quick_gelu", "quick_gelu", lambda: (_normal(9, 264), _normal(264, seed=1)), ops.quick_gelu, 2),
    Case("gelu_tanh", "gelu_tanh", lambda: (_normal(9, 264), _normal(264, seed=1)), ops.gelu_tanh, 2),
    Case("gelu_erf", "gelu_erf", lambda: (_normal(9, 264), _normal(264, seed=1)), ops.gelu_erf, 2),
    Case("activation", "activation", lambda: (_normal(9, 72),), lambda x: ops.activation(x, "gelu_new"), 1),
    Case(
        "cross_entropy",
        "cross_entropy",
        lambda: (_normal(13, 512), torch.arange(13).sub(1).mul(40).clamp(min=-100)),
        lambda logits, labels: ops.cross_entropy(logits, labels, ignore_index=-40),
        1,
    ),
    Case(
        "cross_entropy",
        "cross_entropy_streamed",
        lambda: (_normal(5, 1029), torch.arange(5)),
        lambda logits, labels: ops.cross_entropy(logits, labels, reduction="none"),
        1,
    ),
    Case(
        "quantize",
        "quantize",
        lambda: (_pixels(200), _normal(300, 3, dtype=torch.float32)),
        ops.quantize,
    ),
    Case(
        "causal_attention",
        "causal_attention",
        lambda: (_normal(2, 2, 65, 64), _normal(2, 2, 70, 64, seed=1), _normal(2, 2, 70, 64, seed=2), *_hidden(2, 70)),
        lambda q, k, v, starts, key_mask: ops.causal_attention(q, k, v, starts=starts, key_mask=key_mask)[0],
        3,
    ),
    Case(
        "causal_attention_packed",
        "causal_attention_packed",
        lambda: (_normal(1, 66, 3, 2, 96),),
        ops.causal_attention_packed,
        1,
    ),
    # Without a key_mask, as Hopper's kernels want it, whose rings of four tiles of 64 rows are filled again.
    Case(
        "causal_attention",
        "causal_attention_long",
        lambda: (
            *(_normal(2, 2, t, 64, seed=i) for i, t in enumerate((260, 270, 270))),
            torch.tensor([0, 9], dtype=torch.int32),
        ),
        lambda q, k, v, starts: ops.causal_attention(q, k, v, starts=starts)[0],
        3,
    ),
    Case(
        "causal_attention_packed",
        "causal_attention_packed_long",
        lambda: (_normal(1, 260, 3, 1, 128),),
        ops.causal_attention_packed,
        1,
    ),
    Case(
        "dequantize",
        "dequantize",
        lambda: (torch.arange(700).mul(7).remainder(300), _normal(300, 3, dtype=torch.float32)),
        ops.dequantize,
    ),
    Case(
        "sample",
        "sample",
        lambda: (_normal(3, 512), torch.tensor([0.1, 0.5, 0.9])),
        lambda logits, uniform: ops.sample(logits, uniform, 0.9, 100, 0.9, 0.01),
    ),
    Case(
        "sample_next",
        "sample_next",
        lambda: (
            _normal(3, 512),
            torch.tensor([0, 1, 1 << 40]),
            torch.tensor(4, dtype=torch.int32),
            _normal(513, 24, seed=1),
            _normal(9, 24, seed=2),
        ),
        lambda logits, streams, position, wte, wpe: ops.sample_next(
            logits, 1 << 63, streams, position, wte=wte, wpe=wpe
        ),
    ),
    Case(
        "sample_step",
        "sample_step",
        lambda: (
            _normal(3, 512),
            ops.sample_settings(1 << 63, Sampling(0.9, 100), 2, 1),
            torch.tensor([0, 1, 1 << 40]),
            torch.tensor([0, 4, 1], dtype=torch.int32),
            torch.zeros(3, 4, dtype=torch.int64),
            torch.zeros(3, 4),
            _normal(3, 24),
            _normal(513, 24, seed=1),
            _normal(9, 24, seed=2),
        ),
        _step,
        mutated=(3, 4, 5, 6),
    ),
    Case(
        "attention_decode",
        "attention_decode",
        lambda: (
            *(_normal(2, 2, 64, seed=i) for i in range(3)),
            _normal(2, 2, 150, 64, seed=3),
            _normal(2, 2, 150, 64, seed=4),
            torch.tensor(131, dtype=torch.int32),
            torch.tensor([0, 9], dtype=torch.int32),
        ),
        ops.attention_decode,
        mutated=(3, 4),
    ),
    Case(
        "attention_decode",
        "attention_decode_fp8_values",
        lambda: (
            *(_normal(2, 2, 64, seed=i) for i in range(3)),
            _normal(2, 2, 150, 64, seed=3),
            *_codes_and_scales(2, 2, 150, 64, seed=4),
            torch.tensor(131, dtype=torch.int32),
        ),
        lambda q, k, v, k_cache, codes, v_scale, position: ops.attention_decode(
            q, k, v, k_cache, codes.view(torch.float8_e4m3fn), position, v_scale=v_scale
        ),
        mutated=(3, 4, 5),
    ),
    Case(
        "attention_decode",
        "attention_decode_fp8_cache",
        lambda: (
            *(_normal(2, 2, 96, seed=i) for i in range(3)),
            *_codes_and_scales(2, 2, 150, 96, seed=3),
            *_codes_and_scales(2, 2, 150, 96, seed=4),
            torch.tensor(131, dtype=torch.int32),
        ),
        lambda q, k, v, keys, k_scale, values, v_scale, position: ops.attention_decode(
            *(q, k, v, keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)),
            position,
            v_scale=v_scale,
            k_scale=k_scale,
        ),
        mutated=(3, 4, 5, 6),
    ),
    Case(
        "attention_decode",
        "attention_decode_prefix",
        lambda: (
            *(_normal(4, 1, 96, seed=i) for i in range(3)),
            _normal(4, 1, 40, 96, seed=3),
            _normal(4, 1, 40, 96, seed=4),
            torch.tensor(33, dtype=torch.int32),
            _normal(2, 1, 70, 96, seed=5),
            _normal(2, 1, 70, 96, seed=6),
        ),
        lambda q, k, v, k_cache, v_cache, position, prefix_k, prefix_v: ops.attention_decode(
            q, k, v, k_cache, v_cache, position, prefix_k=prefix_k, prefix_v=prefix_v
        ),
        mutated=(3, 4),
    ),
    Case(
        "gemv",
        "gemv",
        lambda: (_normal(3, 264), _normal(264, 72, seed=1), _normal(72, seed=2), _normal(264, seed=3)),
        lambda x, weight, bias, norm_weight: ops.gemv(
            x, weight, bias, norm_weight=norm_weight, activation="quick_gelu"
        ),
    ),
    Case(
        "attention_decode",
        "attention_decode_ring",
        lambda: (
            *(_normal(1, 2, 64, seed=i) for i in range(3)),
            *_codes_and_scales(1, 2, 150, 64, seed=3),
            *_codes_and_scales(1, 2, 150, 64, seed=4),
            torch.tensor(131, dtype=torch.int32),
        ),
        _by_ring,
        mutated=(3, 4, 5, 6),
    ),
    Case(
        "gemv",
        "gemv_rows",
        lambda: (_normal(12, 264), _normal(264, 72, seed=1), _normal(72, seed=2), _normal(264, seed=3)),
        lambda x, weight, bias, norm_weight: ops.gemv(
            x, weight, bias, norm_weight=norm_weight, activation="quick_gelu"
        ),
    ),
    Case(
        "gemv",
        "gemv_linear",
        lambda: (_normal(1, 136), _normal(512, 136, seed=1), _normal(1, 512, seed=2)),
        lambda x, weight, residual: ops.gemv(x, weight.T, residual=residual),
    ),
]  # fmt: skip
