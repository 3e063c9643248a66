// y = then(x W + bias) of many rows, the body: the forward pass's products. Layouts: forward_kernels.h.
//
// A tile of outputs, kBlockDepth of k at a time, meets all rows, kStripRows of them at a time: its weights come from
// memory once and stay in the second cache, beside the rows of a span. The sums of a strip are in the nearest cache
// when they become y. Bound by multiply-adds (block.h): 2 rows n k FLOPs.
#pragma once

#include "activation.h"
#include "block.h"
#include "rows.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kBlockDepth = 1024, kStripRows = 16;
constexpr int64_t kChain = 256;  // fp32 sums of so many are added up by themselves: the fewer, the less is rounded away

// Where y goes, two registers beside each other, and what it is made of x W + bias.
template <class E>
struct StorePlain {
    static void put(const GemmParams& p, int64_t row, int64_t column, Vec a, Vec b) {
        write_two(static_cast<E*>(p.plain) + row * p.width + column, a, b);
    }
};

struct AddResidual {
    static void put(const GemmParams& p, int64_t row, int64_t column, Vec a, Vec b) {
        float* x = residual_at(p.residual, p.width, row) + along_residual(column);
        store(x, load(x) + a);
        store(x + kLanes, load(x + kLanes) + b);
    }
};

template <class E, class Activation>
struct StoreTiles {
    static void put(const GemmParams& p, int64_t row, int64_t column, Vec a, Vec b) {
        put_two(tiles_at<E>(p.tiles, p.width, row), column - p.first_output, Activation::value(a),
                Activation::value(b));
    }
};

// Of a strip's sums, (kStripRows, kTile).
template <class Kind, class To>
inline void finish_strip(const GemmParams& p, const float* sums, const float* of_offset, int64_t row, int64_t column,
                         int64_t columns) {
    const bool with_bias = p.from == 0;
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
        Vec bias[2], scale[2];
        each<2>([&](auto i) {
            const int64_t n = column + c + i * kLanes;
            bias[i] = with_bias ? load(p.matrix->bias + n) : zero();
            scale[i] = Kind::rounded ? load(p.matrix->scale + n) : zero();
        });
        for (int64_t r = 0; r < kStripRows; ++r) {
            Vec v[2];
            each<2>([&](auto i) {
                v[i] = Kind::number(sums + r * kTile + c + i * kLanes, of_offset + c + i * kLanes);
                if constexpr (Kind::rounded) v[i] = v[i] * (scale[i] * set1(p.scale[row + r]));
                v[i] = v[i] + bias[i];
            });
            To::put(p, row + r, column + c, v[0], v[1]);
        }
    }
}

// Outputs n .. n + columns - 1, of one tile.
template <class Kind, class To>
inline void gemm_tile(const GemmParams& p, int64_t n, int64_t columns) {
    constexpr int64_t line = kLineBytes * Kind::step / Kind::bytes, lines_bytes = kStripRows * kLineBytes;
    constexpr int64_t chain = Kind::step == 1 ? kChain : kBlockDepth, group = Kind::lane * kTile;
    const Matrix& m = *p.matrix;
    const char* weights = m.data + (n / kTile * m.k + p.from) / Kind::step * group + n % kTile * Kind::lane;
    const int64_t strip_bytes = padded(p.depth, most(line, 32)) / line * lines_bytes;
    alignas(64) float one[kStripRows * kTile], of_offset[kTile];
    if constexpr (Kind::offset != 0) {  // as a row of it
        alignas(64) char row[kLineBytes];
        __builtin_memset(row, Kind::offset, kLineBytes);
        run_blocks<Kind, 1>({row, 0, 0, weights, p.depth, of_offset, kTile, true}, columns / kLanes);
    }
    using Many = OfManyRows<Kind>;
    constexpr bool turns = kRowsOfGroup<Many> == 2;
    alignas(64) char turned[turns ? kBlockDepth / Kind::step * group : 1];
    for (int64_t from = 0; from < p.depth; from += kBlockDepth) {
        const int64_t to = least(from + kBlockDepth, p.depth);
        const char* w = weights + from / Kind::step * group;
        if constexpr (turns) w = turn_weights<Ints>(w, (to - from) / Kind::step, turned);
        for (int64_t row = 0; row < p.rows; row += kStripRows) {
            const char* x = static_cast<const char*>(p.x) + row / kStripRows * strip_bytes;
            float* sums = p.depth <= kBlockDepth ? one : p.scratch + row * kTile;
            for (int64_t k = from; k < to; k += chain)
                run_blocks<Many, kStripRows>(
                    {x + k / line * lines_bytes, kLineBytes, lines_bytes, w + (k - from) / Kind::step * group,
                     least(chain, to - k), sums, kTile, k == 0},
                    columns / kLanes);
            if (to == p.depth) finish_strip<Kind, To>(p, sums, of_offset, row, n, columns);
        }
    }
}

template <class Kind, class To>
inline void gemm_to(const GemmParams& p) {
    const int64_t end = least(p.end, p.matrix->n);
    for (int64_t n = p.begin; n < end;) {
        const int64_t columns = least(kTile - n % kTile, end - n);
        gemm_tile<Kind, To>(p, n, columns);
        n += columns;
    }
}

// E: what y is stored as, but for the residual.
template <class Kind, class E>
void gemm(const GemmParams& p) {
    using Bits = decltype(bits_for(E{}));
    switch (p.then) {
        case Then::store:
            return gemm_to<Kind, StorePlain<E>>(p);
        case Then::add:
            return gemm_to<Kind, AddResidual>(p);
        case Then::quick_gelu:
            return gemm_to<Kind, StoreTiles<E, QuickGelu<Bits>>>(p);
        case Then::gelu_tanh:
            return gemm_to<Kind, StoreTiles<E, GeluTanh<Bits>>>(p);
        case Then::gelu_erf:
            return gemm_to<Kind, StoreTiles<E, GeluErf<Bits>>>(p);
    }
}

}  // namespace
}  // namespace igpt::cpu
