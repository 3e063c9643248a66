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
    """What rms_norm gives forward, and backward for a ``dout`` and a ``dsum``."""

    out: Tensor
    sum: Tensor | None
    dx: Tensor
    dweight: Tensor


def definition(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dout: Tensor, dsum: Tensor) -> Norm:
    """reference.py in the dtype of its arguments, with torch's gradients."""
    total = x if residual is None else x + residual
    leaf, weight = total.detach().requires_grad_(), weight.detach().requires_grad_()
    out = reference.rms_norm(leaf, weight, eps)
    dx, dweight = torch.autograd.grad(out, (leaf, weight), dout)
    return Norm(out.detach(), None if residual is None else total, dx if residual is None else dx + dsum, dweight)


class Kernels:
    """The functions of ``_C`` or ``_emulated`` for tensors on a device. What they shall write is NaN before."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, device

    def _place(self) -> tuple[int, int]:
        return (0, torch.cuda.current_stream().cuda_stream) if self.device == "cuda" else (0, 0)

    def quantize(self, x: Tensor, clusters: Tensor) -> Tensor:
        out = torch.full(x.shape[:-1], -1, device=self.device)
        arguments = x.data_ptr(), x.dtype == torch.uint8, clusters.data_ptr(), out.data_ptr()
        self.module.quantize_cuda(*arguments, out.numel(), clusters.shape[0], *self._place())
        return out

    def rms_norm_fwd(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        out, total = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        addresses = x, residual, weight, None if residual is None else total, out
        rows, n_embd = x.numel() // x.shape[-1], x.shape[-1]
        self.module.rms_norm_fwd_cuda(*_addresses(addresses), rows, n_embd, eps, DTYPES[x.dtype], *self._place())
        return out, x if residual is None else total

    def rms_norm_bwd(
        self, dout: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, eps: float, parts: int | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, n_embd = x.numel() // x.shape[-1], x.shape[-1]
        parts = self.module.norm_bwd_parts(rows) if parts is None else parts
        dx, dweight = torch.full_like(x, torch.nan), torch.full_like(weight, torch.nan)
        partial = torch.full((parts, n_embd), torch.nan, device=self.device)
        addresses = _addresses((dout, dsum, x, weight, dx, dweight, partial))
        self.module.rms_norm_bwd_cuda(*addresses, rows, n_embd, parts, eps, DTYPES[x.dtype], *self._place())
        return dx, dweight

    def norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None,
        dout: Tensor,
        dsum: Tensor,
        parts: int | None = None,
    ) -> Norm:
        """As ``definition``, through both kernels."""
        out, total = self.rms_norm_fwd(x, weight, eps, residual)
        dx, dweight = self.rms_norm_bwd(dout, None if residual is None else dsum, total, weight, eps, parts)
        return Norm(out, None if residual is None else total, dx, dweight)


def _addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
