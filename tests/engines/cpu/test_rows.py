"""A step of several positions of one image: the bits of steps, its own prefix, what is refused is forgotten."""

import pytest
import torch
from small_models import ids, small, stepped
from torch import Tensor

from igpt_fast import ImageGPTForCausalImageModeling, backend
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.engines.decoder import Decoder
from igpt_fast.engines.reference import ReferenceDecoder

pytestmark = pytest.mark.skipif(backend._C is None, reason=backend.native_reason)


def drafted(decoder: Decoder, tokens: Tensor, wrong: int) -> Tensor:
    """Logits of (T,) tokens, read in rows of changing number, of which up to ``wrong`` are refused each time."""
    found, t = [], 0
    for turn in range(len(tokens)):
        kept = min(1 + turn * 5 % 9, len(tokens) - t)
        refused = min(turn % (wrong + 1), decoder.capacity - t - kept)
        others = (tokens[t : t + refused] + 1) % 16
        rows = torch.cat([tokens[t : t + kept], others[:refused]])
        found.append(decoder.step_rows(rows)[:kept])
        decoder.rewind(len(rows) - kept)
        t += kept
        if t == len(tokens):
            break
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_have_the_bits_of_steps(isa: str, dtype: str | None, threads: int) -> None:
    model = small(n_embd=96, n_head=3)
    torch.set_num_threads(threads)
    tokens = ids(model, 1, 80)
    want = stepped(CpuDecoder(model, 1, 80, dtype), tokens)[0]
    decoder = CpuDecoder(model, 1, 80, dtype)
    got = drafted(decoder, tokens[0], 5)
    if isa == "generic" or (isa == "neon" and dtype == "int8"):  # which multiply no integers
        assert decoder.why_not_rows is not None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:
        assert decoder.why_not_rows is None
        assert torch.equal(got, want)


def test_a_refused_row_that_is_not_finite_leaves_nothing() -> None:
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[9] = torch.nan
    tokens = ids(model, 1, 40) % 9
    want = stepped(CpuDecoder(model, 1, 40), tokens)[0]
    decoder, found = CpuDecoder(model, 1, 40), []
    for t in range(0, 40, 2):
        rows = torch.cat([tokens[0, t : t + 2], torch.full((min(3, 38 - t),), 9)])
        found.append(decoder.step_rows(rows)[:2])
        decoder.rewind(len(rows) - 2)
    assert torch.equal(torch.cat(found), want)


def test_bfloat16_is_not_verified() -> None:
    assert "round otherwise" in (CpuDecoder(small(torch.bfloat16), 1, 8).why_not_rows or "")


def test_misuse() -> None:
    model: ImageGPTForCausalImageModeling = small()
    with pytest.raises(ValueError, match=r"want \(W,\) int64 of one image"):
        CpuDecoder(model, 2, 8).step_rows(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(backend.BackendUnavailableError, match="reads one position of an image at a time"):
        ReferenceDecoder(model, 1, 8).step_rows(torch.zeros(2, dtype=torch.int64))
    decoder = CpuDecoder(model, 1, 8)
    for wrong in (torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="W >= 1"):
            decoder.step_rows(wrong)
    with pytest.raises(ValueError, match=r"on meta of 1 images; want .* on the CPU"):
        decoder.step_rows(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="9 positions do not fit"):
        decoder.step_rows(torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token 17 is not in 0..16"):
        decoder.step_rows(torch.tensor([0, 17]))
    assert decoder._decoder.position == 0
    logits = decoder.prefill(torch.zeros(1, 3, dtype=torch.int64))
    for count in (-1, 1):
        with pytest.raises(ValueError, match=f"cannot forget {count} of 3 positions"):
            decoder.rewind(count)
    decoder.step_rows(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot forget 3 of 5 positions; want those of step_rows alone"):
        decoder.rewind(3)
    decoder.draw(logits, torch.zeros(1))
    decoder.rewind(2)
    with pytest.raises(ValueError, match="nothing was drawn"):
        decoder.step_drawn()


def test_sizes_that_are_not_trusted() -> None:
    decoder = CpuDecoder(small(), 1, 8)._decoder
    decoder.advance(2)
    for count in (7, 2**63 - 1, -1):
        for call in (decoder.advance, lambda n: decoder.load(0, 0, 0, n, 1), lambda n: decoder.step_rows(0, n, 0, 1)):
            with pytest.raises((ValueError, IndexError), match=r"positions behind 2 do not fit|-1 rows"):
                call(count)
    assert decoder.position == 2


def test_memory_for_rows_is_made_for_tokens_and_twice_as_much_each_time() -> None:
    decoder, sizes = CpuDecoder(small(), 1, 64), []
    decoder.step_rows(torch.zeros(1, dtype=torch.int64))
    least = decoder._decoder.bytes
    with pytest.raises(ValueError, match="token 17"):
        decoder.step_rows(torch.full((9,), 17))
    assert decoder._decoder.bytes == least
    for count in range(2, 17):
        decoder.step_rows(torch.zeros(count, dtype=torch.int64))
        decoder.rewind(count)
        sizes.append(decoder._decoder.bytes)
    assert len(set(sizes)) == 4
    assert sizes == sorted(sizes)
    assert sizes[0] > least
