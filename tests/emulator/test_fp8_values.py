"""The CUDA decoder with cached values, or keys and values, of 8 bits: the whole step against the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from decoding import make, read, shared
from tolerance import assert_parity, tokens
from torch import Tensor

from igpt_fast import ImageGPTForCausalImageModeling, backend
from igpt_fast.engines import memory
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.engines.cuda.decoder import CudaDecoder, why_not_cuda
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.decoder import SCALED
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.ops.attention_decode import dequantize_e4m3, quantize_e4m3

fp8 = pytest.mark.parametrize("fp8", SCALED)


def rounded(x: Tensor, of_8_bits: bool) -> Tensor:
    return dequantize_e4m3(*quantize_e4m3(x), x.dtype) if of_8_bits else x


def rounding(decoder: ReferenceDecoder, fp8: str, primer: int) -> ReferenceDecoder:
    """The same, which from now on caches as CudaDecoder does in 8 bits, with what was read before if it is its own."""
    cache, (keys, values) = decoder._cache, SCALED[fp8]
    for buffer, of_8_bits in zip(cache.buffers, (keys, values), strict=True):
        read = buffer[..., :primer, :]
        read.copy_(rounded(read, of_8_bits))
    update = cache.update
    cache.update = lambda key, value, layer: update(  # type: ignore[method-assign]
        rounded(key, keys), rounded(value, values), layer
    )
    return decoder


@torch.no_grad()
def defined(model: ImageGPTForCausalImageModeling, ids: Tensor, primer: int, copies: int, fp8: str) -> Tensor:
    """As ``read``, by PyTorch: what is cached is rounded, of a primer once it has been read, if at all."""
    decoder = ReferenceDecoder(model, len(ids) // copies, ids.shape[1])
    logits = [decoder.prefill(ids[::copies, :primer]).repeat_interleave(copies, dim=0)]
    decoder.fork(copies)
    rounding(decoder, fp8, primer if copies == 1 else 0)
    logits += [decoder.step(column) for column in ids[:, primer:].unbind(1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    ("rows", "copies", "primer", "halves"),
    [(1, 1, 60, False), (8, 1, 5, True), (9, 1, 60, False), (33, 1, 3, True), (1, 3, 9, False), (2, 8, 9, True)],
)
@pytest.mark.parametrize(
    ("fp8", "heads", "dtype"),
    [("fp8_values", 2, torch.bfloat16), ("fp8_cache", 1, torch.float16)],
    ids=["values, dim32", "cache, dim64"],
)
def test_reads_as_defined(
    device: str,
    fp8: str,
    rows: int,
    copies: int,
    primer: int,
    halves: bool,
    heads: int,
    dtype: torch.dtype,
) -> None:
    model = make(device, dtype, n_head=heads)
    ids = shared(rows, copies, primer + (3 if halves else 8), primer, model.config).to(device)
    decoder = make_decoder(model, rows, ids.shape[1], fp8)
    assert isinstance(decoder, CudaDecoder)
    assert decoder.dtype == fp8
    if halves:
        decoder = CudaDecoder(model, rows, ids.shape[1], fp8, CudaOptions(halves=True))
    ours = read(decoder, ids, primer, copies)
    with backend.use_backend("reference"):
        plain = defined(model, ids, primer, copies, fp8)
        exact = defined(copy.deepcopy(model).double(), ids, primer, copies, fp8)
    assert_parity(ours, plain, exact)
    other = read(CudaDecoder(model, rows, ids.shape[1]), ids, primer, copies)
    assert torch.equal(ours[:, 0], other[:, 0])  # of the primer
    assert not torch.equal(ours[:, 1:], other[:, 1:])


@torch.no_grad()
def test_caches(device: str) -> None:
    """In the first layer, whose keys and values depend on no other: those of the model's own dtype, rounded."""
    model = make(device)
    ids = tokens(model.config, 2, 9).to(device)
    steps = []
    for dtype in (None, *SCALED):
        decoder = CudaDecoder(model, 2, 12, dtype)
        read(decoder, ids, 4)
        steps.append(decoder._step)
    plain, values, both = steps
    read_so_far = (0, slice(None), slice(None), slice(9))
    for step in (values, both):
        codes, scales = quantize_e4m3(plain.values[read_so_far])
        assert torch.equal(step.values[read_so_far].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(step.scales[1][read_so_far], scales)
    codes, scales = quantize_e4m3(plain.keys[read_so_far])
    assert torch.equal(values.keys[read_so_far], plain.keys[read_so_far])
    assert torch.equal(both.keys[read_so_far].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(both.scales[0][read_so_far], scales)
    assert plain.bytes == 2 * 2 * 12 * 64 * (2 + 2) * 1
    assert values.bytes == 2 * 2 * 12 * (64 * (2 + 1) + 2 * 4)
    assert both.bytes == 2 * 2 * 12 * 2 * (64 + 2 * 4)


@fp8
@torch.no_grad()
def test_fork_after_steps(device: str, fp8: str) -> None:
    """What was cached in 8 bits becomes the primer of all, in the model's dtype: as a fork of the rounded model."""
    model = make(device)
    ids = shared(1, 3, 12, 6, model.config).to(device)
    results = []
    for copies in (1, 3):
        decoder = CudaDecoder(model, 3 // copies, 12, fp8)
        logits = [read(decoder, ids[::copies, :6], 3)[:, -1].repeat_interleave(copies, dim=0)]
        decoder.fork(copies)
        assert decoder.batch_size == 3
        logits += [decoder.step(column) for column in ids[:, 6:].unbind(1)]
        results.append(torch.stack(logits, dim=1))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.05 * float(results[0].std()))


def test_a_step_of_the_other_kind_is_not_used(device: str) -> None:
    model = make(device)
    ids = tokens(model.config, 1, 9).to(device)
    kinds = None, *SCALED
    alone = [read(CudaDecoder(model, 1, 9, dtype), ids, 3) for dtype in kinds]
    assert not any(torch.equal(alone[i], alone[i - 1]) for i in range(3))
    decoder = CudaDecoder(model, 1, 9)
    for dtype, want in zip(kinds, alone, strict=True):
        decoder.rest()
        decoder.start(model, 1, 9, dtype)
        assert torch.equal(read(decoder, ids, 3), want)


@fp8
@torch.no_grad()
def test_nan_reaches_its_image_alone(device: str, fp8: str) -> None:
    """A NaN or an infinity in one colour's embedding is in every later logit of the image that has it."""
    model = make(device)
    ids = tokens(model.config, 3, 8).to(device) % 30
    for value in (torch.nan, torch.inf):
        model.transformer.wte.weight[33] = value
        for at in (2, 6):  # in the primer and after
            wrong = ids.clone()
            wrong[1, at] = 33
            logits = read(CudaDecoder(model, 3, 8, fp8), wrong, 4)[:, -1]
            assert logits.isnan().any(dim=1).tolist() == [False, True, False]


@fp8
@torch.no_grad()
def test_draws_the_tokens_of_the_definition(device: str, fp8: str) -> None:
    model = make(device)
    begin, uniforms = tokens(model.config, 3, 2).to(device), torch.rand(8, 3, device=device)
    drawn = []
    for decoder in (CudaDecoder(model, 3, 10, fp8), ReferenceDecoder(model, 3, 10)):
        logits = decoder.prefill(begin)
        if isinstance(decoder, ReferenceDecoder):
            rounding(decoder, fp8, 2)
        for uniform in uniforms[:-1]:
            drawn.append(decoder.draw(logits, uniform)[0])
            logits = decoder.step_drawn()
        drawn.append(decoder.draw(logits, uniforms[-1])[0])
    ours, theirs = torch.stack(drawn).chunk(2)
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 5


@fp8
def test_the_rule(device: str, fp8: str) -> None:
    assert why_not_cuda(make(device), fp8) is None
    reason = f"the weights are float32; want bfloat16 or float16 for '{fp8}'"
    assert why_not_cuda(make(device, torch.float32), fp8) == reason
    with pytest.raises(backend.BackendUnavailableError, match=f"dtype '{fp8}' is not available: {reason}"):
        make_decoder(make(device, torch.float32), 1, 8, fp8)


@fp8
def test_it_is_never_something_else(fp8: str) -> None:
    """Where no CUDA kernels serve, for want of a device or by choice."""
    model = make("cpu")
    with pytest.raises(backend.BackendUnavailableError, match=f"'{fp8}' is not available: the model is on cpu"):
        model.generate(dtype=fp8)
    with pytest.raises(backend.BackendUnavailableError, match=f"the model's dtype or in 'int8', not in '{fp8}'"):
        CpuDecoder(model, 1, 8, fp8)
    with backend.use_backend("reference"), pytest.raises(backend.BackendUnavailableError, match=f"'{fp8}' is not"):
        make_decoder(model, 1, 8, fp8)


@pytest.mark.parametrize(("fp8", "own"), [("fp8_values", 64 * (2 + 1) + 2 * 4), ("fp8_cache", 2 * (64 + 2 * 4))])
def test_memory(emulation, fp8: str, own: int) -> None:
    """Own positions have one byte an element and a scale for each head; a shared primer is as it was."""
    model = make("cpu")
    whole = 64 * (2 + 2)
    assert memory.cache_bytes(model, fp8) == memory.cache_bytes(model, fp8, 35) == 2 * 70 * own
    assert memory.cache_bytes(model, fp8, 35, 5) == 2 * (35 * own + 7 * whole)
    assert memory.image_bytes(model, fp8) < memory.image_bytes(model)
