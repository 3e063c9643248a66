// What tests/test_aarch64.py runs on the plain level: colours to clusters, and a model of two layers that reads a
// primer, forks and goes on, in every format. Prints one number a line, the same on every processor up to rounding.
// With an argument: the same for tests/test_cpu_undefined.py, from numbers of which some are not finite.
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/decoder.h"

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

void quantize() {
    constexpr int64_t n = 1000, k = 37;
    const std::vector<float> clusters = numbers(3 * k), floats = numbers(3 * n);
    std::vector<uint8_t> bytes(3 * n);
    for (uint8_t& x : bytes) x = uint8_t((number() + 1.0f) * 127.5f);
    std::vector<int64_t> out(n);
    cpu::quantize_u8({bytes.data(), clusters.data(), out.data(), n, k, 2, nullptr});
    for (int64_t i : out) std::printf("%d\n", int(i));
    cpu::quantize_f32({floats.data(), clusters.data(), out.data(), n, k, 2, nullptr});
    for (int64_t i : out) std::printf("%d\n", int(i));
}

void decode(cpu::Format format) {
    const cpu::DecoderShape shape{2, 48, 2, 72, 20, 17, 1e-5f, cpu::Then::quick_gelu, format};
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
    constexpr int64_t primers = 2, copies = 3;
    cpu::Decoder decoder(weights, primers, shape.positions);
    std::vector<float> logits(size_t(primers * copies * colours));
    for (int64_t t = 0; t < shape.positions; ++t) {
        if (t == 11) decoder.fork(copies, 2);
        int64_t tokens[primers * copies];
        for (int64_t b = 0; b < primers * copies; ++b) tokens[b] = (5 * t + 3 * b) % colours;
        decoder.step(tokens, logits.data(), 2);
    }
    for (float x : logits) std::printf("%.9g\n", double(x));
}

}  // namespace

int main(int count, char**) {
    all_finite = count < 2;
    if (!cpu::select_isa("generic")) return 1;
    quantize();
    for (cpu::Format format : {cpu::Format::fp32, cpu::Format::bf16, cpu::Format::int8}) decode(format);
}
