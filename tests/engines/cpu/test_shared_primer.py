"""Continuations that share a primer's cache: equal to those with a copy each, on every instruction set, in every
format, for any number of them; not dependent on threads; generation makes use of it and draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_models import small
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.draws import Sampling
from igpt_fast.engines import choice as decoders
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.engines.decoder import Decoder
from igpt_fast.engines.memory import cache_bytes
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.pipeline import Pipeline
from igpt_fast.sampling import decoding as generation
from igpt_fast.sampling.decoding import decode

NATIVE = backend._C is not None
FORMATS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "int8": (torch.float32, "int8")}
needs_module = pytest.mark.skipif(not NATIVE, reason=str(backend.native_reason))

pytestmark = pytest.mark.usefixtures("without_gradients")

Make = Callable[[int], Decoder]  # from the number of images


def native(model: ImageGPTForCausalImageModeling, capacity: int, dtype: str | None) -> Make:
    return lambda batch: CpuDecoder(model, batch, capacity, dtype)


def in_torch(model: ImageGPTForCausalImageModeling, capacity: int) -> Make:
    return lambda batch: ReferenceDecoder(model, batch, capacity)


def primed(model: ImageGPTForCausalImageModeling, batch: int, n: int, primer: int, length: int) -> Tensor:
    """(batch n, length) tokens; the n rows of an image begin with the same primer and go on differently."""
    generator = torch.Generator().manual_seed(batch + 10 * n + 100 * primer)
    tokens = torch.randint(model.config.vocab_size, (batch * n, length), generator=generator)
    tokens[:, :primer] = tokens[::n, :primer].repeat_interleave(n, dim=0)
    return tokens


def run(decoder: Decoder, tokens: Tensor, primer: int, n: int | None = None) -> Tensor:
    """Logits from the primer's last position on, (B, T, K); with n, the decoder reads each primer once and forks.

    Plain PyTorch reads the primer, on one thread: its rounding, and which kernels serve it, depend on the batch.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.use_backend("reference"):
        if n is None:
            first = decoder.prefill(tokens[:, :primer])
        else:
            first = decoder.prefill(tokens[::n, :primer]).repeat_interleave(n, dim=0)
    if n is not None:
        decoder.fork(n)
        assert decoder.batch_size == len(tokens)
    torch.set_num_threads(threads)
    return torch.stack([first, *(decoder.step(column) for column in tokens[:, primer:].unbind(1))], dim=1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).float().square().mean().sqrt() / want.float().square().mean().sqrt())


def rounding(isa: str, kind: str) -> float:
    """How far two orders of the same sums lie apart: more where inputs are rounded and may fall to either side."""
    if kind == "bf16" and isa in ("avx512_bf16", "amx", "neon_bf16"):
        return 1.5e-2
    return 2e-3 if kind == "int8" else 2e-5


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
def test_equals_a_copy_for_each(isa: str, kind: str) -> None:
    """1..9 continuations of 1..3 primers, of one position, odd lengths, whole tiles, and all but the last position."""
    dtype, name = FORMATS[kind]
    random_ = random.Random(f"{isa} {kind}")
    shapes = [{"n_embd": 144, "n_head": 3}, {"n_embd": 64, "n_head": 8}, {"n_embd": 80}, {"n_embd": 128}]
    for n in range(1, 10):
        model = small(dtype, n_positions=100, **random_.choice(shapes))
        primer, batch = random_.choice([1, 2, 15, 31, 33, 63, 64, 65, 97, 98]), random_.randint(1, 3)
        capacity = min(primer + random_.choice([1, 2, 20]), 100)
        tokens = primed(model, batch, n, primer, capacity)
        shared = run(native(model, capacity, name)(batch), tokens, primer, n)
        apart = run(native(model, capacity, name)(batch * n), tokens, primer)
        assert error(shared, apart) <= rounding(isa, kind), (n, batch, primer, capacity, model.config.n_embd)


@needs_module
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(("primer", "n"), [(255, 2), (256, 8), (257, 5), (515, 3)])
def test_long_primers(isa: str, kind: str, primer: int, n: int) -> None:
    """Beyond the 256 positions that attention takes at a time, by the rule of tolerance.py."""
    model = small(FORMATS[kind][0], n_positions=600, n_layer=1, n_embd=128)
    tokens = primed(model, 1, n, primer, 600)[:, : primer + 20]
    shared = run(native(model, 600, None)(1), tokens, primer, n)
    double = ImageGPTForCausalImageModeling(model.config).eval().double()
    double.load_state_dict(model.state_dict())
    exact, plain = (m(tokens, use_cache=False).logits[:, primer - 1 :] for m in (double, model))
    assert_parity(shared, plain, exact)


@needs_module
@pytest.mark.parametrize("width", [80, 128])
@pytest.mark.parametrize("primer", [33, 300])
def test_queries_and_probabilities_keep_their_precision(isa: str, width: int, primer: int) -> None:
    """Next to bf16 keys and values. In one layer all that precedes attention is equal, so only it can differ."""
    model = small(torch.bfloat16, n_positions=600, n_layer=1, n_embd=width)
    tokens = primed(model, 1, 7, primer, primer + 20)
    shared = run(native(model, 600, None)(1), tokens, primer, 7)[:, 1:]
    apart = run(native(model, 600, None)(7), tokens, primer)[:, 1:]
    assert error(shared, apart) < 1.5e-3  # 2e-3 to 4e-3 where they are rounded to bf16


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
def test_every_position_counts(isa: str, kind: str) -> None:
    """Another token anywhere in the primer, its first and last position included, is felt as it is without a fork."""
    dtype, name = FORMATS[kind]
    model, primer, n = small(dtype, n_layer=1), 37, 3
    tokens = primed(model, 1, n, primer, primer + 2)
    base = run(native(model, 80, name)(1), tokens, primer, n)[:, 1:]
    for position in (0, 15, 16, 31, 32, 36):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 5) % 16
        shared = run(native(model, 80, name)(1), other, primer, n)[:, 1:] - base
        apart = run(native(model, 80, name)(n), other, primer)[:, 1:]
        apart -= run(native(model, 80, name)(n), tokens, primer)[:, 1:]
        assert error(shared, apart) < 0.3, position


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
def test_one_copy_is_the_decoder_itself(isa: str, kind: str) -> None:
    dtype, name = FORMATS[kind]
    model = small(dtype)
    tokens = primed(model, 3, 1, 20, 60)
    plain, forked = native(model, 60, name)(3), native(model, 60, name)(3)
    assert torch.equal(run(forked, tokens, 20, 1), run(plain, tokens, 20))
    assert forked._decoder.bytes == plain._decoder.bytes  # type: ignore[attr-defined]


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("heads", [3, 4])
def test_threads_do_not_change_the_result(isa: str, kind: str, heads: int) -> None:
    """Nor how the sequences of a primer are shared out among them."""
    dtype, name = FORMATS[kind]
    model = small(dtype, n_embd=48 * heads, n_head=heads, n_layer=1)
    for batch, n in ((1, 9), (2, 7)):
        tokens = primed(model, batch, n, 33, 40)
        want = run(native(model, 40, name)(batch), tokens, 33, n)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(native(model, 40, name)(batch), tokens, 33, n), want), (threads, n)
        torch.set_num_threads(1)


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_a_number_stays_with_its_image(isa: str, kind: str) -> None:
    dtype, name = FORMATS[kind]
    model = small(dtype, n_embd=80)
    model.transformer.wte.weight[5] = torch.nan
    for where, wrong in ((3, [True] * 3 + [False] * 3), (12, [False] * 4 + [True] + [False])):
        tokens = primed(model, 2, 3, 10, 15) % 5
        tokens[torch.tensor(wrong), where] = 5
        logits = run(native(model, 80, name)(2), tokens, 10, 3)[:, -1]
        assert logits.isnan().any(dim=1).tolist() == wrong


@needs_module
@pytest.mark.parametrize("kind", FORMATS)
def test_memory(kind: str) -> None:
    """The primer once, and for each image what follows; ``cache_bytes`` says so beforehand."""
    dtype, name = FORMATS[kind]
    model = small(dtype, n_positions=256, n_embd=128, n_head=2, n_layer=16)  # beside which the rows of a step are few
    decoder = native(model, 256, name)(2)
    decoder.prefill(primed(model, 2, 1, 192, 192))
    whole = decoder._decoder.bytes / 2  # type: ignore[attr-defined]
    decoder.fork(8)
    each = decoder._decoder.bytes / 16  # type: ignore[attr-defined]
    assert each / whole == pytest.approx((192 / 8 + 64) / 256, rel=0.03)
    assert cache_bytes(model, name) == pytest.approx(whole, rel=0.03)
    assert cache_bytes(model, name, primer=192, copies=8) == pytest.approx(each, rel=0.03)
    with backend.use_backend("reference"):  # PyTorch's decoder copies the primer
        assert cache_bytes(model, primer=192, copies=8) == cache_bytes(model)


@needs_module
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_what_comes_after_a_fork(dtype: str | None) -> None:
    """Further tokens may come several at once; the own part can be taken back, the primer cannot."""
    model = small()
    tokens = primed(model, 2, 3, 10, 20)
    decoder = native(model, 20, dtype)(2)
    want = run(decoder, tokens, 10, 3)
    decoder._decoder.rewind(10)  # type: ignore[attr-defined]
    assert torch.equal(decoder.prefill(tokens[:, 10:16]), want[:, 6])
    assert torch.equal(decoder.step(tokens[:, 16]), want[:, 7])
    with pytest.raises(ValueError, match="to a fork at most"):
        decoder._decoder.rewind(9)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"tokens is \(2, 1\)"):
        decoder.prefill(tokens[::3, :1])


def test_torch_decoder() -> None:
    model = small()
    tokens = primed(model, 2, 3, 9, 20)
    shared, apart = (run(in_torch(model, 20)(b), tokens, 9, n) for b, n in ((2, 3), (6, None)))
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
    if NATIVE:
        torch.testing.assert_close(run(native(model, 20, None)(2), tokens, 9, 3), apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [in_torch, pytest.param(lambda m, c: native(m, c, None), marks=needs_module)])
def test_misuse(make: Callable[[ImageGPTForCausalImageModeling, int], Make]) -> None:
    model = small()
    decoder = make(model, 5)(2)
    with pytest.raises(ValueError, match="nothing has been read"):
        decoder.fork(2)
    tokens = primed(model, 2, 2, 4, 6)
    decoder.prefill(tokens[::2, :4])
    for n in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueError, match="want a positive integer"):
            decoder.fork(n)  # type: ignore[arg-type]
    decoder.fork(2)
    for n in (1, 2):
        with pytest.raises(ValueError, match="forked before"):
            decoder.fork(n)
    decoder.step(tokens[:, 4])
    with pytest.raises(ValueError, match=r"fit into (capacity|max_length)=5"):
        decoder.step(tokens[:, 5])
    full = make(model, 4)(2)
    full.prefill(tokens[::2, :4])
    full.fork(2)  # nothing can follow, which is an error of what follows
    with pytest.raises(ValueError, match="fit"):
        full.step(tokens[:, 4])


@needs_module
def test_too_many_copies_change_nothing() -> None:
    model = small()
    tokens = primed(model, 1, 2, 6, 12)
    decoder = native(model, 12, None)(1)
    decoder.prefill(tokens[::2, :6])
    with pytest.raises(ValueError, match="copies are out of range"):
        decoder.fork(1 << 40)
    decoder.fork(2)
    got = torch.stack([decoder.step(column) for column in tokens[:, 6:].unbind(1)], dim=1)
    torch.testing.assert_close(got, run(native(model, 12, None)(2), tokens, 6)[:, 1:], rtol=1e-4, atol=1e-4)


# ---- Generation ---------------------------------------------------------------------------------------------


class Recorded:
    """Makes decoders as generation does, and notes what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, int]] = []  # images and capacity
        self.copies: list[int] = []
        monkeypatch.setattr(generation, "make_decoder", self.make)

    def make(self, model: ImageGPTForCausalImageModeling, batch: int, capacity: int, dtype: str | None) -> Decoder:
        decoder = decoders.make_decoder(model, batch, capacity, dtype)
        fork = decoder.fork

        def noted(n: int) -> None:
            self.copies.append(n)
            fork(n)

        decoder.fork = noted  # type: ignore[method-assign]
        self.made.append((batch, capacity))
        return decoder


@pytest.mark.parametrize("use", ["auto", "reference"])
def test_decode_draws_what_copies_of_the_context_draw(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    context, sampling = primed(model, 2, 1, 9, 9), Sampling(temperature=0.7)
    uniforms = torch.rand(6, 40, generator=torch.Generator().manual_seed(1))
    calls: list[tuple[int, tuple[int, ...]]] = []
    recorded = Recorded(monkeypatch)
    with backend.use_backend(use):
        shared = decode(model, context, uniforms, sampling, lambda t, tokens: calls.append((t, tokens.shape)))
        apart = decode(model, context.repeat_interleave(3, dim=0), uniforms, sampling)
    assert torch.equal(shared.tokens, apart.tokens)
    torch.testing.assert_close(shared.logprobs, apart.logprobs, rtol=1e-3, atol=1e-3)
    assert calls == [(t, (6,)) for t in range(40)]
    assert recorded.made == [(2, 48), (6, 48)]
    assert recorded.copies == [3, 1]


def test_generate_reads_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    rows = primed(model, 2, 1, 9, 9)
    recorded = Recorded(monkeypatch)
    several = model.generate(rows, do_sample=True, num_return_sequences=4, seed=3, max_new_tokens=20)
    assert (recorded.made, recorded.copies) == ([(2, 28)], [4])
    assert torch.equal(several[:, :9], rows.repeat_interleave(4, dim=0))
    repeated = model.generate(rows.repeat_interleave(4, dim=0), do_sample=True, seed=3, max_new_tokens=20)
    assert torch.equal(several, repeated)
    assert model.generate(rows, max_new_tokens=1).shape == (2, 10)
    assert model.generate(rows, do_sample=True, num_return_sequences=3, max_new_tokens=1).shape == (6, 10)


@pytest.fixture(scope="module")
def bundled() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu")


def photograph(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


# The images made together, and how many of each: whole inputs while they fit, else parts of one.
BATCHES = {1: [1] * 10, 3: [3, 2, 3, 2], 4: [4, 1, 4, 1], 5: [5, 5], 7: [5, 5], 10: [10], None: [10]}


@pytest.mark.parametrize("batch_size", BATCHES)
def test_completions_do_not_depend_on_the_batch(
    bundled: Pipeline, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, calls = [photograph(seed) for seed in range(2)], []
    want = bundled.complete(images, keep=0.8, n=5, seed=4, batch_size=10)
    recorded = Recorded(monkeypatch)
    got = bundled.complete(
        images, keep=0.8, n=5, seed=4, batch_size=batch_size, progress=lambda *count: calls.append(count)
    )
    assert torch.equal(got.tokens, want.tokens)
    made = [images * copies for (images, _), copies in zip(recorded.made, recorded.copies, strict=True)]
    assert made == BATCHES[batch_size]
    assert max(recorded.copies) == min(batch_size or 5, 5)
    assert calls[-1] == (10 * 48, 10 * 48)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


@needs_module
def test_more_completions_fit_when_they_share(bundled: Pipeline) -> None:
    assert 4 * cache_bytes(bundled.model, primer=256, copies=4) == cache_bytes(bundled.model)
    pipeline = Pipeline(bundled.model, bundled.processor)
    pipeline.model = ImageGPTForCausalImageModeling(ImageGPTConfig(vocab_size=129, n_layer=24))
    alone, shared = pipeline.default_batch_size(), pipeline.default_batch_size(None, 513, 8)
    assert alone == (1 << 30) // cache_bytes(pipeline.model)
    assert shared >= 1.6 * alone
    assert pipeline.default_batch_size("int8") > 3 * alone
