"""The CPU decoder's products of several rows: every number of sequences and of threads, sizes that fill no tile, and
rows that hold no numbers beside rows that do, on every instruction set.
"""

import pytest
import torch
from small_models import exact_and_plain, ids, rounded_to_int8, small, stepped
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import ImageGPTForCausalImageModeling, backend
from igpt_fast.engines.cache import DynamicCache
from igpt_fast.engines.cpu.decoder import CpuDecoder

pytestmark = pytest.mark.skipif(backend._C is None, reason=backend.native_reason)

# Tiles are 32 (bf16) or 64 (int8) along k; these leave 16 and 48, and 8 and 8. The deep one is read in three parts.
ODD = {"n_embd": 176, "n_inner": 1096, "n_head": 2, "n_layer": 2, "vocab_size": 131}
FORMATS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "int8": (torch.float32, "int8")}


def made(name: str) -> tuple[ImageGPTForCausalImageModeling, str | None]:
    dtype, asked = FORMATS[name]
    return small(dtype, **ODD), asked


@pytest.fixture(params=FORMATS)
def format_(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.usefixtures("isa")
def test_every_number_of_sequences(format_: str) -> None:
    """1 to 17, one more than a tile has rows, and numbers that make several blocks of rows."""
    model, dtype = made(format_)
    for batch in (*range(1, 18), 25, 33):
        tokens = ids(model, batch, 3, seed=batch)
        got = stepped(CpuDecoder(model, batch, 3, dtype), tokens)
        if dtype is None:
            exact, plain = exact_and_plain(model, tokens)
            assert_parity(got, plain, exact, f"batch {batch}")
            continue
        with torch.no_grad():
            exact = rounded_to_int8(model)(tokens).logits
        # Of each sequence: a wrong one must not drown among right ones.
        errors = (got - exact).square().mean((1, 2)).sqrt() / exact.square().mean((1, 2)).sqrt()
        assert errors.max() < 0.01, (batch, errors)


def test_the_low_half_of_int8s_inputs_counts() -> None:
    """The first position of one layer: nothing but the weights is rounded to 8 bits where attention has one value."""
    for isa_, supported in backend._C.cpu_isas():
        if not supported:
            continue
        before = backend._C.cpu_isa()
        backend._C.select_cpu_isa(isa_)
        model = small(n_layer=1, n_embd=128, n_head=2, n_inner=512)
        with torch.no_grad():
            model.transformer.h[0].attn.c_proj.weight.mul_(1e-6)  # what is left of the values' rounding
        for batch in (1, 2, 9):
            tokens = ids(model, batch, 1)
            with torch.no_grad():
                exact = rounded_to_int8(model)(tokens).logits
            got = stepped(CpuDecoder(model, batch, 1, "int8"), tokens)
            error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert error < 2e-4, (isa_, batch, float(error))  # 8 bits alone give 5e-3
        backend._C.select_cpu_isa(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_numbers_stays_alone(format_: str, poison: float) -> None:
    model, dtype = made(format_)
    with torch.no_grad():
        model.transformer.wte.weight[7] = poison
    for batch, at in ((2, 0), (9, 8), (17, 3)):
        tokens = ids(model, batch, 3, seed=batch) % 7  # 7 itself is not among them
        want = stepped(CpuDecoder(model, batch, 3, dtype), tokens)
        assert want.isfinite().all()
        tokens[at] = 7
        got = stepped(CpuDecoder(model, batch, 3, dtype), tokens)
        others = [row for row in range(batch) if row != at]
        assert torch.equal(got[others], want[others]), (batch, at)
        assert got[at].isnan().all(), (batch, at)


@pytest.mark.usefixtures("isa")
def test_what_was_there_before_does_not_count(format_: str) -> None:
    """A decoder that has met NaN and goes back computes as a new one: no sum, no input, no key is left over."""
    model, dtype = made(format_)
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
    for batch, kept in ((1, 0), (5, 1), (9, 2)):
        tokens = ids(model, batch, 5, seed=batch) % 7
        decoder = CpuDecoder(model, batch, 5, dtype)
        for column in tokens[:, :kept].unbind(1):
            decoder.step(column)
        stepped(decoder, torch.full_like(tokens[:, kept:], 7))
        decoder._decoder.rewind(kept)
        want = stepped(CpuDecoder(model, batch, 5, dtype), tokens)[:, kept:]
        assert torch.equal(stepped(decoder, tokens[:, kept:]), want), batch


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("batch", [1, 9, 17])
def test_every_number_of_threads(format_: str, batch: int) -> None:
    """Bit for bit; where the heads do not divide evenly, too, and where threads have nothing to do."""
    model, dtype = made(format_)
    tokens = ids(model, batch, 4)
    want: Tensor | None = None
    for threads in (1, 2, 3, 4, 5):
        torch.set_num_threads(threads)
        got = stepped(CpuDecoder(model, batch, 4, dtype), tokens)
        want = got if want is None else want
        assert torch.equal(got, want), threads


@pytest.mark.usefixtures("isa")
def test_int8_in_long_contexts() -> None:
    """Keys and values have scales of their own beyond the first block of positions, too."""
    model = small(n_positions=600, n_layer=1)
    tokens = ids(model, 1, 600)
    with torch.no_grad():
        # Values whose size grows with the position, so that another's scale would show.
        model.transformer.wpe.weight.mul_(torch.linspace(0.1, 3.0, 600)[:, None])
        exact = rounded_to_int8(model)(tokens).logits
    got = stepped(CpuDecoder(model, 1, 600, "int8"), tokens)
    errors = (got - exact).square().mean((0, 2)).sqrt() / exact.square().mean((0, 2)).sqrt()
    assert errors.max() < 0.03, errors.argmax()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("at", [3, 300, 598])
def test_one_score_far_above_all_others(format_: str, at: int) -> None:
    """In the first block of positions, a middle one, the last: e^score overflows unless the largest one is taken off.

    Of two keys that point in opposite directions, one has the large score.
    """
    model = small(FORMATS[format_][0], n_positions=600, n_layer=1)
    decoder = CpuDecoder(model, 1, 600, FORMATS[format_][1])
    model.float()  # the measure
    generator = torch.Generator().manual_seed(at)
    keys, values = torch.randn(2, 1, 2, 599, 24, generator=generator)
    keys[:, :, at] *= 1e4
    keys[:, :, at - 1] = -keys[:, :, at]
    decoder._decoder.load(0, keys.data_ptr(), values.data_ptr(), 599, 1)
    decoder._decoder.advance(599)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    token = torch.tensor([5])
    with torch.no_grad():
        want = model(token[:, None], past_key_values=cache, use_cache=True).logits[:, 0]
    got = decoder.step(token)
    assert (got - want).abs().max() < 0.05 * want.abs().max()
