"""One decode step on the CUDA kernels, in memory that stays where it is, so that a CUDA graph can be replayed.

Few rows of bf16 or fp16 (``CudaOptions.gemv_rows``): five fused kernels a layer, one for the head. More rows, and
float32: torch's products (cuBLASLt), with norms, residuals, biases and activations fused around them. Attention reads
the position on the device and adds the new key and value to the cache itself.

Many rows are computed as two halves, which go through the layers side by side on two streams of a graph: the second
begins when the first has its first product, so that from then on one's attention, which is bound by memory, stands
beside the other's products, which are not. They share caches, input and position, each in rows of its own.

A graph holds the whole step and, where it draws, at its end the next token with all that the next replay needs of it
(``ops.sample_step``), so that nothing is launched beside it. There is one for each way that attention is launched: into
how many parts the keys are split depends on the rows and on the largest position, and short caches shall not pay for
the parts of long ones. It is captured when its first position comes (``capture``), after a run that loads kernels, into
one pool of memory for all graphs of a step: they run one after another, and what lasts, the logits, is held. Where it
cannot be captured, it is tried without dependent launches, and then the step does without graphs; ``CudaStep.reason``
says so.

A step serves the next images of the same model and sizes, for which then nothing is captured (``CudaDecoder.start``).

Source: PyTorch's notes on CUDA graphs; programmatic dependent launch: CUDA C++ Programming Guide.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.draws import Sampling
from igpt_fast.engines.cuda.capture import capture, make_workspaces, take_place
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.decoder import SCALED
from igpt_fast.engines.network import Network
from igpt_fast.ops.attention_decode import count_splits, quantize_e4m3
from igpt_fast.ops.gemv import MAX_ROWS

FUSED_DTYPES = (torch.bfloat16, torch.float16)
HALVED_ROWS = 64  # from which on torch's products are those of two halves
# Where a graph's positions may end; a limit is used where it changes the launch.
LIMITS = (64, 256, 1024, 4096)


class Part(NamedTuple):
    """Rows that are computed together, and the shared primers that they have."""

    rows: slice
    primers: slice

    @property
    def images(self) -> int:
        return self.rows.stop - self.rows.start


def halved(options: CudaOptions, rows: int, fused: bool) -> bool:
    """Whether rows are computed as two halves. Fused kernels, which are bound by the weights, would read them twice."""
    return rows >= HALVED_ROWS and not fused if options.halves == "auto" else options.halves


def split(rows: int, primers: int, halves: bool) -> list[Part]:
    """All rows, or two halves. Rows that share one of several primers stay together; a single one serves both."""
    if not halves or rows < 2:
        return [Part(slice(0, rows), slice(0, primers))]
    if primers > 1:
        first = -(-primers // 2)
        middle = rows // primers * first
        return [Part(slice(0, middle), slice(0, first)), Part(slice(middle, rows), slice(first, primers))]
    middle = -(-rows // 2)
    return [Part(part, slice(0, primers)) for part in (slice(0, middle), slice(middle, rows))]


class Draws:
    """What a step draws from and into, besides logits: memory that stays where it is.

    Args:
        rows: Images.
        most: Draws of each.
        device: Where.

    Attributes:
        tokens, logprobs: (rows, most), int64 and float32: what was drawn, the first ones in column 0.
    """

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        self.settings = torch.zeros(7, dtype=torch.int64, device=device)
        self.streams = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros((rows, most), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((rows, most), dtype=torch.float32, device=device)
        self._set: tuple[Any, ...] = ()

    def set(self, seed: int, streams: Tensor, sampling: Sampling, offset: int, first: int) -> None:
        """For the draws to come; arguments as of ``ops.sample_settings`` and ``ops.sample_step``."""
        settings = seed, sampling, offset, first
        if settings != self._set:
            self.settings.copy_(ops.sample_settings(*settings))
            self._set = settings
        self.streams.copy_(streams)

    def held(self) -> list[Tensor]:
        """All of its memory."""
        return [self.settings, self.streams, self.tokens, self.logprobs]


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
        options: How it is computed.

    Attributes:
        reason: Why it does without what ``options`` ask for, once something failed.
    """

    def __init__(
        self,
        network: Network,
        rows: int,
        positions: int,
        primer: tuple[Tensor, Tensor] | None,
        dtype: str,
        options: CudaOptions,
    ) -> None:
        self.network, self.primer, self.options = network, primer, options
        self.reason: str | None = None
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
        # In these caches, of each row's next key.
        self.position = torch.zeros(rows, dtype=torch.int32, device=network.device)
        self.fused = rows <= min(options.gemv_rows, MAX_ROWS) and network.dtype in FUSED_DTYPES
        primers = 0 if primer is None else primer[0].shape[1]
        self.parts = split(rows, primers, halved(options, rows, self.fused))
        self.draws = Draws(rows, positions + 1, network.device)
        # By limit, and of how many colours it draws one; 0 where it draws none.
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._place: Any = None
        self._pool: Any = None
        self._limits = self._choose_limits(positions)

    def _choose_limits(self, positions: int) -> list[int]:
        """The ends of ranges of positions, one for each number of parts that a cache is split into."""
        with backend.launching(self._launching):
            kernels = backend.kernels("attention_decode", self.keys.device)
        assert kernels is not None
        blocks, dtype = [part.images * self.network.heads for part in self.parts], self.network.dtype
        by_parts: dict[tuple[int, ...], int] = {}
        for limit in (*(limit for limit in LIMITS if limit < positions), positions):
            by_parts[tuple(count_splits(kernels, number, limit, dtype) for number in blocks)] = limit
        return sorted(by_parts.values())

    @property
    def _launching(self) -> backend.Launching:
        # torch's products do not take part in dependent launches.
        dependent = self.options.dependent if self.fused else "none"
        return backend.Launching(dependent, self.options.ring, self.options.cluster)

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

    def _caches(self) -> list[Tensor]:
        tensors = (self.keys, self.values, *self.scales, *(self.primer or ()))
        return [tensor for tensor in tensors if tensor is not None]

    def held(self) -> list[Tensor]:
        """What it reads and writes of its own, without the memory of graphs."""
        return [*self._caches(), self.x, self.position, *self.draws.held()]

    @property
    def bytes(self) -> int:
        """Of its caches and of the primer."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._caches())

    def draw(self, logits: Tensor) -> None:
        """Draws the tokens that stand at ``position``, of (rows, K) logits, as ``draws`` says; ``x`` is their input."""
        self.position -= 1  # which the draw advances
        self._draw(logits)

    def _draw(self, logits: Tensor) -> None:
        draws, net = self.draws, self.network
        history = draws.tokens, draws.logprobs
        ops.sample_step(logits, draws.settings, draws.streams, self.position, *history, self.x, net.wte, net.wpe)

    def run(self, position: int, colours: int = 0) -> Tensor:
        """Reads ``x`` at ``position`` of the caches, where the device's ``position`` stands, and advances that. With
        ``colours`` it draws the next token among the first so many, as ``draw`` does.

        Returns the (rows, K) logits: on graphs in memory that the next step writes to.

        Warns: RuntimeWarning: It cannot be captured as ``options`` ask; see ``reason``.
        """
        limit = next(limit for limit in self._limits if position < limit)
        before, which = self.options, (limit, colours)
        while self.options.graphs and which not in self._graphs:
            try:
                self._graphs[which] = self._capture(limit, colours)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._retreat(error)
        if self.options != before:
            warnings.warn(f"decoder: it goes on {self.reason}", RuntimeWarning, stacklevel=2)
        if not self.options.graphs:
            return self._compute(limit, colours)
        graph, logits = self._graphs[which]
        graph.replay()
        return logits

    def _retreat(self, error: RuntimeError) -> None:
        """To no dependent launches, and where there are none, to no graphs."""
        if self.fused and self.options.dependent != "none":
            self.options, without = replace(self.options, dependent="none"), "dependent launches"
        else:
            self.options, without = replace(self.options, graphs=False), "CUDA graphs"
        self.reason = f"without {without}, as the step could not be captured: {error}"

    def _capture(self, limit: int, colours: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device, x = self.keys.device, self.x.clone()
        self._compute(limit, colours)  # loads all kernels; writes what the first replay writes
        self.position -= 1
        self.x.copy_(x)
        if self._place is None:
            self._place = take_place(device, self)
        if not self.fused:
            make_workspaces(self._place, len(self.parts), device, self.network.dtype)
        side, pool = self._place.streams[1], self._pool or torch.cuda.graph_pool_handle()
        captured = capture(self._place, device, pool, lambda: self._compute(limit, colours, side))
        self._pool = pool  # which torch takes again only while a graph is in it
        return captured

    def _compute(self, limit: int, colours: int, side: torch.cuda.Stream | None = None) -> Tensor:
        """The step itself: of two halves, the second on the stream ``side``, if there is one."""
        with backend.launching(self._launching):
            if side is None or len(self.parts) == 1:
                halves = [self._compute_part(part, limit) for part in self.parts]
            else:
                halves = self._compute_halves(limit, side)
            logits = halves[0] if len(halves) == 1 else torch.cat(halves)
            if colours:
                self._draw(logits[:, :colours])
        if not colours:
            self.position += 1
        return logits

    def _compute_halves(self, limit: int, side: torch.cuda.Stream) -> list[Tensor]:
        here, begun = torch.cuda.current_stream(self.keys.device), torch.cuda.Event()
        first = self._compute_part(self.parts[0], limit, begun)
        try:
            side.wait_event(begun)
            with torch.cuda.stream(side):
                return [first, self._compute_part(self.parts[1], limit)]
        finally:
            here.wait_stream(side)  # else the capture could not end, after an error too

    def _compute_part(self, part: Part, limit: int, begun: torch.cuda.Event | None = None) -> Tensor:
        """The logits of some rows; ``begun`` is recorded behind their first product."""
        return (self._compute_fused if self.fused else self._compute_rows)(part, limit, begun)

    def _compute_fused(self, part: Part, limit: int, begun: torch.cuda.Event | None) -> Tensor:
        net, x = self.network, self.x[part.rows]
        # The first one, and with it all others, begins behind what was before: the last step's keys are there, its draw
        # has written the position, and another half's launches are no part of its chain.
        with backend.launching(backend.Launching()):
            qkv = self._project(0, x)
        if begun is not None:
            begun.record()
        for i, layer in enumerate(net.layers):
            attended = self._attend(part, i, qkv if i == 0 else self._project(i, x), limit)
            x = ops.gemv(attended, layer.out_weight, layer.out_bias, residual=x)
            inner = ops.gemv(
                x, layer.fc_weight, layer.fc_bias, norm_weight=layer.ln_2, eps=net.eps, activation=net.kernel
            )
            x = ops.gemv(inner, layer.proj_weight, layer.proj_bias, residual=x)
        return ops.gemv(x, net.head, norm_weight=net.ln_f, eps=net.eps)

    def _project(self, i: int, x: Tensor) -> Tensor:
        layer, eps = self.network.layers[i], self.network.eps
        return ops.gemv(x, layer.qkv_weight, layer.qkv_bias, norm_weight=layer.ln_1, eps=eps)

    def _compute_rows(self, part: Part, limit: int, begun: torch.cuda.Event | None) -> Tensor:
        net, x = self.network, self.x[part.rows]
        normed = ops.rms_norm(x, net.layers[0].ln_1, net.eps)
        for i, layer in enumerate(net.layers):
            qkv = torch.addmm(layer.qkv_bias, normed, layer.qkv_weight)
            if begun is not None and i == 0:
                begun.record()
            attended = torch.addmm(layer.out_bias, self._attend(part, i, qkv, limit), layer.out_weight)
            normed, x = ops.rms_norm(attended, layer.ln_2, net.eps, residual=x)
            inner = ops.activation(normed @ layer.fc_weight, net.activation, layer.fc_bias)
            added = torch.addmm(layer.proj_bias, inner, layer.proj_weight)
            following = net.layers[i + 1].ln_1 if i + 1 < len(net.layers) else net.ln_f
            normed, x = ops.rms_norm(added, following, net.eps, residual=x)
        return normed @ net.head

    def _attend(self, part: Part, i: int, qkv: Tensor, limit: int) -> Tensor:
        """Attention of layer i from a part's (n, 3 n_embd) projection; (n, n_embd)."""
        net, rows = self.network, part.rows
        q, k, v = qkv.view(-1, 3, net.heads, net.head_dim).unbind(1)
        prefix_k, prefix_v = (None, None) if self.primer is None else (p[i, part.primers] for p in self.primer)
        state = self.keys[i, rows], self.values[i, rows], self.position[rows], None, net.scales[i]
        k_scale, v_scale = (None if scales is None else scales[i, rows] for scales in self.scales)
        out = ops.attention_decode(q, k, v, *state, prefix_k, prefix_v, limit, v_scale, k_scale)
        return out.view(out.shape[0], -1)
