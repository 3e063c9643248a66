// y = then(x W + bias) of many rows, the body: the forward pass's products by tiles. Layouts: forward_kernels.h.
//
// A block of y, 32 x 32, stays in four tiles while it walks over kDepth of k. Every other block walks backwards: the
// weights that were read last are read first, as the nearest cache does not hold those of a whole walk beside the
// inputs. Two kinds of work ride along between the products, a share at each step: what happens to the block before
// (bias, activation, residual), and the prefetch of the 64 outputs' weights that come next.
//
// Bound by the tile unit, 2 rows n k FLOPs, and by reading inputs from the second cache, 32 bytes a cycle at its peak.
#pragma once

#include "attention_tiles.h"
#include "forward_kernels.h"
#include "linear.h"

namespace igpt::cpu {
namespace {

#if defined(__AMX_TILE__)

constexpr int64_t kWalk = 16;                     // tiles along k
constexpr int64_t kWeightRow = 256;               // bytes: a pair of k, 64 outputs
constexpr int64_t kWeightTile = 16 * kWeightRow;  // bytes from tile to tile along k
constexpr int64_t kBlockSize = kRows * 32;        // numbers

// Weights to fetch into the second cache: `lines` at each step.
struct Feed {
    const char* at;
    int64_t lines;

    void step() {
        for (int64_t i = 0; i < lines; ++i) prefetch(at + 64 * i);
        at += 64 * lines;
    }
};

// A block whose sums are there, and for which the rest is to be done.
struct Pending {
    const float* sums = nullptr;
    int64_t row = 0, column = 0;
};

// The tiles of k that a walk takes: x and weights from the first on, in which the last may have one of its own.
struct Walk {
    const uint16_t *x, *x_below;
    const char* weights;
    const char* last;  // the last tile, where k ends inside it; else null
    int64_t steps;
    bool back;
};

template <class Finish>
inline void walk(const Walk& w, Feed& feed, const Pending& pending, Finish finish) {
    const int64_t rows = (kRows + w.steps - 1) / w.steps;
    for (int64_t i = 0; i < w.steps; ++i) {
        const int64_t k = w.back ? w.steps - 1 - i : i;
        const char* weights = w.last && k == w.steps - 1 ? w.last : w.weights + k * kWeightTile;
        load_tile<4>(w.x + k * kTileSize, 64);
        load_tile<6>(weights, kWeightRow);
        multiply_bf16<0, 4, 6>();
        load_tile<7>(weights + 64, kWeightRow);
        multiply_bf16<1, 4, 7>();
        load_tile<5>(w.x_below + k * kTileSize, 64);
        multiply_bf16<2, 5, 6>();
        multiply_bf16<3, 5, 7>();
        feed.step();
        if (pending.sums)
            for (int64_t r = i * rows; r < least(kRows, (i + 1) * rows); ++r) finish(pending, r);
    }
}

// The weights of a last tile that k does not fill: 16 pairs of 64 outputs, of which `pairs` are there.
inline void copy_last(const char* from, int64_t pairs, char* to) {
    for (int64_t r = 0; r < 16; ++r)
        for (int64_t i = 0; i < kWeightRow; i += 64)
            _mm512_store_si512(to + r * kWeightRow + i,
                               r < pairs ? load_ints(from + r * kWeightRow + i) : _mm512_setzero_si512());
}

// finish(block, row) makes y of a row of sums, (32, 32).
template <class Finish>
inline void gemm_with(const GemmParams& p, Finish finish) {
    const Tiles tiles;
    const int64_t steps = (p.matrix->k + 31) / 32, rest = p.matrix->k % 32;
    alignas(64) float sums[2][kBlockSize];
    alignas(64) char last[kWeightTile];
    Pending pending;
    int turn = 0;
    for (int64_t n = p.begin / 64 * 64; n < p.end; n += 64) {
        const char* weights = p.matrix->data + n * p.matrix->k * 2;
        if (rest) copy_last(weights + (steps - 1) * kWeightTile, rest / 2, last);
        for (int64_t k = 0; k < steps; k += kWalk) {
            const int64_t count = least(kWalk, steps - k);
            const bool ends = k + count == steps;
            Feed feed{weights + (k + count) * kWeightTile, (2 * kRows * 16 + p.rows - 1) / p.rows};
            for (int64_t half = 0; half < 64; half += 32) {
                if (n + half < p.begin || n + half >= p.end) continue;
                for (int64_t row = 0; row < p.rows; row += kRows) {
                    float* parts = p.scratch + (row * 2 + half) * 32;
                    if (k == 0)
                        zero_tiles();
                    else
                        load_tiles(parts, 32);
                    const uint16_t* x = p.x + (row / 16 * steps + k) * kTileSize;
                    walk(
                        {x, x + steps * kTileSize, weights + k * kWeightTile + 4 * half,
                         ends && rest ? last + 4 * half : nullptr, count, ((p.first + row) % p.positions & kRows) != 0},
                        feed, pending, finish);
                    pending.sums = ends ? sums[turn ^= 1] : nullptr;
                    pending.row = row;
                    pending.column = n + half;
                    store_tiles(ends ? sums[turn] : parts, 32);
                }
            }
        }
    }
    for (int64_t r = 0; r < kRows && pending.sums; ++r) finish(pending, r);
}

// The activations of linear.h, to more digits than bf16 keeps and at half the price: 1 / x has 14 bits.
inline Vec times_sigmoid(Vec x, Vec minus_u) { return x * _mm512_rcp14_ps(set1(1.0f) + exp2(minus_u * set1(kLog2E))); }

inline Vec quick_gelu_near(Vec x) { return times_sigmoid(x, x * set1(-1.702f)); }

inline Vec gelu_tanh_near(Vec x) {
    return times_sigmoid(x, x * fma(x * x, set1(0.044715f), set1(1.0f)) * set1(-1.59576912f));
}

// Calls finish(block, row, y, column) with the two registers of sums and bias.
template <class Then>
inline void gemm_then(const GemmParams& p, Then then) {
    gemm_with(p, [&](const Pending& block, int64_t r) {
        const float *sums = block.sums + r * 32, *bias = p.matrix->bias + block.column;
        then(block, r, load(sums) + load(bias), load(sums + 16) + load(bias + 16));
    });
}

template <class Activation>
inline void gemm_to_tiles(const GemmParams& p, Activation activation) {
    gemm_then(p, [&](const Pending& block, int64_t r, Vec a, Vec b) {
        const int64_t row = block.row + r, tile = row / 16 * (p.width / 32) + block.column / 32;
        _mm512_store_si512(p.tiles + tile * kTileSize + row % 16 * 32, to_bf16(activation(a), activation(b)));
    });
}

void gemm(const GemmParams& p) {
    switch (p.then) {
        case Then::store:
            return gemm_then(p, [&](const Pending& block, int64_t r, Vec a, Vec b) {
                _mm512_store_si512(p.plain + (block.row + r) * p.width + block.column, to_bf16(a, b));
            });
        case Then::add:
            return gemm_then(p, [&](const Pending& block, int64_t r, Vec a, Vec b) {
                const int64_t at = block.row / kRows * (p.width / 32) + block.column / 32;
                float* y = p.residual + at * kBlockSize + r * 32;
                store(y, load(y) + a);
                store(y + 16, load(y + 16) + b);
            });
        case Then::quick_gelu:
            return gemm_to_tiles(p, quick_gelu_near);
        case Then::gelu_tanh:
            return gemm_to_tiles(p, gelu_tanh_near);
        case Then::gelu_erf:
            return gemm_to_tiles(p, gelu_erf);
    }
}

#endif

}  // namespace
}  // namespace igpt::cpu
