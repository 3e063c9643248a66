"""What is put around a model or into it: generation goes through it, and an engine serves where there is nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from igpt_fast import Pipeline, backend
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cpu import forward as forward_module
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


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc", "transformer.wpe", "lm_head"])
def test_weights_that_are_no_parameters(name: str, without_gradients: None) -> None:
    """What changes a buffer in place reaches the next decoder and the next forward pass."""
    model, tokens = small(torch.bfloat16), torch.tensor([[16, 1, 2, 3, 4, 5, 6, 7]])
    module = model.get_submodule(name)
    weight = module.weight.detach()
    del module.weight
    module.register_buffer("weight", weight)
    before = model(tokens).logits, make_decoder(model, 1, 3).step(tokens[:, 0])
    weight.mul_(-1)
    assert not torch.equal(model(tokens).logits, before[0])
    assert not torch.equal(make_decoder(model, 1, 3).step(tokens[:, 0]), before[1])
    assert "no parameter" in (why_not_cpu(model) or "")


def test_dropout_that_is_on_by_itself_stays_on(without_gradients: None) -> None:
    """In a model in eval mode, as for several answers of one. Of a model in training mode all of it goes off."""
    model = small(resid_pdrop=0.5)
    assert why_not_cpu(model.train()) is None
    assert why_not_cpu(model.eval()) is None
    model.transformer.h[1].mlp.dropout.train()
    assert why_not_cpu(model) == "the dropout transformer.h.1.mlp.dropout is on"
    decoder = make_decoder(model, 1, 3)
    assert decoder.name == "reference"
    assert not torch.equal(*(make_decoder(model, 1, 3).step(torch.tensor([16])) for _ in range(2)))


def test_modes_see_what_is_computed() -> None:
    with FlopCounterMode(display=False) as counter:
        small().generate(max_new_tokens=3)
    assert counter.get_total_flops() > 0


def test_modes_of_functions_see_what_is_computed() -> None:
    """But a default device, which is one, counts not: it moves nothing that is there."""
    model, seen = small(), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.device("cpu"):
        assert why_not_cpu(model) is None
        with Mode():
            assert why_not_cpu(model) == "a mode of torch's looks at every operation"
            model.generate(max_new_tokens=2)
    assert nn.functional.linear in seen


@pytest.mark.parametrize("method", ["_embed", "_tokens"])
@pytest.mark.parametrize("of_the_class", [False, True])
def test_other_embeddings(method: str, of_the_class: bool, monkeypatch: Patch, without_gradients: None) -> None:
    """Generation and the forward pass go through them."""
    model, tokens = small(torch.bfloat16), torch.tensor([[16, 1, 2, 3, 4, 5, 6, 7]])
    body = model.transformer
    monkeypatch.setattr(*(type(body) if of_the_class else body, method), lambda *_: torch.ones(1, 8, 48).bfloat16())
    assert why_not_cpu(model) is not None
    assert forward_module.why_not_modules(body, around=False) is not None
    assert torch.equal(body(tokens).last_hidden_state[0, 3], body(tokens.flip(1)).last_hidden_state[0, 3])


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
