"""The CUDA decoder with cached values of 8 bits: the whole step against the definition."""

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
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.ops.attention_decode import dequantize_values, quantize_values

FP8 = "fp8_values"


def rounded(v: Tensor) -> Tensor:
    return dequantize_values(*quantize_values(v), v.dtype)


@torch.no_grad()
def defined(model: ImageGPTForCausalImageModeling, ids: Tensor, primer: int, copies: int = 1) -> Tensor:
    """As ``read``, by PyTorch: values are rounded as they are cached, a primer's once it has been read, if at all."""
    decoder = ReferenceDecoder(model, len(ids) // copies, ids.shape[1])
    logits = [decoder.prefill(ids[::copies, :primer]).repeat_interleave(copies, dim=0)]
    decoder.fork(copies)
    cache = decoder._cache
    if copies == 1:
        values = cache.buffers[1][..., :primer, :]
        values.copy_(rounded(values))
    update = cache.update
    cache.update = lambda key, value, layer: update(key, rounded(value), layer)  # type: ignore[method-assign]
    logits += [decoder.step(column) for column in ids[:, primer:].unbind(1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    ("rows", "copies", "primer", "halves"),
    [(1, 1, 60, False), (8, 1, 5, True), (9, 1, 60, False), (33, 1, 3, True), (1, 3, 9, False), (2, 8, 9, True)],
)
@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.bfloat16), (1, torch.float16)], ids=["dim32", "dim64"])
def test_reads_as_defined(
    device: str,
    rows: int,
    copies: int,
    primer: int,
    halves: bool,
    heads: int,
    dtype: torch.dtype,
) -> None:
    model = make(device, dtype, n_head=heads)
    ids = shared(rows, copies, primer + (3 if halves else 8), primer, model.config).to(device)
    decoder = make_decoder(model, rows, ids.shape[1], FP8)
    assert isinstance(decoder, CudaDecoder)
    assert decoder.dtype == FP8
    if halves:
        decoder = CudaDecoder(model, rows, ids.shape[1], FP8, CudaOptions(halves=True))
    ours = read(decoder, ids, primer, copies)
    with backend.use_backend("reference"):
        plain = defined(model, ids, primer, copies)
        exact = defined(copy.deepcopy(model).double(), ids, primer, copies)
    assert_parity(ours, plain, exact)
    other = read(CudaDecoder(model, rows, ids.shape[1]), ids, primer, copies)
    assert torch.equal(ours[:, 0], other[:, 0])  # of the primer
    assert not torch.equal(ours[:, 1:], other[:, 1:])


@torch.no_grad()
def test_caches(device: str) -> None:
    """In the first layer, whose values do not depend on others: those of the model's own dtype, rounded."""
    model = make(device)
    ids = tokens(model.config, 2, 9).to(device)
    steps = []
    for dtype in (None, FP8):
        decoder = CudaDecoder(model, 2, 12, dtype)
        read(decoder, ids, 4)
        steps.append(decoder._step)
    plain, scaled = steps
    codes, scales = quantize_values(plain.values[0, :, :, :9])
    assert torch.equal(scaled.keys[0, :, :, :9], plain.keys[0, :, :, :9])
    assert torch.equal(scaled.values[0, :, :, :9].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scaled.scales[0, :, :, :9], scales)
    assert plain.bytes == 2 * 2 * 12 * 64 * (2 + 2) * 1
    assert scaled.bytes == 2 * 2 * 12 * (64 * (2 + 1) + 2 * 4)


@torch.no_grad()
def test_fork_after_steps(device: str) -> None:
    """What was cached in 8 bits becomes the primer of all, in the model's dtype: as a fork of the rounded model."""
    model = make(device)
    ids = shared(1, 3, 12, 6, model.config).to(device)
    results = []
    for copies in (1, 3):
        decoder = CudaDecoder(model, 3 // copies, 12, FP8)
        logits = [read(decoder, ids[::copies, :6], 3)[:, -1].repeat_interleave(copies, dim=0)]
        decoder.fork(copies)
        assert decoder.batch_size == 3
        logits += [decoder.step(column) for column in ids[:, 6:].unbind(1)]
        results.append(torch.stack(logits, dim=1))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.05 * float(results[0].std()))


def test_a_step_of_the_other_kind_is_not_used(device: str) -> None:
    model = make(device)
    ids = tokens(model.config, 1, 9).to(device)
    plain, scaled = (read(CudaDecoder(model, 1, 9, dtype), ids, 3) for dtype in (None, FP8))
    assert torch.equal(read(CudaDecoder(model, 1, 9), ids, 3), plain)
    assert torch.equal(read(CudaDecoder(model, 1, 9, FP8), ids, 3), scaled)


@torch.no_grad()
def test_nan_reaches_its_image_alone(device: str) -> None:
    """A NaN or an infinity in one colour's embedding is in every later logit of the image that has it."""
    model = make(device)
    ids = tokens(model.config, 3, 8).to(device) % 30
    for value in (torch.nan, torch.inf):
        model.transformer.wte.weight[33] = value
        for at in (2, 6):  # in the primer and after
            wrong = ids.clone()
            wrong[1, at] = 33
            logits = read(CudaDecoder(model, 3, 8, FP8), wrong, 4)[:, -1]
            assert logits.isnan().any(dim=1).tolist() == [False, True, False]


def test_draws(device: str) -> None:
    model = make(device, n_positions=20)
    drawn = model.generate(do_sample=True, seed=1, dtype=FP8, num_return_sequences=3)
    assert torch.equal(model.generate(do_sample=True, seed=1, dtype=FP8, num_return_sequences=3), drawn)


def test_the_rule(device: str) -> None:
    assert why_not_cuda(make(device), FP8) is None
    reason = "the weights are float32; want bfloat16 or float16 for 'fp8_values'"
    assert why_not_cuda(make(device, torch.float32), FP8) == reason
    with pytest.raises(backend.BackendUnavailableError, match=f"dtype 'fp8_values' is not available: {reason}"):
        make_decoder(make(device, torch.float32), 1, 8, FP8)


def test_it_is_never_something_else() -> None:
    """Where no CUDA kernels serve, for want of a device or by choice."""
    model = make("cpu")
    with pytest.raises(backend.BackendUnavailableError, match="'fp8_values' is not available: the model is on cpu"):
        model.generate(dtype=FP8)
    with pytest.raises(backend.BackendUnavailableError, match="the model's dtype or in 'int8', not in 'fp8_values'"):
        CpuDecoder(model, 1, 8, FP8)
    with backend.use_backend("reference"), pytest.raises(backend.BackendUnavailableError, match="'fp8_values' is not"):
        make_decoder(model, 1, 8, FP8)


def test_memory(emulation) -> None:
    """Own positions have values of one byte and a scale for each head; a shared primer is as it was."""
    model = make("cpu")
    own, whole = 64 * (2 + 1) + 2 * 4, 64 * (2 + 2)
    assert memory.cache_bytes(model, FP8) == memory.cache_bytes(model, FP8, 35) == 2 * 70 * own
    assert memory.cache_bytes(model, FP8, 35, 5) == 2 * (35 * own + 7 * whole)
    assert memory.image_bytes(model, FP8) < memory.image_bytes(model)
