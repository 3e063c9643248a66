"""The compiled module's forward pass: equal to the layers by the rule of tolerance.py, whatever the sizes, threads,
batch and instruction set; what is not finite stays where it is; a change of the weights is seen; what it is not for
goes to PyTorch.
"""

import copy
import functools
import gc
import os
from collections.abc import Callable
from threading import Thread

import pytest
import small_models
import torch
from small_models import ids
from tolerance import assert_parity
from torch import Tensor, nn

from igpt_fast import (
    DynamicCache,
    ImageGPTForImageClassification,
    ImageGPTModel,
    backend,
)
from igpt_fast import environment as environment_module
from igpt_fast.engines import choice as decoders
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu import weights as cpu_weights
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.engines.network import Weights

if backend._C is None:
    pytest.skip(backend.native_reason, allow_module_level=True)
pytestmark = pytest.mark.usefixtures("without_gradients")

small = functools.partial(small_models.small, torch.bfloat16)


def body(model: nn.Module) -> ImageGPTModel:
    return model if isinstance(model, ImageGPTModel) else model.transformer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each forward pass, whether the compiled module ran it, which short ones are no reason against here."""
    monkeypatch.setattr(forwards, "_why_not_short", lambda *_: None)
    seen: list[bool] = []
    run = forwards.run

    def watched(*args: object, **keywords: object) -> object:
        states = run(*args, **keywords)
        seen.append(states is not None)
        return states

    monkeypatch.setattr(forwards, "run", watched)
    return seen


def everything(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    labels = tokens.clamp(max=model.config.vocab_size - 2)  # SOS is never predicted
    found = model(tokens, labels=labels, use_cache=True, output_hidden_states=True)
    named = {"logits": found.logits, "loss": found.loss[None]}
    named |= {f"hidden {i}": state for i, state in enumerate(found.hidden_states)}
    for i, (keys, values) in enumerate(found.past_key_values):
        named |= {f"keys {i}": keys, f"values {i}": values}
    return named


def assert_right(model: nn.Module, tokens: Tensor, calls: list[bool]) -> None:
    got = everything(model, tokens)
    with backend.use_backend("reference"):
        plain = everything(model, tokens)
    double = type(model)(model.config).eval().double()
    double.load_state_dict(model.state_dict())
    exact = everything(double, tokens)
    assert calls[-3:].count(True) == 1
    for name, value in got.items():
        if name != "loss":  # a single number's error is a matter of luck
            assert value.dtype == model.dtype
            assert_parity(value, plain[name], exact[name], name)
    near = {"rtol": 0.02, "atol": 0.02} if model.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got["loss"].double(), exact["loss"].double(), equal_nan=True, **near)


# Every option that the kernels know, and sizes that fill no tile: heads of 8, 24, 40, 72, 128 and 256.
CONFIGS = {
    "plain": {},
    "gelu": {"activation_function": "gelu", "n_embd": 64, "n_head": 8, "vocab_size": 131},
    "gelu_new": {"activation_function": "gelu_new", "n_embd": 80, "n_head": 2, "n_inner": 56},
    "scales": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_embd": 144, "n_head": 2},
    "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 0.1},
    "heads of 128": {"n_embd": 256, "n_head": 2, "n_layer": 1, "n_inner": 1208},
    "one head of 256": {"n_embd": 256, "n_head": 1, "n_layer": 1, "n_inner": 1208},
    "many inputs": {"n_embd": 1040, "n_head": 13, "n_layer": 1, "n_inner": 2064},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_layers(fields: dict, dtype: torch.dtype, calls: list[bool]) -> None:
    model = small_models.small(dtype, **fields)
    for batch, length in ((1, 80), (2, 1), (3, 33)):
        assert_right(model, ids(model, batch, length), calls)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 300, 1000, 1024])
def test_any_length(length: int, dtype: torch.dtype, calls: list[bool]) -> None:
    """To beyond the 256 keys that attention takes at a time, and the 256 rows of a span."""
    model = small_models.small(dtype, n_positions=1024, n_embd=64)
    for batch in (1, 3) if length < 300 else (1,):
        assert_right(model, ids(model, batch, length), calls)


def test_threads_and_batches_do_not_change_the_result(dtype: torch.dtype, calls: list[bool]) -> None:
    """Bit by bit: teams of threads, more threads than rows or heads, batches in several turns."""
    for fields, batch, length in (({}, 1, 20), ({"n_head": 3}, 3, 70), ({"n_positions": 1000}, 3, 1000)):
        model = small_models.small(dtype, **fields)
        tokens = ids(model, batch, length)
        want = everything(model, tokens)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            got = everything(model, tokens)
            assert all(torch.equal(got[name], want[name]) for name in want)
        torch.set_num_threads(1)
        alone = torch.cat([model(row[None]).logits for row in tokens])
        assert torch.equal(alone, want["logits"])
    assert all(calls)


def test_the_classes_and_shapes_of_input(calls: list[bool]) -> None:
    classifier, network = small(head=ImageGPTForImageClassification, num_labels=5), small(head=ImageGPTModel)
    tokens = ids(network, 2, 40)
    for model in (classifier, network):
        got = model(tokens)
        with backend.use_backend("reference"):
            want = model(tokens)
        torch.testing.assert_close(got[0], want[0], rtol=0.05, atol=0.05)
    one = network(tokens[0], return_dict=False)
    assert one[0].shape == (40, 48)
    assert torch.equal(one[0], network(tokens)[0][0])
    strided = torch.stack([tokens, tokens], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(network(strided)[0], network(tokens)[0])
    assert (calls[0], calls[2]) == (True, True)
    assert all(calls[4:])


def test_a_cache_goes_on(calls: list[bool]) -> None:
    model = small()
    tokens = ids(model, 2, 50)
    cache = model(tokens[:, :33]).past_key_values
    assert isinstance(cache, DynamicCache)
    rest = model(tokens[:, 33:], past_key_values=cache).logits
    assert calls == [True]
    torch.testing.assert_close(rest, model(tokens).logits[:, 33:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("length", [2, 33, 64])
def test_a_primer_of_the_decoder(dtype: str | None, length: int, calls: list[bool]) -> None:
    """Read in one go, then a step at a time, against steps alone."""
    model = small()
    tokens = ids(model, 2, 80)
    primed, stepped = CpuDecoder(model, 2, 80, dtype), CpuDecoder(model, 2, 80, dtype)
    steps = torch.stack([stepped.step(column) for column in tokens.unbind(1)], dim=1)[:, length - 1 :]
    first = primed.prefill(tokens[:, :length])
    got = torch.stack([first, *(primed.step(column) for column in tokens[:, length:].unbind(1))], dim=1)
    assert calls == [True]
    error = (got - steps).square().mean().sqrt() / steps.square().mean().sqrt()
    assert error < (0.01 if dtype is None else 0.03), float(error)


# ---- What is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 31, 32, 40, 69])
def test_nothing_goes_back_in_time(value: float, at: int, dtype: torch.dtype, calls: list[bool]) -> None:
    """A position that is not finite leaves those before it as they are, bit by bit, and reaches all that see it."""
    model = small_models.small(dtype, n_head=3)
    tokens = ids(model, 2, 70)
    want = model(tokens).logits
    model.transformer.wpe.weight[at, 5] = value
    got = model(tokens).logits
    assert calls == [True, True]
    assert torch.equal(got[:, :at], want[:, :at])
    assert got[:, at:].isnan().all()


def test_sequences_are_apart(dtype: torch.dtype, calls: list[bool]) -> None:
    model = small_models.small(dtype, vocab_size=18)
    tokens = ids(model, 3, 40) % 17
    want = model(tokens).logits
    tokens[1, 3] = 17
    model.transformer.wte.weight[17] = torch.nan
    got = model(tokens).logits
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])
    assert got[1, 3:].isnan().all()
    assert torch.equal(got[1, :3], want[1, :3])
    assert all(calls)


def test_a_weight_that_is_not_a_number_is_seen(dtype: torch.dtype) -> None:
    model = small_models.small(dtype)
    for name, parameter in model.named_parameters():
        broken = copy.deepcopy(model)
        broken.get_parameter(name).view(-1)[7 if parameter.ndim > 1 else 3] = torch.nan
        tokens = torch.zeros(1, 40, dtype=torch.int64)
        assert broken(tokens).logits.isnan().any(), name


# ---- Weights that change ------------------------------------------------------------------------------------


def changes() -> dict[str, Callable[[nn.Module], object]]:
    def swap(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * -1.3

    def swap_twice(model: nn.Module) -> None:
        swap(model)
        swap(model)

    def past_the_version(model: nn.Module) -> None:
        model.transformer.h[1].mlp.c_fc.weight.data.mul_(-0.5)

    def columns(model: nn.Module) -> None:
        model.transformer.h[1].attn.c_attn.weight.data[:, 64:] = 0

    def past_strides(model: nn.Module) -> None:
        weight = model.transformer.h[0].mlp.c_fc.weight
        weight.data = weight.data.t().contiguous().t()
        model(ids(model, 1, 40))
        model.transformer.wte.weight.data[5:9] *= -2

    def heads(model: nn.Module) -> None:
        model.config.n_head = 6
        for block in model.transformer.h:
            block.attn.n_head = 6

    return {
        "in place": lambda model: model.transformer.h[0].attn.c_attn.bias.add_(0.5),
        "one number": lambda model: model.transformer.h[1].mlp.c_proj.weight[3, 4].fill_(9.0),
        "other memory": swap,
        "other memory, twice": swap_twice,
        "data": past_the_version,
        "data of columns": columns,
        "data, with other strides": past_strides,
        "heads": heads,
        "state dict": lambda model: model.load_state_dict(small(seed=4).state_dict()),
        "another parameter": lambda model: setattr(
            model.transformer.wpe, "weight", nn.Parameter(model.transformer.wpe.weight * 2)
        ),
        "scale": lambda model: setattr(model.transformer.h[0].attn, "scale", 1.0),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_a_change_is_seen(change: Callable[[nn.Module], object], calls: list[bool]) -> None:
    model = small()
    tokens = ids(model, 1, 40)
    before = model(tokens).logits
    assert torch.equal(model(tokens).logits, before)
    change(model)
    after = model(tokens).logits
    assert all(calls)
    with backend.use_backend("reference"):
        want = model(tokens).logits
    assert (after - want).norm() < 0.5 * (before - want).norm()


def test_one_copy_of_the_weights_for_all() -> None:
    model = small()
    network = body(model)
    model(ids(model, 1, 20))
    decoder = CpuDecoder(model, 1, 30)
    decoder.prefill(ids(model, 1, 20))
    shared = cpu_weights.packed_weights(network, None, None)
    assert shared in forwards._passes
    assert cpu_weights.packed_weights(network, model.lm_head.weight, None) is shared
    assert cpu_weights.packed_weights(network, None, None) is shared


def test_a_pass_asks_for_the_parameters_once(monkeypatch: pytest.MonkeyPatch, without_gradients: None) -> None:
    """What comes before a small model's pass takes a tenth of it."""
    model, asked, of = small(), [], Weights.of
    model(ids(model, 1, 20))  # packs
    monkeypatch.setattr(Weights, "of", lambda body: asked.append(1) or of(body))
    model(ids(model, 1, 20))
    assert len(asked) == 1


def test_memory_is_given_back() -> None:
    """The packed weights go with the model, and one hidden state does not keep the others."""
    model = small()
    states = model(ids(model, 1, 20), output_hidden_states=True).hidden_states
    assert states[1].untyped_storage().nbytes() == states[1].numel() * 2
    count = len(forwards._passes)
    del model
    gc.collect()
    assert len(forwards._passes) == count - 1


def test_models_of_inference_mode() -> None:
    """Their tensors count no changes."""
    with torch.inference_mode():
        model = small()
        tokens = ids(model, 1, 20)
        before = model(tokens).logits
        model.transformer.h[1].mlp.c_fc.weight[:, 8:].zero_()
        after = model(tokens).logits
    assert not torch.equal(after, before)


def test_a_network_of_ones_own(calls: list[bool]) -> None:
    model = small()
    model.transformer.__class__ = type("Mine", (type(model.transformer),), {})
    assert "Mine" in str(forwards.why_not(model.transformer, ids(model, 1, 20)))


# ---- What it is not for -------------------------------------------------------------------------------------


class Other(nn.Dropout):
    pass


def with_hook(model: nn.Module) -> None:
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)


def with_own_forward(model: nn.Module) -> None:
    linear = model.transformer.h[0].mlp.c_fc
    linear.forward = linear.forward


REASONS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "hook": (with_hook, "a hook"),
    "forward": (with_own_forward, "a forward of its own"),
    "module": (lambda model: setattr(model.transformer.h[1].attn, "resid_dropout", Other(0.0)), "Other"),
    "dropout": (lambda model: model.transformer.drop.train(), "dropout"),
    "training": (lambda model: model.train(), "training"),
    "float64": (lambda model: model.double(), "bfloat16"),
    "one float32": (lambda model: model.transformer.h[0].ln_1.float(), "bfloat16"),
    "scale": (lambda model: setattr(model.transformer.h[0].attn, "scale", -1.0), "positive"),
    "small scale": (lambda model: setattr(model.transformer.h[0].attn, "scale", 1e-39), "positive"),
    "eps": (lambda model: setattr(model.transformer.ln_f, "eps", 1e-3), "norm"),
    "heads": (lambda model: setattr(model.transformer.h[0].attn, "n_head", 4), "heads"),
    "max_norm": (lambda model: setattr(model.transformer.wte, "max_norm", 0.5), "max_norm"),
    "tokens": (lambda model: model.set_input_embeddings(nn.Embedding(20, 48).bfloat16()), "shape"),
    "parameter": (
        lambda model: setattr(model.transformer.h[0].ln_1, "weight", type("Mine", (nn.Parameter,), {})(torch.ones(48))),
        "weight of h.0.ln_1 is a Mine",
    ),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_a_network_that_it_is_not_for(change: Callable, reason: str) -> None:
    model = small(resid_pdrop=0.1)
    tokens = ids(model, 1, 10)
    assert forwards.why_not(model.transformer, tokens) is None
    change(model)
    assert reason in str(forwards.why_not(model.transformer, tokens))
    if reason != "bfloat16" and "Mine" not in reason:
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "served", "left"),
    [
        (torch.float32, [(1, 8), (2, 24), (40, 24)], [(1, 7), (2, 23), (40, 8)]),
        (torch.bfloat16, [(1, 1), (8, 1), (9, 8)], [(9, 7)]),
        (torch.float16, [(8, 1), (9, 8)], [(9, 7)]),
    ],
)
def test_what_is_shorter_than_what_it_is_padded_to(dtype: torch.dtype, served: list, left: list) -> None:
    model = small_models.small(dtype).requires_grad_(False)
    for shape in served:
        assert forwards.why_not(model.transformer, ids(model, *shape)) is None
    for shape in left:
        assert "padded" in str(forwards.why_not(model.transformer, ids(model, *shape)))
        assert forwards.why_not(model.transformer, ids(model, *shape), primer=True) is None


def test_a_call_that_it_is_not_for(calls: list[bool]) -> None:
    model = small()
    tokens, embeds = ids(model, 2, 10), torch.randn(2, 10, 48).bfloat16()
    for arguments in (
        {"attention_mask": torch.ones(2, 10)},
        {"position_ids": torch.arange(10)[None]},
        {"token_type_ids": tokens},
        {"past_key_values": DynamicCache()},
        {"output_attentions": True},
    ):
        assert model(tokens, **arguments).logits.shape == (2, 10, 16)
    model(inputs_embeds=embeds)
    assert not any(calls)
    for tensor in (tokens.int(), tokens.to("meta"), tokens[:, :0], torch.tensor(3), None):
        assert forwards.why_not(model.transformer, tensor) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(forwards.why_not(model.transformer, tokens))
        model(tokens)
    with backend.use_backend("reference"):
        assert "reference" in str(forwards.why_not(model.transformer, tokens))
    with torch.enable_grad():
        assert "gradient" in str(forwards.why_not(model.transformer, tokens))
        assert model(tokens).logits.requires_grad
    assert not any(calls)
    with torch.inference_mode():
        model(tokens)
    with torch.enable_grad():
        assert not model.requires_grad_(False)(tokens).logits.requires_grad
    assert calls[-2:] == [True, True]


def test_bad_tokens_and_lengths() -> None:
    model = small()
    for token in (-1, 17):
        with pytest.raises(IndexError):
            model(torch.tensor([[0, token]]))
    with pytest.raises(ValueError, match="n_positions"):
        model(ids(model, 1, 81))


def test_sizes_that_are_not_trusted() -> None:
    packed, tokens = cpu_weights.packed_weights(small().transformer, None, None), torch.zeros(4, dtype=torch.int64)
    out = dict.fromkeys(("last", "keys", "values", "states", "means"), 0)
    asked = {"batch": 1, "length": 4, "layers": 2, "taken": [], "normed": False, "bands": 1, "threads": 1, **out}
    forward = backend._C.Forward(packed)
    forward.run(tokens=tokens.data_ptr(), **asked)
    for wrong in ({"batch": 2**62}, {"batch": 2**61}, {"taken": [1, 1]}, {"taken": [1, 0]}, {"taken": [3]}):
        with pytest.raises(ValueError, match="forward: "):
            forward.run(tokens=tokens.data_ptr(), **{**asked, **wrong})


@pytest.mark.parametrize("length", [140, 270, 520])
def test_scores_that_are_all_infinite_weigh_nothing(length: int, dtype: torch.dtype, calls: list[bool]) -> None:
    """Of a whole block of keys, or two: minus infinity, and those that follow are not."""
    model = small_models.small(dtype, n_positions=520, n_layer=1, n_head=1)
    wte, attention = body(model).wte.weight, body(model).h[0].attn
    for weight in (wte, body(model).wpe.weight, attention.c_attn.weight[:, :96], attention.c_attn.bias[:96]):
        weight.zero_()
    body(model).h[0].ln_1.weight.fill_(1.0)
    wte[1, 0] = wte[2, 1] = 1.0
    attention.c_attn.weight[1, 0], attention.c_attn.weight[0, 48] = 1e20, -1e20  # q of the second, k of the first
    tokens = torch.ones(1, length, dtype=torch.int64)
    tokens[:, length - 8 :] = 2
    assert_right(model, tokens, calls)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of every choice by shape
def test_transforms_see_the_layers(calls: list[bool]) -> None:
    model = small().requires_grad_(False)
    tokens = ids(model, 2, 12)
    want = model(tokens, use_cache=False).logits
    calls.clear()
    state = {name: parameter * 1.0 for name, parameter in model.named_parameters()}
    arguments = {"use_cache": False}
    got = [
        torch.func.functional_call(model, state, (tokens,), arguments).logits,
        torch.func.vmap(lambda row: model(row[None], use_cache=False).logits[0])(tokens),
        torch.jit.trace(lambda x: model(x, use_cache=False).logits, tokens, check_trace=False)(tokens),
        torch.export.export(model, (tokens,), arguments).module()(tokens, use_cache=False).logits,
        torch.compile(model, backend="eager", fullgraph=True)(tokens, use_cache=False).logits,
    ]
    assert not any(calls)
    for other in got:
        torch.testing.assert_close(other, want, rtol=0.05, atol=0.05)
    with torch.overrides.TorchFunctionMode(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert forwards.why_not(model.transformer, tokens) is not None


def test_what_the_report_says() -> None:
    live = environment_module.config()["forwards"]
    assert set(live) == set(decoders.FORWARDS)
    assert live["cpu"] == {"runs": f"native ({backend._C.cpu_isa()})", "reason": decoders.FORWARDS["cpu"]}
    with backend.use_backend("reference"):
        assert environment_module.config()["forwards"]["cpu"]["reason"] == "the backend 'reference' is chosen"
    assert "forward    cpu" in environment_module.format_config(environment_module.config())


# ---- Beside others ------------------------------------------------------------------------------------------


def test_two_threads_of_python() -> None:
    """One model, called at once."""
    torch.set_num_threads(2)
    model = small(n_positions=300)
    inputs = [ids(model, 1, 300, seed) for seed in range(2)]
    want = [model(tokens).logits for tokens in inputs]
    same: list[bool] = []

    def work(which: int) -> None:
        with torch.no_grad():
            same.extend(torch.equal(model(inputs[which]).logits, want[which]) for _ in range(10))

    threads = [Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert len(same) == 20
    assert all(same)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_after_a_fork() -> None:
    torch.set_num_threads(2)
    model = small()
    tokens = ids(model, 2, 40)
    want = model(tokens).logits
    child = os.fork()
    if child == 0:
        got = forwards.run(model.transformer, tokens)
        torch.set_num_threads(1)
        os._exit(0 if got is not None and torch.equal(model.lm_head(got.last), want) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
