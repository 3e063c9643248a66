"""causal_attention's CPU kernels where their blocks end: lengths, masks, memory around the tensors, threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import contract
import pytest
import torch
from implementations import ISAS, Implementation, isas_of
from torch import Tensor

from igpt_fast import backend, environment, ops
from igpt_fast.ops.causal_attention import LEAST_QUERIES

FP32, BF16 = torch.float32, torch.bfloat16
REGISTERED = torch.ops.igpt_fast
pytestmark = [
    pytest.mark.parametrize("native_cpu", isas_of("causal_attention"), indirect=True),
    pytest.mark.parametrize("dtype", [FP32, BF16]),
]


def make(t_q: int, t_k: int, d: int, dtype: torch.dtype, b: int = 2, h: int = 2) -> list[Tensor]:
    return [torch.randn(b, h, t, d).to(dtype) for t in (t_q, t_k, t_k)]


def attending(starts: Tensor | None = None, key_mask: Tensor | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: ops.causal_attention(q, k, v, starts=starts, key_mask=key_mask)[0]


@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize(("t_q", "t_k"), [(33, 33), (64, 95), (257, 300)])
def test_lengths(native_cpu: Implementation, dtype: torch.dtype, t_q: int, t_k: int, d: int) -> None:
    """Around strips of 32, keys by 64, 128 and 256, queries by 128; heads."""
    contract.check_parity(native_cpu, attending(), make(t_q, t_k, d, dtype))


@pytest.mark.parametrize(("t_q", "t_k"), [(31, 31), (97, 97), (127, 128), (129, 160), (255, 255), (500, 555)])
def test_more_lengths(native_cpu: Implementation, dtype: torch.dtype, t_q: int, t_k: int) -> None:
    contract.check_parity(native_cpu, attending(), make(t_q, t_k, 64, dtype))


@pytest.mark.parametrize(("t_q", "t_k"), [(1, 1), (1, 257), (2, 513)])
def test_few_queries(native_cpu: Implementation, dtype: torch.dtype, t_q: int, t_k: int) -> None:
    """As if they were the last of more: torch sums up a single query's scores in another way than those of many."""
    q, k, v = make(t_k, t_k, 64, dtype)
    few = q[:, :, t_k - t_q :]
    with contract.launching(native_cpu):
        assert torch.equal(attending()(few, k, v), attending()(q, k, v)[:, :, t_k - t_q :])
    if dtype == BF16 and t_k > 1:
        contract.check_parity(native_cpu, attending(), [few, k, v])


@pytest.mark.parametrize("t", [1023, 1024])
def test_whole_images(native_cpu: Implementation, dtype: torch.dtype, t: int) -> None:
    contract.check_parity(
        native_cpu, lambda qkv: ops.causal_attention_packed(qkv), [torch.randn(1, t, 3, 2, 64).to(dtype)]
    )


@pytest.mark.parametrize("starts", [[0, 1], [31, 32], [64, 256], [257, 299], [300, 1000], [-5, 290]])
@pytest.mark.parametrize("keys", [False, True])
def test_hidden_keys(native_cpu: Implementation, dtype: torch.dtype, starts: list[int], keys: bool) -> None:
    """Whole strips and blocks of them, all of them; queries that see none are zero and have no gradient."""
    key_mask = torch.rand(2, 300).lt(0.7) if keys else None
    q, k, v = make(270, 300, 64, dtype)
    first = torch.tensor(starts, dtype=torch.int32)
    contract.check_parity(native_cpu, attending(first, key_mask), [q, k, v])
    out = attending(first, key_mask)(q, k, v)
    seen = torch.arange(300) >= first[:, None]
    seen = seen if key_mask is None else seen & key_mask
    nothing = seen.cumsum(1)[:, 30:] == 0
    assert not out[nothing[:, None].expand(2, 2, 270)].any()


def test_denormals_are_not_flushed(native_cpu: Implementation, dtype: torch.dtype) -> None:
    """In float32: the values, and their gradients."""
    if dtype == BF16:
        return
    q, k, v = make(128, 128, 32, dtype, 1, 1)
    v = (v * 1e-39).requires_grad_()
    with contract.launching(native_cpu):
        out = attending()(q, k, v)
        (given,) = torch.autograd.grad(out, v, torch.full_like(out, 1e-39))
    with backend.use_backend("reference"):
        want = attending()(q, k, v)
        (gradient,) = torch.autograd.grad(want, v, torch.full_like(want, 1e-39))
    for got, wanted in ((out, want), (given, gradient)):
        assert wanted.any()
        assert (got - wanted).abs().max() <= 128 * 1.5e-45


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_hidden_reaches_nothing(native_cpu: Implementation, dtype: torch.dtype, poison: float) -> None:
    q, k, v = make(140, 150, 32, dtype)
    upstream = torch.randn_like(q)
    key_mask, starts = torch.rand(2, 150).lt(0.8), torch.tensor([0, 70], dtype=torch.int32)
    hidden = ~(key_mask & (torch.arange(150) >= starts[:, None]))[:, None, :, None]
    found = []
    for value in (0.0, poison):
        inputs = [q, k.masked_fill(hidden, value), v.masked_fill(hidden, value)]
        with contract.launching(native_cpu):
            found.append(contract.with_gradients(attending(starts, key_mask), inputs, [upstream]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[1])
    assert not found[1][2][hidden.expand_as(k)].any()


def test_a_nan_stays_with_its_query_and_those_after_it(native_cpu: Implementation, dtype: torch.dtype) -> None:
    """Of a query: in its own row. Of a key: not before its position's strip."""
    q, k, v = make(100, 100, 32, dtype, b=1, h=1)
    q[0, 0, 40], k[0, 0, 70] = math.nan, math.nan
    with contract.launching(native_cpu):
        out = attending()(q, k, v)[0, 0]
    bad = out.isnan().any(-1)
    assert bad[40]
    assert not bad[:40].any()
    assert not bad[41:70].any()
    assert bad[70:].all()


def test_memory_around_and_between_is_left_alone(native_cpu: Implementation, dtype: torch.dtype) -> None:
    """The tensors lie in larger ones of NaN: nothing of those is read into a result, and nothing is written there."""
    b, h, t, d = 2, 3, 45, 64
    for packed in (False, True):
        wide = torch.full((b, t + 2, 3, h + 1, d + 32), math.nan, dtype=dtype)
        inside = wide[:, 1:-1, :, :h, :d]
        inside.copy_(torch.randn(b, t, 3, h, d))
        tensors = [inside] if packed else list(inside.permute(2, 0, 3, 1, 4))
        op = ops.causal_attention_packed if packed else attending()
        upstream = torch.randn(b, t, h, d).to(dtype) if packed else torch.randn(b, h, t, d).to(dtype)
        before = wide.clone()
        with contract.launching(native_cpu):
            found = contract.with_gradients(op, tensors, [upstream])
        assert all(x.isfinite().all() for x in found)
        assert torch.equal(wide.isnan(), before.isnan())
        dense = contract.with_gradients(op, [x.contiguous() for x in tensors], [upstream])
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_bits_with_any_number_of_threads(native_cpu: Implementation, dtype: torch.dtype, heads: int) -> None:
    """One head's queries are shared out among the threads; more of them than cores too."""
    tensors, before = make(600, 700, 64, dtype, b=1, h=heads), torch.get_num_threads()
    upstream = torch.randn_like(tensors[0])
    found = []
    try:
        for threads in (1, 2, 3, 4, 9):
            torch.set_num_threads(threads)
            with contract.launching(native_cpu):
                found.append(contract.with_gradients(attending(), tensors, [upstream]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in found[1:] for a, b in zip(result, found[0], strict=True))


def test_sharp_and_flat_softmax(native_cpu: Implementation, dtype: torch.dtype) -> None:
    """Scores of hundreds, whose weights leave float32's range, and all alike."""
    q, k, v = make(80, 80, 64, dtype)
    contract.check_parity(native_cpu, attending(), [q * 12, k * 12, v])
    contract.check_parity(native_cpu, attending(), [q * 0, k, v])


def test_huge_scores(native_cpu: Implementation, dtype: torch.dtype) -> None:
    """Whose rounding alone is hundreds: the largest still has the weight 1."""
    for size in (3e4, 6e4, 1.3e5):
        q = torch.full((1, 1, 160, 32), size, dtype=dtype)
        with contract.launching(native_cpu):
            out, _ = ops.causal_attention(q, q, torch.ones_like(q), scale=0.1)
        assert (out - 1).abs().max() < 1e-6, size


@pytest.mark.parametrize("level", ["avx2", "amx"])
def test_few_queries_are_torchs(
    native_cpu: Implementation, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of bf16 where there are tiles, which a call of one query is worth."""
    least = 128 if dtype == FP32 else 32 if level == "avx2" else 1
    monkeypatch.setattr(backend._C, "cpu_isa", lambda: level)
    for name in ("causal_attention", "causal_attention_packed"):
        monkeypatch.setitem(backend.OPS, name, dataclasses.replace(backend.OPS[name], least_queries_cpu=LEAST_QUERIES))
    for t in {max(1, least - 1), least}:
        for op, tensors in (
            (attending(), make(t, 200, 32, dtype)),
            (ops.causal_attention_packed, [torch.randn(1, t, 3, 2, 32).to(dtype)]),
        ):
            with contract.launching(native_cpu, t == least):
                op(*tensors)


def test_opcheck(native_cpu: Implementation, dtype: torch.dtype) -> None:
    if native_cpu.module.cpu_isa() != ISAS[-1]:
        pytest.skip("what is registered is the same at every level")
    q, k, v = make(3, 40, 32, dtype)
    qkv = torch.randn(2, 5, 3, 2, 32).to(dtype)
    masks = torch.rand(2, 40).lt(0.8), torch.tensor([0, 3], dtype=torch.int32), 0.2
    leaves = [x.clone().requires_grad_() for x in (q, k, v, qkv)]
    contract.check_opcheck(native_cpu, REGISTERED.causal_attention.default, (*leaves[:3], *masks))
    contract.check_opcheck(native_cpu, REGISTERED.causal_attention_packed.default, (leaves[3], None, None, 0.2))
    out, lse = REGISTERED.causal_attention(q, k, v, *masks)
    contract.check_opcheck(native_cpu, REGISTERED.causal_attention_bwd.default, (out, q, k, v, out, lse, *masks))


def test_every_instruction_set_serves(native_cpu: Implementation, dtype: torch.dtype) -> None:
    for op in ("causal_attention", "causal_attention_packed"):
        assert environment.implementation(op, "cpu")[0] == f"native ({native_cpu.module.cpu_isa()})"
    with contract.launching(native_cpu, some=False):
        attending()(*make(5, 5, 32, torch.float16))
