"""The ops of the tests behind one interface: the definition, the emulated kernels, the kernels on a GPU.

Each takes and returns tensors; ``device`` says where they have to be.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from igpt_fast import reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Norm:
    """What a norm gives forward, and backward for a ``dout`` and a ``dsum``. layer_norm's has a ``dbias``."""

    out: Tensor
    sum: Tensor | None
    dx: Tensor
    dweight: Tensor
    dbias: Tensor | None = None


def definition(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dout: Tensor,
    dsum: Tensor,
    bias: Tensor | None = None,
) -> Norm:
    """reference.py in the dtype of its arguments, with torch's gradients; layer_norm with ``bias``, else rms_norm.

    The norm is in the dtype of ``dout``.
    """
    total = x if residual is None else x + residual
    leaves = [t.detach().requires_grad_() for t in (total, weight, bias) if t is not None]
    out = reference.rms_norm(*leaves, eps) if bias is None else reference.layer_norm(*leaves, eps)
    out = out.to(dout.dtype)
    dx, dweight, *dbias = torch.autograd.grad(out, leaves, dout)
    total_out = None if residual is None else total
    return Norm(out.detach(), total_out, dx if residual is None else dx + dsum, dweight, *dbias)


class Kernels:
    """The functions of ``_C`` or ``_emulated`` for tensors on a device. What they shall write is NaN before."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, device

    def _place(self) -> tuple[int, int]:
        return (0, torch.cuda.current_stream().cuda_stream) if self.device == "cuda" else (0, 0)

    def quantize(self, x: Tensor, clusters: Tensor) -> Tensor:
        out = torch.full(x.shape[:-1], -1, device=self.device)
        self.module.quantize_cuda(
            is_u8=x.dtype == torch.uint8,
            n=out.numel(),
            k=clusters.shape[0],
            work=0,
            place=self._place(),
            **addresses(x=x, clusters=clusters, out=out),
        )
        return out

    def norm_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """rms_norm, or layer_norm with ``bias``: its output, in ``dtype``, and what was normalised."""
        stream = x if residual is None else residual
        out, total = torch.full_like(x, torch.nan, dtype=dtype or stream.dtype), torch.full_like(stream, torch.nan)
        rows, n_embd = x.numel() // x.shape[-1], x.shape[-1]
        tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "out": out}
        self.module.norm_fwd_cuda(
            **addresses(**tensors, sum=None if residual is None else total),
            rows=rows,
            n_embd=n_embd,
            eps=eps,
            centred=bias is not None,
            dtype=DTYPES[stream.dtype],
            x_dtype=DTYPES[x.dtype],
            weight_dtype=DTYPES[weight.dtype],
            out_dtype=DTYPES[out.dtype],
            place=self._place(),
        )
        return out, x if residual is None else total

    def norm_bwd(
        self,
        dout: Tensor,
        dsum: Tensor | None,
        x: Tensor,
        weight: Tensor,
        eps: float,
        parts: int | None = None,
        centred: bool = False,
        branch: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """dx, dweight and, ``centred``, dbias; or, with the dtype of a ``branch``, its gradient."""
        dbranch = None if branch is None else torch.full_like(x, torch.nan, dtype=branch)
        rows, n_embd = x.numel() // x.shape[-1], x.shape[-1]
        parts = self.module.norm_bwd_parts(rows) if parts is None else parts
        found = [torch.full_like(x, torch.nan), *(torch.full_like(weight, torch.nan) for _ in range(1 + centred))]
        partial = torch.full((1 + centred, parts, n_embd), torch.nan, device=self.device)
        dx, dweight, dbias = (*found, None)[:3]
        tensors = {"dout": dout, "dsum": dsum, "x": x, "weight": weight, "dx": dx, "dweight": dweight, "dbias": dbias}
        self.module.norm_bwd_cuda(
            **addresses(**tensors, dbranch=dbranch, partial=partial),
            rows=rows,
            n_embd=n_embd,
            parts=parts,
            eps=eps,
            centred=centred,
            dtype=DTYPES[x.dtype],
            x_dtype=DTYPES[branch or x.dtype],
            weight_dtype=DTYPES[weight.dtype],
            out_dtype=DTYPES[dout.dtype],
            place=self._place(),
        )
        return tuple(found) if dbranch is None else (*found, dbranch)

    def norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None,
        dout: Tensor,
        dsum: Tensor,
        bias: Tensor | None = None,
        parts: int | None = None,
    ) -> Norm:
        """As ``definition``, through both kernels."""
        out, total = self.norm_fwd(x, weight, eps, residual, bias)
        upstream = dout, None if residual is None else dsum
        gradients = self.norm_bwd(*upstream, total, weight, eps, parts, centred=bias is not None)
        return Norm(out, None if residual is None else total, *gradients)


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
