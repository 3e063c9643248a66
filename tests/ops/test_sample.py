"""sample: the generator against its published vectors, the draw against its distribution and transformers."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from drawing import assert_draws

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend, ops, reference
from igpt_fast.draws import Sampling

if TYPE_CHECKING:
    from implementations import Implementation

OP = "sample"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (1 << 64) - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, words: list[int]) -> None:
    """The known-answer vectors that Random123, the authors' library, publishes for philox4x32-10."""
    assert reference.philox(torch.tensor([counter]), key).tolist() == [words]


def test_uniform_is_uniform() -> None:
    numbers = reference.uniform(1, torch.arange(1000), 0, 100)
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    assert torch.equal(numbers * 2.0**24, (numbers * 2.0**24).round())
    counts = torch.histc(numbers, bins=100, min=0.0, max=1.0)
    chi2 = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi2 < 149.0  # 99 degrees of freedom, p = 0.0009
    # Neighbours in position and in stream are uncorrelated: 5 sigma of 10^5 pairs.
    centred = numbers - 0.5
    for pairs in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(float(pairs.mean())) * 12 < 5 / math.sqrt(pairs.numel())


def test_the_draw_inverts_the_distribution() -> None:
    """Equally spaced numbers give every token in proportion to its probability, to one count."""
    logits = torch.randn(1, 13) * 2
    n = 1 << 16
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5).div(n).float()
    tokens = ops.sample(logits.expand(n, -1), uniform, temperature=1.5)
    expected = torch.softmax(logits[0].double() / 1.5, dim=-1) * n
    assert (torch.bincount(tokens, minlength=13) - expected).abs().max() <= 2.0
    assert (tokens.diff() >= 0).all()  # the inverse of a cumulative distribution rises


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *itertools.product((None, 1, 4, 500), (None, 1e-9, 0.3, 0.9, 1.0), (None,)),
        *((*others, min_p) for others in ((None, None), (4, 0.9), (40, 0.3)) for min_p in (0.0, 1e-4, 0.05, 0.7, 1.0)),
    ],
)
def test_the_support_is_transformers(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    from transformers.generation import logits_process as processors

    logits = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)) * 2
    kept = processors.TemperatureLogitsWarper(0.8)(None, logits)
    if top_k is not None:
        kept = processors.TopKLogitsWarper(top_k)(None, kept)
    if top_p is not None:
        kept = processors.TopPLogitsWarper(top_p)(None, kept)
    if min_p is not None:
        kept = processors.MinPLogitsWarper(min_p)(None, kept)
    n = 4000
    uniform = (torch.arange(n) + 0.5) / n
    for row, expected in zip(logits, kept, strict=True):
        drawn = ops.sample(row.expand(n, -1), uniform, 0.8, top_k, top_p, min_p)
        likely = torch.softmax(expected, dim=-1) > 2 / n
        assert set(likely.nonzero()[:, 0].tolist()) <= set(drawn.tolist())
        assert torch.isfinite(expected[drawn]).all()


def test_edges() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    almost = torch.tensor([1.0 - 2.0**-24])
    assert ops.sample(logits, torch.zeros(1)).tolist() == [0]
    assert ops.sample(logits, almost).tolist() == [2]
    assert ops.sample(torch.zeros(1, 5), almost).tolist() == [4]
    assert ops.sample(torch.zeros(1, 5), torch.zeros(1), temperature=0.0).tolist() == [0]
    assert ops.sample(torch.zeros(1, 5), almost, top_p=1e-9).tolist() == [0]
    assert ops.sample(torch.full((1, 5), 6e4), almost, temperature=1e-30).tolist() == [4]
    assert ops.sample(torch.tensor([[1.0, 2.0]]), torch.zeros(1), temperature=1e-40).tolist() == [1]
    assert ops.sample(torch.empty(0, 5), torch.empty(0)).shape == (0,)
    assert ops.sample(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0.0, 0.9])).tolist() == [0, 2]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(5,\)"):
        ops.sample(torch.zeros(5), torch.zeros(1))
    with pytest.raises(ValueError, match="uniform"):
        ops.sample(torch.zeros(2, 5), torch.zeros(3))


NOT_NUMBERS = (True, np.True_, "1", "x" * 1000, [1], math.nan, math.inf, 10**400, 10**5000, -0.1, torch.tensor(1.0))


@pytest.mark.parametrize("setting", ["temperature", "top_k", "top_p", "min_p"])
def test_wrong_settings(setting: str) -> None:
    """Said in a few words, by everyone who takes them."""
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=5, n_positions=4, n_embd=8, n_layer=1, n_head=1))
    for value in (*NOT_NUMBERS, *({"top_k": (2.5,), "top_p": (0,)}.get(setting, ()))):
        for call in (
            Sampling,
            partial(ops.sample, torch.zeros(1, 5), torch.zeros(1)),
            partial(model.generate, do_sample=True),
        ):
            with pytest.raises(ValueError, match=f"^sample: {setting} is .*; want ") as caught:
                call(**{setting: value})
            assert len(str(caught.value)) < 200


def test_settings_become_floats() -> None:
    """Those of numpy as well, which no sidecar could hold."""
    sampling = Sampling(1, 3, np.float32(0.5), np.int64(0))
    assert sampling == Sampling(1.0, 3, 0.5, 0.0)
    assert [type(value) for value in vars(sampling).values()] == [float, int, float, float]


SETTINGS = [
    *((1.0, None, None), (0.8, 11, None), (1.2, None, 0.7), (0.9, 30, 0.9), (0.0, None, None)),
    *((1.1, None, None, 0.02), (0.9, 30, 0.9, 0.1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(0, 16), (1, 1), (3, 65), (70, 512), (2, 1024), (2, 1025)])
def test_parity(implementation: Implementation, dtype: torch.dtype, n: int, k: int) -> None:
    logits, uniform = (torch.randn(n, k) * 2).to(dtype), torch.rand(n)
    for settings in SETTINGS:
        if implementation.module is not None:
            implementation.module.reset_counters()
        tokens = ops.sample(logits.to(implementation.device), uniform.to(implementation.device), *settings)
        assert tokens.dtype == torch.int64
        assert_draws(tokens.cpu(), logits, uniform, *settings)
        if implementation.module is not None:
            covered = dtype != torch.float64 and (implementation.name == "cpu" or (n > 0 and k <= 1024))
            assert implementation.module.counters()["launches"] == covered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(0, 16), (1, 1), (3, 65), (70, 512)])
def test_scored(implementation: Implementation, dtype: torch.dtype, n: int, k: int) -> None:
    """The draw is ``sample``'s; log-probabilities, given tokens and weights are what they are said to be."""
    logits, uniform = (torch.randn(n, k) * 2).to(dtype), torch.rand(n)
    known = torch.arange(n) % 3 - 1
    known = torch.where(known < 0, known, (known * 31) % k)
    exact = torch.log_softmax(logits.double(), dim=-1)
    for temperature, top_k, top_p, *min_p in SETTINGS:
        sampling = Sampling(temperature, top_k, top_p, *min_p)
        for given in (None, known):
            moved = [x if x is None else x.to(implementation.device) for x in (logits, uniform, given)]
            tokens, logprobs, weights = ops.draw_scored(*moved[:2], sampling, moved[2], weighted=True)
            fixed = torch.zeros(n, dtype=torch.bool) if given is None else given >= 0
            assert torch.equal(tokens.cpu()[fixed], known[fixed])
            assert_draws(tokens.cpu()[~fixed], logits[~fixed], uniform[~fixed], *vars(sampling).values())
            found = exact.gather(1, tokens.cpu()[:, None])[:, 0]
            torch.testing.assert_close(logprobs.cpu().double(), found, rtol=3e-7, atol=1e-6)
            assert (weights is None) == (temperature == 0.0)
            if weights is not None:
                assert weights.dtype == torch.float64
                least = reference.least_score(sampling.min_p)
                expected = reference.cumulative_weights(logits, temperature, top_k, top_p, least)
                torch.testing.assert_close(weights.cpu(), expected, rtol=1e-6, atol=0.0)
                free = ~fixed
                assert torch.equal(reference.inverted(weights.cpu(), uniform)[free], tokens.cpu()[free])
        assert ops.draw_scored(logits, uniform, sampling)[2] is None


def test_scored_where_there_is_no_distribution(implementation: Implementation) -> None:
    logits = torch.randn(5, 10)
    logits[0, 3], logits[1, 4], logits[2], logits[3, 2] = math.nan, math.inf, -math.inf, -math.inf
    known = torch.tensor([-1, 7, 2, 2, -1])
    for settings in SETTINGS:
        moved = [x.to(implementation.device) for x in (logits, torch.rand(5), known)]
        tokens, logprobs, weights = ops.draw_scored(*moved[:2], Sampling(*settings), moved[2], weighted=True)
        assert tokens[1:4].tolist() == [7, 2, 2]
        assert logprobs.isnan().tolist() == [True, True, True, False, False]
        assert float(logprobs[3]) == -math.inf
        if weights is not None:
            assert weights[:, -1].isnan().tolist() == [True, True, True, False, False]


def test_a_known_token_that_is_none(implementation: Implementation) -> None:
    if implementation.name == "cuda":
        pytest.skip("what torch's gather on a device does with it, the device says later")
    logits, uniform = torch.randn(2, 10), torch.rand(2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.draw_scored(logits, uniform, Sampling(), torch.tensor([-1, 10]))


@pytest.mark.parametrize(
    ("uniform", "known", "message"),
    [
        (torch.zeros(1), None, r"shapes \(2, 10\), \(1,\)"),
        (torch.zeros(2), torch.zeros(1).long(), r"known is \(1,\) torch.int64"),
        (torch.zeros(2), torch.zeros(2).int(), r"known is \(2,\) torch.int32"),
        (torch.zeros(2), torch.zeros(2, device="meta").long(), r"on meta; want \(2,\) int64 on cpu"),
    ],
)
def test_scored_misuse(uniform: torch.Tensor, known: torch.Tensor | None, message: str) -> None:
    """A kernel would read what is not there."""
    with pytest.raises(ValueError, match=message):
        ops.draw_scored(torch.randn(2, 10), uniform, Sampling(), known)


def test_non_contiguous(implementation: Implementation) -> None:
    logits, uniform = torch.randn(64, 6) * 2, torch.rand(12)[::2]
    wide = torch.randn(6, 3, 64).to(implementation.device)
    for view, number in ((logits.T, uniform), (wide[:, -1], uniform), (wide[:, 1, ::2], uniform)):
        tokens = ops.sample(view.to(implementation.device), number.to(implementation.device), 1.0, 9, 0.9)
        assert_draws(tokens.cpu(), view.cpu(), number, 1.0, 9, 0.9)


def test_no_distribution_gives_token_0(implementation: Implementation) -> None:
    logits = torch.randn(4, 10)
    logits[0, 3], logits[1, 4], logits[2] = math.nan, math.inf, -math.inf
    for settings in (*SETTINGS[:4], *SETTINGS[5:]):
        tokens = ops.sample(logits.to(implementation.device), torch.rand(4).to(implementation.device), *settings)
        assert tokens[:3].tolist() == [0, 0, 0]
    greedy = ops.sample(logits.to(implementation.device), torch.zeros(4).to(implementation.device), 0.0)
    assert greedy.tolist() == [3, 4, 0, int(logits[3].argmax())]


def test_a_temperature_below_float32_is_greedy(implementation: Implementation) -> None:
    logits = torch.randn(3, 10).to(implementation.device)
    number = torch.full((3,), 0.99).to(implementation.device)
    assert torch.equal(ops.sample(logits, number, 1e-60), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e300])
def test_a_temperature_beyond_float32(implementation: Implementation, temperature: float) -> None:
    """All tokens are alike but those that minus infinity rules out."""
    logits = torch.randn(3, 10)
    logits[:, 8:] = -math.inf
    number = torch.tensor([0.0, 0.49, 0.99]).to(implementation.device)
    assert ops.sample(logits.to(implementation.device), number, temperature).tolist() == [0, 3, 7]


def next_arguments(device: str, n: int = 3, k: int = 20, n_embd: int = 16) -> dict[str, torch.Tensor]:
    tensors = {
        "logits": torch.randn(n, k),
        "streams": torch.arange(n) + 7,
        "position": torch.tensor(2, dtype=torch.int32),
        "wte": torch.randn(k + 1, n_embd),
        "wpe": torch.randn(9, n_embd),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def test_next_is_sample_with_the_streams_numbers(implementation: Implementation) -> None:
    """What generation does step by step: the numbers of ``uniform``, and the embedding that the model makes."""
    given = next_arguments(implementation.device, n=40, k=64)
    for t in (0, 5, 7, 8):
        position = torch.tensor([t], dtype=torch.int32, device=implementation.device)
        uniform = reference.uniform(3, given["streams"].cpu(), t, 1)[:, 0]
        tokens, hidden = ops.sample_next(**given | {"position": position}, seed=3, temperature=0.9, top_k=30)
        assert_draws(tokens.cpu(), given["logits"].cpu(), uniform, 0.9, 30, None)
        following = given["wpe"][t + 1] if t < 8 else -given["wte"][tokens]
        assert torch.equal(hidden, given["wte"][tokens] + following)


def test_next_does_not_depend_on_the_batch(implementation: Implementation) -> None:
    given = next_arguments(implementation.device, n=6)
    position = torch.tensor([0, 3, 1, 8, 2, 2], dtype=torch.int32, device=implementation.device)
    whole = ops.sample_next(**given | {"position": position}, seed=9)
    for i in range(6):
        rows = {name: given[name][i : i + 1] for name in ("logits", "streams")} | {"position": position[i : i + 1]}
        single = ops.sample_next(**given | rows, seed=9)
        assert torch.equal(single[0], whole[0][i : i + 1])
        assert torch.equal(single[1], whole[1][i : i + 1])


def test_next_edges(implementation: Implementation) -> None:
    given = next_arguments(implementation.device, n=0)
    tokens, hidden = ops.sample_next(**given, seed=0)
    assert tokens.shape == (0,)
    assert hidden.shape == (0, 16)
    given = next_arguments(implementation.device, n_embd=0)
    assert ops.sample_next(**given, seed=0)[1].shape == (3, 0)
    del given["wte"], given["wpe"]
    assert ops.sample_next(**given, seed=0)[1] is None


def test_no_gradient(implementation: Implementation) -> None:
    given = next_arguments(implementation.device)
    for name in ("logits", "wte", "wpe"):
        given[name].requires_grad_()
    tokens, hidden = ops.sample_next(**given, seed=0)
    assert not tokens.requires_grad
    assert not hidden.requires_grad
    uniform = torch.rand(3, device=implementation.device)
    assert not ops.sample(given["logits"], uniform).requires_grad


def test_opcheck(emulation: Implementation) -> None:
    given = next_arguments("cpu")
    logits, streams, position = given["logits"], given["streams"], given["position"]
    torch.library.opcheck(torch.ops.igpt_fast.sample.default, (logits, torch.rand(3), 1.0, 5, 0.9, -4.0))
    for tables in ((given["wte"], given["wpe"]), (None, None)):
        arguments = logits, -5, streams, position, 1.0, 0, 1.0, -4.0, *tables
        torch.library.opcheck(torch.ops.igpt_fast.sample_next.default, arguments)


def step_arguments(device: str) -> dict[str, torch.Tensor]:
    given = next_arguments(device)
    given |= {
        "settings": ops.sample_settings((1 << 64) - 9, Sampling(0.9, 7), offset=3, first=4).to(device),
        "position": torch.tensor([0, 1, 4], dtype=torch.int32, device=device),
        "tokens": torch.full((3, 3), -1, device=device),
        "logprobs": torch.full((3, 3), torch.nan, device=device),
        "embedding": given["wte"].new_full((3, 16), torch.nan),
    }
    return given


def test_step_is_next_in_place(implementation: Implementation) -> None:
    """Three steps, of which every row has its own: tokens and log-probabilities of ``sample_next`` at index - 4."""
    given = step_arguments(implementation.device)
    logits, streams, tables = given["logits"], given["streams"], (given["wte"], given["wpe"])
    wanted, wanted_logprobs = given["tokens"].clone(), given["logprobs"].clone()
    for step in range(3):
        index = torch.tensor([3, 4, 7], dtype=torch.int32, device=implementation.device) + step
        drawn, hidden = ops.sample_next(logits, (1 << 64) - 9, streams, index, 0.9, 7, None, None, *tables)
        every = torch.log_softmax(logits, dim=-1)
        for row, column in ((row, int(index[row]) - 4) for row in range(3)):
            if 0 <= column < 3:
                wanted[row, column], wanted_logprobs[row, column] = drawn[row], every[row, drawn[row]]
        ops.sample_step(**given)
        assert torch.equal(given["embedding"], hidden)
    assert given["position"].tolist() == [3, 4, 7]
    assert torch.equal(given["tokens"], wanted)
    assert given["tokens"].ge(0).tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    torch.testing.assert_close(given["logprobs"], wanted_logprobs, rtol=3e-7, atol=0.0, equal_nan=True)


def test_step_opcheck_and_compile(emulation: Implementation) -> None:
    given = step_arguments("cpu")
    arguments = tuple(given[p] for p in ("logits", "settings", "streams", "position", "tokens", "logprobs"))
    for more in ((None, None, None), (given["embedding"], given["wte"], given["wpe"])):
        torch.library.opcheck(torch.ops.igpt_fast.sample_step.default, (*arguments, *more))
    torch._dynamo.reset()
    ours, theirs = step_arguments("cpu"), step_arguments("cpu")
    torch.manual_seed(0)
    for name in ("logits", "wte", "wpe"):
        theirs[name] = ours[name]
    torch.compile(ops.sample_step, backend="aot_eager", fullgraph=True)(**ours)
    ops.sample_step(**theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(-9.0), theirs[name].nan_to_num(-9.0)), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(20)}, ValueError, r"logits has shape \(20,\); want \(N, K\)"),
        ({"settings": torch.zeros(6).long()}, ValueError, r"settings has shape \(6,\); want \(7,\)"),
        ({"settings": torch.zeros(7)}, TypeError, "settings is torch.float32; want torch.int64"),
        ({"streams": torch.zeros(3)}, TypeError, "streams is torch.float32; want torch.int64"),
        ({"streams": torch.zeros(6).long()[::2]}, ValueError, "streams has strides .*; want a contiguous tensor"),
        ({"position": torch.zeros(1).int()}, ValueError, r"position has shape \(1,\); want \(3,\)"),
        ({"position": torch.zeros(1).int().expand(3)}, ValueError, "position has strides"),
        ({"tokens": torch.zeros(3).long()}, ValueError, r"tokens is \(3,\); want \(N, T\) with N = 3"),
        ({"tokens": torch.zeros(3, 3)}, TypeError, "tokens is torch.float32; want torch.int64"),
        ({"logprobs": torch.zeros(3, 4)}, ValueError, r"logprobs has shape \(3, 4\); want \(3, 3\)"),
        ({"logprobs": torch.zeros(3, 3, device="meta")}, ValueError, "logprobs is on meta, others on cpu"),
        ({"embedding": None}, ValueError, "of embedding, wte and wpe some are None"),
        ({"embedding": torch.zeros(3, 15)}, ValueError, r"embedding has shape \(3, 15\); want \(3, 16\)"),
        ({"embedding": torch.zeros(3, 16).half()}, TypeError, "embedding is torch.float16; want torch.float32"),
        ({"wte": torch.zeros(19, 16)}, ValueError, r"wte has shape \(19, 16\)"),
    ],
)
def test_step_misuse(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="sample_step: " + message):
        ops.sample_step(**step_arguments("cpu") | change)


def test_step_settings_are_in_range() -> None:
    for wrong in ({"seed": -1}, {"seed": 1 << 64}, {"offset": 1 << 31}, {"first": -(1 << 31) - 1}):
        with pytest.raises(ValueError, match=f"sample_settings: {next(iter(wrong))} is .*; want"):
            ops.sample_settings(**{"seed": 0, "sampling": Sampling(), **wrong})


def test_compile_autocast_and_meta(implementation: Implementation) -> None:
    given, uniform = next_arguments(implementation.device), torch.rand(3).to(implementation.device)
    torch._dynamo.reset()
    compiled = torch.compile(ops.sample, backend="aot_eager", fullgraph=True)
    expected = ops.sample(given["logits"], uniform, 0.9, 5, 0.9, 0.05)
    assert torch.equal(compiled(given["logits"], uniform, 0.9, 5, 0.9, 0.05), expected)
    both = torch.compile(ops.sample_next, backend="aot_eager", fullgraph=True)
    whole = ops.sample_next(**given, seed=(1 << 63) + 5, top_p=0.9)
    for ours, theirs in zip(both(**given, seed=(1 << 63) + 5, top_p=0.9), whole, strict=True):
        assert torch.equal(ours, theirs)
    with torch.autocast(implementation.device, dtype=torch.bfloat16):
        tokens, hidden = ops.sample_next(**given, seed=(1 << 63) + 5, top_p=0.9)
    assert torch.equal(tokens, whole[0])
    assert torch.equal(hidden, whole[1])
    with backend.use_backend("auto"):
        meta = ops.sample_next(**{name: tensor.to("meta") for name, tensor in given.items()}, seed=1)
    assert meta[0].shape == (3,)
    assert meta[1].shape == (3, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 20).long()}, TypeError, "logits is torch.int64; want a floating-point tensor"),
        ({"logits": torch.zeros(20)}, ValueError, r"logits has shape \(20,\); want \(N, K\)"),
        ({"seed": -1}, ValueError, "seed is -1; want an integer"),
        ({"seed": 1 << 64}, ValueError, "seed is 18446744073709551616"),
        ({"streams": torch.zeros(3)}, TypeError, "streams is torch.float32; want an int64 tensor"),
        ({"streams": torch.zeros(2).long()}, ValueError, r"streams has shape \(2,\); want \(N,\) = \(3,\)"),
        ({"position": 3}, TypeError, "position is int; want an int32 tensor"),
        ({"position": torch.zeros(2).int()}, ValueError, r"position has shape \(2,\)"),
        ({"position": torch.zeros(1, device="meta").int()}, ValueError, "position is on meta, logits on cpu"),
        ({"wte": None}, ValueError, "wte is None; give both or neither"),
        ({"wpe": torch.zeros(9, 16).half()}, TypeError, "wte is torch.float32, wpe torch.float16"),
        ({"wte": torch.zeros(19, 16)}, ValueError, r"wte has shape \(19, 16\); want \(V, n_embd\) with V >= 20"),
        ({"wpe": torch.zeros(9, 15)}, ValueError, r"wpe has shape \(9, 15\); want \(n_positions, 16\)"),
        ({"wpe": torch.zeros(9, 16, device="meta")}, ValueError, "wpe is on meta"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_p": 2.0}, ValueError, "top_p is 2.0"),
        ({"min_p": 1.1}, ValueError, "min_p is 1.1"),
    ],
)
def test_next_misuse(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="sample(_next)?: " + message):
        ops.sample_next(**{**next_arguments("cpu"), "seed": 0, **change})


@pytest.mark.gpu
def test_a_captured_step_draws_on() -> None:
    """One graph, replayed: the positions go on by themselves, and another seed is another tensor in the same memory."""
    given = step_arguments("cuda") | {"tokens": torch.full((3, 12), -1, device="cuda")}
    given["logprobs"] = given["tokens"].float()
    start, graph = {name: tensor.clone() for name, tensor in given.items()}, torch.cuda.CUDAGraph()
    ops.sample_step(**given)
    with torch.cuda.graph(graph):
        ops.sample_step(**given)
    for seed in (3, 1 << 63):
        settings = ops.sample_settings(seed, Sampling(0.8, top_p=0.9), 3, 4)
        expected = {name: tensor.clone() for name, tensor in start.items()} | {"settings": settings.cuda()}
        for name, tensor in expected.items():
            given[name].copy_(tensor)
        for _ in range(5):
            graph.replay()
            ops.sample_step(**expected)
        for name, tensor in expected.items():
            assert torch.equal(given[name], tensor), name


@pytest.mark.gpu
def test_a_captured_graph_draws_on() -> None:
    """One graph, replayed with the next position in the same memory."""
    given = next_arguments("cuda", n=8, k=512)
    graph = torch.cuda.CUDAGraph()
    ops.sample_next(**given, seed=5)
    with torch.cuda.graph(graph):
        tokens, hidden = ops.sample_next(**given, seed=5)
    for t in range(8):
        given["position"].fill_(t)
        graph.replay()
        expected = ops.sample_next(**given, seed=5)
        assert torch.equal(tokens, expected[0])
        assert torch.equal(hidden, expected[1])
