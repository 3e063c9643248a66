// From a checkpoint's matrices to packed ones; layouts: decoder_kernels.h.
#include "weights.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "region.h"

namespace igpt::cpu {
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

// Fills a matrix; `order[n]` is the column of source and bias for output n.
void fill(const Matrix& m, const Source& source, const float* bias, const std::vector<int64_t>& order,
          const DecoderKernels& kernels, int threads) {
    const int64_t tile = kernels.tile, tiles = m.n / tile, bytes = tile * m.k * format_bytes(m.format);
    for_each(tiles, usable_threads(threads), [&](int64_t t) {
        const int64_t first = t * tile;
        kernels.pack({source.data, source.is_bf16, source.stride_k, source.stride_n, order.data() + first,
                      std::min(tile, int64_t(order.size()) - first), m.k, m.format,
                      const_cast<char*>(m.data) + t * bytes, m.scale ? const_cast<float*>(m.scale) + first : nullptr,
                      m.sums ? const_cast<int32_t*>(m.sums) + first : nullptr});
    });
    if (bias)
        for (size_t n = 0; n < order.size(); ++n) const_cast<float*>(m.bias)[n] = bias[order[n]];
}

}  // namespace

Matrix DecoderWeights::take(Arena& arena, int64_t n, int64_t k) const {
    const int64_t wide = padded(n, kernels.tile);
    const bool int8 = shape.format == Format::int8;
    Matrix m{};
    m.n = wide;
    m.k = k;
    m.format = shape.format;
    m.data = arena.take<char>(wide * k * format_bytes(shape.format));
    m.bias = arena.take<float>(wide);
    m.scale = int8 ? arena.take<float>(wide) : nullptr;
    m.sums = int8 ? arena.take<int32_t>(wide) : nullptr;
    return m;
}

DecoderWeights::DecoderWeights(const DecoderShape& wanted)
    : shape(checked(wanted)), kernels(ops().decoder), layers_(size_t(shape.layers)) {
    const int64_t d = shape.embd, f = shape.inner;
    arena_ = Arena::of([&](Arena& arena) {  // in the order in which a step reads them
        for (Layer& l : layers_) {
            l.norm_1 = arena.take<float>(d);
            l.qkv = take(arena, 3 * d, d);
            l.proj = take(arena, d, d);
            l.norm_2 = arena.take<float>(d);
            l.fc = take(arena, f, d);
            l.fc_proj = take(arena, d, f);
            l.scale = 1.0f;
        }
        norm_ = arena.take<float>(d);
        head_ = take(arena, shape.vocab - 1, d);
        wte_ = arena.take<float>(shape.vocab * d);
        wpe_ = arena.take<float>(shape.positions * d);
    });
}

void DecoderWeights::set_tables(const float* wte, const float* wpe, const float* norm, const Source& head,
                                int threads) {
    std::copy_n(wte, shape.vocab * shape.embd, wte_);
    std::copy_n(wpe, shape.positions * shape.embd, wpe_);
    std::copy_n(norm, shape.embd, norm_);
    if (head.data) fill(head_, head, nullptr, in_order(shape.vocab - 1), kernels, threads);
}

void DecoderWeights::set_layer(int64_t layer, const LayerSource& source, int threads) {
    if (layer < 0 || layer >= shape.layers) throw std::invalid_argument("decoder: no such layer");
    Layer& l = layers_[size_t(layer)];
    std::copy_n(source.norm_1, shape.embd, l.norm_1);
    std::copy_n(source.norm_2, shape.embd, l.norm_2);
    fill(l.qkv, source.qkv, source.qkv_bias, by_head(shape.embd, shape.heads), kernels, threads);
    fill(l.proj, source.proj, source.proj_bias, in_order(shape.embd), kernels, threads);
    fill(l.fc, source.fc, source.fc_bias, in_order(shape.inner), kernels, threads);
    fill(l.fc_proj, source.fc_proj, source.fc_proj_bias, in_order(shape.embd), kernels, threads);
    l.scale = source.scale;
}

}  // namespace igpt::cpu
