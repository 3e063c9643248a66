"""Known ways to be wrong in csrc/cpu, and the check that finds each; see test_mutations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import contention
import contract
import torch
from compiling import Mutation
from drawing import assert_draws
from implementations import Implementation
from small_models import (
    computed_in_int8,
    exact_and_plain,
    ids,
    int8_is_right,
    rounded_to_int8,
    small,
    stepped,
)
from tolerance import assert_parity

from igpt_fast import backend, ops, reference
from igpt_fast.draws import Sampling
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu.decoder import CpuDecoder
from igpt_fast.sampling.decoding import decode

FP32, BF16 = torch.float32, torch.bfloat16
Check = Callable[[Implementation], None]


@dataclass(frozen=True)
class Known:
    """A mutation, for ``level`` and the drivers; ``check`` takes the mutated module, or is a case of threads.cpp or
    the program of pool.cpp."""

    mutation: Mutation
    check: Check | str
    level: str = "generic"
    software_tiles: bool = False


def norms(cpu: Implementation) -> None:
    for dtype in (FP32, BF16):
        x, other = torch.randn(2, 70, 67).to(dtype).unbind()
        weight, bias = torch.randn(2, 67).to(dtype).unbind()
        contract.check_parity(cpu, lambda x, r, w: ops.rms_norm(x, w, residual=r), [x, other, weight])
        contract.check_parity(cpu, lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r), [x, other, weight, bias])
    contract.check_sums_over_rows(cpu, ops.layer_norm, [torch.randn(32, 3000), torch.randn(3000), torch.randn(3000)])


def activations(cpu: Implementation) -> None:
    for op in (ops.quick_gelu, ops.gelu_tanh, ops.gelu_erf):
        for dtype in (FP32, BF16):
            contract.check_parity(cpu, op, [3 * torch.randn(70, 67).to(dtype), torch.randn(67).to(dtype)])


def losses(cpu: Implementation) -> None:
    labels = torch.arange(70) % 67
    labels[5] = -100
    for reduction in ("mean", "sum"):
        x = 9 * torch.randn(70, 67)
        contract.check_parity(cpu, lambda t, r=reduction: ops.cross_entropy(t, labels, reduction=r), [x])


def colours(cpu: Implementation) -> None:
    for k, n, scale in ((37, 100, 1.0), (400, 9000, 1.0), (400, 600, 1.0), (60, 9000, 1.0), (300, 900, 1e-5)):
        clusters = torch.randn(k, 3) * scale
        clusters[-1] = clusters[0]
        x = torch.rand(n, 3) * 2 - 1
        for colours in (x, ((x + 1) * 127.5).to(torch.uint8)):
            assert torch.equal(ops.quantize(colours, clusters), reference.quantize(colours, clusters))


def palettes(cpu: Implementation) -> None:
    clusters = torch.rand(40, 3) * 2.2 - 1.1
    for tokens in (torch.arange(-40, 40), torch.arange(40, dtype=torch.uint8)):
        assert torch.equal(ops.dequantize(tokens, clusters), reference.dequantize(tokens, clusters))
    for token in (-41, 40):
        try:
            ops.dequantize(torch.tensor([0, token]), clusters)
        except (IndexError, ValueError):
            continue
        raise AssertionError(token)


def decoders(cpu: Implementation) -> None:
    """In every format, of one and several sequences, on one thread."""
    for dtype in (FP32, BF16):
        model = small(dtype, n_embd=80, n_inner=136, vocab_size=131)
        for batch in (1, 3):
            tokens = ids(model, batch, 70 if batch == 1 else 10)
            exact, plain = exact_and_plain(model, tokens)
            assert_parity(stepped(CpuDecoder(model, batch, 70), tokens), plain, exact)
    model = small(n_embd=80, n_inner=136, vocab_size=131)
    for batch in (1, 3):
        tokens = ids(model, batch, 9)
        with torch.no_grad():
            exact = rounded_to_int8(model)(tokens).logits
        error = stepped(CpuDecoder(model, batch, 9, "int8"), tokens) - exact
        assert error.square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


def long_contexts(cpu: Implementation) -> None:
    model = small(n_positions=300, n_layer=1)
    tokens = ids(model, 1, 300)
    exact, plain = exact_and_plain(model, tokens)
    assert_parity(stepped(CpuDecoder(model, 1, 300), tokens), plain, exact)


def forks(cpu: Implementation) -> None:
    """Copies of a primer, and a decoder that goes back and on again, are as decoders of their own."""
    for kind in (None, "int8"):
        model = small(n_head=3, n_embd=48)
        firsts = ids(model, 2, 9)
        tokens = torch.cat([firsts.repeat_interleave(3, 0), ids(model, 6, 7, seed=9)], 1)
        decoder = CpuDecoder(model, 2, 20, kind)
        stepped(decoder, firsts)
        decoder.fork(3)
        want = stepped(CpuDecoder(model, 6, 20, kind), tokens)[:, 9:]
        for kept in (9, 12):
            got = stepped(decoder, tokens[:, kept:])
            assert (got - want[:, kept - 9 :]).abs().max() < (1e-4 if kind is None else 0.02) * want.abs().max()
            if kept == 9:
                decoder._decoder.rewind(12)


def going_back(cpu: Implementation) -> None:
    """What was there before the decoder went back does not count, where it was no number."""
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
    tokens = ids(model, 2, 9) % 7
    decoder = CpuDecoder(model, 2, 9)
    stepped(decoder, tokens[:, :2])
    stepped(decoder, torch.full((2, 5), 7))
    decoder._decoder.rewind(2)
    assert torch.equal(stepped(decoder, tokens[:, 2:]), stepped(CpuDecoder(model, 2, 9), tokens)[:, 2:])


def several_rows(cpu: Implementation) -> None:
    """Positions of one sequence at a time are steps, whatever came after them and was taken back, no numbers even."""
    model = small(n_head=3)
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
    tokens = ids(model, 1, 40)[0] % 7
    for kind in (None, "int8"):
        want = stepped(CpuDecoder(model, 1, 60, kind), tokens[None])[0]
        decoder, found = CpuDecoder(model, 1, 60, kind), []
        for kept in tokens.split([2, 1, 12, 10, 15]):
            rows = torch.cat([kept, torch.full((3 if found else 0,), 7)])
            found.append(decoder.step_rows(rows)[: len(kept)])
            decoder.rewind(len(rows) - len(kept))
        assert (torch.cat(found) - want).abs().max() < (1e-4 if kind is None else 0.02) * want.abs().max()


def sums(cpu: Implementation) -> None:
    """RFC 3720's vector in two parts; every byte of a block counts."""
    text = torch.arange(32, dtype=torch.uint8)
    first = cpu.module.crc32c(text.data_ptr(), 13, 0)
    assert cpu.module.crc32c(text.data_ptr() + 13, 19, first) == 0x46DD794E
    memory = torch.zeros((1 << 20) + 77, dtype=torch.uint8)
    seen = set(cpu.module.checksums([(memory.data_ptr(), len(memory) - less) for less in (0, 1)], 1))
    for at in (0, 63, 64, 1000, (1 << 20) - 1, 1 << 20, len(memory) - 1):
        memory.zero_()[at] = 1
        seen.add(cpu.module.checksums([(memory.data_ptr(), len(memory))], 1)[0])
    assert len(seen) == 9


def passes(cpu: Implementation) -> None:
    """Whole forward passes; a length beyond the keys that attention takes at a time, and a depth beyond a walk."""
    sizes = ({}, 33), ({"n_positions": 300, "n_embd": 80, "n_inner": 1048}, 300), ({"activation_function": "gelu"}, 25)
    for fields, length in sizes:
        for dtype in (BF16, FP32):
            model = small(dtype, **fields)
            tokens = ids(model, 2, length)
            with torch.no_grad():
                assert forwards.why_not(model.transformer, tokens) is None
                found = model(tokens, output_hidden_states=True, use_cache=False)
            with backend.use_backend("reference"):
                exact, plain = exact_and_plain(model, tokens)
            assert_parity(found.logits, plain, exact)


def rounded_passes(cpu: Implementation) -> None:
    """In int8, with more inner numbers than have a scale together; what is not finite is seen by all behind it."""
    for fields in ({}, {"activation_function": "gelu", "n_embd": 80, "n_inner": 1048}):
        model = small(spread=0.1, **fields).transformer.requires_grad_(False)
        tokens = ids(model, 2, 33) % 16
        with backend.use_backend("reference"), torch.no_grad():
            want, plain = (found(tokens).last_hidden_state for found in (computed_in_int8(model), model))
        with torch.no_grad():
            found = forwards.run(model, tokens, dtype="int8")
            assert found is not None
            assert int8_is_right(found.last, want, plain)
            model.wte.weight[16] = torch.nan
            tokens[:, 5] = 16
            found = forwards.run(model, tokens, dtype="int8")
            assert found is not None
            assert not found.last[:, 5:].isfinite().any()


def attention(cpu: Implementation) -> None:
    for t_q, t_k, d, starts in ((65, 65, 64, [0, 40]), (40, 270, 96, [0, 70])):
        for dtype in (BF16, FP32):
            q, k, v = (torch.randn(2, 2, t, d).to(dtype) for t in (t_q, t_k, t_k))
            first = torch.tensor(starts, dtype=torch.int32)
            contract.check_parity(cpu, lambda *qkv, s=first: ops.causal_attention(*qkv, starts=s)[0], [q, k, v])


def denormals(cpu: Implementation) -> None:
    """What is stored in float32 keeps them, and who calls goes on as before."""
    for dtype in (BF16, FP32):
        q, k, v = (torch.ones(1, 1, 64, 32, dtype=dtype) for _ in range(3))
        assert ops.causal_attention(q, k, v * 1e-39)[0].all() or dtype == BF16
        assert (torch.full((40,), 1e-39) * 0.5).all()


def sharing(cpu: Implementation) -> None:
    for busy, threads, region, want in contention.CASES.values():
        assert contention.changes(cpu.module.GivingWay(), busy, threads, region) == want


def products(cpu: Implementation) -> None:
    for rows, n_in, n_out in ((259, 70, 33), (33, 600, 20)):
        contract.check_parity(cpu, ops.linear, [torch.randn(s) for s in ((rows, n_in), (n_in, n_out), (n_out,))])


def draws(cpu: Implementation) -> None:
    logits, uniform = 2 * torch.randn(300, 65), torch.rand(300)
    logits[::7, 0], uniform[::7], logits[8, 3] = -torch.inf, 0.0, torch.nan
    for settings in ((1.0,), (0.7, 9), (1.3, None, 0.8), (0.9, 30, 0.9, 0.1), (1.0, None, None, 1.0), (0.0,)):
        sampling = Sampling(*settings)
        tokens, logprobs, _ = ops.draw_scored(logits, uniform, sampling)
        assert_draws(tokens, logits, uniform, *settings)
        exact = torch.log_softmax(logits.double(), dim=-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), exact, rtol=3e-7, atol=1e-6, equal_nan=True)
        known = torch.arange(300) % 65 - 1
        assert torch.equal(ops.draw_scored(logits, uniform, sampling, known)[0][known >= 0], known[known >= 0])


def guesses(cpu: Implementation) -> None:
    """Drafts change nothing, and spare steps."""
    model = small(n_positions=64, n_embd=32, n_head=1, spread=0.02)
    known = torch.where(torch.rand(1, 60) < 0.3, torch.randint(16, (1, 60)), -1)
    context = torch.tensor([[model.config.sos_token_id, 3, 5, 2]])
    uniforms, steps = torch.rand(1, 60), 0
    for sampling, given in ((Sampling(), None), (Sampling(0.5, 3), known), (Sampling(0.0), None)):
        with mock.patch.object(CpuDecoder, "why_not_rows", None):  # at generic it is not worth it
            ahead = decode(model, context, uniforms, sampling, known=given)
        plain = decode(model, context, uniforms, sampling, known=given, speculate=False)
        assert torch.equal(ahead.tokens, plain.tokens)
        assert torch.equal(ahead.logprobs, plain.logprobs)
        steps += ahead.steps
    assert 0 < steps < 160


BODIES = {
    "norm": norms, "activation": activations, "cross_entropy": losses, "quantize": colours, "quantize_search": colours,
    "product": decoders, "linear": decoders, "pack": decoders, "attention_decode": decoders,
    "attention_decode_prefix": forks, "block": passes, "gemm": passes, "rows": passes, "heads": passes,
    "attention_fwd": attention, "attention_bwd": attention, "checksum": sums, "matmul": products,
}  # fmt: skip
TILED = {"product_tiles": decoders, "attention_decode_prefix_tiles": forks, "gemm_tiles": passes}
DRIVERS = {
    "elementwise": norms,
    "kv_cache": forks,
    "checksums": sums,
    "weights": decoders,
    "giving_way": sharing,
    "sample": draws,
    "drafts": guesses,
}
CHANGES: list[tuple[str, str, str]] = [
    ("norm", "reduce_add(total(sums)) / float(n) + eps", "reduce_add(total(sums)) / float(n - 1) + eps"),
    ("norm", "scale * (g - by_one - y * by_y)", "scale * (g - y * by_y)"),
    ("norm", "pad(read(x + i, part) - set1(mean), part, zero())", "read(x + i, part) - set1(mean)"),
    ("norm", "if (dbias) write(dbias + i, d +", "if (dbias) write(dbias + i, g +"),
    ("activation", "kSlope = 1.702f", "kSlope = 1.7f"),
    ("activation", "kLinear * 0.044715f", "kLinear * 0.0447f"),
    ("activation", "z * set1(0.398942280f), n.bell, share", "z * set1(0.398942280f), n.bell, n.tail"),
    ("activation", "write(partial + i, read(partial + i, part) + d, part);", "write(partial + i, d, part);"),
    ("cross_entropy", "chosen * set1(factor), Part{1}", "chosen, Part{1}"),
    ("cross_entropy", "* set1(inverse) - set1(1.0f)", "* set1(inverse)"),
    ("cross_entropy", "if (label != p.ignore_index) {", "if (true) {"),
    ("cross_entropy", "if (label == p.ignore_index) {", "if (false) {"),
    ("quantize", "half_pixels / 127.5f);\n", "half_pixels / 512.0f);\n"),
    ("quantize", "least = min(far, least);", "least = min(near, least);"),
    ("quantize", "0.5f * (float(256 >> level) - cells.reach)", "0.25f * (float(256 >> level) - cells.reach)"),
    ("quantize_search", "index[v] = d < best[v] ? at : index[v];", "index[v] = d > best[v] ? index[v] : at;"),
    ("quantize_search", "(r * r + g * g) + b * b", "r * r + g * g"),
    ("quantize_search", "best[v] = min(d, best[v]);", "best[v] = d;"),
    ("product", "(w + k * p.stride) + c * kLanes", "(w) + c * kLanes"),
    ("product", "if (R == 1)\n", "if (R == 2)\n"),
    ("product", "k ? bf16_odd(both) : bf16_even(both)", "bf16_even(both)"),
    ("linear", "return load(y) + v;", "return v;"),
    ("linear", "if (m.bias) v = v + load(m.bias + n);", ""),
    ("linear", "load(x + i) * scale * load(weight + i)", "load(x + i) * scale"),
    ("pack", "const float step = most[n] / 127.0f;", "const float step = most[n] / 255.0f;"),
    ("pack", "q + (q < 0.0f ? -0.5f : 0.5f)", "q"),
    ("pack", "gather_row(p, k + 1, in_a_row, rows + kTile);", "gather_row(p, k, in_a_row, rows + kTile);"),
    ("attention_decode", "store(at, from == 0 ? v : fma(load(at), set1(keep[r]), v));", "store(at, v);"),
    ("attention_decode", "(from == 0 ? 0.0f : sofar.total[r] * keep) + weigh", "weigh"),
    ("attention_decode_prefix", "own[1] * __builtin_expf(own[0] - most)", "own[1]"),
    ("attention_decode_prefix", "sofar.acc[r][i] * (before * inverse)", "sofar.acc[0][i] * (before * inverse)"),
    ("product_tiles", "if (const int64_t rest = p.count % deep / step) {", "if (const int64_t rest = 0) {"),
    ("product_tiles", "inputs += p.tiles_step;", ""),
    ("product_tiles", "zero_tile<c>();", ";"),
    ("attention_decode_prefix_tiles", "high, high + 64, sizeof", "high, high, sizeof"),
    ("gemm_tiles", "const bool with_bias = this->p.from == 0;", "const bool with_bias = false;"),
    ("gemm_tiles", "r < groups ? load_ints", "r < groups - 1 ? load_ints"),
    ("gemm_tiles", "store(x + 16, load(x + 16) + b);", "store(x + 16, b);"),
    ("gemm_tiles", "set1(-1.702f)", "set1(-1.5f)"),
    ("block", "for (; left > 0; --left,", "for (; left > 1; --left,"),
    ("block", "own.x += first * p.row_bytes;", ""),
    ("block", "store(to, first ? v : load(to) + v);", "store(to, v);"),
    ("gemm", "with_bias ? load(p.matrix->bias + n) : zero()", "load(p.matrix->bias + n)"),
    ("gemm", "sums, kTile, k == 0}", "sums, kTile, true}"),
    ("gemm", "store(x + kLanes, load(x + kLanes) + b);", "store(x + kLanes, b);"),
    ("rows", "reduce_add(sums[0] + sums[1])", "reduce_add(sums[0])"),
    ("rows", "* scale * load(p.weight + at)", "* scale * load(p.weight + i)"),
    ("rows", "load(a + i) + load(b + i) : zero()", "load(a + i) : zero()"),
    ("heads", "hide_from(r + 1 - t, load(at))", "hide_from(r + 2 - t, load(at))"),
    ("heads", "store(s.sums + r * kLanes, load(s.sums + r * kLanes) * keep);", ""),
    ("heads", "store(s.sums + r * kLanes, even + odd);", "store(s.sums + r * kLanes, even);"),
    ("attention_fwd", "hide_from(visible - i, load(at(i)))", "hide_from(visible + 1 - i, load(at(i)))"),
    ("attention_fwd", "s.sum[r] * reduce_max(keep) + reduce_add(total)", "s.sum[r] + reduce_add(total)"),
    ("attention_fwd", "if (now == before) return;", "return;"),
    ("attention_bwd", "s.delta[t] = sees ? reduce_add(sum) : 0.0f;", "s.delta[t] = 0.0f;"),
    ("attention_bwd", "write_rows<S>(s.dk, d, set1(of.scale)", "write_rows<S>(s.dk, d, set1(1.0f)"),
    ("attention_bwd", "weights[j] = drop_below(weight, query, first);", "weights[j] = weight;"),
    ("matmul", "k > 0 ? read(c + j, part) : p.bias", "p.bias"),
    ("matmul", "read(p.bias + n + j, part)", "read(p.bias + j, part)"),
    ("matmul", "(k + from) * p.a_column", "from * p.a_column"),
    ("matmul", ": read(x, Part{int(count)})", ": zero()"),
    ("drafts", "if (!hit || i == drafted) break;", "if (i == drafted) break;"),
    ("drafts", "p.uniform = uniform_.data() + t;", "p.uniform = uniform_.data();"),
    ("drafts", "nullptr : known_.data() + t;", "nullptr : known_.data();"),
    ("drafts", "aside_ = chance < kLeastChance", "aside_ = chance < 2.0"),
    ("sample", "s.ordered + top_k - 1, s", "s.ordered + top_k, s"),
    ("sample", "if (before >= enough)", "if (sum >= enough)"),
    ("sample", "std::upper_bound(", "std::lower_bound("),
    ("sample", "return at = i, x[i];", "continue;"),
    ("sample", "sum += double(std::exp(x[i] - largest));", "sum += double(std::exp(s.scores[i]));"),
    ("sample", "if (s.scores[i] < p.min_score)", "if (s.scores[i] <= p.min_score)"),
    ("elementwise", "for (int64_t i = 0; i + step < blocks_; i += 2 * step)", "for (int64_t i = 0; i + 2 * step < blocks_; i += 2 * step)"),  # noqa: E501
    ("elementwise", "std::fill(sums, sums + width_, 0.0f);", "std::fill(sums, sums + width_, 0.5f);"),
    ("elementwise", "kernels.narrow(total + p.n_embd,", "kernels.narrow(total,"),
    ("kv_cache", "std::copy_n(source.keys, key_bytes_, to.keys);", "std::copy_n(source.keys, key_bytes_ / 2, to.keys);"),  # noqa: E501
    ("kv_cache", "std::copy_n(source.value_scale, each, to.value_scale);", ""),
    ("kv_cache", "params.keys = data_.data() + unit * unit_bytes_;", "params.keys = data_.data() + unit / 2 * unit_bytes_;"),  # noqa: E501
    ("checksum", "__builtin_memcpy(words, data + at, size_t(bytes - at));", ""),
    ("checksum", "i < chains; ++i) stir(", "i < chains - 1; ++i) stir("),
    ("checksum", "uint64_t all = uint64_t(bytes),", "uint64_t all = 0,"),
    ("checksum", "state = word + (word << 21);", "state = word << 21;"),
    ("checksums", "crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0)", "crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0)"),
    ("checksums", "uint32_t crc = each(~before, at, words);", "uint32_t crc = each(~0u, at, words);"),
    ("weights", "order.push_back(part * embd + h * d + i)", "order.push_back(h * embd + part * d + i)"),
    ("weights", "bias)[n] = bias[order[n]];", "bias)[n] = bias[n];"),
    ("weights", "l.scale = source.scale;", ""),
    ("giving_way", "contended ? streak_ + 1 : 0;", "contended ? streak_ + 1 : streak_;"),
    ("giving_way", "std::min(2 * rest_, kLongestRest)", "2 * rest_"),
    ("giving_way", "std::min(2 * rest_, kLongestRest)", "kRest"),
    ("giving_way", "phase_ = Phase::all;\n        halvings_ = 0;", "phase_ = Phase::all;"),
    ("giving_way", "phase_ = Phase::probing;  //", "phase_ = Phase::all;  //"),
    ("giving_way", "looked_ + windows * window;", "looked_ + windows * kWindow;"),
    ("giving_way", "phase_ == Phase::resting && time >= until_", "phase_ == Phase::resting"),
    ("giving_way", "return looked_ + kWindow;", "return looked_;"),
    ("giving_way", "std::clamp(time - looked_, kWindow, kLongestWindow)", "std::max(time - looked_, kWindow)"),
]  # fmt: skip


# Of attention, in both formats; on a level that multiplies pairs of bf16 where those are meant.
ATTENTION = [
    ("attention_blocks", "p.first ? acc[r][i] : load(sum) + acc[r][i]", "acc[r][i]", "generic"),
    ("attention_blocks", "p.c + below * p.c_below + n", "p.c + n", "generic"),
    ("attention_blocks", "b + n * p.b_panel + line * p.b_line", "b + n * p.b_panel", "generic"),
    ("attention_blocks", "p.first && line == 0", "p.first", "generic"),
    ("attention_operands", "t / kLine<E> * (wide / 16)", "t / kLine<E>", "generic"),
    ("attention_operands", "(j + n) * 16 + i", "(i + n) * 16 + j", "generic"),
    ("attention_operands", "top == -__builtin_inff() ? 0.0f : top", "top", "generic"),
    ("attention_operands", "t >= first && t < p.t_k", "t < p.t_k", "generic"),
    ("attention_operands", "load(sum_at(tiles, d, r, i + kLanes)) * scale", "load(sum_at(tiles, d, r, i)) * scale", "generic"),  # noqa: E501
    ("attention_operands", "1.0f : kLog2e", "1.0f : 1.4f", "avx512_bf16"),
    ("attention_operands", "interleave(a, b, a, next);", "interleave(b, a, a, next);", "avx512_bf16"),
    ("attention_fwd", "visible = most(0, least(visible, n));", "visible = most(1, least(visible, n));", "generic"),
    ("attention_fwd", "line_at(s.weights, width, r, i), a, b", "line_at(s.weights, width, r, i), b, a", "avx512_bf16"),
    ("attention_bwd", "load(lse + at)", "load(lse + i)", "generic"),
    ("attention_bwd", "k.hidden && k.hidden[t] != 0.0f ?", "false ?", "generic"),
    ("attention_bwd", "strip * kStripSums + n / 16", "n / 16", "avx512_bf16"),
    ("attention_bwd", "store(at(i + kLanes), floats(second));", "store(at(i + kLanes), floats(first));", "avx512_bf16"),
    ("attention_bwd", "interleave(first, second, first, second);", "interleave(second, first, first, second);", "avx512_bf16"),  # noqa: E501
    ("attention_bwd", "write_two(line_at(s.dscores, kQueryBlock, r, i), gradients[0], gradients[1]);", "", "avx512_bf16"),  # noqa: E501
]  # fmt: skip


def known(stem: str, old: str, new: str, number: int) -> Known:
    name = f"cpu_{stem}_{number}"
    if stem in DRIVERS:
        return Known(Mutation(name, f"cpu/{stem}.cpp", old, new), DRIVERS[stem])
    mutation = Mutation(name, f"cpu/bodies/{stem}.h", old, new)
    if stem in TILED:
        return Known(mutation, TILED[stem], "amx", software_tiles=True)
    return Known(mutation, long_contexts if "sofar.total" in old or "from == 0" in old else BODIES[stem])


# Of products of 16-bit integers, on the level that the twin of AVX-VNNI runs.
WORDS = [
    ("simd/avx2", "_mm_packs_epi32(", "_mm_packus_epi32("),
    ("product", "p.half + r * p.ld + 2 * g, v[c]", "p.half + 2 * g, v[c]"),
    ("product", "p.sums += 2 * kLanes;", ""),
    ("linear", "p.rows->scale[r]", "p.rows->scale[0]"),
]
# Of the forward pass in int8, on a level that multiplies it as such.
ROUNDED = [
    ("block", "(v + set1(12582912.0f)) - set1(12582912.0f)", "v", "generic"),
    ("gemm", "set1(p.scale[row + r])", "set1(p.scale[r])", "generic"),
    ("rows", "scale + reduce_add(poison)", "scale", "avx_vnni"),
    ("rows", "tiles_at<R>(p.tiles, wide, row)", "tiles_at<R>(p.tiles, width, row)", "avx512_vnni"),
    ("gemm", "memset(row, Kind::offset, kLineBytes)", "memset(row, 127, kLineBytes)", "avx512_vnni"),
    ("block", "return to_floats(load_ints(sum));", "return load(sum);", "avx_vnni"),
    ("gemm_tiles", "set1(this->p.scale[block.row + r])", "set1(this->p.scale[r])", "amx"),
    ("gemm_tiles", "store_bytes(to, v, 0);", "store_bytes(to, v, 128);", "amx"),
]
DECODER, FORWARD, BARRIER = "cpu/decoder.cpp", "cpu/forward.cpp", "cpu/barrier.h"
MET = "attention_decode(i, start(l.proj, proj));\n        meet();"
REGION, POOL = "cpu/region.h", "cpu/pool.cpp"
IN_TURN = "            w_.kernels.remember(p);\n            w_.kernels.attention_decode(p);"
MUTATIONS = [known(*change, number) for number, change in enumerate(CHANGES)] + [
    *(Known(Mutation(f"cpu_words_{i}", f"cpu/bodies/{stem}.h", old, new), decoders, "avx_vnni", True)
      for i, (stem, old, new) in enumerate(WORDS)),
    *(Known(Mutation(f"cpu_rounded_{i}", f"cpu/bodies/{stem}.h", old, new), rounded_passes, level, level != "generic")
      for i, (stem, old, new, level) in enumerate(ROUNDED)),
    Known(Mutation("cpu_rounded_inner", FORWARD, "rows, count, true)", "rows, count, false)"), rounded_passes),
    Known(Mutation("cpu_rounded_meet", FORWARD, "meet_team();\n        return {to.tiles", "return {to.tiles"), "forward", "amx", True),  # noqa: E501
    Known(Mutation("cpu_dequantize_negative", "cpu/elementwise.cpp", "+ (tokens[i] < 0 ? p.k : 0)", ""), palettes),
    Known(Mutation("cpu_dequantize_bound", "cpu/elementwise.cpp", "int64_t(tokens[i]) >= p.k)", "int64_t(tokens[i]) > p.k)"), palettes),  # noqa: E501
    Known(Mutation("cpu_dequantize_round", "cpu/elementwise.cpp", "std::nearbyint(127.5f", "std::floor(127.5f"), palettes),  # noqa: E501
    Known(Mutation("cpu_decoder_position", DECODER, "w_.wpe() + position(b) * embd", "w_.wpe()"), decoders),
    Known(Mutation("cpu_decoder_shared", DECODER, "p.position = position(row) - d_.shared_;", "p.position = position(row);"), forks),  # noqa: E501
    Known(Mutation("cpu_decoder_copies", DECODER, "unit % d_.primers_ * copies + begin", "unit % d_.primers_ + begin"), forks),  # noqa: E501
    Known(Mutation("cpu_decoder_rewind", DECODER, "for (p.position = first; p.position < end; ++p.position)", "for (p.position = end; p.position < end; ++p.position)"), going_back),  # noqa: E501
    Known(Mutation("cpu_decoder_meet", DECODER, MET, MET.replace("\n        meet();", "")), "decoder"),
    Known(Mutation("cpu_decoder_own_heads", DECODER, "if (!own_heads_) meet();", ""), "decoder"),
    Known(Mutation("cpu_barrier_order", BARRIER, "generation_.store(now + 1, std::memory_order_seq_cst)", "generation_.store(now + 1, std::memory_order_relaxed)"), "decoder"),  # noqa: E501
    Known(Mutation("cpu_barrier_early", BARRIER, "+ 1 == threads) {", "+ 2 == threads) {"), "decoder"),
    Known(Mutation("cpu_barrier_arrival", BARRIER, "fetch_add(1, std::memory_order_acq_rel)", "fetch_add(1, std::memory_order_relaxed)"), "decoder"),  # noqa: E501
    Known(Mutation("cpu_barrier_seen", BARRIER, "generation_.load(std::memory_order_acquire)", "generation_.load(std::memory_order_relaxed)"), "decoder"),  # noqa: E501
    Known(Mutation("cpu_barrier_impatient", BARRIER, "if (!spin(now)) sleep(now);", "spin(now);"), "decoder"),
    Known(Mutation("cpu_partial_shared", "cpu/elementwise.cpp", "return sums_.get() + 2 * block * width_;", "return sums_.get();"), "elementwise"),  # noqa: E501
    Known(Mutation("cpu_partial_few", "cpu/elementwise.cpp", "if (sums == few) ops()", "if (false) ops()"), norms),
    Known(Mutation("cpu_partial_chain", "cpu/elementwise.cpp", "kFewRows = 8;", "kFewRows = 64;"), norms),
    Known(Mutation("cpu_quantize_scratch", "cpu/quantize.cpp", "body(p, cells[t], from", "body(p, cells[0], from"), "colours"),  # noqa: E501
    Known(Mutation("cpu_forward_meet", FORWARD, "causal_attention(i);\n            barriers_[0].wait(count_);", "causal_attention(i);"), "forward", "amx", True),  # noqa: E501
    Known(Mutation("cpu_forward_rows", FORWARD, "row % positions_;\n            const bool", "row % positions_ + 1;\n            const bool"), passes, "amx", True),  # noqa: E501
    Known(Mutation("cpu_matmul_tile", "cpu/matmul.cpp", "packed + i * tile_numbers", "packed"), products),
    Known(Mutation("cpu_matmul_scratch", "cpu/matmul.cpp", "scratch + index * kernels.scratch", "scratch"), "matmul"),
    Known(Mutation("cpu_sample_scratch", "cpu/sample.cpp", "orders.get() + p.k * index", "orders.get()"), "sample"),
    Known(Mutation("cpu_attention_scratch", "cpu/attention.cpp", "work(i, memory + each * index)", "work(i, memory)"), "attention", "amx", True),  # noqa: E501
    *(Known(Mutation(f"cpu_attention_{i}", f"cpu/bodies/{stem}.h", old, new), attention, level, level != "generic")
      for i, (stem, old, new, level) in enumerate(ATTENTION)),
    Known(Mutation("cpu_rows_in_turn", DECODER, IN_TURN, "\n".join(reversed(IN_TURN.split("\n")))), several_rows),
    Known(Mutation("cpu_rows_at_once", DECODER, IN_TURN, f"for (int64_t r = row; r < d_.count_; ++r) w_.kernels.remember(head_of(layer, head, r));\n{IN_TURN}"), several_rows),  # noqa: E501
    Known(Mutation("cpu_rows_room", DECODER, "if (count > room_) make_rows(", "if (count > room_ + 1) make_rows("), several_rows),  # noqa: E501
    Known(Mutation("cpu_rows_width", DECODER, "{width_, l.qkv.n, weights_->shape.embd,", "{width_, width_, weights_->shape.embd,"), several_rows),  # noqa: E501
    Known(Mutation("cpu_rows_position", DECODER, "threads);\n    position_ += count;", "threads);\n    position_ += count - 1;"), several_rows),  # noqa: E501
    Known(Mutation("cpu_rows_each_position", DECODER, "(in_one_sequence() ? row : 0)", "0"), several_rows),
    Known(Mutation("cpu_rows_rewind", DECODER, "    position_ = position;\n", ""), several_rows),
    Known(Mutation("cpu_rows_forget", DECODER, "std::min(padded(first, value_rows), position_ - shared_)", "first"), several_rows),  # noqa: E501
    Known(Mutation("cpu_region_one", REGION, "return work(0, 1);", "return work(0, 2);"), sums),
    Known(Mutation("cpu_region_part", REGION, "{n * index / count,", "{n * (index > 0 ? index - 1 : 0) / count,"), "decoder"),  # noqa: E501
    Known(Mutation("cpu_region_last", REGION, "i < mine.end; ++i", "i + 1 < mine.end; ++i"), forks),
    Known(Mutation("cpu_region_flush", REGION, "(really ? 0x8040 : 0)", "0x8040"), denormals),
    Known(Mutation("cpu_region_flushed", REGION, "~FlushDenormals() { _mm_setcsr(before_); }", "~FlushDenormals() {}"), denormals),  # noqa: E501
    Known(Mutation("cpu_pool_left", POOL, "return left_ == 0;", "return left_ <= 1;"), "pool"),
    Known(Mutation("cpu_pool_lock", POOL, "const std::lock_guard<std::mutex> lock(mutex_);", ""), "pool"),
    Known(Mutation("cpu_pool_called", POOL, "own.called = false;", ""), "pool"),
]  # fmt: skip
