// Rows of the forward pass, the body: embedding, norm, and what is taken of a residual and of tiles. Layouts:
// forward_kernels.h. E is an activation, W a state that the pass gives: float or bf16.
#pragma once

#include "../forward_kernels.h"
#include "block.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kStripRegisters = 32 / kLanes;  // registers of 32 columns

inline float* residual_at(const float* residual, int64_t width, int64_t row) {
    return const_cast<float*>(residual) + row / kRows * kRows * width + row % kRows * 32;
}

// The line of a row's first numbers; the next ones are 16 lines further.
template <class E>
inline E* tiles_at(const void* tiles, int64_t width, int64_t row) {
    return static_cast<E*>(const_cast<void*>(tiles)) + row / 16 * 16 * width + row % 16 * (64 / int64_t(sizeof(E)));
}
// Where column i of a row is, which begins at `line`.
template <class E>
inline int64_t along_line(int64_t i) {
    constexpr int64_t line = 64 / int64_t(sizeof(E));
    return i / line * 16 * line + i % line;
}
// Columns i and following of a row, two registers.
template <class E>
inline void put_two(E* line, int64_t i, Vec a, Vec b) {
    if constexpr (2 * kLanes * sizeof(E) <= 64) {
        write_two(line + along_line<E>(i), a, b);
    } else {
        write(line + along_line<E>(i), a, Whole{});
        write(line + along_line<E>(i + kLanes), b, Whole{});
    }
}

inline int64_t along_residual(int64_t i) { return i / 32 * kRows * 32 + i % 32; }

void embed_row(const float* a, const float* b, int64_t n, int64_t width, int64_t row, float* residual) {
    float* to = residual_at(residual, width, row);
    for (int64_t i = 0; i < width; i += kLanes) {
        const bool there = a != nullptr && i < n;
        store(to + along_residual(i), there ? load(a + i) + load(b + i) : zero());
    }
}

template <class E>
void norm_tiles(const NormTiles& p) {
    for (int64_t row = p.first; row < p.first + p.count; ++row) {
        const float* x = residual_at(p.residual, p.width, row);
        E* to = tiles_at<E>(p.tiles, p.width, row);
        Vec sums[2] = {zero(), zero()};
        for (int64_t i = 0; i < p.width; i += 2 * kLanes)
            for (int64_t j = 0; j < 2; ++j) {
                const int64_t at = i + j * kLanes;
                const Vec v = at < p.n ? load(x + along_residual(at)) : zero();
                sums[j] = fma(v, v, sums[j]);
            }
        const Vec scale = set1(1.0f / __builtin_sqrtf(reduce_add(sums[0] + sums[1]) / float(p.n) + p.eps));
        for (int64_t i = 0; i < p.width; i += 2 * kLanes) {
            Vec y[2];
            for (int64_t j = 0; j < 2; ++j) {
                const int64_t at = i + j * kLanes;
                y[j] = at < p.n ? load(x + along_residual(at)) * scale * load(p.weight + at) : zero();
            }
            put_two(to, i, y[0], y[1]);
        }
    }
}

// Kind: of block.h, one with int8 weights.
template <class Kind, class E>
void round_rows(const RoundRows& p) {
    using R = typename Kind::Input;
    const int64_t width = padded(p.n, 32), wide = padded(p.n, most(32, 64 / int64_t(sizeof(R))));
    for (int64_t row = p.first; row < p.first + p.count; ++row) {
        const E* x = tiles_at<E>(p.from, width, row);
        R* to = tiles_at<R>(p.tiles, wide, row);
        Vec largest = zero(), poison = zero();
        for (int64_t i = 0; i < p.n; i += kLanes) {
            const Vec v = read(x + along_line<E>(i), Whole{});
            largest = max(abs(v), largest);
            poison = fma(v, zero(), poison);
        }
        const float scale = reduce_max(largest) / 127.0f;
        // Numbers so small that their steps have no inverse are zero.
        const Vec inverse = set1(scale > 1e-37f ? 1.0f / scale : 0.0f);
        for (int64_t i = 0; i < p.n; i += kLanes)
            Kind::put(to + along_line<R>(i), read(x + along_line<E>(i), Whole{}) * inverse);
        p.scale[row] = scale + reduce_add(poison);
    }
}

template <class W>
void residual_row(const float* residual, int64_t n, int64_t width, int64_t row, void* out) {
    const float* x = residual_at(residual, width, row);
    for (int64_t i = 0; i < n; i += kLanes) write(static_cast<W*>(out) + i, load(x + along_residual(i)), Whole{});
}

template <class E, class W>
void tiles_row(const void* tiles, int64_t n, int64_t width, int64_t row, void* out) {
    const E* x = tiles_at<E>(tiles, width, row);
    for (int64_t i = 0; i < n; i += kLanes)
        write(static_cast<W*>(out) + i, read(x + along_line<E>(i), Whole{}), Whole{});
}

// `at(row, i)` is column i of a row.
template <class At>
inline void mean_rows(const MeanParams& p, At at) {
    Vec sums[kStripRegisters];
    for (Vec& sum : sums) sum = zero();
    for (int64_t row = p.first; row < p.first + p.count; ++row)
        for (int64_t j = 0; j < kStripRegisters; ++j) sums[j] = sums[j] + read(at(row, p.column + j * kLanes), Whole{});
    const Vec count = set1(float(p.count));
    for (int64_t i = p.column, j = 0; j < kStripRegisters && i < p.n; ++j, i += kLanes)
        store(p.out + i, sums[j] / count);
}

void mean_residual(const float* residual, const MeanParams& p) {
    mean_rows(p, [&](int64_t row, int64_t i) { return residual_at(residual, p.width, row) + along_residual(i); });
}

template <class E>
void mean_tiles(const void* tiles, const MeanParams& p) {
    mean_rows(p, [&](int64_t row, int64_t i) { return tiles_at<E>(tiles, p.width, row) + along_line<E>(i); });
}

}  // namespace
}  // namespace igpt::cpu
