"""The forward pass in 8 bits: what is rounded is what the specification here rounds, at every level; likelihoods hardly
feel it; what cannot be computed so is refused.
"""

import copy

import numpy as np
import pytest
import torch
from small_models import computed_in_int8, ids, int8_is_right, small, small_pipeline
from torch import Tensor, nn

from igpt_fast import Pipeline, backend
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu.forward import States, Taken
from igpt_fast.files import BUNDLED
from igpt_fast.learning.extraction import extract
from igpt_fast.likelihood.nats import image_nats
from igpt_fast.model.outputs import BaseModelOutput

if backend._C is None:
    pytest.skip(backend.native_reason, allow_module_level=True)
pytestmark = pytest.mark.usefixtures("without_gradients")


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def run(model: nn.Module, tokens: Tensor, cache: bool = False) -> States:
    """With all states, in float32."""
    layers = model.config.n_layer
    states = forwards.run(model, tokens, Taken(list(range(layers)), layers), cache, primer=True, dtype="int8")
    assert states is not None
    return states


def of(output: BaseModelOutput) -> States:
    """As ``run`` gives it."""
    return States(output.last_hidden_state, torch.stack(output.hidden_states[:-1]), None, None)


SIZES = {
    "plain": {},
    "gelu": {"activation_function": "gelu", "n_embd": 80, "n_inner": 136},
    "slices": {"activation_function": "gelu_new", "n_embd": 1040, "n_head": 13, "n_inner": 1208, "n_layer": 1},
}


@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_its_specification(isa: str, dtype: torch.dtype, fields: dict) -> None:
    model = small(dtype, spread=0.1, **fields).transformer
    tokens = ids(model, 2, 20)
    with backend.use_backend("reference"):
        networks = computed_in_int8(model), copy.deepcopy(model).float()
        want, plain = (network(tokens, output_hidden_states=True) for network in networks)
    got = run(model, tokens)
    states, wanted, exact = ((*found.taken[1:], found.last) for found in (got, of(want), of(plain)))
    for state, right, unrounded in zip(states, wanted, exact, strict=True):
        assert state.dtype == torch.float32
        assert int8_is_right(state, right, unrounded)


def test_threads_and_batches_do_not_change_the_result(isa: str) -> None:
    model = small(n_positions=300, n_embd=64, n_inner=1032).transformer
    tokens = ids(model, 3, 300)
    want = run(model, tokens, cache=True)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(model, tokens, cache=True), want, strict=True))
    assert torch.equal(run(model, tokens[1:2]).last, want.last[1:2])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_is(isa: str, value: float) -> None:
    model = small().transformer
    tokens = ids(model, 2, 40) % 16
    tokens[0, 20] = 16
    model.wte.weight[16, 5] = value
    got = run(model, tokens).last
    assert got[1].isfinite().all()
    assert got[0, :20].isfinite().all()
    assert not got[0, 20:].isfinite().any()  # those behind it see it
    model.h[0].mlp.c_fc.weight[3, 7] = value  # now everywhere
    assert not run(model, tokens).last.isfinite().any()


def test_a_row_of_zeros(isa: str) -> None:
    model = small().transformer
    tokens = ids(model, 1, 9)
    model.h[1].ln_2.weight.zero_()
    model.h[0].mlp.c_fc.weight.zero_()
    with backend.use_backend("reference"):
        want = computed_in_int8(model)(tokens).last_hidden_state
    assert error(run(model, tokens).last, want) < 0.004


def test_the_states_have_the_dtype_of_the_model() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = small(dtype).transformer
        found = forwards.run(model, ids(model, 2, 9), Taken([1], 2), True, dtype="int8")
        assert {state.dtype for state in found} == {dtype}


# ---- Likelihoods and features -------------------------------------------------------------------------------


def test_nats_per_pixel_of_held_out_emoji() -> None:
    """As the decoder is held to it."""
    pipe = Pipeline.from_pretrained(device="cpu")
    with np.load(BUNDLED.parent / "emoji16.npz") as file:
        tokens = torch.from_numpy(file["tokens"][file["heldout"]][::32].astype(np.int64)).reshape(-1, 256)
    want, got = (float(pipe.score_tokens(tokens, dtype=dtype).nats.mean()) for dtype in (None, "int8"))
    assert 0.8 < want < 1.5  # it is the trained model
    assert 0 < abs(got - want) < 0.005


def test_scores_and_features_are_those_of_the_pass() -> None:
    pipe = small_pipeline(3, 8, 12, classes=2, dtype=torch.float32)
    model, tokens = pipe.model, torch.randint(12, (10, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 2
    inputs = torch.cat([12 + labels[:, None], tokens[:, :-1]], dim=1)
    logits = model.lm_head(run(model.transformer, inputs).last)[..., :12]
    want = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(10, 24)
    torch.testing.assert_close(image_nats(model, tokens, labels, "int8"), want)
    torch.testing.assert_close(pipe.score_tokens(tokens, labels.tolist(), 3, dtype="int8").nats, want)
    features = extract(model, tokens, [1, 2], sos=False, dtype="int8")
    plain = extract(model, tokens, [1, 2], sos=False)
    np.testing.assert_allclose(features[:, 1], run(model.transformer, tokens).last.mean(1), rtol=1e-4, atol=1e-5)
    assert 1e-4 < error(torch.from_numpy(features), torch.from_numpy(plain)) < 0.05
    # Few positions of many images, where PyTorch's layers would run.
    assert extract(model.transformer, tokens, [1], dtype="int8").shape == (10, 1, 32)
    assert image_nats(model, tokens[:, :2], dtype="int8").shape == (10, 2)


def test_what_it_is_not_for_is_refused() -> None:
    model = small()
    tokens = ids(model, 2, 9) % 16
    with pytest.raises(ValueError, match="dtype is 'fp8_cache'; want None or 'int8'"):
        forwards.run(model.transformer, tokens, dtype="fp8_cache")
    with (
        backend.use_backend("reference"),
        pytest.raises(backend.BackendUnavailableError, match="dtype 'int8' is not available: the backend 'reference'"),
    ):
        model.forward_intermediates(tokens, dtype="int8")
    with torch.enable_grad(), pytest.raises(backend.BackendUnavailableError, match="gradient"):
        image_nats(model, tokens, dtype="int8")
