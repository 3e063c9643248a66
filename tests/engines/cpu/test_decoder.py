"""CpuDecoder: equal to the uncached forward on every instruction set, with any number of threads, sequences and
positions; its precision; its limits; what it does beside other threads, after a fork and where it is not for.
"""

import copy
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from small_models import exact_and_plain, ids, rounded_to_int8, small, stepped
from tolerance import assert_parity
from torch import Tensor, nn

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend, environment
from igpt_fast.draws import Sampling
from igpt_fast.engines.choice import make_decoder
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu.decoder import CpuDecoder, why_not_cpu
from igpt_fast.engines.reference import ReferenceDecoder
from igpt_fast.files import BUNDLED
from igpt_fast.ops.activation import KERNELS
from igpt_fast.pipeline import Pipeline
from igpt_fast.sampling.decoding import decode

pytestmark = pytest.mark.skipif(backend._C is None, reason=backend.native_reason)


# Every option that the kernels know, and sizes that fill no tile: heads of 8, 24 and 40, 3 heads on 2 threads.
CONFIGS = {
    "plain": {},
    "gelu": {"activation_function": "gelu", "n_embd": 64, "n_head": 8, "vocab_size": 131},
    "gelu_new": {"activation_function": "gelu_new", "n_embd": 80, "n_head": 2, "n_inner": 56},
    "scales": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_embd": 144, "n_head": 3},
    "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "layer_norm_epsilon": 0.1},
    "wide": {"n_embd": 256, "n_head": 1, "n_layer": 1, "n_inner": 1200},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_forward(isa: str, fields: dict, dtype: torch.dtype) -> None:
    """By the rule of tolerance.py, through all positions, with every number of threads and sequences alike."""
    model = small(dtype, **fields)
    for batch, threads in ((1, 1), (2, 2), (3, 1), (8, 1)):
        torch.set_num_threads(threads)
        tokens = ids(model, batch, 70 if threads == 1 else 20)
        exact, plain = exact_and_plain(model, tokens)
        assert_parity(stepped(CpuDecoder(model, batch, 70), tokens), plain, exact, f"batch {batch}, threads {threads}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_long_contexts(isa: str, dtype: torch.dtype, batch: int) -> None:
    """Beyond the 256 positions that attention takes at a time, and beyond a tile after that."""
    model = small(dtype, n_positions=600, n_layer=1)
    tokens = ids(model, batch, 600)
    exact, plain = exact_and_plain(model, tokens)
    assert_parity(stepped(CpuDecoder(model, batch, 600), tokens), plain, exact)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_int8_is_the_rounding_of_the_weights(isa: str, batch: int) -> None:
    """At the first position, where softmax is 1 and a value's rounding the only other one, and later ones."""
    model = small(n_layer=3, n_embd=144, n_head=3, n_inner=328)
    tokens = ids(model, batch, 70)
    with torch.no_grad():
        exact = rounded_to_int8(model)(tokens).logits
    got = stepped(CpuDecoder(model, batch, 70, "int8"), tokens)
    # Keys and values have 8 bits as well; 15 bits of activations would not be seen.
    error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.005, float(error)
    assert (got - model(tokens).logits).abs().max() > 1e-3  # it is not the model itself


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_threads_and_batches_do_not_change_the_result(isa: str, dtype: str | None) -> None:
    model = small(n_embd=96, n_head=3)
    tokens = ids(model, 4, 30)
    want = stepped(CpuDecoder(model, 4, 80, dtype), tokens)
    for threads in (2, 3):  # heads divide among three
        torch.set_num_threads(threads)
        assert torch.equal(stepped(CpuDecoder(model, 4, 80, dtype), tokens), want)
    alone = torch.cat([stepped(CpuDecoder(model, 1, 80, dtype), row[None]) for row in tokens])
    if dtype is None:  # so the same pictures come of any batch
        assert torch.equal(alone, want)
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_a_primer_and_what_follows(isa: str, dtype: str | None, length: int) -> None:
    model = small()
    tokens = ids(model, 2, 80)
    whole, primed = CpuDecoder(model, 2, 80, dtype), CpuDecoder(model, 2, 80, dtype)
    with torch.no_grad():
        want = model(tokens).logits if dtype is None else stepped(whole, tokens)
    first = primed.prefill(tokens[:, :length])
    rest = [primed.step(column) for column in tokens[:, length:].unbind(1)]
    got = torch.stack([first, *rest], dim=1)
    tolerance = 2e-4 if dtype is None else 0.05  # int8: the primer was read in float32
    assert (got - want[:, length - 1 :]).abs().max() <= tolerance * want.abs().max()
    # A second primer follows the first.
    twice = CpuDecoder(model, 2, 80, dtype)
    twice.prefill(tokens[:, :length])
    torch.testing.assert_close(twice.prefill(tokens[:, length : length + 3]), got[:, 3], rtol=1e-4, atol=1e-4)


# ---- Precision on a trained model and on weights of S's kind ------------------------------------------------


def nats(logits: Tensor, targets: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()))


def test_nats_per_pixel_of_held_out_emoji() -> None:
    model = ImageGPTForCausalImageModeling.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    with np.load(BUNDLED.parent / "emoji16.npz") as file:
        pixels = torch.from_numpy(file["tokens"][file["heldout"]][::32].astype(np.int64)).reshape(-1, 256)
    tokens = nn.functional.pad(pixels[:, :-1], (1, 0), value=128)
    with torch.no_grad():
        want = nats(model(tokens).logits, pixels)
    assert 0.8 < want < 1.5  # it is the trained model
    fp32 = nats(stepped(CpuDecoder(model, len(tokens), 256), tokens), pixels)
    int8 = nats(stepped(CpuDecoder(model, len(tokens), 256, "int8"), tokens), pixels)
    bf16 = nats(stepped(CpuDecoder(model.bfloat16(), len(tokens), 256), tokens), pixels)
    assert abs(fp32 - want) < 1e-5
    assert abs(bf16 - want) < 0.002
    assert abs(int8 - want) < 0.005
    assert int8 != fp32


def test_divergence_of_int8_on_seeded_weights() -> None:
    """KL(fp32 || int8) per token, with the width, heads and head_dim of S."""
    torch.manual_seed(0)
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(n_layer=4, n_positions=128)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.1)  # 0.02 gives all colours nearly the same probability
        tokens = ids(model, 2, 96)
        want = torch.log_softmax(model(tokens).logits, dim=-1)
    got = torch.log_softmax(stepped(CpuDecoder(model, 2, 96, "int8"), tokens), dim=-1)
    divergence = (want.exp() * (want - got)).sum(-1).mean()
    entropy = -(want.exp() * want).sum(-1).mean()
    assert entropy < 5.0
    assert 0 < divergence < 1e-3, float(divergence)


# ---- Generation ---------------------------------------------------------------------------------------------


def test_draws_equal_those_of_torch() -> None:
    """The bundled model, whole images: float32 moves a draw about once in 10^6 pixels."""
    model = ImageGPTForCausalImageModeling.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    context = torch.full((2, 1), 128)
    uniforms = torch.rand(2, 256, generator=torch.Generator().manual_seed(5))
    sampling = Sampling(temperature=0.9, top_p=0.95)
    assert isinstance(make_decoder(model, 2, 256), CpuDecoder)
    ours = decode(model, context, uniforms, sampling)
    with backend.use_backend("reference"):
        assert isinstance(make_decoder(model, 2, 256), ReferenceDecoder)
        theirs = decode(model, context, uniforms, sampling)
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=1e-3)


def test_int8_is_asked_for_by_name() -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    plain, int8 = pipeline.sample(2, seed=3), pipeline.sample(2, seed=3, dtype="int8")
    assert (plain.settings["dtype"], int8.settings["dtype"]) == ("float32", "int8")
    assert not torch.equal(plain.logprobs, int8.logprobs)
    done = pipeline.complete([plain.images[0]], keep=0.9, n=2, seed=1, dtype="int8")
    assert len(done) == 2
    model = small()
    options = {"do_sample": True, "seed": 1, "dtype": "int8"}
    assert torch.equal(model.generate(**options), model.generate(**options))
    for name in ("int4", "float32", 8):
        with pytest.raises(ValueError, match="want None, which is the model's, 'int8', 'fp8_values' or 'fp8_cache'"):
            model.generate(dtype=name)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dtype"):
            pipeline.sample(dtype=name)  # type: ignore[arg-type]


def test_int8_is_never_something_else() -> None:
    model = small()
    with backend.use_backend("reference"), pytest.raises(backend.BackendUnavailableError, match=r"int8.*'reference'"):
        model.generate(dtype="int8")
    with pytest.raises(backend.BackendUnavailableError, match=r"int8.*relu"):
        small(activation_function="relu").generate(dtype="int8")
    assert model.half().generate(dtype="int8").shape == (1, 81)  # from weights of any floating-point dtype


def test_weights_are_those_of_the_call() -> None:
    """A decoder is made for every generation: between two of them, training may go on, by whatever means."""
    model = small()
    before = model.generate()
    for parameter in model.parameters():
        parameter.data = parameter.data * -1.3
    after = model.generate()
    assert not torch.equal(before, after)
    with backend.use_backend("reference"):
        assert torch.equal(after, model.generate())
    # One that is at work keeps the weights it was made with.
    decoder, tokens = CpuDecoder(model, 1, 4), ids(model, 1, 4)
    want = model(tokens).logits
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(stepped(decoder, tokens), want, rtol=1e-3, atol=1e-3)


# ---- Limits and misuse --------------------------------------------------------------------------------------


def test_capacity_and_arguments() -> None:
    model = small()
    for capacity in (0, 81):
        with pytest.raises(ValueError, match="capacity"):
            CpuDecoder(model, 1, capacity)
    decoder = CpuDecoder(model, 2, 3)
    with pytest.raises(ValueError, match="4 positions do not fit into capacity=3"):
        decoder.prefill(torch.zeros(2, 4, dtype=torch.int64))
    decoder.prefill(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="fit"):
        decoder.step(torch.zeros(2, dtype=torch.int64))
    decoder = CpuDecoder(model, 2, 3)
    for tokens in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"want \(2,\) int64"):
            decoder.step(tokens)
    for token in (-1, 17):
        with pytest.raises(ValueError, match=rf"token {token} is not in 0..16"):
            decoder.step(torch.tensor([0, token]))
    with pytest.raises(ValueError, match="T >= 1"):
        decoder.prefill(torch.zeros(2, 0, dtype=torch.int64))
    # None of these moved it.
    tokens = ids(model, 2, 3)
    torch.testing.assert_close(stepped(decoder, tokens), model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_primers_numbers_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Nine short ones, each as alone: what a forward pass would leave to torch's layers, which round otherwise."""
    model = small(dtype)
    tokens = ids(model, 9, 5)
    assert forwards.why_not(model.transformer.requires_grad_(False), tokens) is not None
    together = CpuDecoder(model, 9, 6)
    got = together.prefill(tokens)
    for i, row in enumerate(tokens):  # the head is one product of all images
        torch.testing.assert_close(CpuDecoder(model, 1, 6).prefill(row[None])[0], got[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_are_float32_by_any_default(dtype: torch.dtype) -> None:
    model = small()
    tokens = ids(model, 1, 3)
    want = stepped(CpuDecoder(model, 1, 8), tokens)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(stepped(CpuDecoder(model, 1, 8), tokens), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_configuration_that_changes_later() -> None:
    """What a decoder reads and writes stays as long as it was when it was made."""
    model = small()
    tokens = ids(model, 1, 3)
    want = stepped(CpuDecoder(model, 1, 8), tokens)
    decoder = CpuDecoder(model, 1, 8)
    model.config.vocab_size = 9
    assert torch.equal(stepped(decoder, tokens), want)
    decoder = CpuDecoder(small(), 1, 8)
    decoder.model = small(n_head=6)
    with pytest.raises(ValueError, match="changed its shape"):
        decoder.prefill(tokens)


def test_nothing_that_is_not_finite_is_hidden(isa: str) -> None:
    """A NaN in the weights reaches the logits, in int8 too, where integers know none."""
    for dtype in (None, "int8"):
        for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"):
            model = small()
            with torch.no_grad():
                model.get_parameter(name).view(-1)[5] = torch.nan
            logits = stepped(CpuDecoder(model, 1, 2, dtype), torch.zeros(1, 2, dtype=torch.int64))
            assert logits.isnan().any(), (dtype, name)


class Other(nn.Dropout):
    pass


def hooked(model: ImageGPTForCausalImageModeling) -> None:
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)


def replaced(model: ImageGPTForCausalImageModeling) -> None:
    model.transformer.h[1].attn.resid_dropout = Other(0.0)


def overridden(model: ImageGPTForCausalImageModeling) -> None:
    model.transformer.h[1].forward = model.transformer.h[1].forward


def mixed(model: ImageGPTForCausalImageModeling) -> None:
    model.transformer.wte.bfloat16()


@pytest.mark.parametrize(
    ("fields", "change", "reason"),
    [
        ({"activation_function": "relu"}, None, "activation_function is 'relu'"),
        ({"n_embd": 40}, None, "head_dim is 20|n_embd is 40"),
        ({"n_embd": 48, "n_head": 4}, None, "head_dim is 12"),
        ({"n_embd": 320, "n_head": 1}, None, "head_dim is 320"),
        ({"n_inner": 100}, None, "n_inner is 100"),
        ({}, hooked, "hook"),
        ({}, replaced, "transformer.h.1.attn.resid_dropout is a .*Other"),
        ({}, overridden, "forward of its own"),
        ({}, mixed, "torch.bfloat16, torch.float32"),
        ({}, lambda model: model.set_input_embeddings(nn.Embedding(9, 48)), "a weight has another shape"),
        ({}, lambda model: setattr(model, "lm_head", nn.Linear(48, 12, bias=False)), "lm_head is"),
        ({}, lambda model: setattr(model.transformer.ln_f, "eps", 1e-3), "a norm or an activation"),
        ({}, lambda model: setattr(model.transformer.h[0].attn, "n_head", 4), "heads"),
        ({}, lambda model: setattr(model.transformer.h[0].attn, "scale", 1e-39), "scale of the scores"),
        ({}, lambda model: model.double(), "torch.float64"),
        ({}, lambda model: model.to("meta"), "meta"),
    ],
)
def test_what_goes_to_torch(fields: dict, change: object, reason: str) -> None:
    """By a written rule, whose reason the decoder itself gives when it is asked for."""
    model = small(**fields)
    if change is not None:
        change(model)  # type: ignore[operator]
    with pytest.raises(backend.BackendUnavailableError, match=reason):
        CpuDecoder(model, 1, 8)
    if model.device.type == "cpu":
        assert isinstance(make_decoder(model, 1, 8), ReferenceDecoder)


def test_autocast_goes_to_torch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_cpu(small()) == "autocast is on"


def test_every_activation_of_the_rule_agrees() -> None:
    for name in KERNELS:
        model = small(activation_function=name)
        tokens = ids(model, 1, 5)
        torch.testing.assert_close(stepped(CpuDecoder(model, 1, 5), tokens), model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_show_config_names_it() -> None:
    live = environment.config()["decoders"]["cpu"]
    assert live["runs"] == f"native ({backend._C.cpu_isa()})"
    with backend.use_backend("reference"):
        assert environment.config()["decoders"]["cpu"] == {
            "runs": "none",
            "reason": "the backend 'reference' is chosen",
        }


# ---- Threads and processes ----------------------------------------------------------------------------------


@pytest.mark.clock
def test_more_threads_than_cores() -> None:
    """The barrier lets others run: two cores may have four threads of ours to serve."""
    model = small(n_embd=128, n_head=4)
    tokens = ids(model, 1, 40)
    want = stepped(CpuDecoder(model, 1, 40), tokens)
    torch.set_num_threads(4 * (os.cpu_count() or 1))
    start = time.monotonic()
    assert torch.equal(stepped(CpuDecoder(model, 1, 40), tokens), want)
    assert time.monotonic() - start < 60


def test_two_decoders_in_two_threads() -> None:
    """At once, with the lock of Python released; each with a team of threads of its own."""
    models = [small(seed=seed) for seed in (1, 2)]
    tokens = ids(models[0], 2, 80)
    want = [stepped(CpuDecoder(model, 2, 80), tokens) for model in models]
    got: list[list[Tensor]] = [[], []]

    def work(which: int) -> None:
        torch.set_num_threads(2)
        for _ in range(3):
            got[which].append(stepped(CpuDecoder(models[which], 2, 80), tokens))

    threads = [Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for which in range(2):
        assert len(got[which]) == 3
        assert all(torch.equal(result, want[which]) for result in got[which])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_after_a_fork() -> None:
    """OpenMP's threads stay in the parent; the child decodes alone, with a decoder from before too."""
    torch.set_num_threads(2)
    model = small()
    tokens = ids(model, 1, 10)
    decoder = CpuDecoder(model, 1, 20)
    first = stepped(decoder, tokens)
    want = stepped(CpuDecoder(model, 1, 10), tokens)
    child = os.fork()
    if child == 0:
        same = torch.equal(stepped(CpuDecoder(model, 1, 10), tokens), want)
        finite = bool(stepped(decoder, tokens).isfinite().all())
        os._exit(0 if same and finite and torch.equal(first, want) else 3)
    deadline = time.monotonic() + 60
    status = 0
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_its_memory_is_given_back() -> None:
    """Weights and caches of finished decoders do not pile up."""
    if not Path("/proc/self/statm").exists():
        pytest.skip(f"no /proc on {sys.platform}")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = small(n_embd=512, n_head=8, n_layer=3)
    CpuDecoder(model, 1, 8).step(torch.zeros(1, dtype=torch.int64))
    before = resident()
    for _ in range(6):
        CpuDecoder(model, 1, 8).step(torch.zeros(1, dtype=torch.int64))
    assert resident() - before < 40 << 20  # one set of weights has 38 MB


def test_float16_is_that_model_in_float32(isa: str) -> None:
    """Packed wider: the same bits, drawn on the engine, and cached as wide."""
    half = small(torch.float16)
    single = copy.deepcopy(half).float()
    tokens = ids(half, 2, 12)
    assert make_decoder(half, 2, 20).name == "cpu"
    got = stepped(CpuDecoder(half, 2, 20), tokens)
    assert got.dtype == torch.float32
    assert torch.equal(got, stepped(CpuDecoder(single, 2, 20), tokens))
    assert CpuDecoder.position_bytes(half, None) == CpuDecoder.position_bytes(single, None)
    assert CpuDecoder.position_bytes(half, "int8") == CpuDecoder.position_bytes(single, "int8")
    uniform = torch.rand(2, 20)
    drawn = [decode(model, tokens[:, :1], uniform, Sampling()).tokens for model in (half, single)]
    assert torch.equal(*drawn)


def test_a_float16_primer_is_read_in_float32(isa: str) -> None:
    """Nothing of it is rounded to float16 on the way to the cache; a forward pass alone is, in the end."""
    half = small(torch.float16)
    single = copy.deepcopy(half).float()
    tokens = ids(half, 2, 30)
    decoders = CpuDecoder(half, 2, 40), CpuDecoder(single, 2, 40)
    assert torch.equal(*(decoder.prefill(tokens) for decoder in decoders))
    assert torch.equal(*(decoder.step(tokens[:, 0]) for decoder in decoders))
    with torch.no_grad():
        got, want = (model.transformer(tokens, use_cache=True) for model in (half, single))
    assert torch.equal(got.last_hidden_state, want.last_hidden_state.half())
    assert torch.equal(list(got.past_key_values)[1][0], list(want.past_key_values)[1][0].half())
