// y = then(x W + bias), the body: products (product.h) of a matrix's tiles, one after the other, kDepth deep, so that
// further rows find a block of weights in the cache.
#pragma once

#include "activation.h"
#include "product.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kDepth = 512;  // of k, a multiple of 64
// What Int8Words adds up.
static_assert(kDepth * 127 * 32768 <= INT32_MAX);

void split(const Rows& rows, int64_t k, Format format) {
    if (format == Format::int8) Int8::split_rows(rows, k);
    if (format == Format::bf16 && rows.count > 1) Bf16::split_rows(rows, k);
}

inline Vec apply(Then then, Vec v, const float* y) {
    switch (then) {
        case Then::add:
            return load(y) + v;
        case Then::quick_gelu:
            return QuickGelu<Fine>::value(v);
        case Then::gelu_tanh:
            return GeluTanh<Fine>::value(v);
        case Then::gelu_erf:
            return GeluErf<Fine>::value(v);
        case Then::store:
            break;
    }
    return v;
}

// From the sums of one tile's registers to y.
template <class F>
inline void conclude(const LinearParams& p, int64_t column, int registers) {
    const Matrix& m = *p.matrix;
    for (int64_t r = 0; r < p.rows->count; ++r)
        for (int c = 0; c < registers; ++c) {
            const int64_t n = column + c * kLanes;
            const float* sums = p.scratch + 2 * r * kTile + c * kLanes;
            Vec v = load(sums);
            if constexpr (F::splits)
                v = F::whole(sums, sums + kTile, m.sums + n) * (load(m.scale + n) * set1(p.rows->scale[r]));
            else if (m.format == Format::int8)
                v = v * load(m.scale + n);
            if (m.bias) v = v + load(m.bias + n);
            float* y = p.y + r * p.ld + n;
            store(y, apply(p.then, v, y));
        }
}

template <class F>
void linear_in(const LinearParams& p) {
    const Matrix& m = *p.matrix;
    const Rows& rows = *p.rows;
    const ptrdiff_t stride = 4 * F::bytes, tile_bytes = m.k / F::step * stride;
    const int64_t blocks = (rows.count + F::max_rows - 1) / F::max_rows;
    const char* end = m.data + (p.end + kTile - 1) / kTile * tile_bytes;
    for (int64_t column = p.begin; column < p.end;) {
        const int64_t tile = column / kTile, first = column % kTile / kLanes, left = (p.end - column) / kLanes;
        const int registers = int(left < 4 - first ? left : 4 - first);
        for (int64_t k = 0; k < m.k; k += kDepth)
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t row = F::tiled ? b * F::max_rows : rows.count * b / blocks, at = row * rows.ld + k;
                const int64_t depth = m.k - k < kDepth ? m.k - k : kDepth;
                Piece piece{};
                piece.weights = m.data + tile * tile_bytes + k / F::step * stride + first * F::bytes;
                piece.stride = stride;
                piece.count = depth;
                piece.x = rows.x + at;
                piece.high = rows.high + at;
                piece.low = rows.low + at;
                piece.half = rows.half + at;
                piece.ld = rows.ld;
                if constexpr (F::tiled) F::set_inputs(piece, rows, row, k);
                piece.sums = p.scratch + 2 * row * kTile;
                piece.width = kTile;
                piece.first = k == 0;
                if (blocks == 1)
                    prefetch_in_front(piece, end, p.next);
                else
                    prefetch_in_parts(piece, end, p.next, depth / F::step, b, blocks);
                if constexpr (F::tiled)
                    run_columns<F, F::max_rows>(piece, registers);
                else
                    run_rows<F>(piece, rows.count * (b + 1) / blocks - row, registers);
            }
        conclude<F>(p, column, registers);
        column += registers * kLanes;
    }
}

// f(the format's weights), as they are without tiles.
template <class F>
inline void in_format(Format format, F&& f) {
    switch (format) {
        case Format::fp32:
            return f(Fp32{});
        case Format::bf16:
            return f(Bf16{});
        case Format::int8:
            return f(Int8{});
    }
}

void linear(const LinearParams& p) {
    in_format(p.matrix->format, [&](auto weights) { linear_in<decltype(weights)>(p); });
}

// ---- Element by element -------------------------------------------------------------------------------------

void norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    Vec squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    const Vec scale = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

void sum(const float* a, const float* b, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(a + i) + load(b + i));
}

}  // namespace
}  // namespace igpt::cpu
