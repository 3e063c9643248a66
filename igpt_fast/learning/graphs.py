"""A whole step of training as one CUDA graph: forward, backward, clipping and update, launched as one.

The first steps run as ever, on a stream of their own, so that what is compiled, chosen or allocated once is there; the
next one is captured, which computes nothing, and replayed, as are all after it. A replay reads the inputs and the
learning rate from memory that stays where it is, and torch gives it the seed and offset of the GPU's generator, so it
drops what the step would have dropped.

Source: PyTorch's notes on CUDA graphs, "whole-network capture".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from igpt_fast.engines.cuda.capture import Place, capture, own_stream
from igpt_fast.files import first_line
from igpt_fast.likelihood.transfer import sent

WARM = 3  # steps before the capture, as torch's notes have it


class StepGraph:
    """A step, called with its inputs; on a graph as soon as there is one, without one where it cannot be captured.

    Args:
        compute: The step; what it reads besides its inputs, and what it writes, stays where it is.
        optimizer: Its own, with a learning rate on the device.
        device: A GPU, with its number.
    """

    def __init__(
        self, compute: Callable[[tuple[Tensor, ...]], None], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._compute, self._optimizer, self._device = compute, optimizer, device
        self._stream = own_stream(device)  # else what another thread launches could become part of the graph
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._failed = 0, False

    def __call__(self, inputs: tuple[Tensor, ...]) -> None:
        """Computes a step; every call's inputs have the shapes and types of the first's."""
        inputs = tuple(sent(tensor, self._device) for tensor in inputs)
        if self._graph is None and not self._failed and self._warm == WARM:
            self._capture(inputs)
        if self._graph is None:
            self._warm = min(self._warm + 1, WARM)
            here = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                self._compute(inputs)
            here.wait_stream(self._stream)
            return
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._optimizer.zero_grad(set_to_none=True)
        _capturable(self._optimizer, True)
        # So that the graph has a cuBLAS workspace in its own pool, that nobody else writes to.
        torch._C._cuda_clearCublasWorkspaces()
        place, pool, why = Place((self._stream, self._stream), None), torch.cuda.graph_pool_handle(), ""
        try:
            self._graph, _ = capture(place, self._device, pool, lambda: self._compute(self._inputs))
        except BaseException as error:
            self._failed, self._inputs = True, ()
            self._optimizer.zero_grad(set_to_none=True)
            _renew_generator(self._device)
            if not isinstance(error, RuntimeError):
                raise
            why = first_line(error)
        finally:
            _capturable(self._optimizer, False)
            torch._C._cuda_clearCublasWorkspaces()
        if self._failed:  # the error is gone, and with it what was computed: the pool's memory is free
            torch.cuda.empty_cache()
            warnings.warn(
                f"the step could not be captured in a CUDA graph, it is launched kernel by kernel: {why}",
                RuntimeWarning,
                stacklevel=2,
            )


def _capturable(optimizer: torch.optim.Optimizer, value: bool) -> None:
    """What torch asks for while it captures, and warns of at any other time: the fused AdamW is so in any case."""
    for group in optimizer.param_groups:
        group["capturable"] = value


def _renew_generator(device: torch.device) -> None:
    """A capture that fails leaves the GPU's generator refusing to draw outside of one; its seed is kept."""
    generator, fresh = torch.cuda.default_generators[device.index], torch.Generator(device)
    fresh.manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
