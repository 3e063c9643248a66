// threads CASE: what csrc/cpu shares between threads, for the thread sanitizer; every case on three of them, more than
// there may be processors (asked.cpp). It looks at no result: the tests of the op do.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/checksums.h"
#include "cpu/decoder.h"
#include "cpu/forward.h"
#include "cpu/ops.h"
#include "cpu/sample.h"

namespace cpu = igpt::cpu;

namespace {

constexpr int kThreads = 3;

std::vector<float> numbers(int64_t n, float scale = 1.0f) {
    static uint32_t state = 1;
    std::vector<float> all(static_cast<size_t>(n));
    for (float& x : all) {
        state = state * 1664525u + 1013904223u;
        x = (float(state >> 8) * 0x1p-23f - 1.0f) * scale;
    }
    return all;
}

// Of a format, bfloat16 cut off, in room for float32.
std::vector<float> numbers_as(cpu::Format format, int64_t n) {
    std::vector<float> all = numbers(n);
    for (size_t i = 0; i < all.size() && format == cpu::Format::bf16; ++i)
        std::memcpy(reinterpret_cast<char*>(all.data()) + 2 * i, reinterpret_cast<const char*>(&all[i]) + 2, 2);
    return all;
}

void elementwise() {
    constexpr int64_t rows = 700, n = 129;
    constexpr cpu::Format f = cpu::Format::fp32;
    const auto x = numbers(rows * n), other = numbers(rows * n), weight = numbers(n), bias = numbers(n);
    auto total = numbers(rows * n), out = numbers(rows * n), dweight = numbers(n), dbias = numbers(n);
    cpu::norm_fwd({x.data(), other.data(), weight.data(), bias.data(), total.data(), out.data(), rows, n, 1e-5f, true,
                   f, f, f, f, kThreads});
    cpu::norm_bwd({out.data(), nullptr, total.data(), weight.data(), out.data(), nullptr, dweight.data(), dbias.data(),
                   rows, n, 1e-5f, true, f, f, f, kThreads});
    constexpr auto gelu = cpu::Activation::quick_gelu;
    cpu::activation_fwd({x.data(), bias.data(), out.data(), rows, n, gelu, f, kThreads});
    cpu::activation_fwd({x.data(), nullptr, out.data(), rows, n, gelu, f, kThreads});
    cpu::activation_bwd({other.data(), x.data(), bias.data(), out.data(), dbias.data(), rows, n, gelu, f, kThreads});
    std::vector<int64_t> labels(rows);
    for (int64_t i = 0; i < rows; ++i) labels[size_t(i)] = i % 5 ? i % n : -100;
    std::vector<float> losses(rows), statistics(2 * rows), loss(1), count(1);
    cpu::cross_entropy_fwd({x.data(), labels.data(), losses.data(), statistics.data(), rows, n, -100, f, kThreads,
                            loss.data(), count.data(), true});
    cpu::cross_entropy_bwd({loss.data(), x.data(), labels.data(), statistics.data(), count.data(), out.data(), rows, n,
                            -100, false, f, kThreads});
}

void colours() {
    constexpr int64_t n = 40000;
    constexpr int32_t k = 400;
    const auto clusters = numbers(3 * k), pixels = numbers(3 * n);
    std::vector<uint8_t> bytes(3 * n), out(3 * n);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t((pixels[i] + 1.0f) * 127.0f);
    std::vector<int64_t> tokens(n);
    cpu::quantize_f32({pixels.data(), clusters.data(), tokens.data(), n, k, kThreads, nullptr});
    cpu::quantize_u8({bytes.data(), clusters.data(), tokens.data(), n, k, kThreads, nullptr});
    cpu::dequantize({tokens.data(), cpu::TokenType::i64, clusters.data(), out.data(), n, k, kThreads});
    const size_t large = size_t(3) << 20;
    const std::vector<char> memory(large, 'x');
    cpu::checksums({{reinterpret_cast<uintptr_t>(memory.data()), large}}, kThreads);
}

std::shared_ptr<cpu::DecoderWeights> weights(cpu::Format format, int64_t heads, int64_t positions) {
    const cpu::DecoderShape shape{2, 96, heads, 144, positions, 17, 1e-5f, cpu::Then::quick_gelu, format};
    const auto all = std::make_shared<cpu::DecoderWeights>(shape);
    const int64_t n = shape.embd, f = shape.inner;
    const auto table = numbers((shape.vocab + positions) * n), norm = numbers(n), bias = numbers(3 * n),
               matrix = numbers(3 * n * f, 0.3f);
    all->set_tables(table.data(), table.data(), norm.data(), {matrix.data(), false, 1, n}, kThreads);
    for (int64_t i = 0; i < shape.layers; ++i)
        all->set_layer(i,
                       {norm.data(),
                        norm.data(),
                        {matrix.data(), false, 3 * n, 1},
                        {matrix.data(), false, n, 1},
                        {matrix.data(), false, f, 1},
                        {matrix.data(), false, n, 1},
                        bias.data(),
                        bias.data(),
                        bias.data(),
                        bias.data(),
                        0.2f},
                       kThreads);
    return all;
}

// Heads that three threads divide evenly among them, and two that they do not.
void decoder() {
    constexpr int64_t primers = 2, copies = 3, positions = 9;
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16, cpu::Format::int8})
        for (int64_t heads : {2, 3}) {
            cpu::Decoder decoder(weights(format, heads, positions), primers, positions);
            const auto keys = numbers(primers * 96 * 2);
            for (int64_t layer = 0; layer < 2; ++layer) decoder.load(layer, keys.data(), keys.data(), 2, kThreads);
            decoder.advance(2);
            std::vector<float> logits(primers * copies * 16);
            const std::vector<int64_t> tokens(primers * copies, 3);
            for (int i = 0; i < 6; ++i) {
                if (i == 3) decoder.fork(copies, kThreads);
                decoder.step(tokens.data(), logits.data(), kThreads);
            }
            decoder.rewind(6);
            // Several positions of one sequence at a time, of which some are taken back.
            cpu::Decoder single(weights(format, heads, positions), 1, positions);
            for (int64_t count : {1, 3, 5}) {
                single.step_rows(tokens.data(), count, logits.data(), kThreads);
                single.rewind(single.position() - count / 2);
            }
        }
}

// Few rows, which a team of all threads shares, and many, of which each has its own.
void forward() {
    constexpr int64_t length = 70;
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16, cpu::Format::int8}) {
        const cpu::Forward forward(weights(format, 3, length));
        for (int64_t batch : {1, 8}) {
            const std::vector<int64_t> tokens(size_t(batch * length), 3), taken { 0, 1, 2 };
            std::vector<float> last(size_t(2 * batch * length * 96)), states(3 * last.size());
            std::vector<float> keys(2 * last.size()), values(2 * last.size());
            std::vector<float> means(size_t(3 * batch * 2 * 96));
            cpu::ForwardParams p{};
            p.tokens = tokens.data();
            p.batch = batch;
            p.length = length;
            p.layers = 2;
            p.last = last.data();
            p.keys = keys.data();
            p.values = values.data();
            p.taken = taken.data();
            p.takes = 3;
            p.states = states.data();
            p.bands = 2;
            p.means = means.data();
            forward.run(p, kThreads);
        }
    }
}

void attention() {
    constexpr int64_t length = 70, width = 32;
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16})
        for (int64_t heads : {1, 4}) {
            std::vector<float> in[4], out[4];
            const auto tensor = [&](std::vector<float>& memory) {
                memory = numbers_as(format, heads * length * width);
                return cpu::AttentionTensor{memory.data(), heads * length * width, length * width, width};
            };
            std::vector<float> lse(size_t(heads * length));
            cpu::CausalAttentionGradParams p{};
            p.of.q = tensor(in[0]);
            p.of.k = tensor(in[1]);
            p.of.v = tensor(in[2]);
            p.of.out = tensor(out[0]);
            p.of.lse = lse.data();
            p.of.batch = 1;
            p.of.heads = heads;
            p.of.t_q = p.of.t_k = length;
            p.of.head_dim = width;
            p.of.scale = 0.2f;
            p.of.format = format;
            p.of.threads = kThreads;
            p.dout = tensor(in[3]);
            p.dq = tensor(out[1]);
            p.dk = tensor(out[2]);
            p.dv = tensor(out[3]);
            cpu::causal_attention_fwd(p.of);
            cpu::causal_attention_bwd(p);
        }
}

void matmul() {
    constexpr int64_t m = 500, n = 70, k = 600;
    const std::vector<float> a(m * k, 0.5f), b(k * n, 0.5f), bias(n, 0.5f);
    std::vector<float> c(m * n);
    cpu::matmul({a.data(), k, 1, b.data(), n, 1, bias.data(), c.data(), m, n, k, kThreads});
}

void sample() {
    constexpr int64_t rows = 90, k = 130;
    std::vector<float> logits(rows * k), uniform(rows, 0.5f), logprobs(rows);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = float(i % 17);
    std::vector<int64_t> known(rows, -1), tokens(rows);
    std::vector<double> cumulative(rows * k);
    cpu::sample({logits.data(), k, uniform.data(), known.data(), 0.8f, 40, 0.9, -5.0f, tokens.data(), logprobs.data(),
                 cumulative.data(), rows, k, kThreads});
}

}  // namespace

int main(int count, char** names) {
    const std::map<std::string, void (*)()> cases{
        {"elementwise", elementwise}, {"colours", colours}, {"decoder", decoder}, {"forward", forward},
        {"attention", attention},     {"matmul", matmul},   {"sample", sample}};
    const auto found = count == 2 ? cases.find(names[1]) : cases.end();
    if (found == cases.end()) return 2;
    found->second();
    std::puts("done");
}
