"""What is put around a model or into it: generation goes through it, and an engine serves where there is nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from igpt_fast import Pipeline, backend
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cpu.decoder import why_not_cpu

pytestmark = pytest.mark.skipif(backend._C is None, reason=backend.native_reason)
BONUS = 1000.0 * nn.functional.one_hot(
    torch.tensor(3), 16
)  # for a colour: whoever goes around a change does not see it
Patch = pytest.MonkeyPatch


def favour(output: Any) -> Any:
    return dataclasses.replace(output, logits=output.logits + BONUS)


def wrapped(forward: Callable) -> Callable:
    return functools.wraps(forward)(lambda *args, **more: favour(forward(*args, **more)))


def hook(model: nn.Module, patch: Patch) -> None:
    model.register_forward_hook(lambda _, __, output: favour(output))


def hook_of_all_modules(model: nn.Module, patch: Patch) -> None:
    hook = lambda module, _, output: favour(output) if module is model else None  # noqa: E731
    patch.setitem(nn.modules.module._global_forward_hooks, -1, hook)


def hook_of_a_layer(model: nn.Module, patch: Patch) -> None:
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + BONUS)


def pre_hook_of_a_layer(model: nn.Module, patch: Patch) -> None:
    with torch.no_grad():
        model.lm_head.weight[3] = BONUS[3]
    model.lm_head.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))


def forward(model: nn.Module, patch: Patch) -> None:
    """As accelerate puts its hooks and autocast around a model."""
    model.forward = wrapped(model.forward)  # type: ignore[method-assign]


def forward_of_the_class(model: nn.Module, patch: Patch) -> None:
    patch.setattr(type(model), "forward", wrapped(type(model).forward))


def forward_of_a_layers_class(model: nn.Module, patch: Patch) -> None:
    patch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight) + BONUS)


def call(model: nn.Module, patch: Patch) -> None:
    before = nn.Module.__call__
    mine = lambda self, *args, **more: (favour if self is model else lambda x: x)(before(self, *args, **more))  # noqa: E731
    patch.setattr(nn.Module, "__call__", mine)


def subclass(model: nn.Module, patch: Patch) -> None:
    model.__class__ = type("Mine", (type(model),), {"forward": wrapped(type(model).forward)})


def parametrization(model: nn.Module, patch: Patch) -> None:
    """A head that is all zeros but for a colour, which a norm that is all ones makes likely."""
    head = nn.Module()
    head.forward = lambda weight: BONUS[:, None].expand_as(weight)  # type: ignore[method-assign]
    model.transformer.ln_f.register_forward_hook(lambda _, __, hidden: torch.ones_like(hidden))
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", head)


WAYS = [hook, hook_of_all_modules, hook_of_a_layer, pre_hook_of_a_layer, forward, forward_of_the_class]
WAYS += [forward_of_a_layers_class, call, subclass, parametrization]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_gone_around(way: Callable, monkeypatch: Patch) -> None:
    model = small()
    assert make_decoder(model, 1, 8).name == "cpu"
    way(model, monkeypatch)
    decoder = make_decoder(model, 1, 8)
    assert decoder.name == "reference"
    assert decoder.reason == why_not_cpu(model) is not None
    for context in (None, torch.tensor([[16, 1, 2]])):
        assert model.generate(context, max_new_tokens=3)[0, -3:].tolist() == [3, 3, 3]


def test_modes_see_what_is_computed() -> None:
    with FlopCounterMode(display=False) as counter:
        small().generate(max_new_tokens=3)
    assert counter.get_total_flops() > 0


def test_compiling_is_nothing_in_between() -> None:
    """It changes no value, and the engines need none."""
    model = small()
    model.compile()
    assert why_not_cpu(model) is None


def test_results_say_why() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    assert "engine_reason" not in pipeline.sample(1, seed=0).settings
    pipeline.model.register_forward_hook(lambda *_: None)
    settings = pipeline.sample(1, seed=0).settings
    assert settings["engine"] == "reference"
    assert settings["engine_reason"] == "the model has a hook or a forward of its own"
