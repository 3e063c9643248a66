"""One decode step on the CUDA kernels, in memory that stays where it is, so that a CUDA graph can be replayed.

Up to 8 rows, bf16 or fp16: five fused kernels a layer, one for the head. More rows, and float32: torch's products
(cuBLASLt), with norms, residuals, biases and activations fused around them. Attention reads the position on the device
and adds the new key and value to the cache itself.

A graph holds the whole step. There is one for each way that attention is launched: into how many parts the keys are
split depends on the rows and on the largest position, and short caches shall not pay for the parts of long ones. It is
captured when its first position comes, after a run that loads kernels and workspaces, on a stream of its own, into one
pool of memory for all graphs of a step: they run one after another, and what lasts, the logits, is held.

A step serves the next images of the same model and sizes, for which then nothing is captured (``CudaDecoder.start``).

Source: PyTorch's notes on CUDA graphs; programmatic dependent launch: CUDA C++ Programming Guide.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.engines.decoder import SCALED
from igpt_fast.engines.network import Network
from igpt_fast.locks import Lock
from igpt_fast.ops.attention_decode import quantize_e4m3

FUSED_ROWS = 8  # that ops.gemv's kernel takes
FUSED_DTYPES = (torch.bfloat16, torch.float16)
# Where a graph's positions may end; a limit is used where it changes the launch.
LIMITS = (64, 256, 1024, 4096)


class CudaStep:
    """The state of ``rows`` images and the step that they go on by.

    Args:
        network: The parameters.
        rows: Images.
        positions: That their caches have room for.
        primer: (keys, values) that came before, of one each (n_layer, G, H, T_p, D); rows / G images share one each.
            ``None`` where the caches begin at the first position.
        dtype: The decoder's; one of ``SCALED`` for keys or values that are cached in 8 bits (``quantize_e4m3``). A
            primer's, which images share, are not.
        graphs: Whether steps are captured and replayed; else every kernel is launched by itself.
        dependent: Whether a kernel may begin while the one before ends (sm_90; see ``backend.Launching``).
    """

    def __init__(
        self,
        network: Network,
        rows: int,
        positions: int,
        primer: tuple[Tensor, Tensor] | None,
        dtype: str,
        graphs: bool,
        dependent: bool,
    ) -> None:
        self.network, self.primer, self.dependent = network, primer, dependent
        shape = (len(network.layers), rows, network.heads, positions, network.head_dim)
        scaled = SCALED.get(dtype, (False, False))
        self.keys, self.values = (
            torch.empty(shape, dtype=torch.float8_e4m3fn if of_8_bits else network.dtype, device=network.device)
            for of_8_bits in scaled
        )
        self.scales = [  # of keys and of values
            torch.empty(shape[:-1], dtype=torch.float32, device=network.device) if of_8_bits else None
            for of_8_bits in scaled
        ]
        self.x = network.wte.new_zeros(rows, network.wte.shape[1])  # the step's input
        self.position = torch.zeros(1, dtype=torch.int32, device=network.device)  # in these caches, of the next key
        self.fused = rows <= FUSED_ROWS and network.dtype in FUSED_DTYPES
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] | None = {} if graphs else None
        self._pool: Any = None
        self._limits = self._choose_limits(rows * network.heads, positions)

    def _choose_limits(self, blocks: int, positions: int) -> list[int]:
        """The ends of ranges of positions, one for each number of parts that a cache is split into."""
        kernels = backend.kernels("attention_decode", self.keys.device)
        assert kernels is not None
        by_parts: dict[int, int] = {}
        for limit in (*(limit for limit in LIMITS if limit < positions), positions):
            by_parts[kernels.module.attention_decode_splits(blocks, limit)] = limit
        return sorted(by_parts.values())

    def start(self, primer: tuple[Tensor, Tensor]) -> None:
        """Begins after a primer's (n_layer, G, H, T_p, D) keys and values: shared ones if the step has some, else in
        the images' own caches.
        """
        if self.primer is not None:
            for ours, theirs in zip(self.primer, primer, strict=True):
                if ours.data_ptr() != theirs.data_ptr():
                    ours.copy_(theirs)
            self.position.zero_()
            return
        length, copies = primer[0].shape[3], self.keys.shape[1] // primer[0].shape[1]
        for cache, scales, read in zip((self.keys, self.values), self.scales, primer, strict=True):
            for i, layer in enumerate(read):
                every = layer.repeat_interleave(copies, dim=0)
                if scales is None:
                    cache[i, :, :, :length] = every
                else:
                    cache[i, :, :, :length], scales[i, :, :, :length] = quantize_e4m3(every)
        self.position.fill_(length)

    @property
    def bytes(self) -> int:
        """Of its caches and of the primer."""
        tensors = (self.keys, self.values, *(self.primer or ()), *self.scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def run(self, position: int) -> Tensor:
        """Reads ``x`` at ``position`` of the caches, where the device's ``position`` stands, and advances that.

        Returns the (rows, K) logits: on graphs in memory that the next step writes to.
        """
        limit = next(limit for limit in self._limits if position < limit)
        if self._graphs is None:
            logits = self._compute(limit)
            self.position += 1
            return logits
        if limit not in self._graphs:
            self._graphs[limit] = self._capture(limit)
        graph, logits = self._graphs[limit]
        graph.replay()
        return logits

    def _capture(self, limit: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device = self.keys.device
        here, stream = torch.cuda.current_stream(device), _capture_stream(device)
        # The outer stream: torch does not put it back where the end of a capture fails.
        with _capturing, torch.cuda.device(device), torch.cuda.stream(here):
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream):
                    self._compute(limit)  # writes what the first replay writes
                graph = torch.cuda.CUDAGraph()
                logits = self._record(graph, stream, limit)
            finally:
                here.wait_stream(stream)  # what it uses may be freed here, after an error too
            self._pool = graph.pool()
        return graph, logits

    def _record(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, limit: int) -> Tensor:
        # A graph has cuBLAS's workspace in its own pool: another one may be replayed beside it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                logits = self._compute(limit)
                self.position += 1
            return logits
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # after which the capture could not end
                # A new one: the end's frame holds the other, which would hold that frame, and all would stay.
                raise torch.OutOfMemoryError(str(error.__context__)) from None
            raise RuntimeError(f"decoder: the step could not be captured in a CUDA graph: {error}") from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def _compute(self, limit: int) -> Tensor:
        if not self.fused:
            return self._compute_rows(limit)
        with backend.launching(backend.Launching(dependent="late" if self.dependent else "none")):
            return self._compute_fused(limit)

    def _compute_fused(self, limit: int) -> Tensor:
        net, x = self.network, self.x
        for i, layer in enumerate(net.layers):
            qkv = ops.gemv(x, layer.qkv_weight, layer.qkv_bias, norm_weight=layer.ln_1, eps=net.eps)
            attended = self._attend(i, qkv, limit)
            x = ops.gemv(attended, layer.out_weight, layer.out_bias, residual=x)
            inner = ops.gemv(
                x, layer.fc_weight, layer.fc_bias, norm_weight=layer.ln_2, eps=net.eps, activation=net.kernel
            )
            x = ops.gemv(inner, layer.proj_weight, layer.proj_bias, residual=x)
        return ops.gemv(x, net.head, norm_weight=net.ln_f, eps=net.eps)

    def _compute_rows(self, limit: int) -> Tensor:
        net, x = self.network, self.x
        normed = ops.rms_norm(x, net.layers[0].ln_1, net.eps)
        for i, layer in enumerate(net.layers):
            attended = self._attend(i, torch.addmm(layer.qkv_bias, normed, layer.qkv_weight), limit)
            attended = torch.addmm(layer.out_bias, attended, layer.out_weight)
            normed, x = ops.rms_norm(attended, layer.ln_2, net.eps, residual=x)
            inner = ops.activation(normed @ layer.fc_weight, net.activation, layer.fc_bias)
            added = torch.addmm(layer.proj_bias, inner, layer.proj_weight)
            following = net.layers[i + 1].ln_1 if i + 1 < len(net.layers) else net.ln_f
            normed, x = ops.rms_norm(added, following, net.eps, residual=x)
        return normed @ net.head

    def _attend(self, i: int, qkv: Tensor, limit: int) -> Tensor:
        """Attention of layer i from the (rows, 3 n_embd) projection; (rows, n_embd)."""
        net = self.network
        q, k, v = qkv.view(-1, 3, net.heads, net.head_dim).unbind(1)
        prefix_k, prefix_v = (None, None) if self.primer is None else (self.primer[0][i], self.primer[1][i])
        state = self.keys[i], self.values[i], self.position, None, net.scales[i]
        k_scale, v_scale = (None if scales is None else scales[i] for scales in self.scales)
        out = ops.attention_decode(q, k, v, *state, prefix_k, prefix_v, limit, v_scale, k_scale)
        return out.view(out.shape[0], -1)


_capturing = Lock()  # one capture at a time: torch can do no more, and there is one stream for all


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
