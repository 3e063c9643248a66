// What tests/test_aarch64.py runs on a level: colours to clusters, the elementwise ops, attention, and a model of two
// layers that reads whole sequences, and that reads a primer, forks and goes on, in every format. Prints a number a
// line behind what it belongs to, the same on every processor up to rounding. Without an argument: the names of the
// levels that this processor has. With a second argument: the same for tests/test_cpu_undefined.py, from numbers of
// which some are not finite.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/forward.h"
#include "cpu/ops.h"

namespace cpu = igpt::cpu;

namespace {

// Numbers in [-1, 1), the same everywhere.
float number() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) * 0x1p-23f - 1.0f;
}

bool all_finite = true;

std::vector<float> numbers(int64_t n, float scale = 1.0f) {
    std::vector<float> all(static_cast<size_t>(n));
    for (float& x : all) x = number() * scale;
    constexpr float wild[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -3e38f};
    for (size_t i = 0; i < 3 && !all_finite; ++i) all[all.size() / 4 * i] = wild[i];
    return all;
}

void print(const char* what, const std::vector<int64_t>& out, bool whole) {
    uint32_t sum = 0;
    for (int64_t i : out) {
        sum = sum * 31u + uint32_t(i);
        if (whole) std::printf("%s %d\n", what, int(i));
    }
    if (!whole) std::printf("%s %u\n", what, unsigned(sum));
}

const char* name_of(cpu::Format format) {
    return format == cpu::Format::fp32 ? "fp32" : format == cpu::Format::bf16 ? "bf16" : "int8";
}

void print(const char* what, cpu::Format format, const std::vector<float>& out) {
    for (float x : out) std::printf("%s-%s %.9g\n", what, name_of(format), double(x));
}

// Every token, or a checksum of them.
void quantize(int64_t n, int32_t k, bool whole) {
    const std::vector<float> clusters = numbers(3 * k), floats = numbers(3 * n);
    std::vector<uint8_t> bytes(size_t(3 * n));
    for (uint8_t& x : bytes) x = uint8_t((number() + 1.0f) * 127.5f);
    std::vector<int64_t> out(static_cast<size_t>(n));
    cpu::quantize_u8({bytes.data(), clusters.data(), out.data(), n, k, 2, nullptr});
    print("u8", out, whole);
    cpu::quantize_f32({floats.data(), clusters.data(), out.data(), n, k, 2, nullptr});
    print("f32", out, whole);
}

// As an array of the format; bfloat16 is the upper half, which is not rounded here.
std::vector<uint8_t> stored(const std::vector<float>& from, cpu::Format format) {
    const size_t size = size_t(cpu::format_bytes(format));
    std::vector<uint8_t> bytes(from.size() * size);
    for (size_t i = 0; i < from.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &from[i], 4);
        const uint16_t upper = uint16_t(bits >> 16);
        std::memcpy(&bytes[i * size], size == 4 ? static_cast<const void*>(&bits) : &upper, size);
    }
    return bytes;
}

void show(const char* what, cpu::Format format, const std::vector<uint8_t>& from) {
    std::vector<float> wide(from.size() / size_t(cpu::format_bytes(format)));
    cpu::ops().elementwise.widen(from.data(), format, int64_t(wide.size()), wide.data());
    print(what, format, wide);
}

// Each op forward and backward, every activation.
void elementwise(cpu::Format format) {
    constexpr int64_t rows = 37, n = 21;
    const auto array = [&](int64_t count, float scale = 1.0f) { return stored(numbers(count, scale), format); };
    const auto x = array(rows * n), other = array(rows * n), weight = array(n), bias = array(n);
    auto total = array(rows * n), out = array(rows * n), dweight = array(n), dbias = array(n);
    for (bool centred : {false, true}) {
        cpu::norm_fwd({x.data(), other.data(), weight.data(), bias.data(), total.data(), out.data(), rows, n, 1e-5f,
                       centred, format, format, format, format, 2});
        show("norm", format, out);
        cpu::norm_bwd({out.data(), other.data(), total.data(), weight.data(), out.data(), nullptr, dweight.data(),
                       dbias.data(), rows, n, 1e-5f, centred, format, format, format, 2});
        show("norm_bwd", format, out);
        show("norm_dweight", format, dweight);
    }
    for (auto activation : {cpu::Activation::quick_gelu, cpu::Activation::gelu_tanh, cpu::Activation::gelu_erf}) {
        cpu::activation_fwd({x.data(), bias.data(), out.data(), rows, n, activation, format, 2});
        show("activation", format, out);
        cpu::activation_bwd(
            {other.data(), x.data(), bias.data(), out.data(), dbias.data(), rows, n, activation, format, 2});
        show("activation_bwd", format, out);
    }
    std::vector<int64_t> labels;
    for (int64_t i = 0; i < rows; ++i) labels.push_back(i % 5 ? i % n : -100);
    std::vector<float> losses(rows), statistics(2 * rows), loss(1), count(1);
    cpu::cross_entropy_fwd({x.data(), labels.data(), losses.data(), statistics.data(), rows, n, -100, format, 2,
                            loss.data(), count.data(), true});
    cpu::cross_entropy_bwd({loss.data(), x.data(), labels.data(), statistics.data(), count.data(), out.data(), rows, n,
                            -100, false, format, 2});
    print("loss", format, {loss[0], count[0]});
    show("cross_entropy_bwd", format, out);
}

// Forward and backward, fewer queries than keys, of which some are hidden.
void attention(cpu::Format format) {
    constexpr int64_t batch = 2, heads = 2, queries = 40, keys = 70, dim = 32, size = batch * heads * keys * dim;
    const auto array = [&] { return stored(numbers(size), format); };
    auto q = array(), k = array(), v = array(), dout = array(), out = array(), dq = array(), dk = array(), dv = array();
    const auto place = [&](std::vector<uint8_t>& x) {
        return cpu::AttentionTensor{x.data(), heads * keys * dim, keys * dim, dim};
    };
    const int32_t starts[batch] = {0, 9};
    std::vector<uint8_t> mask(batch * keys);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 7 != 3;
    std::vector<float> lse(batch * heads * queries);
    const cpu::CausalAttentionParams params{place(q),    place(k), place(v), place(out), lse.data(), starts,
                                            mask.data(), keys,     batch,    heads,      queries,    keys,
                                            dim,         0.5f,     format,   2};
    cpu::causal_attention_fwd(params);
    cpu::causal_attention_bwd({params, place(dout), place(dq), place(dk), place(dv)});
    print("attention_lse", format, lse);
    show("attention", format, out);
    show("attention_dq", format, dq);
    show("attention_dk", format, dk);
    show("attention_dv", format, dv);
}

std::shared_ptr<const cpu::DecoderWeights> network(cpu::Format format) {
    const cpu::DecoderShape shape{2, 48, 2, 72, 40, 17, 1e-5f, cpu::Then::quick_gelu, format};
    const auto weights = std::make_shared<cpu::DecoderWeights>(shape);
    const int64_t embd = shape.embd, colours = shape.vocab - 1;
    const std::vector<float> wte = numbers(shape.vocab * embd), wpe = numbers(shape.positions * embd),
                             norm = numbers(embd), head = numbers(colours * embd, 0.3f);
    weights->set_tables(wte.data(), wpe.data(), norm.data(), {head.data(), false, 1, embd}, 2);
    for (int64_t i = 0; i < shape.layers; ++i) {
        const std::vector<float> qkv = numbers(3 * embd * embd, 0.3f), proj = numbers(embd * embd, 0.3f),
                                 fc = numbers(embd * shape.inner, 0.3f), fc_proj = numbers(embd * shape.inner, 0.3f),
                                 bias = numbers(3 * embd);
        weights->set_layer(i,
                           {norm.data(),
                            norm.data(),
                            {qkv.data(), false, 3 * embd, 1},
                            {proj.data(), false, embd, 1},
                            {fc.data(), false, shape.inner, 1},
                            {fc_proj.data(), false, embd, 1},
                            bias.data(),
                            bias.data(),
                            bias.data(),
                            bias.data(),
                            0.2f},
                           2);
    }
    return weights;
}

// Every state of a batch, and means of parts of it.
void forward(cpu::Format format) {
    const auto weights = network(format);
    const cpu::DecoderShape& shape = weights->shape;
    constexpr int64_t batch = 3, length = 36, takes = 2, taken[takes] = {0, 1}, bands = 3;
    std::vector<int64_t> tokens(batch * length);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int64_t(7 * i + 3) % shape.vocab;
    const int64_t states = batch * length * shape.embd;
    const cpu::Format stored = format == cpu::Format::bf16 ? format : cpu::Format::fp32;
    const auto room = [&](int64_t count) { return std::vector<uint8_t>(size_t(count * cpu::format_bytes(stored))); };
    const auto tell = [&](const char* name, const std::vector<uint8_t>& x) {
        std::vector<float> wide(x.size() / size_t(cpu::format_bytes(stored)));
        cpu::ops().elementwise.widen(x.data(), stored, int64_t(wide.size()), wide.data());
        print(name, format, wide);
    };
    auto last = room(states), keys = room(2 * states), values = room(2 * states), some = room(takes * states);
    std::vector<float> means(size_t(takes * batch * bands * shape.embd));
    cpu::Forward(weights).run({tokens.data(), batch, length, shape.layers, last.data(), keys.data(), values.data(),
                               taken, takes, true, some.data(), bands, means.data()},
                              2);
    tell("forward", last);
    tell("forward_keys", keys);
    tell("forward_values", values);
    tell("forward_states", some);
    print("forward_means", format, means);
}

void decode(cpu::Format format) {
    const auto weights = network(format);
    constexpr int64_t primers = 2, copies = 3, length = 20;
    const int64_t colours = weights->shape.vocab - 1;
    cpu::Decoder decoder(weights, primers, length);
    std::vector<float> logits(size_t(primers * copies * colours));
    for (int64_t t = 0; t < length; ++t) {
        if (t == 11) decoder.fork(copies, 2);
        int64_t tokens[primers * copies];
        for (int64_t b = 0; b < primers * copies; ++b) tokens[b] = (5 * t + 3 * b) % colours;
        decoder.step(tokens, logits.data(), 2);
    }
    print("logits", format, logits);
}

}  // namespace

int main(int count, char** arguments) {
    cpu::Isa all[8];
    for (int i = 0, n = cpu::isas(all); i < n && count < 2; ++i)
        if (all[i].supported) std::printf("%s\n", all[i].table->isa);
    if (count < 2) return 0;
    all_finite = count < 3;
    if (!cpu::select_isa(arguments[1])) return 1;
    quantize(1000, 37, true);
    quantize(9000, 300, false);  // with cells and groups
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16}) {
        elementwise(format);
        attention(format);
        forward(format);
    }
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16, cpu::Format::int8}) decode(format);
    if (all_finite) forward(cpu::Format::int8);
}
