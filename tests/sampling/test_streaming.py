"""Streams of rows; batches that do not fit into memory; no growth of memory; threads."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from small_models import small_pipeline

from igpt_fast import ImageGPTForCausalImageModeling, Pipeline, backend
from igpt_fast.engines import choice as decoders
from igpt_fast.engines.decoder import Decoder
from igpt_fast.sampling import decoding as generation
from igpt_fast.sampling import streaming
from igpt_fast.sampling.batches import Batches, out_of_memory
from igpt_fast.sampling.results import Generation, InterruptedGeneration
from igpt_fast.sampling.rules import stream_uniforms
from igpt_fast.sampling.streaming import RowEvent, Stream

SIDE, COLOURS = 6, 9


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline(SIDE, SIDE, COLOURS)


@pytest.fixture(scope="module")
def images(pipeline: Pipeline) -> list:
    tokens = torch.randint(0, COLOURS, (3, SIDE * SIDE), generator=torch.Generator().manual_seed(0))
    return pipeline.processor.decode(tokens)


def ragged() -> np.ndarray:
    """A row, and a part of the next, and pixels below."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[0], mask[1, :2], mask[3, 4], mask[5, 1:3] = True, True, True, True
    return mask


def put_together(events: list[RowEvent], count: int) -> torch.Tensor:
    """Every row of every image, each exactly once, from the top."""
    tokens = torch.full((count, SIDE, SIDE), -1)
    for event in events:
        part = tokens[event.first : event.first + len(event.tokens)]
        assert (part[:, event.row] == -1).all()
        assert (part[:, : event.row] >= 0).all()
        part[:, event.row] = event.tokens
    assert (tokens >= 0).all()
    return tokens.flatten(1)


@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
def test_rows_of_samples(pipeline: Pipeline, batch_size: int | None) -> None:
    want = pipeline.sample(5, seed=3)
    stream = pipeline.stream(5, seed=3, batch_size=batch_size)
    assert isinstance(stream, Stream)
    events = list(stream)
    assert torch.equal(put_together(events, 5), want.tokens)
    assert torch.equal(stream.result.tokens, want.tokens)
    torch.testing.assert_close(stream.result.logprobs, want.logprobs)
    done = [event.done for event in events]
    assert done == sorted(done)
    assert done[0] == SIDE * len(events[0].tokens)
    assert all(event.total == 5 * SIDE * SIDE for event in events)
    assert done[-1] == 5 * SIDE * SIDE


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, None])
def test_rows_of_completions(pipeline: Pipeline, images: list, batch_size: int | None, candidates: int) -> None:
    options = {"keep": ragged(), "n": 2, "seed": 3, "candidates": candidates}
    want = pipeline.complete(images, **options)
    stream = pipeline.stream_complete(images, **options, batch_size=batch_size)
    events = list(stream)
    assert torch.equal(put_together(events, 6), want.tokens)
    assert torch.equal(stream.result.tokens, want.tokens)
    total = 6 * candidates * (SIDE * SIDE - SIDE - 2)
    assert (events[-1].done, events[-1].total) == (total, total)
    if candidates == 1:
        assert [(event.row, event.done) for event in events[:1]] == [(0, 0)]  # given, without work
        assert len(events) == SIDE * -(-6 // len(events[0].tokens))


def test_rows_come_as_they_are_drawn(pipeline: Pipeline) -> None:
    calls: list[int] = []
    stream = pipeline.stream(2, seed=0, progress=lambda done, total: calls.append(done))
    assert calls == []
    event = next(stream)
    assert (event.row, event.done, len(calls)) == (0, 2 * SIDE, SIDE)
    with pytest.raises(RuntimeError, match="not come to its end"):
        stream.result  # noqa: B018
    assert stream.partial is None
    kept = event.tokens.clone()
    list(stream)
    assert torch.equal(event.tokens, kept)
    assert torch.equal(stream.result.tokens[:, :SIDE], kept)


def test_partial_results(pipeline: Pipeline, images: list) -> None:
    stream = pipeline.stream(5, seed=3, batch_size=2)
    for event in stream:
        if event.first == 4:
            break
    assert stream.partial is not None
    assert torch.equal(stream.partial.tokens, pipeline.sample(4, seed=3).tokens)
    stream = pipeline.stream_complete(images, keep=0.5, n=3, seed=3, batch_size=2)
    for event in stream:
        if event.first == 5:
            break
    partial, whole = stream.partial, pipeline.complete(images[:2], keep=0.5, n=3, seed=3)
    assert partial is not None
    assert (partial.counts, len(partial.inputs or [])) == ([3, 2], 2)
    assert torch.equal(partial.tokens, whole.tokens[:5])
    assert partial.grid().size == whole.grid().size


def test_a_request_is_checked_once_and_cut(pipeline: Pipeline, images: list) -> None:
    """No image is read before it is begun; the parts draw what the whole draws."""
    with pytest.raises(ValueError, match="top_p"):
        pipeline.stream_complete(["no such file"], top_p=2.0)
    assert len(pipeline.request(2, images=["no such file"] * 3)) == 3
    whole = pipeline.request(2, images=images, keep=ragged(), candidates=2, seed=3, first=5)
    want = pipeline.start(whole).drained()
    parts = [pipeline.start(whole.shard(part)).drained() for part in (range(1), range(1, 3))]
    assert torch.equal(torch.cat([part.tokens for part in parts]), want.tokens)
    assert parts[1].settings["first_input"] == 6
    samples = pipeline.request(5, seed=3)
    assert torch.equal(
        pipeline.start(samples.shard(range(3, 5))).drained().tokens, pipeline.sample(5, seed=3).tokens[3:]
    )


def test_a_keyword_that_is_none(pipeline: Pipeline, images: list) -> None:
    for call, names in ((pipeline.sample, ("tempreature", "images", "sampling")), (pipeline.complete, ("first",))):
        for name in names:
            with pytest.raises(TypeError, match=f"unexpected keyword {name}; want some of seed, "):
                call(images if call == pipeline.complete else 1, **{name: 1})


def test_interruption_of_a_stream(pipeline: Pipeline) -> None:
    def stop(done: int, total: int) -> None:
        if done > 3 * SIDE * SIDE:
            raise KeyboardInterrupt

    stream = pipeline.stream(5, seed=3, batch_size=2, progress=stop)
    with pytest.raises(InterruptedGeneration) as caught:
        list(stream)
    assert caught.value.partial is not None
    assert torch.equal(caught.value.partial.tokens, pipeline.sample(2, seed=3).tokens)
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="end"):
        stream.result  # noqa: B018


def test_wrong_settings_are_errors_before_the_first_row(pipeline: Pipeline, images: list) -> None:
    for options in ({"n": 0}, {"seed": -1}, {"top_k": 0}, {"min_p": 2.0}, {"first": -1}, {"dtype": "float8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pipeline.stream(**options)
    with pytest.raises(ValueError, match="keep"):
        pipeline.stream_complete(images, keep=1.5)


def test_a_stream_can_be_dropped(pipeline: Pipeline, images: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder is gone at once, the model is as before, and gradients are on between rows and afterwards."""
    made: list[weakref.ref[object]] = []

    def make(*arguments: object) -> Decoder:
        decoder = decoders.make_decoder(*arguments)  # type: ignore[arg-type]
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(generation, "make_decoder", make)
    pipeline.model.train()
    gc.disable()
    try:
        for start in (pipeline.stream, lambda **more: pipeline.stream_complete(images, keep=ragged(), **more)):
            stream = start(seed=0)
            assert stream.engine is None
            while stream.engine is None:
                next(stream)
            assert made[-1]() is not None
            assert not pipeline.model.training
            assert torch.is_grad_enabled()
            del stream
            assert made[-1]() is None
            assert pipeline.model.training
        assert len(made) == 2
    finally:
        gc.enable()
        pipeline.model.eval()


# ---- Engines, seeds, batches --------------------------------------------------------------------------------


def test_settings_say_how_it_was_drawn(pipeline: Pipeline) -> None:
    result = pipeline.sample(2, seed=1, min_p=0.1, temperature=0.9)
    assert {
        "min_p": 0.1,
        "temperature": 0.9,
        "cfg_scale": 1.0,
        "engine": "reference",
    }.items() <= result.settings.items()
    if backend._C is not None and backend.unavailable("cpu") is None:
        single = Pipeline.from_pretrained(device="cpu")
        with backend.use_backend("auto"):
            assert single.sample(1, seed=0).settings["engine"] == "cpu"


WIDE = {"avx512", "avx512_vnni", "avx512_bf16", "amx"}


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_bits_do_not_depend_on_the_batch(pipeline: Pipeline, isa: str, dtype: str | None) -> None:
    """Likelihoods tell what tokens would hide. In float32 all batches are the same; in int8, as far as is said."""
    single = Pipeline(ImageGPTForCausalImageModeling(pipeline.model.config), pipeline.processor)
    single.model.load_state_dict(pipeline.model.state_dict())
    with backend.use_backend("auto"):
        results = {size: single.sample(6, seed=1, batch_size=size, dtype=dtype) for size in (1, 2, 3, 4, 6)}
    assert results[1].settings["engine"] == "cpu"
    same = {1, 2, 3, 4} if dtype is None or isa in WIDE - {"avx512"} else {2, 3, 4} if isa in WIDE else set()
    for size in (1, 2, 3, 4):
        tokens, logprobs = (results[size].tokens, results[6].tokens), (results[size].logprobs, results[6].logprobs)
        if size in same:
            assert torch.equal(*tokens)
            assert torch.equal(*logprobs)


def test_numbers_do_not_depend_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same; for the same logits so is the draw (tests/ops/test_sample.py)."""
    single = Pipeline.from_pretrained(device="cpu")
    found: dict[str, list[torch.Tensor]] = {"auto": [], "reference": []}
    draw = generation.ops.draw_scored
    for use, numbers in found.items():
        with backend.use_backend(use), monkeypatch.context() as patch:
            patch.setattr(
                generation.ops, "draw_scored", lambda x, u, s, n=numbers: (n.append(u.clone()), draw(x, u, s))[1]
            )
            single.sample(2, seed=5)
    assert torch.equal(torch.stack(found["auto"]), torch.stack(found["reference"]))
    expected = stream_uniforms(5, torch.arange(2), 0, 256, torch.device("cpu"))
    assert torch.equal(torch.stack(found["auto"], 1), expected)


def test_images_have_streams_of_their_own(pipeline: Pipeline) -> None:
    whole = pipeline.sample(6, seed=4)
    assert torch.equal(pipeline.sample(4, seed=4, first=2).tokens, whole.tokens[2:])
    assert pipeline.sample(1, seed=4, first=2).settings["first"] == 2


def test_temperature_0_takes_the_likeliest(pipeline: Pipeline) -> None:
    result = pipeline.sample(2, temperature=0.0, seed=0)
    assert torch.equal(result.tokens[:1], pipeline.model.generate()[:, 1:])
    assert torch.equal(result.tokens[0], result.tokens[1])


# ---- Memory -------------------------------------------------------------------------------------------------

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, Exception], None]:
    """Decoders that fail, when they are made or at some step, with more images than there is room for."""

    def limit(most: int, where: str, error: Exception) -> None:
        def make(*arguments: object) -> Decoder:
            decoder = decoders.make_decoder(*arguments)  # type: ignore[arg-type]
            steps, step = [0], decoder.step

            def stepped(tokens: torch.Tensor) -> torch.Tensor:
                steps[0] += 1
                if decoder.batch_size > most and steps[0] == 9:
                    raise error
                return step(tokens)

            if where == "made" and decoder.batch_size > most:
                raise error
            if where == "step":
                decoder.step = stepped  # type: ignore[method-assign]
            return decoder

        monkeypatch.setattr(generation, "make_decoder", make)

    return limit


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "torch"])
@pytest.mark.parametrize("where", ["made", "step"])
def test_out_of_memory_means_smaller_batches(
    pipeline: Pipeline, scarce: Callable, where: str, error: Exception
) -> None:
    want, calls = pipeline.sample(13, seed=3, batch_size=11), []
    scarce(3, where, error)
    with pytest.warns(RuntimeWarning, match="out of memory") as caught:
        result = pipeline.sample(13, seed=3, batch_size=11, progress=lambda *count: calls.append(count))
    assert [str(warning.message).partition(" (")[0] for warning in caught] == [
        "out of memory with 11 images at a time; goes on with 5",
        "out of memory with 5 images at a time; goes on with 2",
    ]
    assert torch.equal(result.tokens, want.tokens)
    assert result.settings["batch_size"] == 2
    done = [count[0] for count in calls]
    assert done == sorted(done)
    assert calls[-1] == (13 * SIDE * SIDE, 13 * SIDE * SIDE)


def test_out_of_memory_frees_what_is_kept_for_other_models(
    pipeline: Pipeline, scarce: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch is asked to give back what nobody uses."""
    other, left = small_pipeline(SIDE, SIDE, COLOURS), []
    monkeypatch.setattr(Decoder, "rest", lambda _: 1 << 20)  # as one that has graphs
    decoders.keep(decoders.make_decoder(other.model, 1, 4))
    monkeypatch.setattr("gc.collect", lambda: left.append(decoders.kept_bytes(other.model)))
    scarce(1, "step", MemoryError())
    with pytest.warns(RuntimeWarning, match="out of memory"):
        pipeline.sample(2)
    assert left == [0]
    decoders.forget()


@pytest.mark.parametrize("candidates", [1, 4])
def test_completions_out_of_memory(pipeline: Pipeline, images: list, scarce: Callable, candidates: int) -> None:
    options = {"keep": ragged(), "n": 3, "seed": 3, "candidates": candidates}
    want = pipeline.complete(images, **options)
    scarce(2, "step", MemoryError())
    with pytest.warns(RuntimeWarning, match="out of memory"):
        result = pipeline.complete(images, **options)
    assert torch.equal(result.tokens, want.tokens)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_out_of_memory_after_the_choice(
    pipeline: Pipeline, images: list, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of candidates: before anything was noted, or all of it. What comes again is chosen again, the same."""
    options = {"keep": ragged(), "n": 2, "seed": 3, "candidates": 3, "batch_size": batch_size}
    want = pipeline.complete(images, **options)
    rows, failed = streaming._Run._rows, []

    def fails(*arguments: object) -> Iterator[RowEvent]:
        if not failed:
            failed.append(1)
            raise MemoryError
        yield from rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming._Run, "_rows", fails)
    stream = pipeline.stream_complete(images, **options)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        events = list(stream)
    assert torch.equal(put_together(events, 6), want.tokens)
    assert torch.equal(stream.result.tokens, want.tokens)
    assert torch.equal(stream.result.logprobs.nan_to_num(1.0), want.logprobs.nan_to_num(1.0))


def test_generate_out_of_memory(pipeline: Pipeline, scarce: Callable) -> None:
    model = pipeline.model
    prompt = torch.nn.functional.pad(torch.randint(0, COLOURS, (2, 4)), (1, 0), value=COLOURS)
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 5}
    want = model.generate(prompt, **options)
    scarce(3, "step", MemoryError())
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert torch.equal(model.generate(prompt, **options), want)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert model.generate(prompt.repeat(4, 1)).shape == (8, SIDE * SIDE + 1)
    with pytest.raises(MemoryError):
        model.generate(prompt, **options, callback=lambda step, tokens: None)


def test_rows_come_again_where_memory_did_not_suffice(pipeline: Pipeline, scarce: Callable) -> None:
    scarce(2, "step", MemoryError())
    stream, rows = pipeline.stream(4, seed=3, batch_size=4), {}
    with pytest.warns(RuntimeWarning, match="out of memory"):
        events = list(stream)
    for event in events:
        for i, row in enumerate(event.tokens):
            assert torch.equal(rows.setdefault((event.first + i, event.row), row), row)
    assert len(rows) == 4 * SIDE


def test_one_image_that_does_not_fit_is_an_error(pipeline: Pipeline, scarce: Callable) -> None:
    scarce(0, "made", MemoryError("of one"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MemoryError, match="of one"):
            pipeline.sample(4, seed=3)


def test_what_counts_as_out_of_memory() -> None:
    for error in (
        *ERRORS,
        RuntimeError("[enforce fail at CPUAllocator.cpp:124] not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ):
        assert out_of_memory(error), error
    for error in (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError(""),
    ):
        assert not out_of_memory(error), error


def test_other_errors_are_not_taken_for_memory(pipeline: Pipeline, scarce: Callable) -> None:
    scarce(1, "step", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        pipeline.sample(4, seed=3)


def test_batches_are_planned(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is free on a CUDA device, else by a budget."""
    assert (pipeline.default_batch_size(), pipeline.default_batch_size(guided=True)) == (64, 64)
    asked: list[tuple[object, ...]] = []
    for room, expected in ((100, [100, 50]), (10001, [10001, 5000]), (1, [1, 1]), (0, [1, 1])):
        monkeypatch.setattr(
            "igpt_fast.pipeline.most_images", lambda model, *others, room=room: (asked.append(others), room)[1]
        )
        assert [pipeline.default_batch_size(None, 9, 2, guided) for guided in (False, True)] == expected
    assert set(asked) == {(None, 9, 2)}


def test_batches() -> None:
    """Whole inputs, or parts of one; all sequences once, in order."""
    for count, copies in ((1, 1), (10, 1), (12, 3), (12, 12), (30, 5)):
        for size in range(1, 40):
            start = 0
            while start < count:
                stop, together = Batches(count, copies, size).end(start)
                assert start < stop <= min(start + size, count)
                assert (stop - start) % together == 0
                assert together == copies or (stop - 1) // copies == start // copies
                start = stop


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow(pytestconfig: pytest.Config) -> None:
    """200 images with --soak, else 40: of the second half of the calls none has more than the first half. The collector
    is called at the end of each: calls leave nothing that would need it.
    """
    calls = 50 if pytestconfig.getoption("--soak") else 10
    half = calls // 2
    bundled, sizes = Pipeline.from_pretrained(device="cpu"), []
    mask = np.zeros((16, 16), dtype=bool)
    mask[:8], mask[12, 3] = True, True
    for i in range(calls):
        if i % 2:
            bundled.sample(4, seed=i, min_p=0.02)
        else:
            grey = np.full((16, 16, 3), i, np.uint8)
            stream = bundled.stream_complete(grey, keep=mask, n=4, seed=i)
            assert [next(stream).row for _ in range(10)] == list(range(10))
            assert stream.engine == "cpu" or backend._C is None
            del stream  # behind the given rows, while a decoder is there
            bundled.complete(grey, keep=mask, n=4, seed=i)
        if i + 1 in (half, calls):
            gc.collect()
        sizes.append(resident())
    assert max(sizes[half:]) - max(sizes[:half]) < 2 << 20, [size >> 10 for size in sizes]


def test_threads_draw_what_they_draw_alone(pipeline: Pipeline, images: list) -> None:
    """Several at once on one pipeline, of the bundled model on the fast engine and of a small one on the other."""
    bundled = Pipeline.from_pretrained(device="cpu")
    photograph = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def work(i: int) -> list[Generation]:
        return [
            bundled.sample(2, seed=i, top_p=0.9),
            bundled.complete(photograph, keep=0.8, n=3, seed=i),
            pipeline.complete(images[:1], keep=ragged(), n=2, seed=i, candidates=2),
        ]

    alone = [work(i) for i in range(3)]
    together: dict[int, list[Generation]] = {}
    threads = [Thread(target=lambda i=i: together.__setitem__(i, work(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        for got, want in zip(together[i], alone[i], strict=True):
            assert torch.equal(got.tokens, want.tokens)
            assert torch.equal(got.logprobs.nan_to_num(1.0), want.logprobs.nan_to_num(1.0))
