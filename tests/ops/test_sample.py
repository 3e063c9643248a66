"""sample: the generator against its published vectors, the draw against its distribution and transformers."""

import math

import pytest
import torch

from igpt_fast import ops, reference


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


@pytest.mark.parametrize("top_k", [None, 1, 4, 500])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_the_support_is_transformers(top_k: int | None, top_p: float | None) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)) * 2
    kept = processors.TemperatureLogitsWarper(0.8)(None, logits)
    if top_k is not None:
        kept = processors.TopKLogitsWarper(top_k)(None, kept)
    if top_p is not None:
        kept = processors.TopPLogitsWarper(top_p)(None, kept)
    n = 4000
    uniform = (torch.arange(n) + 0.5) / n
    for row, expected in zip(logits, kept, strict=True):
        drawn = ops.sample(row.expand(n, -1), uniform, 0.8, top_k, top_p)
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
    for options in ({"temperature": -0.1}, {"temperature": math.inf}, {"top_k": 2.5}, {"top_k": True}, {"top_p": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            ops.sample(torch.zeros(1, 5), torch.zeros(1), **options)
