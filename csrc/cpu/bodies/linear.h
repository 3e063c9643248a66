// y = then(x W + bias), the body: products (product.h) of a matrix's tiles, one after the other, kDepth deep, so that
// further rows find a block of weights in the cache.
#pragma once

#include "product.h"
#include "product_tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kDepth = 512;  // of k, a multiple of 64

void split(const Rows& rows, int64_t k, Format format) {
    if (tiled(rows.count, format)) return split_tiles(rows, k, format);
    if (format == Format::int8) split_bytes(rows, k);
    if (format == Format::bf16 && rows.count > 1)
        for (int64_t r = 0; r < rows.count; ++r) halve_row(rows.x + r * rows.ld, k, rows.half + r * rows.ld);
}

inline Vec quick_gelu(Vec x) { return x / (set1(1.0f) + exp(x * set1(-1.702f))); }

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
inline Vec gelu_tanh(Vec x) {
    const Vec u = x * fma(x * x, set1(0.044715f), set1(1.0f));
    return x / (set1(1.0f) + exp(u * set1(-1.59576912f)));
}

// 0.5 x erfc(-x / sqrt(2)). erfc(y) = exp(-y^2) P(1 / (1 + 0.42 y)) for y >= 0, P fitted to 4e-8.
inline Vec gelu_erf(Vec x) {
    const Vec y = abs(x) * set1(0.707106781f), t = set1(1.0f) / fma(y, set1(0.42f), set1(1.0f));
    Vec p = set1(0.0760096819f);
    p = fma(p, t, set1(-0.345075231f));
    p = fma(p, t, set1(0.485002994f));
    p = fma(p, t, set1(-0.173109188f));
    p = fma(p, t, set1(0.292445122f));
    p = fma(p, t, set1(0.187096898f));
    p = fma(p, t, set1(0.240898579f));
    p = fma(p, t, set1(0.23673116f));
    const Vec tail = set1(0.5f) * p * t * exp(zero() - y * y);  // of the side where the result is small
    // x > 0: x (1 - tail); x < 0: x tail. Both are max(x, 0) - |x| tail.
    return max(zero(), x) - abs(x) * tail;
}

inline Vec apply(Then then, Vec v, const float* y) {
    switch (then) {
        case Then::add:
            return load(y) + v;
        case Then::quick_gelu:
            return quick_gelu(v);
        case Then::gelu_tanh:
            return gelu_tanh(v);
        case Then::gelu_erf:
            return gelu_erf(v);
        case Then::store:
            break;
    }
    return v;
}

// From the sums of one tile's registers to y.
inline void conclude(const LinearParams& p, int64_t column, int registers) {
    const Matrix& m = *p.matrix;
    for (int64_t r = 0; r < p.rows->count; ++r)
        for (int c = 0; c < registers; ++c) {
            const int64_t n = column + c * kLanes;
            const float* sums = p.scratch + 2 * r * kTile + c * kLanes;
            Vec v = load(sums);
            if (m.format == Format::int8) {
                const Vec scale = load(m.scale + n);
#if defined(__AVX512VNNI__)
                v = whole(sums, sums + kTile, m.sums + n) * (scale * set1(p.rows->scale[r]));
#else
                v = v * scale;
#endif
            }
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
        conclude(p, column, registers);
        column += registers * kLanes;
    }
}

void linear(const LinearParams& p) {
#if defined(__AMX_TILE__)
    if (tiled(p.rows->count, p.matrix->format)) {
        const Tiles unit;
        return p.matrix->format == Format::bf16 ? linear_in<TiledBf16>(p) : linear_in<TiledInt8>(p);
    }
#endif
    switch (p.matrix->format) {
        case Format::fp32:
            return linear_in<Fp32>(p);
        case Format::bf16:
            return linear_in<Bf16>(p);
        case Format::int8:
            return linear_in<Int8>(p);
    }
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
