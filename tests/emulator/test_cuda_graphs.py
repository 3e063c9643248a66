"""The CUDA decoder's step in CUDA graphs: what is captured, where, how often, and what happens when it cannot be."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import make, read, shared
from tolerance import tokens
from torch import Tensor

from igpt_fast import backend, ops
from igpt_fast.draws import Sampling
from igpt_fast.engines import choice
from igpt_fast.engines.cuda import capture, decoder, step
from igpt_fast.engines.cuda.decoder import CudaDecoder
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.cuda.step import CudaStep
from igpt_fast.sampling.decoding import decode
from igpt_fast.sampling.rules import RandomStreams

EAGER = CudaOptions(graphs=False)


class Replayed:
    """In place of a CUDA graph: does again what was done last before it was finished."""

    done: tuple[CudaStep, tuple[int, int], Tensor] | None = None

    def replay(self) -> None:
        assert self.done is not None
        owner, which, logits = self.done
        logits.copy_(owner._compute(*which))


class Captures:
    """CUDA graphs on the emulator: a captured step is one that has not been done. Notes what happens.

    Attributes:
        pools: Of each capture.
        said: What streams and events were told, and what was made of workspaces and the allocator.
        decoders: Each one, weakly.
        fails: Gives an error for what a step does within a capture, or before it; else ``None``.
        at_the_end: Whether the end of a capture in which something failed fails as well, as torch's does.
    """

    def __init__(self) -> None:
        self.pools: list[object] = []
        self.said: list[str] = []
        self.decoders: list[weakref.ref[CudaDecoder]] = []
        self.fails: Callable[[CudaStep, bool], Exception | None] = lambda owner, inside: None
        self.at_the_end = False
        self._inside = False
        self._last: tuple[CudaStep, tuple[int, int], Tensor] | None = None

    def say(self, *words: str) -> None:
        self.said.append(" ".join(words))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captures, compute, init = self, CudaStep._compute, CudaDecoder.__init__

        class Capture:
            def __init__(self, graph: Replayed, pool: object, stream: object, capture_error_mode: str) -> None:
                assert stream is first
                captures.pools.append(pool)
                self.graph = graph

            def __enter__(self) -> None:
                captures._inside = True

            def __exit__(self, *args: object) -> None:  # as torch's, this frame has the error
                captures._inside = False
                if args[1] is not None and captures.at_the_end:
                    raise RuntimeError("operation failed due to a previous error during capture")
                if args[1] is None and captures._last is not None:
                    owner, _, logits = self.graph.done = captures._last
                    owner.position -= 1
                    owner.x.copy_(captures._x)
                    logits.fill_(torch.nan)

        def noted(owner: CudaStep, limit: int, colours: int, side: Any = None) -> Tensor:
            captures._x = owner.x.clone()
            error = captures.fails(owner, captures._inside)
            try:
                if error is not None:
                    raise error
            finally:
                del error  # which would hold this frame, and that it
            logits = compute(owner, limit, colours, side)
            captures._last = owner, (limit, colours), logits
            return logits

        def made(self: CudaDecoder, *arguments: Any, options: CudaOptions = CudaOptions()) -> None:  # noqa: B008
            init(self, *arguments)
            self.options = options
            captures.decoders.append(weakref.ref(self))

        def stream(name: str) -> types.SimpleNamespace:
            waits = {
                "wait_stream": lambda other: self.say(name, "waits for", other.name),
                "wait_event": lambda _: self.say(name, "waits for the event"),
            }
            return types.SimpleNamespace(name=name, **waits)

        here, first, second = map(stream, ("here", "first", "second"))
        handles = itertools.count(1)
        event = types.SimpleNamespace(record=lambda: self.say("event"))
        fakes: dict[str, Any] = {"current_stream": lambda _: here, "CUDAGraph": Replayed, "graph": Capture}
        fakes |= dict.fromkeys(("device", "stream"), lambda _: contextlib.nullcontext())
        fakes |= {"Event": lambda: event, "graph_pool_handle": lambda: (0, next(handles))}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_, name=name: self.say(name), raising=False)
        place = types.SimpleNamespace(streams=(first, second))
        monkeypatch.setattr(step, "take_place", lambda device, owner: place)
        monkeypatch.setattr(step, "make_workspaces", lambda *_: self.say("workspaces"))
        monkeypatch.setattr(CudaStep, "_compute", noted)
        monkeypatch.setattr(CudaDecoder, "__init__", made)


@pytest.fixture
def captures(emulation, monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    found.install(monkeypatch)
    return found


@pytest.mark.parametrize(("copies", "primer"), [(1, 2), (3, 3)])
def test_the_bookkeeping_of_graphs(
    captures: Captures, copies: int, primer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each launch of attention, of what is in fixed memory."""
    monkeypatch.setattr(step, "LIMITS", (4, 99))
    monkeypatch.setattr(step, "count_splits", lambda kernels, blocks, keys, dtype: keys)
    model = make("cpu", n_layer=1)
    ids = shared(1, copies, 9, primer, model.config)
    expected = read(CudaDecoder(model, 1, 9, options=EAGER), ids, primer, copies)
    results = []
    again = CudaDecoder(model, 1, 9)
    for _ in range(2):
        results.append(read(again, ids, primer, copies))
        again.rest()
        again.start(model, 1, 9)
    assert again._spare is not None
    assert len(captures.pools) == 2
    assert len(set(captures.pools)) == 1, "a second start captures nothing, and graphs share a pool"
    assert list(again._spare._graphs) == [(limit, 0) for limit in again._spare._limits]
    assert all(torch.equal(result, expected) for result in results)
    assert captures.said == [], "the fused kernels need no workspace, and nothing failed"


def drawn_by(found: CudaDecoder, context: Tensor, seed: int, settings: Sampling, count: int) -> tuple[Tensor, Tensor]:
    """(B, count) tokens and log-probabilities, as generation draws them."""
    streams = torch.arange(len(context), device=context.device)
    logits = found.prefill(context)
    for t in range(count):
        unused: Any = lambda: 1 / 0  # noqa: E731
        found.draw(logits[:, :39], unused, (seed, streams), settings, as_they_came=True)
        if t + 1 < count:
            logits = found.step_drawn()
    assert found.history is not None
    return found.history[0].clone(), found.history[1].clone()


@pytest.mark.parametrize("rows", [1, 9])
def test_draws_in_a_graph(captures: Captures, emulation: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a token is in it, other seeds and settings need no other, and it draws what is drawn without."""
    model, launches = make("cpu", n_layer=1), []
    context = tokens(model.config, rows, 3)
    again, plain = CudaDecoder(model, rows, 9), CudaDecoder(model, rows, 9, options=replace(EAGER, drawing=False))
    run, sample_step = CudaStep.run, ops.sample_step
    noted = lambda *arguments: (launches.append(1), sample_step(*arguments))  # noqa: E731
    monkeypatch.setattr(ops, "sample_step", noted)
    outside = lambda *arguments: (launches.append(0), run(*arguments), launches.append(-1))[1]  # noqa: E731
    monkeypatch.setattr(CudaStep, "run", outside)
    for seed, settings in ((1 << 63, Sampling()), (2, Sampling(0.8, 9, 0.9)), (2, Sampling(temperature=0.0))):
        launches.clear()
        found = drawn_by(again, context, seed, settings, 7)
        replays = [0, *([1] * (3 if not again._spare and seed == 1 << 63 else 1)), -1]
        assert launches == [1, *replays, *([0, 1, -1] * 5)], "the first is drawn by itself, the others in the step"
        assert again._step is not None
        assert list(again._step._graphs) == [(9, 39)]
        expected = drawn_by(plain, context, seed, settings, 7)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        for one in (again, plain):
            one.rest()
            one.start(model, rows, 9)
    assert len(captures.pools) == 1


def test_halves_in_a_graph(captures: Captures) -> None:
    """The second begins behind the first product of the first, and the graph ends when both have."""
    model = make("cpu", torch.float32)
    ids = tokens(model.config, 5, 6)
    halves = CudaOptions(halves=True)
    expected = read(CudaDecoder(model, 5, 6, options=replace(halves, graphs=False)), ids, 3)
    assert torch.equal(read(CudaDecoder(model, 5, 6, options=halves), ids, 3), expected)
    assert captures.said == ["workspaces", "event", "second waits for the event", "here waits for second"]


@pytest.mark.parametrize(("where", "at_the_end"), [("before", False), ("inside", False), ("inside", True)])
def test_out_of_memory_at_a_capture(
    captures: Captures, where: str, at_the_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is told as such, and when fewer images are tried nothing of the decoder is left, without the collector."""
    model, left = make("cpu"), []
    out = lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")  # noqa: E731
    captures.fails = lambda owner, inside: out() if len(owner.x) > 1 and inside == (where == "inside") else None
    captures.at_the_end = at_the_end
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            note = lambda *_: left.extend(found() for found in captures.decoders)  # noqa: E731
            monkeypatch.setattr(warnings, "showwarning", note)
            drawn = model.generate(max_new_tokens=3, do_sample=True, seed=1, num_return_sequences=2)
    finally:
        gc.enable()
    assert drawn.shape == (2, 4)
    assert left == [None]
    assert len(captures.decoders) == 2
    assert len(captures.pools) == 1 + (where == "inside"), "the third batch captures nothing"


# What fails -> attempts to capture, what is left on, and the reason.
FALLBACKS = {
    "dependent": (2, True, "without dependent launches, as the step could not be captured: no such attribute"),
    "all": (2, False, "without CUDA graphs, as the step could not be captured: no such attribute"),
    "products": (1, False, "without CUDA graphs, as the step could not be captured: no such attribute"),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_failed_capture(captures: Captures, case: str, at_the_end: bool) -> None:
    """Costs a warning, and then speed, once."""
    attempts, graphs, reason = FALLBACKS[case]
    model = make("cpu", torch.float32 if case == "products" else torch.bfloat16)
    ids = tokens(model.config, 2, 6)
    expected = read(CudaDecoder(model, 2, 6, options=EAGER), ids, 3)
    failing = lambda owner, inside: inside and (case != "dependent" or owner.options.dependent != "none")  # noqa: E731
    captures.fails = lambda owner, inside: RuntimeError("no such attribute") if failing(owner, inside) else None
    captures.at_the_end = at_the_end
    again = CudaDecoder(model, 2, 6)
    with pytest.warns(RuntimeWarning, match=r"^decoder: it goes on without ") as warned:
        found = read(again, ids, 3)
    assert torch.equal(found, expected)
    assert len(warned) == 1
    assert len(set(captures.pools)) == len(captures.pools) == attempts
    assert captures.said.count("_cuda_endAllocateToPool") == attempts - graphs
    assert again.options.graphs == graphs
    assert again.reason == reason
    assert again._step is not None
    choice.keep(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next_one = choice.make_decoder(model, 2, 6)
        assert next_one is again
        assert torch.equal(read(next_one, ids, 3), expected)
        assert again.reason == reason, "of the images that came after it, too"
        again.start(model, 1, 6)
        read(again, ids[:1], 3)
    assert len(captures.pools) == attempts + graphs, "what failed is not tried for other sizes"


def test_who_drew_is_said_with_its_reason(captures: Captures) -> None:
    """Also where that is found out in the middle."""
    model = make("cpu", n_layer=1)
    captures.fails = lambda owner, inside: RuntimeError("no such attribute") if inside else None
    context = torch.full((1, 1), model.config.sos_token_id)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        drawn = decode(model, context, RandomStreams(5, torch.arange(1), 0, 3), Sampling())
    assert drawn.engine == "cuda"
    assert str(drawn.reason).startswith("without CUDA graphs")


def test_an_error_of_the_step_itself(captures: Captures) -> None:
    """Which no other way mends."""
    model = make("cpu")
    captures.fails = lambda owner, inside: ZeroDivisionError("of its own")
    with pytest.raises(ZeroDivisionError):
        read(CudaDecoder(model, 2, 6), tokens(model.config, 2, 6), 3)
    captures.fails = lambda owner, inside: RuntimeError("of its own")
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"), pytest.raises(RuntimeError, match="of its own"):
        read(CudaDecoder(model, 2, 6), tokens(model.config, 2, 6), 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("join", [False, True])
def test_what_came_first_is_told(
    captures: Captures, error: type[BaseException], join: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that halves could not be joined after it, nor that the capture could not end."""
    parts, original = itertools.count(), CudaStep._compute_part

    def fails(*arguments: Any) -> Tensor:
        if next(parts) == (3 if join else 2):  # the first two are of the run before
            raise error("first")
        return original(*arguments)

    def cannot(_: object) -> None:
        raise RuntimeError("cannot join")

    monkeypatch.setattr(CudaStep, "_compute_part", fails)
    monkeypatch.setattr(torch.cuda.current_stream(None), "wait_stream", cannot)
    captures.at_the_end = True
    with pytest.raises(error):
        read(
            CudaDecoder(make("cpu", torch.float32), 4, 6, options=CudaOptions(halves=True)), torch.ones(4, 6).long(), 3
        )


def test_what_was_handled_before_is_no_cause(captures: Captures) -> None:
    """A decoder that is tried again where an error of the first is being handled."""
    model, ids = make("cpu", torch.float32), torch.ones(2, 6).long()
    captures.fails = lambda owner, inside: RuntimeError("no such attribute") if inside else None
    try:
        raise torch.OutOfMemoryError
    except torch.OutOfMemoryError:
        with pytest.warns(RuntimeWarning, match="without CUDA graphs.*no such attribute"):
            read(CudaDecoder(model, 2, 6), ids, 3)


def test_a_place_has_one_owner(emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams are made for it, and go to another when the owner is gone."""
    monkeypatch.setattr(capture, "_places", {})
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: address)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    current: list[object] = []

    @contextlib.contextmanager
    def guard(device: object) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: types.SimpleNamespace(device=current[-1]))
    device, owners = torch.device("cpu"), [torch.nn.Module() for _ in range(3)]
    one, two = (capture.take_place(device, owner) for owner in owners[:2])
    assert len({*one.streams, *two.streams}) == 4
    assert one.workspaces is not two.workspaces
    assert one.workspaces.device == two.workspaces.device == device
    del owners[0]
    assert capture.take_place(device, owners[1]) is one
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert capture.take_place(device, owners[1]).workspaces is None


@pytest.mark.parametrize("native", [True, False])
def test_workspaces_have_memory_of_their_own(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What products make on a place's streams comes from its pool, after all that may use it."""
    said: list[str] = []

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        said.append(name)
        yield

    for name in ("device", "stream", "use_mem_pool"):
        monkeypatch.setattr(torch.cuda, name, within)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    monkeypatch.setattr(torch, "addmm", lambda *_: said.append("product"))
    place: Any = capture.Place(("first", "second"), "pool" if native else None)  # type: ignore[arg-type]
    device: Any = torch.device("cpu")
    for count in (1, 2):
        said.clear()
        capture.make_workspaces(place, count, device, torch.bfloat16)
        each = [[name, *(["pool"] if native else []), "product"] for name in ("first", "second")[:count]]
        assert said == [device, "synchronize", *(word for words in each for word in words)]


def test_streams_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one waits for the last, once, and what it reads stays until it is done with it."""
    said: list[object] = []
    streams = [
        types.SimpleNamespace(cuda_stream=i, wait_stream=lambda other, i=i: said.append((i, other.cuda_stream)))
        for i in range(2)
    ]
    tensor = types.SimpleNamespace(record_stream=lambda stream: said.append(stream.cuda_stream))
    current = [0]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[current[0]])
    order = capture.Order()
    for current[0] in (0, 0, 1, 1, 0):
        order.follow(torch.device("cuda", 0), lambda: [tensor])
    assert said == [(1, 0), 1, (0, 1), 0]


def flags() -> Iterator[tuple[Callable[[Any], object], Any, Any]]:
    """What sets a flag, another value, and the one that it has."""
    matmul = torch.backends.cuda.matmul
    for dtype in ("fp16", "bf16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        yield lambda value, name=name: setattr(matmul, name, value), False, True
    if hasattr(matmul, "allow_fp16_accumulation"):
        yield lambda value: setattr(matmul, "allow_fp16_accumulation", value), True, False
    yield torch.use_deterministic_algorithms, True, False
    if torch.version.cuda:
        yield torch.backends.cuda.preferred_blas_library, "cublaslt", torch.backends.cuda.preferred_blas_library()
    yield torch.set_float32_matmul_precision, "high", "highest"


def test_a_graph_is_of_the_settings_that_it_was_captured_under(captures: Captures) -> None:
    """Those of torch that change numbers."""
    model = make("cpu", n_layer=1)
    ids = tokens(model.config, 1, 2)
    again = CudaDecoder(model, 1, 2)

    def captured() -> int:
        before = len(captures.pools)
        read(again, ids, 1)
        again.rest()
        again.start(model, 1, 2)
        return len(captures.pools) - before

    assert [captured(), captured()] == [1, 0]
    for set_flag, other, own in flags():
        try:
            set_flag(other)
            assert captured() == 1, set_flag
        finally:
            set_flag(own)
    assert [captured(), captured()] == [1, 0]
    again.options = replace(again.options, ring=False)
    assert captured() == 1


def test_what_is_kept_is_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of 24 GB iGPT-L at a batch of 1, and S at some twenty."""
    total = types.SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    position = 2 * 2 * 1024  # bf16 keys and values of n_positions
    assert 48 * 1536 * position < 20 * 24 * 512 * position < decoder.most_kept(torch.device("cuda", 0)) < 4 << 30


# ---- On a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "copies"), [(1, 1), (8, 1), (33, 1), (70, 1), (1, 4), (2, 9)])
def test_graphs_change_no_bit(rows: int, copies: int) -> None:
    """Nor do dependent launches; past every limit, with a graph for each. With torch's products by the rule."""
    model = make("cuda", n_positions=300, n_embd=128)
    ids = shared(rows, copies, 300, 5, model.config).cuda()
    results, exact = [], True
    for options in (CudaOptions(graphs=False, dependent="none"), CudaOptions(dependent="none"), CudaOptions()):
        found = CudaDecoder(model, rows, 300, options=options)
        results.append(read(found, ids, 5, copies))
        assert found._step is not None
        assert found.options == options, found.reason
        exact &= found._step.fused
        limits = found._step._limits if options.graphs else []
        assert list(found._step._graphs) == [(limit, 0) for limit in limits]
    for other in results[1:]:
        atol = 0.0 if exact else 0.05 * float(results[0].std())
        torch.testing.assert_close(other, results[0], rtol=0.0, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_graphs_draw_what_is_drawn_without(rows: int) -> None:
    """Bit for bit, for seeds and settings that one graph takes in turn."""
    model = make("cuda", n_positions=300, n_embd=128)
    context = tokens(model.config, rows, 5).cuda()
    plain = CudaOptions(graphs=False, dependent="none", drawing=False)
    again, other = (CudaDecoder(model, rows, 300, options=options) for options in (CudaOptions(), plain))
    for seed, settings in ((1 << 63, Sampling()), (2, Sampling(0.8, 9, 0.9)), (2, Sampling(temperature=0.0))):
        found, expected = (drawn_by(one, context, seed, settings, 296) for one in (again, other))
        assert again.options == CudaOptions(), again.reason
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        for one in (again, other):
            one.rest()
            one.start(model, rows, 300)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "copies"), [(65, 1), (1, 70), (3, 23)])
def test_halves_are_the_whole(rows: int, copies: int) -> None:
    """Replayed many times, as what one half writes shall not depend on how far the other is."""
    model = make("cuda", n_positions=300, n_embd=128)
    ids = shared(rows, copies, 300, 5, model.config).cuda()
    whole, *halves = (
        read(CudaDecoder(model, rows, 300, options=CudaOptions(halves=value)), ids, 5, copies)
        for value in (False, True, True)
    )
    assert torch.equal(*halves)
    torch.testing.assert_close(halves[0], whole, rtol=0.0, atol=0.05 * float(whole.std()))


@pytest.mark.gpu
def test_a_thousand_replays_are_the_same() -> None:
    """Races of dependent launches would show as bits that differ."""
    model = make("cuda", n_positions=1024, n_embd=512, n_head=8, n_layer=4, vocab_size=513)
    ids = tokens(model.config, 1, 1001).cuda()
    first = read(CudaDecoder(model, 1, 1001), ids, 1)
    assert torch.equal(read(CudaDecoder(model, 1, 1001), ids, 1), first)
    for dependent in ("none", "late"):
        options = CudaOptions(dependent=dependent)
        assert torch.equal(read(CudaDecoder(model, 1, 1001, options=options), ids, 1), first)


@pytest.mark.gpu
def test_drawing_does_not_wait() -> None:
    """torch raises where the host would wait for the device."""
    model = make("cuda", n_positions=300, n_embd=128)
    found = CudaDecoder(model, 4, 300)
    logits = found.prefill(torch.full((4, 1), model.config.sos_token_id, device="cuda"))
    streams, numbers = torch.arange(4, device="cuda"), torch.zeros(4, device="cuda")
    for _ in range(2):
        drawn, _ = found.draw(logits, numbers, (3, streams), Sampling(top_k=5), as_they_came=True)
        logits = found.step_drawn()
    logits = found.step(drawn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            drawn, _ = found.draw(logits, numbers, (3, streams), Sampling(top_k=5), as_they_came=True)
            logits = found.step_drawn()
            logits = found.step(drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(drawn.max()) < 40


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 66])
def test_threads_and_streams(rows: int) -> None:
    """Decoders of one model in threads, each on a stream of its own: what each reads alone."""
    model = make("cuda", n_embd=128)
    ids = [tokens(model.config, rows, 70, seed=i).cuda() for i in range(4)]
    alone = [read(CudaDecoder(model, rows, 70), part, 4) for part in ids]
    torch.cuda.synchronize()
    found: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[i] = read(CudaDecoder(model, rows, 70), ids[i], 4)
            torch.cuda.current_stream().synchronize()

    in_threads(*(lambda i=i: work(i) for i in range(4)))
    for got, expected in zip(found, alone, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


def in_threads(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=part) for part in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 66])
def test_steps_on_several_streams(rows: int) -> None:
    """One decoder, each step of it on another stream than the last, and its images' memory goes while they run."""
    model = make("cuda", n_embd=128)
    ids = tokens(model.config, rows, 70).cuda()
    expected = read(CudaDecoder(model, rows, 70), ids, 4)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found, logits = CudaDecoder(model, rows, 70), []
    with torch.no_grad():
        logits.append(found.prefill(ids[:, :4]))
        for t in range(4, 70):
            with torch.cuda.stream(streams[t % 3]):
                torch.cuda._sleep(100_000)  # the next one would be far ahead
                logits.append(found.step(ids[:, t]))
    del found
    junk = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert torch.equal(torch.stack(logits, dim=1), expected), len(junk)


@pytest.mark.gpu
def test_a_capture_beside_anothers_kernels() -> None:
    """Which another thread launches on as many of torch's streams as there are: none of them becomes part of it."""
    model = make("cuda", n_embd=128, n_positions=300)
    ids = tokens(model.config, 66, 300).cuda()
    expected = read(CudaDecoder(model, 66, 300, options=EAGER), ids, 4)
    counts, launched, done = torch.zeros(64, device="cuda"), [0] * 64, threading.Event()
    torch.cuda.synchronize()

    def count() -> None:
        streams = [torch.cuda.Stream() for _ in range(64)]
        while not done.is_set():
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    counts[i] += 1
                launched[i] += 1

    def draw() -> None:
        try:
            for _ in range(3):
                found = CudaDecoder(model, 66, 300)
                results.append(read(found, ids, 4))
                results[-1].sum().item()
                assert found.options == CudaOptions(), found.reason
        except Exception as error:
            results.append(error)
        finally:
            done.set()

    results: list[Any] = []
    in_threads(count, draw)
    torch.cuda.synchronize()
    assert len(results) == 3, results
    assert counts.tolist() == launched
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0.0, atol=0.05 * float(expected.std()))


@pytest.mark.gpu
def test_a_users_graph_and_ours_leave_each_other_alone() -> None:
    """The workspace of cuBLAS that a user's graph was captured with stays, and ours where others clear them all."""
    model = make("cuda", n_embd=128)
    ids = tokens(model.config, 66, 70).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(64, 1 << 16, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = (a @ b.T).clone()  # few outputs of many terms: parts of the sum stand in the workspace
    with torch.cuda.graph(graph, stream=stream):
        product = a @ b.T

    def replays() -> bool:
        with torch.cuda.stream(stream):
            junk = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
            graph.replay()
            same = torch.equal(product, expected)
            return same and all(bool(part.isnan().all()) for part in junk)

    found, logits = CudaDecoder(model, 66, 70), []
    with torch.no_grad():
        logits.append(found.prefill(ids[:, :4]))
        for t in range(4, 70):
            if t == 40:
                assert replays()
            logits.append(found.step(ids[:, t]))
    assert found.options == CudaOptions(), found.reason
    alone = torch.stack(logits, dim=1)
    again = CudaDecoder(model, 66, 70)
    with torch.no_grad():
        logits = [again.prefill(ids[:, :4])]
        for t in range(4, 70):
            if t == 40:
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()
            logits.append(again.step(ids[:, t]))
    assert torch.equal(torch.stack(logits, dim=1), alone)


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not be captured ends it, and torch's allocator and streams are as before; others are captured then."""
    model = make("cuda", n_embd=128)
    ids = tokens(model.config, 9, 8).cuda()
    original = CudaStep._compute_part
    expected = read(CudaDecoder(model, 9, 8, options=EAGER), ids, 3)

    def fails(self: CudaStep, *arguments: Any) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return original(self, *arguments)

    stream = torch.cuda.current_stream()
    found = CudaDecoder(model, 9, 8)
    with monkeypatch.context() as patch:
        patch.setattr(CudaStep, "_compute_part", fails)
        with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
            logits = read(found, ids, 3)
    assert torch.equal(logits, expected)
    assert "without CUDA graphs" in str(found.reason)
    assert torch.cuda.current_stream() == stream
    del found
    gc.collect()
    for _ in range(2):
        found = CudaDecoder(model, 9, 8)
        assert torch.equal(read(found, ids, 3), expected)
        assert found.options == CudaOptions(), found.reason


@pytest.mark.gpu
def test_large_caches_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 MB of them, as of iGPT-L at a batch of 1."""
    model = make("cuda", n_positions=1024, n_embd=1024, n_head=16, n_layer=8)
    ids, captured, original = tokens(model.config, 9, 6).cuda(), [], CudaStep._capture
    noted = lambda self, *arguments: (captured.append(arguments), original(self, *arguments))[1]  # noqa: E731
    monkeypatch.setattr(CudaStep, "_capture", noted)
    for _ in range(2):
        found = choice.make_decoder(model, 9, 1024)
        read(found, ids, 3)
        choice.keep(found)
    assert choice.kept_bytes(model) > 256 << 20
    assert len(captured) == 1
    choice.forget()
    assert backend.get_backend() == "auto"
