"""The tolerance rule of all tests, and the same model in three versions: ours, transformers', and in float64.

The specification is the plain PyTorch expression in float64. A result in a lower precision passes when its error
is at most twice that of the plain expression in the same dtype, plus one unit of output rounding. There are no other
tolerances. ``benchmarks/parity.py`` prints the table of what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig
from igpt_fast import model as ours_module

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Largest and root-mean-square errors to the float64 result, and whether ours are within the rule."""

    ours: float
    theirs: float
    ours_rms: float
    theirs_rms: float
    passed: bool

    @property
    def ratio(self) -> float:
        """Our largest error over theirs."""
        return self.ours / self.theirs if self.theirs else float(self.ours > 0)


def compare(ours: Tensor, theirs: Tensor, exact: Tensor) -> Comparison:
    """Applies the rule to a result.

    Once to the largest error of any element, and once to the root mean square, which a small but systematic error
    cannot slip through. One unit of rounding is ``eps`` times the result's own largest, or root mean square, value.

    Args:
        ours, theirs: The same quantity in the same low precision (an output of ours may be wider).
        exact: It in float64.
    """
    assert ours.shape == theirs.shape == exact.shape, (ours.shape, theirs.shape, exact.shape)
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, True)
    eps = torch.finfo(theirs.dtype).eps
    exact = exact.detach()
    mine, reference = (ours.detach().double() - exact).abs(), (theirs.detach().double() - exact).abs()
    rms, reference_rms, scale_rms = (float(x.square().mean().sqrt()) for x in (mine, reference, exact))
    largest, reference_largest, scale = (float(x.abs().max()) for x in (mine, reference, exact))
    # Written so that a NaN fails.
    passed = largest <= 2.0 * reference_largest + eps * scale and rms <= 2.0 * reference_rms + eps * scale_rms
    return Comparison(largest, reference_largest, rms, reference_rms, passed)


def assert_parity(ours: Tensor, theirs: Tensor, exact: Tensor, what: str = "") -> None:
    """Fails with the errors unless ``compare`` passes."""
    result = compare(ours, theirs, exact)
    assert result.passed, f"{what}: {result}"


def randomise(model: nn.Module, seed: int) -> None:
    """Weights of a size that trained ones have, and none that is zero or one: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "ln_" in name:
                parameter.copy_(1.0 + 0.3 * values)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * values)
            else:
                parameter.copy_(
                    values * (0.6 if "wte" in name else 0.3 if "wpe" in name else parameter.shape[0] ** -0.5)
                )


@dataclass(frozen=True)
class Trio:
    """The same weights, rounded to the dtype, in our class, in transformers', and in transformers' in float64."""

    ours: nn.Module
    theirs: nn.Module
    exact: nn.Module

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.ours, self.theirs, self.exact))

    def assert_parity(self, quantities: Callable[[nn.Module], Tensors]) -> None:
        """Applies the rule to everything that ``quantities`` gets out of a model."""
        failed = {name: result for name, result in self.compare(quantities).items() if not result.passed}
        assert not failed, failed

    def compare(self, quantities: Callable[[nn.Module], Tensors]) -> dict[str, Comparison]:
        """``compare`` for everything that ``quantities`` gets out of a model."""
        ours, theirs, exact = (quantities(model) for model in self)
        assert ours.keys() == theirs.keys() == exact.keys(), ours.keys() ^ theirs.keys()
        return {name: compare(ours[name], theirs[name], exact[name]) for name in exact}


def make_trio(head: str, dtype: torch.dtype, seed: int = 0, **config: Any) -> Trio:
    """Builds a ``Trio``, without dropout and in eval mode.

    Args:
        head: Name of the class.
        dtype: Of the first two.
        seed: Of the weights.
        config: Fields of the configuration.
    """
    import transformers

    fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **config}
    ours = getattr(ours_module, head)(ImageGPTConfig(**fields)).eval()
    randomise(ours, seed)
    ours = ours.to(dtype)
    theirs = getattr(transformers, head)(transformers.ImageGPTConfig(**fields)).to(dtype).eval()
    # The upcast is to float32 whatever the model's dtype; in exact arithmetic it changes nothing.
    plain = transformers.ImageGPTConfig(**{**fields, "reorder_and_upcast_attn": False})
    exact = getattr(transformers, head)(plain).double().eval()
    state = ours.state_dict()
    for model in (theirs, exact):
        model.load_state_dict(state, strict=True)
    return Trio(ours, theirs, exact)


def tokens(config: Any, batch: int, length: int, seed: int = 1) -> Tensor:
    """(batch, length) int64 colours."""
    return torch.randint(config.vocab_size - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, **inputs: Any) -> Tensors:
    """Every tensor that a forward pass returns but for the cache and the loss, by name."""
    with torch.no_grad():
        result = model(**{"output_hidden_states": True, "output_attentions": True, **inputs})
    return dict(_flat(result))


def losses(model: nn.Module, batch: int, length: int, labels: Callable[[int], Tensor] | None = None) -> Tensors:
    """The losses of 16 inputs together: the rounding error of a single number is a matter of luck.

    Args:
        model: With a loss.
        batch, length: Of each input.
        labels: From the number of the input; the inputs themselves when ``None``.
    """
    found = []
    with torch.no_grad():
        for i in range(16):
            ids = tokens(model.config, batch, length, seed=100 + i)
            wanted = ids if labels is None else labels(i)
            if wanted.is_floating_point():
                wanted = wanted.to(model.dtype)
            found.append(model(input_ids=ids, labels=wanted, use_cache=False).loss)
    return {"loss": torch.stack(found)}


def gradients(model: nn.Module, **inputs: Any) -> Tensors:
    """The gradient of the loss by every parameter."""
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, missing
    return found


def _flat(result: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in result.items():
        if isinstance(value, Tensor) and name != "loss":
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
