"""The CUDA decoder: the whole step on the emulated kernels, and on a GPU in CUDA graphs, against the reference."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from decoding import make, read, shared
from tolerance import assert_parity, tokens
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend, ops, reference
from igpt_fast.draws import Sampling
from igpt_fast.engines import choice, memory
from igpt_fast.engines.choice import keep, make_decoder
from igpt_fast.engines.cuda import decoder as cuda_decoder
from igpt_fast.engines.cuda import step as cuda_step
from igpt_fast.engines.cuda.decoder import CudaDecoder, why_not_cuda
from igpt_fast.engines.cuda.options import CudaOptions
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.sampling import decoding as generation
from igpt_fast.sampling import rules

DTYPES = [torch.bfloat16, torch.float16]


def assert_reads(
    model: ImageGPTForCausalImageModeling, ids: Tensor, primer: int, copies: int = 1, **options: Any
) -> None:
    """As the reference does, by the rule of tolerance.py."""
    rows, capacity = len(ids) // copies, ids.shape[1]
    decoder = make_decoder(model, rows, capacity)
    assert isinstance(decoder, CudaDecoder)
    if options:
        decoder = CudaDecoder(model, rows, capacity, options=CudaOptions(**options))
    ours = read(decoder, ids, primer, copies)
    with backend.use_backend("reference"):
        plain = read(ReferenceDecoder(model, rows, capacity), ids, primer, copies)
        exact = read(ReferenceDecoder(copy.deepcopy(model).double(), rows, capacity), ids, primer, copies)
    assert ours.dtype == plain.dtype
    assert_parity(ours, plain, exact)


@pytest.mark.parametrize("heads", [2, 1], ids=["dim32", "dim64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_reads_as_the_reference(device: str, rows: int, dtype: torch.dtype, heads: int) -> None:
    """From a primer on, past the position from which attention is launched in another way."""
    model = make(device, dtype, n_head=heads)
    assert_reads(model, tokens(model.config, rows, 68).to(device), 60, gemv_rows=8)


@pytest.mark.parametrize(
    ("rows", "copies", "parts"),
    [(8, 1, [4, 4]), (9, 1, [5, 4]), (33, 1, [17, 16]), (1, 5, [3, 2]), (3, 3, [6, 3]), (1, 1, [1])],
)
def test_halves(device: str, rows: int, copies: int, parts: list[int]) -> None:
    """Of the rows, or of the primers that they share, by kernels of few rows and by torch's products."""
    model = make(device, n_layer=1)
    ids = shared(rows, copies, 6, 3, model.config).to(device)
    for gemv_rows in (0, 64):
        assert_reads(model, ids, 3, copies, halves=True, gemv_rows=gemv_rows)
    decoder = CudaDecoder(model, rows, 6, options=CudaOptions(halves=True))
    read(decoder, ids, 3, copies)
    assert decoder._step is not None
    assert [part.images for part in decoder._step.parts] == parts


@pytest.mark.parametrize("rows", [1, 9])
def test_every_switch(device: str, rows: int) -> None:
    """Changes nothing that can be seen but time."""
    model = make(device, n_layer=1)
    ids = tokens(model.config, rows, 5).to(device)
    for name, values in {
        "dependent": ("none", "late"),
        "ring": (False,),
        "cluster": (False,),
        "drawing": (False,),
        "gemv_rows": (0, 1),
        "graphs": (False,),
    }.items():
        for value in values:
            assert_reads(model, ids, 3, **{name: value})


def test_when_there_are_halves() -> None:
    """By themselves from 64 rows on, where the products are torch's."""
    assert cuda_step.halved(CudaOptions(), 64, False)
    assert not cuda_step.halved(CudaOptions(), 64, True)
    assert not cuda_step.halved(CudaOptions(), 63, False)
    assert cuda_step.halved(CudaOptions(halves=True), 2, True)
    assert not cuda_step.halved(CudaOptions(halves=False), 999, False)
    part = lambda *bounds: cuda_step.Part(*(slice(*pair) for pair in bounds))  # noqa: E731
    assert cuda_step.split(12, 4, True) == [part((0, 6), (0, 2)), part((6, 12), (2, 4))]
    assert cuda_step.split(64, 1, True) == [part((0, 32), (0, 1)), part((32, 64), (0, 1))]


@pytest.mark.parametrize("fields", [{"activation_function": "gelu"}, {"vocab_size": 39}, {"n_inner": 24, "n_layer": 3}])
@pytest.mark.parametrize("rows", [2, 9])
def test_other_models(device: str, rows: int, fields: dict[str, object]) -> None:
    model = make(device, **fields)
    assert_reads(model, tokens(model.config, rows, 8).to(device), 1, gemv_rows=8)


@pytest.mark.parametrize("rows", [2, 9])
def test_float32(device: str, rows: int) -> None:
    model = make(device, torch.float32)
    assert_reads(model, tokens(model.config, rows, 8).to(device), 3)
    assert_reads(model, tokens(model.config, 2 * rows, 8).to(device), 3, copies=rows)


@pytest.mark.parametrize(("rows", "copies"), [(1, 1), (1, 3), (2, 4), (3, 3), (1, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fork(device: str, rows: int, copies: int, dtype: torch.dtype) -> None:
    """Continuations of a primer, which they share: up to 8 of them, and more."""
    model = make(device, dtype)
    assert_reads(model, shared(rows, copies, 17, 9, model.config).to(device), 9, copies)


@pytest.mark.parametrize("copies", [1, 3, 9])
@torch.no_grad()
def test_fork_after_steps(device: str, copies: int) -> None:
    model = make(device)
    ids = shared(1, copies, 12, 6, model.config).to(device)
    results = []
    for kind in (CudaDecoder, ReferenceDecoder):
        decoder = kind(model, 1, 12)
        logits = read(decoder, ids[:1, :6], 3)[:, -1]
        decoder.fork(copies)
        assert decoder.batch_size == copies
        stepped = [decoder.step(column) for column in ids[:, 6:].unbind(1)]
        results.append(torch.stack([logits.expand(copies, -1), *stepped], dim=1))
    torch.testing.assert_close(*results, rtol=0.0, atol=0.05 * float(results[1].std()))


@torch.no_grad()
def test_a_fork_follows_the_steps_before(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose values it reads, on a stream that may be another."""
    decoder = CudaDecoder(make(device), 1, 12, "fp8_values")
    decoder.prefill(torch.zeros(1, 2, dtype=torch.int64, device=device))
    decoder.step(torch.zeros(1, dtype=torch.int64, device=device))
    said, dequantize = [], cuda_decoder.dequantize_e4m3
    held = [decoder._step.keys.data_ptr(), decoder._step.values.data_ptr()]
    monkeypatch.setattr(decoder._order, "follow", lambda _, held: said.append([part.data_ptr() for part in held()]))
    noted = lambda *arguments: (said.append("read"), dequantize(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(cuda_decoder, "dequantize_e4m3", noted)
    decoder.fork(2)
    assert set(held) <= set(said[0])
    assert said[1:] == ["read"]


@pytest.mark.parametrize("rows", [1, 8, 9, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 1], ids=["dim32", "dim64"])
@torch.no_grad()
def test_draws_what_the_reference_draws(device: str, rows: int, dtype: torch.dtype, heads: int) -> None:
    """From what the reference has drawn before, but where a number falls into the rounding of the logits."""
    model = make(device, dtype, n_head=heads)
    context = torch.full((rows, 1), model.config.sos_token_id, device=device)
    uniforms = rules.stream_uniforms(5, torch.arange(rows), 0, 16, model.device)
    with backend.use_backend("reference"):
        expected = generation.decode(model, context, uniforms, rules.Sampling()).tokens
        sure = read(ReferenceDecoder(model, rows, 16), torch.cat([context, expected[:, :-1]], dim=1), 1)
    logits = read(CudaDecoder(model, rows, 16), torch.cat([context, expected[:, :-1]], dim=1), 1)
    drawn = ops.sample(logits.flatten(0, 1), uniforms.flatten()).view(rows, 16)
    boundaries, theirs = (part.double().softmax(dim=-1).cumsum(dim=-1) for part in (logits, sure))
    rounding = (boundaries - theirs).abs().amax(dim=-1)
    unsure = ((theirs - uniforms[..., None]).abs() <= rounding[..., None]).any(dim=-1)
    assert torch.equal(drawn[~unsure], expected[~unsure])
    assert int((drawn != expected).sum()) <= 1 + drawn.numel() // 10
    assert float(rounding.max()) < 0.02


@pytest.mark.parametrize("by_itself", [False, True])
def test_generation_draws_with_it(device: str, by_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way through, in float32, where rounding decides about one draw in a million."""
    model = make(device, torch.float32)
    context = tokens(model.config, 2, 5).to(device)
    streams, calls = rules.RandomStreams(5, torch.arange(6), 4, 12), []
    uniforms = streams if by_itself else streams.made(model.device)
    draw = CudaDecoder.draw
    noted = lambda *args, **more: (calls.append(args[3] is not None), draw(*args, **more))[1]  # noqa: E731
    monkeypatch.setattr(CudaDecoder, "draw", noted)
    made, calls_made = rules.RandomStreams.made, []
    noted_made = lambda *args: (calls_made.append(args), made(*args))[1]  # noqa: E731
    monkeypatch.setattr(rules.RandomStreams, "made", noted_made)
    sampling = rules.Sampling(0.9, 20, 0.95, 0.01)
    drawn = generation.decode(model, context, uniforms, sampling)
    assert calls == [by_itself] * 12
    assert calls_made == []  # by the host
    with backend.use_backend("reference"):
        expected = generation.decode(model, context, uniforms, sampling)
    assert len(calls_made) == by_itself  # all at once
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, rtol=0.0, atol=1e-4)


def test_generate_draws_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers of streams from the first pixel on, and greedily; another generator's come from the host."""
    model = make(device, torch.float32)
    calls: list[bool] = []
    draw = CudaDecoder.draw
    noted = lambda *args, **more: (calls.append(args[3] is not None), draw(*args, **more))[1]  # noqa: E731
    monkeypatch.setattr(CudaDecoder, "draw", noted)
    for options, drawn in (
        ({"do_sample": True, "seed": 3, "num_return_sequences": 3}, True),
        ({}, True),
        ({"do_sample": True, "generator": torch.Generator().manual_seed(1)}, False),
    ):
        calls.clear()
        with_it = model.generate(max_new_tokens=6, **options)
        assert calls == [drawn] * 6
        if "generator" in options:
            options["generator"].manual_seed(1)
        with backend.use_backend("reference"):
            assert torch.equal(model.generate(max_new_tokens=6, **options), with_it)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 0.0}])
def test_draws_on_the_device(device: str, settings: dict[str, float], copies: int) -> None:
    """``draw`` and ``step_drawn`` are ``sample`` on the streams' numbers, and ``step``."""
    model, seed, length = make(device), 1 << 63, 9
    ids, streams = tokens(model.config, 2, 4).to(device), torch.arange(7, 7 + 2 * copies, device=device)
    ids[:, 0] = model.config.sos_token_id
    decoder, other = (CudaDecoder(model, 2, length) for _ in range(2))
    logits = decoder.prefill(ids).repeat_interleave(copies, dim=0)
    assert torch.equal(other.prefill(ids).repeat_interleave(copies, dim=0), logits)
    decoder.fork(copies)
    other.fork(copies)
    for position in range(4, length + 1):
        uniform = reference.uniform(seed, streams.cpu(), position - 1, 1)[:, 0].to(device)
        drawn, logprobs = decoder.draw(
            logits[:, :37], torch.zeros_like(uniform), (seed, streams), Sampling(**settings), as_they_came=True
        )
        assert torch.equal(drawn, reference.sample(logits[:, :37], uniform, **settings))
        expected = torch.log_softmax(logits[:, :37].float(), dim=-1).gather(1, drawn[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-5)
        if position < length:
            logits = decoder.step_drawn()
            assert torch.equal(other.draw(logits[:, :37], uniform)[0], ops.sample(logits[:, :37], uniform))
            assert torch.equal(logits, other.step(drawn))
    with pytest.raises(ValueError, match="10 positions do not fit into capacity=9"):
        decoder.step(drawn)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", ["logits", "columns", "sampling", "seed", "streams", "numbers", "step"])
def test_what_was_drawn_ahead_is_drawn_again(device: str, change: str, inference: bool) -> None:
    """Where its logits have been written to, also where torch does not count that, or another draw is asked for."""
    with torch.inference_mode(inference):
        assert_draws_again(device, change)


def assert_draws_again(device: str, change: str) -> None:
    model, results, ahead = make(device, n_layer=1), [], -1
    context = tokens(model.config, 2, 3).to(device)
    for drawing in (True, False):
        decoder = CudaDecoder(model, 2, 9, options=CudaOptions(drawing=drawing))
        streams = torch.arange(2, device=device)
        logits, drawn = decoder.prefill(context)[:, :39], []
        seed, sampling = 3, Sampling()
        for t in range(7):
            numbers = torch.full((2,), 0.5, device=device)
            if t == 3 and change == "logits":
                ahead = int(decoder.history[0][0, 3]) if drawing else ahead
                logits[:, ahead] = -torch.inf
            logits = logits[:, :5] if t == 3 and change == "columns" else logits
            sampling = Sampling(temperature=0.0) if t == 3 and change == "sampling" else sampling
            seed = 4 if t == 3 and change == "seed" else seed
            streams = streams + 5 if t == 3 and change == "streams" else streams
            given = None if t == 3 and change == "numbers" else (seed, streams)
            as_they_came = t != 3 or change != "logits"
            both = decoder.draw(logits, numbers, given, sampling, as_they_came=as_they_came)
            drawn.append(torch.stack([part.double() for part in both]))
            if t < 6:
                logits = (decoder.step(context[:, 0]) if t == 3 and change == "step" else decoder.step_drawn())[:, :39]
        results.append(torch.stack(drawn))
    assert torch.equal(*results)


def test_what_was_left_is_not_drawn_over(device: str) -> None:
    """Images that nobody wants to the end, by those that come after them in the same memory."""
    model = make(device, n_layer=1)
    context = torch.full((2, 1), model.config.sos_token_id, device=device)
    drawn = generation.blank(2, 8, model.device)
    streams = rules.RandomStreams(5, torch.arange(2), 0, 8)
    steps = generation.decoding(drawn, model, context, streams, Sampling())
    assert [next(steps) for _ in range(4)] == [0, 1, 2, 3]
    before = drawn.tokens[:, :4].clone()
    steps.close()
    again = generation.decode(model, context, streams, Sampling())
    other = generation.decode(model, context, rules.RandomStreams(6, torch.arange(2), 0, 8), Sampling())
    assert not torch.equal(other.tokens[:, :4], before)
    assert torch.equal(drawn.tokens[:, :4], before)
    assert torch.equal(again.tokens[:, :4], before)


def test_what_a_callback_keeps_is_its_own(device: str) -> None:
    """Other images come in the same memory."""
    model, kept = make(device, n_layer=1), []
    context = torch.full((2, 1), model.config.sos_token_id, device=device)
    draw = lambda seed, note=None: generation.decode(  # noqa: E731
        model, context, rules.RandomStreams(seed, torch.arange(2), 0, 8), Sampling(), note
    )
    drawn = draw(5, lambda _, column: kept.append(column))
    assert not torch.equal(draw(6).tokens, drawn.tokens)
    assert torch.equal(torch.stack(kept, dim=1), drawn.tokens)


def test_weights_that_are_no_numbers(device: str) -> None:
    """Are told, though the device draws by itself."""
    model = make(device, n_layer=1)
    with torch.no_grad():
        model.transformer.wpe.weight[4] = torch.nan
    context = torch.full((2, 1), model.config.sos_token_id, device=device)
    with pytest.raises(FloatingPointError, match=r"image 0, position 4\)"):
        generation.decode(model, context, rules.RandomStreams(5, torch.arange(2), 0, 8), Sampling())


def test_misuse(device: str) -> None:
    model = make(device)
    decoder = CudaDecoder(model, 2, 4)
    ids = tokens(model.config, 2, 5).to(device)
    for call, message in (
        (lambda: CudaDecoder(model, 1, 71), r"capacity is 71; want 1\.\.70"),
        (lambda: decoder.step(ids[:, 0]), "nothing has been read"),
        (lambda: decoder.draw(torch.zeros(2, 40), torch.zeros(2)), "nothing has been read"),
        (lambda: decoder.fork(2), "nothing has been read"),
        (lambda: decoder.prefill(ids), "5 positions do not fit into capacity=4"),
        (lambda: decoder.prefill(ids[0]), r"tokens is \(5,\); want \(2, T\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    decoder.prefill(ids[:, :2])
    for call, message in (
        (decoder.step_drawn, "nothing was drawn"),
        (lambda: decoder.step(ids[:1, 0]), r"tokens is \(1,\) torch.int64 on .*; want \(2,\) int64"),
        (lambda: decoder.step(ids[:, 0].int()), "torch.int32"),
        (lambda: decoder.fork(0), "n=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    decoder.draw(decoder.step(ids[:, 2]), torch.zeros(2), (0, ids[:, 0]))
    decoder.fork(2)
    for call, message in ((lambda: decoder.fork(1), "forked before"), (decoder.step_drawn, "nothing was drawn")):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_rule(device: str) -> None:
    """What is not covered is said, and goes to the reference; a dtype that nothing offers is an error."""
    model = make(device)
    assert why_not_cuda(model) is None
    assert make_decoder(model, 1, 8).name == "cuda"
    reasons = {
        "head_dim is 16; want 32, 64, 96, 128": make(device, n_head=4),
        "n_inner 20; want multiples of 8": make(device, n_inner=20),
        "activation_function is 'relu'": make(device, activation_function="relu"),
        "the weights are torch.float64": make(device, torch.float64),
    }
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    reasons["c_fc has a hook"] = model
    for reason, other in reasons.items():
        assert reason in str(why_not_cuda(other))
        with pytest.raises(backend.BackendUnavailableError, match="decoder: "):
            CudaDecoder(other, 1, 8)
        assert make_decoder(other, 1, 8).name == "reference"
    with backend.use_backend("reference"):
        assert why_not_cuda(make(device)) == "the backend 'reference' is chosen"
    with pytest.raises(backend.BackendUnavailableError, match="dtype 'int8' is not available"):
        make_decoder(make(device), 1, 8, "int8")
    with torch.autocast(device, torch.bfloat16):
        assert why_not_cuda(make(device)) == "autocast is on"


def test_a_model_elsewhere() -> None:
    assert why_not_cuda(make("meta")) == "the model is on meta"
    assert why_not_cuda(make("cpu")) == "the model is on cpu"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that is made."""
    rows: list[int] = []
    original = cuda_step.CudaStep.__init__

    def counted(self: cuda_step.CudaStep, *arguments: object) -> None:
        rows.append(arguments[1])  # type: ignore[arg-type]
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_step.CudaStep, "__init__", counted)
    return rows


def again(model: ImageGPTForCausalImageModeling, ids: Tensor, primer: int, copies: int = 1) -> Tensor:
    """What generation's decoder reads, which it leaves to the model's next images."""
    decoder = make_decoder(model, len(ids) // copies, ids.shape[1])
    logits = read(decoder, ids, primer, copies)
    keep(decoder)
    return logits


def test_a_step_is_used_again(device: str, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next images of these sizes, which see nothing of what was there; else it goes, and large ones at once."""
    model = make(device)
    ids = shared(1, 3, 12, 5, model.config).to(device)
    first, other = (read(CudaDecoder(model, 1, 12), part, 5, 3) for part in (ids, ids.flip(1)))
    made.clear()
    for _ in range(2):
        assert torch.equal(again(model, ids, 5, 3), first)
        assert torch.equal(again(model, ids.flip(1), 5, 3), other)
    assert made == [3]
    again(model, ids, 5)
    assert made == [3, 3]  # without a primer to share
    again(model, ids, 5)
    assert made == [3, 3]
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert torch.equal(again(model, ids, 5, 3), 2 * first)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2.0)
    assert torch.equal(again(model, ids, 5, 3), 4 * first)
    assert made == [3, 3, 3, 3]
    monkeypatch.setattr(cuda_decoder, "most_kept", lambda device: 0)
    for _ in range(2):
        assert torch.equal(again(model, ids, 5, 3), 4 * first)
    assert made == [3, 3, 3, 3, 3]
    assert choice.kept_bytes(model) == 0


@pytest.mark.parametrize(("copies", "steps"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("dtype", [None, "fp8_cache"])
def test_a_step_is_used_in_inference_mode_and_outside(
    device: str, made: list[int], copies: int, steps: int, dtype: str | None
) -> None:
    """Whichever was first, also of a primer that was read in steps."""
    model, results = make(device, n_layer=1), []
    ids = shared(1, copies, 12, 5 + steps, model.config).to(device)
    for inference in (True, False, True):
        with torch.inference_mode(inference), torch.no_grad():
            decoder = make_decoder(model, 1, 12, dtype)
            decoder.prefill(ids[:1, :5])
            for t in range(5, 5 + steps):
                decoder.step(ids[:1, t])
            decoder.fork(copies)
            results.append(torch.stack([decoder.step(ids[:, t]) for t in range(5 + steps, 12)]))
            keep(decoder)
    assert made == ([1, 3, 1, 3, 1, 3] if steps else [copies])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("copies", "rows", "length"), [(3, 2, 12), (3, 1, 13), (1, 2, 12), (1, 1, 13)])
def test_a_step_that_cannot_serve_goes_first(device: str, copies: int, rows: int, length: int) -> None:
    """Before the next images' memory is taken, not after what they have read."""
    model = make(device)
    again(model, shared(1, copies, 12, 5, model.config).to(device), 5, copies)
    decoder = make_decoder(model, 1, 12)
    assert isinstance(decoder, CudaDecoder)
    assert decoder._spare is not None
    decoder.start(model, rows, length)
    assert decoder._spare is None


def test_what_is_kept_has_one_owner(device: str, made: list[int]) -> None:
    """Whoever decodes takes it out, another one meanwhile has its own, and another kind of decoder drops it."""
    model = make(device)
    ids = tokens(model.config, 2, 6).to(device)
    again(model, ids, 3)
    one, two = (make_decoder(model, 2, 6) for _ in range(2))
    assert torch.equal(read(one, ids, 3), read(two, ids, 3))
    assert made == [2, 2]
    keep(one)
    assert choice.kept_bytes(model) > 0
    model.transformer.register_forward_hook(lambda *_: None)
    assert make_decoder(model, 2, 6).name == "reference"
    assert choice.kept_bytes(model) == 0


def as_on_a_gpu(patch: pytest.MonkeyPatch, free: int) -> None:
    """For the plan of memory, whether the compiled module has a CUDA part or not."""
    patch.setattr(cuda_decoder, "no_cuda_decoder", lambda device: None)
    patch.setattr(ImageGPTForCausalImageModeling, "device", torch.device("cuda", 0))
    for name, value in (("mem_get_info", (free, 1 << 31)), ("memory_reserved", 1 << 20), ("memory_allocated", 0)):
        patch.setattr(torch.cuda, name, lambda _, value=value: value)
    segment = {"device": 0, "segment_pool_id": (0, 0), "total_size": 1 << 20, "allocated_size": 1 << 18}
    graphs = segment | {"segment_pool_id": (0, 3)}
    patch.setattr(torch.cuda, "memory_snapshot", lambda: [segment, graphs, graphs | {"device": 1}])
    patch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")


def test_a_step_is_used_again_by_a_pipeline(emulation, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which plans by what is free, and that is, too."""
    from igpt_fast import ImageGPTImageProcessor, Pipeline

    def planned(*arguments: object) -> int | None:
        with monkeypatch.context() as patch:
            as_on_a_gpu(patch, 1 << 30)
            return memory.most_images(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("igpt_fast.pipeline.most_images", planned)
    clusters = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).numpy()
    size = {"height": 3, "width": 3}
    pipeline = Pipeline(make("cpu", n_positions=9), ImageGPTImageProcessor(clusters=clusters, size=size))
    first, second = (pipeline.sample(8, seed=1) for _ in range(2))
    assert made == [8]
    assert torch.equal(first.tokens, second.tokens)
    kept = choice.kept_bytes(pipeline.model)
    assert kept == 8 * memory.cache_bytes(pipeline.model)
    plans = []
    for there in (kept, 0):
        with monkeypatch.context() as patch:
            as_on_a_gpu(patch, (1 << 30) - there)
            plans.append(memory.most_images(pipeline.model))
        choice._kept.clear()
    assert plans[0] == plans[1]


def test_a_step_that_is_kept_keeps_no_weights(device: str) -> None:
    model = make(device)
    ids = tokens(model.config, 2, 6).to(device)
    again(model, ids, 3)
    assert choice.kept_bytes(model) > 0
    weights = StorageWeakRef(model.transformer.h[0].mlp.c_fc.weight.untyped_storage())
    model.float()
    assert weights.expired()


def test_a_step_that_is_kept_is_of_the_weights_as_they_are(device: str, made: list[int]) -> None:
    """The same memory read in another order is another network, for a graph has the strides."""
    model = make(device)
    ids = tokens(model.config, 2, 6).to(device)
    again(model, ids, 3)
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.T
    assert_reads(model, ids, 3)
    assert made == [2, 2]


def test_decoders_side_by_side(device: str) -> None:
    model = make(device)
    ids = tokens(model.config, 4, 8).to(device)
    alone = [read(CudaDecoder(model, 2, 8), part, 3) for part in ids.split(2)]
    pair = [CudaDecoder(model, 2, 8) for _ in range(2)]
    together = [[decoder.prefill(part[:, :3])] for decoder, part in zip(pair, ids.split(2), strict=True)]
    for t in range(3, 8):
        for decoder, part, logits in zip(pair, ids.split(2), together, strict=True):
            logits.append(decoder.step(part[:, t]))
    assert all(torch.equal(torch.stack(a, 1), b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("order", ["random", "skewed"])
def test_the_same_bits_under_every_schedule(emulation, order: str) -> None:
    model = make("cpu")
    ids = shared(1, 3, 12, 7, model.config)
    expected = read(CudaDecoder(model, 1, 12), ids, 7, 3)
    emulation.schedule(order, 1)
    assert torch.equal(read(CudaDecoder(model, 1, 12), ids, 7, 3), expected)


def test_launches_for_short_positions_have_fewer_parts(emulation) -> None:
    model = make("cpu", n_positions=300)
    step = CudaDecoder(model, 1, 300)
    step.prefill(torch.zeros(1, 1, dtype=torch.int64))
    launches = []
    for _ in range(2):
        emulation.module.reset_counters()
        step.step(torch.zeros(1, dtype=torch.int64))
        launches.append(emulation.module.counters()["launches"])
    assert launches == [11, 11]  # five a layer, one for the head
    assert step._step is not None
    assert step._step._limits == [64, 256, 300]


# ---- Memory -----------------------------------------------------------------------------------------------------


def test_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("cpu")
    assert memory.most_images(model) is None
    as_on_a_gpu(monkeypatch, 1 << 30)
    graphs = (1 << 20) - (1 << 18)  # what idles in their pool is no other's
    room = int(0.9 * ((1 << 30) + (1 << 20) - graphs)) - memory.WORKSPACE_BYTES
    assert memory.most_images(model) == room // memory.image_bytes(model)
    assert memory.image_bytes(model) > memory.cache_bytes(model) + 36 * 70
    assert memory.cache_bytes(model) == 2 * 2 * 70 * 64 * 2
    assert memory.image_bytes(model, primer=35, copies=8) < memory.image_bytes(model, primer=35)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    assert memory.most_images(model) == 0


def test_memory_alone_bounds_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """iGPT-S in bfloat16, as much as an H200 has free: far more than 256, whose caches and tokens fit."""
    from igpt_fast import Pipeline

    sizes = {"n_layer": 24, "n_head": 8, "n_embd": 512, "n_positions": 1024, "vocab_size": 513}
    with torch.device("meta"):
        model = ImageGPTForCausalImageModeling(ImageGPTConfig(**sizes)).to(torch.bfloat16)
    as_on_a_gpu(monkeypatch, 139 << 30)
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.model = model
    size = pipeline.default_batch_size()
    assert 2000 < size <= 0.9 * (139 << 30) / (memory.cache_bytes(model) + 12 * 1024)
    assert pipeline.default_batch_size(guided=True) == size // 2


def test_continuations_take_less_memory(emulation) -> None:
    """Of a model that the CUDA decoder serves: one primer for all in bf16, a copy each in fp32."""
    model = make("cpu")
    assert memory.cache_bytes(model, None, 35, 5) == 2 * 2 * 64 * 2 * (35 + 7)
    assert memory.cache_bytes(model.float(), None, 35, 5) == 2 * 2 * 64 * 4 * 70


@pytest.mark.gpu
def test_the_plan_of_memory_holds() -> None:
    """A decoder takes no more than planned, and no memory is left behind."""
    model = make("cuda", n_positions=1024, n_embd=512, n_head=8, n_layer=8, vocab_size=513)
    ids = tokens(model.config, 16, 516).cuda()
    for primer, copies in ((1, 1), (512, 1), (512, 4)):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decoder = CudaDecoder(model, 16 // copies, 1024)
        read(decoder, ids[:, : primer + 3], primer, copies)
        used = torch.cuda.max_memory_allocated() - before
        planned = 16 * memory.image_bytes(model, None, primer, copies) + memory.WORKSPACE_BYTES
        assert 16 * memory.cache_bytes(model, None, primer, copies) <= used <= planned, (primer, copies)
        del decoder
        gc.collect()
        assert torch.cuda.memory_allocated() <= before + (128 << 20), "workspaces of libraries stay, caches do not"
