"""A device without float64, as Apple's "mps" is: what is defined in float64 is computed on the CPU there.

It is a double: tensors whose device is "meta" by name, with memory of the CPU behind them, and no float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small, small_pipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from igpt_fast import Pipeline, backend, reference
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.objectives.classification import ImageGPTWithBothHeads, class_figures
from igpt_fast.learning.objectives.masked import Masked
from igpt_fast.likelihood.nats import mean_nats

DEVICE = torch.device("meta")


class Double(Tensor):
    """A tensor there."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Double:
        if inner.dtype == torch.float64:
            raise TypeError("the device has no float64")
        shape, strides = inner.shape, inner.stride()
        made = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=inner.dtype, device=DEVICE)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """On the memory behind; what comes out is there if it was asked for there, or something was there."""
    there: list[Double] = []
    args, kwargs = tree_map_only(Double, lambda t: (there.append(t), t.inner)[1], (args, kwargs))
    wanted = kwargs.get("device")
    here = wanted is not None and torch.device(wanted) != DEVICE
    if wanted is not None and not here:
        kwargs = {**kwargs, "device": "cpu"}
    out = op(*args, **kwargs)
    return tree_map_only(Tensor, Double, out) if not here and (there or wanted is not None) else out


class There(TorchDispatchMode):
    """New tensors, too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


@pytest.fixture
def without_float64() -> Iterator[None]:
    reference.WITHOUT_FLOAT64.add(DEVICE.type)
    with backend.use_backend("reference"), There():
        yield
    reference.WITHOUT_FLOAT64.remove(DEVICE.type)


def moved(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Double(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Double(buffer)


@pytest.fixture
def pipelines() -> tuple[Pipeline, Pipeline]:
    """The same one, here and there."""
    here, there = (small_pipeline(4, 4, 7, seed=3, dtype=torch.float32) for _ in range(2))
    moved(there.model)
    assert there.device == DEVICE
    return here, there


def test_the_double_has_no_float64(without_float64: None) -> None:
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, device=DEVICE).double()
    assert torch.zeros(2, device=DEVICE).cpu().double().dtype == torch.float64


def test_pictures_are_drawn_and_scored(pipelines: tuple[Pipeline, Pipeline], without_float64: None) -> None:
    here, there = pipelines
    options = {"seed": 1, "temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
    drawn, want = (pipeline.sample(3, **options) for pipeline in (there, here))
    assert torch.equal(drawn.tokens, want.tokens)
    torch.testing.assert_close(drawn.logprobs, want.logprobs)
    images = drawn.images[:2]
    completed, want = (pipeline.complete(images, keep=0.5, n=2, seed=2) for pipeline in (there, here))
    assert torch.equal(completed.tokens, want.tokens)
    nats, want_nats = (pipeline.score(images).nats for pipeline in (there, here))
    torch.testing.assert_close(nats, want_nats)


def test_means_and_losses(pipelines: tuple[Pipeline, Pipeline], without_float64: None) -> None:
    tokens = torch.randint(0, 7, (3, 16))
    means, gradients = [], []
    for pipeline in pipelines:
        model = pipeline.model
        means.append(mean_nats(model, [(tokens, None)]))
        model(tokens.to(model.device), labels=tokens.to(model.device)).loss.backward()
        gradients.append(model.transformer.h[0].mlp.c_fc.weight.grad.cpu())
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    torch.testing.assert_close(*gradients)


def test_figures_of_held_out_images(without_float64: None) -> None:
    """Of classes and of masked pixels, as a run has them."""
    sizes = {"vocab_size": 7, "n_positions": 16, "n_embd": 32}
    tokens, labels, figures = torch.randint(0, 6, (5, 16)), torch.arange(5) % 3, []
    data = TokenData(tokens, np.zeros((6, 3), np.float32), torch.arange(5) > 1)
    for move in (False, True):
        classes, masked = small(head=ImageGPTWithBothHeads, num_labels=3, **sizes), small(bidirectional=True, **sizes)
        for model in (classes, masked) if move else ():
            moved(model)
        figures.append(class_figures(classes, [(tokens, labels)]) | Masked(0.5).evaluate(masked, data))
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)
    assert figures[0].keys() == {"accuracy", "class_loss", "nats", "heldout_masked_nats"}


def test_colours(without_float64: None) -> None:
    pixels, colours = torch.randint(0, 256, (50, 3), dtype=torch.uint8), torch.rand(9, 3) * 2 - 1
    want = reference.quantize(pixels, colours)
    assert torch.equal(reference.quantize(Double(pixels), Double(colours)).cpu(), want)
    # Where ops.quantize comes to with such a device's tensors, which are registered for it.
    assert torch.equal(import_module("igpt_fast.ops.quantize")._quantize(Double(pixels), Double(colours)).cpu(), want)
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key("igpt_fast::quantize", key) for key in ("MPS", "XPU"))
