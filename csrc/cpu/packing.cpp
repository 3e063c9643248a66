// From a checkpoint's matrices to packed ones; layouts: decoder_kernels.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.h"

namespace igpt::cpu {
namespace {

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

uint16_t to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// The `count` columns of a tile, at every k: (k, count) as fp32.
void gather(const Source& source, const int64_t* order, int64_t count, int64_t k, float* out) {
    for (int64_t i = 0; i < k; ++i, out += count) {
        if (source.is_bf16) {
            const auto* row = static_cast<const uint16_t*>(source.data) + i * source.stride_k;
            for (int64_t n = 0; n < count; ++n) {
                const uint32_t bits = uint32_t(row[order[n] * source.stride_n]) << 16;
                std::memcpy(out + n, &bits, 4);
            }
        } else {
            const float* row = static_cast<const float*>(source.data) + i * source.stride_k;
            for (int64_t n = 0; n < count; ++n) out[n] = row[order[n] * source.stride_n];
        }
    }
}

// (k, count) -> int8 with a scale for each column, which is NaN when a weight is not finite.
void quantize_columns(const float* in, int64_t count, int64_t k, int8_t* out, float* scale, int32_t* sums) {
    std::vector<float> most(size_t(count), 0.0f), poison(size_t(count), 0.0f), inverse(size_t(count), 0.0f);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t n = 0; n < count; ++n) {
            const float x = in[i * count + n], magnitude = std::fabs(x);
            most[size_t(n)] = magnitude > most[size_t(n)] ? magnitude : most[size_t(n)];
            poison[size_t(n)] += x * 0.0f;
        }
    for (int64_t n = 0; n < count; ++n) {
        const float step = most[size_t(n)] / 127.0f;
        inverse[size_t(n)] = step > 1e-37f && std::isfinite(step) ? 1.0f / step : 0.0f;
        scale[n] = step + poison[size_t(n)];
        sums[n] = 0;
    }
    for (int64_t i = 0; i < k; ++i)
        for (int64_t n = 0; n < count; ++n) {
            const float q = in[i * count + n] * inverse[size_t(n)];
            // Rounds to nearest, and clears what is not a number.
            const int32_t rounded = q > -128.0f && q < 128.0f ? int32_t(q + (q < 0.0f ? -0.5f : 0.5f)) : 0;
            out[i * count + n] = int8_t(rounded);
            sums[n] += rounded;
        }
}

// Interleaves (k, count) into [k / step][tile][step].
template <class T, class In, class Convert>
void interleave(const In* in, int64_t count, int64_t k, int64_t tile, int64_t step, T* out, Convert convert) {
    for (int64_t i = 0; i < k; i += step)
        for (int64_t s = 0; s < step; ++s)
            for (int64_t n = 0; n < count; ++n)
                out[(i * tile) + n * step + s] = convert(in[(i + s) * count + n]);
}

}  // namespace

void pack(const Matrix& out, const Source& source, const float* bias, const std::vector<int64_t>& order,
          const DecoderKernels& kernels, int threads) {
    const int64_t tile = kernels.tile, k = out.k, tiles = out.n / tile, size = format_bytes(out.format);
    const int used = usable_threads(threads);
    auto* scale = const_cast<float*>(out.scale);
    auto* sums = const_cast<int32_t*>(out.sums);
    std::vector<std::vector<float>> columns(size_t(used), std::vector<float>(size_t(tile * k)));
    std::vector<std::vector<int8_t>> bytes(size_t(used), std::vector<int8_t>(scale ? size_t(tile * k) : 0));
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int part = 0; part < used; ++part)
        for (int64_t t = tiles * part / used; t < tiles * (part + 1) / used; ++t) {
            const int64_t count = std::min(tile, int64_t(order.size()) - t * tile);
            float* wide = columns[size_t(part)].data();
            char* to = const_cast<char*>(out.data) + t * tile * k * size;
            gather(source, order.data() + t * tile, count, k, wide);
            if (out.format == Format::fp32) {
                interleave(wide, count, k, tile, 1, reinterpret_cast<float*>(to), [](float x) { return x; });
            } else if (out.format == Format::bf16) {
                interleave(wide, count, k, tile, 2, reinterpret_cast<uint16_t*>(to), to_bf16);
            } else {
                int8_t* narrow = bytes[size_t(part)].data();
                quantize_columns(wide, count, k, narrow, scale + t * tile, sums + t * tile);
                interleave(narrow, count, k, tile, kernels.int8_step, reinterpret_cast<int8_t*>(to),
                           [](int8_t x) { return x; });
            }
        }
    if (bias)
        for (size_t n = 0; n < order.size(); ++n) const_cast<float*>(out.bias)[n] = bias[order[n]];
}

namespace {

std::vector<int64_t> in_order(int64_t n) {
    std::vector<int64_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[size_t(i)] = i;
    return order;
}

// Output h 3 d + part d + i of the packed qkv is column part embd + h d + i.
std::vector<int64_t> by_head(int64_t embd, int64_t heads) {
    const int64_t d = embd / heads;
    std::vector<int64_t> order;
    order.reserve(size_t(3 * embd));
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t part = 0; part < 3; ++part)
            for (int64_t i = 0; i < d; ++i) order.push_back(part * embd + h * d + i);
    return order;
}

const DecoderShape& checked(const DecoderShape& s) {
    const int64_t limit = int64_t(1) << 24;
    for (int64_t size : {s.layers, s.embd, s.heads, s.inner, s.positions, s.vocab - 1})
        if (size < 1 || size > limit) throw std::invalid_argument("decoder: a size is out of its range");
    if (s.embd % 16 || s.embd % s.heads || s.head_dim() % 8 || s.inner % 8 || s.head_dim() > max_head_dim ||
        s.embd > 65536 || s.inner > 65536)
        throw std::invalid_argument("decoder: n_embd " + std::to_string(s.embd) + ", n_head " +
                                    std::to_string(s.heads) + ", n_inner " + std::to_string(s.inner) +
                                    " are not sizes that the kernels take");
    return s;
}

}  // namespace

size_t DecoderWeights::matrix_bytes(int64_t n, int64_t k) const {
    const int64_t wide = padded(n, kernels.tile);
    const size_t vectors = shape.format == Format::int8 ? 3 : 1;
    return Arena::bytes<char>(wide * k * format_bytes(shape.format)) + vectors * Arena::bytes<float>(wide);
}

Matrix DecoderWeights::take(int64_t n, int64_t k) {
    const int64_t wide = padded(n, kernels.tile);
    const bool int8 = shape.format == Format::int8;
    Matrix m{};
    m.n = wide;
    m.k = k;
    m.format = shape.format;
    m.data = arena_.take<char>(wide * k * format_bytes(shape.format));
    m.bias = arena_.take<float>(wide);
    m.scale = int8 ? arena_.take<float>(wide) : nullptr;
    m.sums = int8 ? arena_.take<int32_t>(wide) : nullptr;
    return m;
}

DecoderWeights::DecoderWeights(const DecoderShape& wanted) : shape(checked(wanted)), kernels(ops().decoder) {
    const int64_t d = shape.embd, f = shape.inner, colours = shape.vocab - 1;
    const size_t vector = Arena::bytes<float>(d);
    const size_t layer = 2 * vector + matrix_bytes(3 * d, d) + matrix_bytes(d, d) + matrix_bytes(f, d) + matrix_bytes(d, f);
    arena_ = Arena(size_t(shape.layers) * layer + matrix_bytes(colours, d) + vector +
                   Arena::bytes<float>(shape.vocab * d) + Arena::bytes<float>(shape.positions * d));
    // In the order in which a step reads them.
    layers_.resize(size_t(shape.layers));
    for (Layer& l : layers_) {
        l.norm_1 = arena_.take<float>(d);
        l.qkv = take(3 * d, d);
        l.proj = take(d, d);
        l.norm_2 = arena_.take<float>(d);
        l.fc = take(f, d);
        l.fc_proj = take(d, f);
        l.scale = 1.0f;
    }
    norm_ = arena_.take<float>(d);
    head_ = take(colours, d);
    wte_ = arena_.take<float>(shape.vocab * d);
    wpe_ = arena_.take<float>(shape.positions * d);
}

void DecoderWeights::set_tables(const float* wte, const float* wpe, const float* norm, const Source& head,
                                int threads) {
    std::copy_n(wte, shape.vocab * shape.embd, wte_);
    std::copy_n(wpe, shape.positions * shape.embd, wpe_);
    std::copy_n(norm, shape.embd, norm_);
    pack(head_, head, nullptr, in_order(shape.vocab - 1), kernels, threads);
}

void DecoderWeights::set_layer(int64_t layer, const LayerSource& source, int threads) {
    if (layer < 0 || layer >= shape.layers) throw std::invalid_argument("decoder: no such layer");
    Layer& l = layers_[size_t(layer)];
    std::copy_n(source.norm_1, shape.embd, l.norm_1);
    std::copy_n(source.norm_2, shape.embd, l.norm_2);
    pack(l.qkv, source.qkv, source.qkv_bias, by_head(shape.embd, shape.heads), kernels, threads);
    pack(l.proj, source.proj, source.proj_bias, in_order(shape.embd), kernels, threads);
    pack(l.fc, source.fc, source.fc_bias, in_order(shape.inner), kernels, threads);
    pack(l.fc_proj, source.fc_proj, source.fc_proj_bias, in_order(shape.embd), kernels, threads);
    l.scale = source.scale;
}

}  // namespace igpt::cpu
