// y = then(x W + bias) of many rows, the body by tiles: the forward pass's products. Layouts: forward_kernels.h.
//
// A block of y, 32 x 32, stays in four tiles while it walks over kDepth of k. Every other block walks backwards: the
// weights that were read last are read first, as the nearest cache does not hold those of a whole walk beside the
// inputs. Two kinds of work ride along between the products, a share at each step: what happens to the block before
// (bias, activation, residual), and the prefetch of the 64 outputs' weights that come next. Kinds: `Pairs` of block.h,
// and int8 with int8, `TileBytes`: the same tiles with twice as many of k.
//
// Bound by the tile unit, 2 rows n k FLOPs, and by reading inputs from the second cache, 32 bytes a cycle at its peak.
#pragma once

#include "../forward_kernels.h"
#include "attention_tiles.h"
#include "block.h"
#include "linear.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kWalk = 16;                     // tiles along k
constexpr int64_t kWeightRow = 256;               // bytes: a group of k, 64 outputs
constexpr int64_t kWeightTile = 16 * kWeightRow;  // bytes from tile to tile along k
constexpr int64_t kBlockSize = kRows * 32;        // numbers

// The unit multiplies signed bytes as well.
struct TileBytes : Bytes {
    static void put(uint8_t* to, Vec v) { store_bytes(to, v, 0); }
    static Vec number(const float* sum, const float*) { return to_floats(load_ints(sum), Ints{}); }
};

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

// `before` is the block whose rows are made y on the way. `now` is the one whose sums will be there after this walk:
// its lines of y, long gone from the caches since they were last written, are fetched, as stores that wait would hold
// up everything.
template <class Kind, class Y>
inline void walk(const Walk& w, Feed& feed, const Pending& before, const Pending& now, const Y& y) {
    const int64_t rows = (kRows + w.steps - 1) / w.steps;
    for (int64_t i = 0; i < w.steps; ++i) {
        const int64_t k = w.back ? w.steps - 1 - i : i, end = least(kRows, (i + 1) * rows);
        const char* weights = w.last && k == w.steps - 1 ? w.last : w.weights + k * kWeightTile;
        multiply_tiles<Kind::rounded>(w.x + k * kTileSize, w.x_below + k * kTileSize, 64, weights, weights + 64,
                                      kWeightRow);
        feed.step();
        for (int64_t r = i * rows; r < end && now.sums; ++r) y.fetch(now.row + r, now.column);
        for (int64_t r = i * rows; r < end && before.sums; ++r) y.finish(before, r);
    }
}

// The weights of a last tile that k does not fill: 16 groups of 64 outputs, of which `groups` are there.
inline void copy_last(const char* from, int64_t groups, char* to) {
    for (int64_t r = 0; r < 16; ++r)
        for (int64_t i = 0; i < kWeightRow; i += 64)
            _mm512_store_si512(to + r * kWeightRow + i,
                               r < groups ? load_ints(from + r * kWeightRow + i) : _mm512_setzero_si512());
}

template <class Kind, class Y>
inline void gemm_with(const GemmParams& p, const Y& y) {
    constexpr int64_t deep = 16 * Kind::step;
    const Tiles tiles;
    const int64_t steps = (p.depth + deep - 1) / deep, rest = p.depth % deep, groups = p.matrix->k / Kind::step;
    alignas(64) float sums[2][kBlockSize];
    alignas(64) char last[kWeightTile];
    Pending before;
    int turn = 0;
    for (int64_t n = p.begin / 64 * 64; n < p.end; n += 64) {
        const char* weights = p.matrix->data + (n / 64 * groups + p.from / Kind::step) * kWeightRow;
        const char* after = n + 64 < p.end ? weights + groups * kWeightRow : p.next;
        if (rest) copy_last(weights + (steps - 1) * kWeightTile, rest / Kind::step, last);
        for (int64_t k = 0; k < steps; k += kWalk) {
            const int64_t count = least(kWalk, steps - k);
            const bool ends = k + count == steps;
            Feed feed{ends ? after : weights + (k + count) * kWeightTile, (2 * kRows * 16 + p.rows - 1) / p.rows};
            for (int64_t half = 0; half < 64; half += 32) {
                if (n + half < p.begin || n + half >= p.end) continue;
                for (int64_t row = 0; row < p.rows; row += kRows) {
                    float* parts = p.scratch + (row * 2 + half) * 32;
                    if (k == 0)
                        zero_tiles();
                    else
                        load_tiles(parts, 32);
                    const uint16_t* x = static_cast<const uint16_t*>(p.x) + (row / 16 * steps + k) * kTileSize;
                    const bool back = ((p.first + row) % p.positions & kRows) != 0;
                    const Walk w{x,
                                 x + steps * kTileSize,
                                 weights + k * kWeightTile + 4 * half,
                                 ends && rest ? last + 4 * half : nullptr,
                                 count,
                                 back};
                    const Pending now{ends ? sums[turn ^= 1] : nullptr, row, n + half};
                    walk<Kind>(w, feed, before, now, y);
                    store_tiles(ends ? sums[turn] : parts, 32);
                    before = now;
                }
            }
        }
    }
    for (int64_t r = 0; r < kRows && before.sums; ++r) y.finish(before, r);
}

// Activations, to more digits than bf16 keeps and at half the price: 1 / x has 14 bits.
inline Vec times_sigmoid(Vec x, Vec minus_u) { return x * _mm512_rcp14_ps(set1(1.0f) + exp2(minus_u * set1(kLog2e))); }

inline Vec quick_gelu_near(Vec x) { return times_sigmoid(x, x * set1(-1.702f)); }

inline Vec gelu_tanh_near(Vec x) {
    return times_sigmoid(x, x * fma(x * x, set1(0.044715f), set1(1.0f)) * set1(-1.59576912f));
}

// Where y goes, and what it is made of x W + bias.
struct ToPlain {
    static constexpr int64_t kLines = 1;
    const GemmParams& p;

    char* place(int64_t row, int64_t column) const {
        return static_cast<char*>(p.plain) + 2 * (row * p.width + column);
    }
    static void write(char* y, Vec a, Vec b) { _mm512_store_si512(y, to_bf16(a, b)); }
};

struct ToResidual {
    static constexpr int64_t kLines = 2;
    const GemmParams& p;

    char* place(int64_t row, int64_t column) const {
        const int64_t block = row / kRows * (p.width / 32) + column / 32;
        return reinterpret_cast<char*>(p.residual + block * kBlockSize + row % kRows * 32);
    }
    static void write(char* y, Vec a, Vec b) {
        float* x = reinterpret_cast<float*>(y);
        store(x, load(x) + a);
        store(x + 16, load(x + 16) + b);
    }
};

template <Vec (*Activation)(Vec)>
struct ToTiles {
    static constexpr int64_t kLines = 1;
    const GemmParams& p;

    char* place(int64_t row, int64_t column) const {
        const int64_t tile = row / 16 * (p.width / 32) + (column - p.first_output) / 32;
        return static_cast<char*>(p.tiles) + 2 * (tile * kTileSize + row % 16 * 32);
    }
    static void write(char* y, Vec a, Vec b) { _mm512_store_si512(y, to_bf16(Activation(a), Activation(b))); }
};

template <class Kind, class To>
struct Output : To {
    void fetch(int64_t row, int64_t column) const {
        for (int64_t i = 0; i < To::kLines; ++i) __builtin_prefetch(this->place(row, column) + 64 * i, 1, 3);
    }
    // Row r of a block's sums, (32, 32), and the bias.
    void finish(const Pending& block, int64_t r) const {
        const float *sums = block.sums + r * 32, *bias = this->p.matrix->bias + block.column;
        const bool with_bias = this->p.from == 0;
        Vec left = Kind::number(sums, nullptr), right = Kind::number(sums + 16, nullptr);
        if constexpr (Kind::rounded) {
            const Vec inputs = set1(this->p.scale[block.row + r]);
            const float* weights = this->p.matrix->scale + block.column;
            left = left * (load(weights) * inputs);
            right = right * (load(weights + 16) * inputs);
        }
        To::write(this->place(block.row + r, block.column), left + (with_bias ? load(bias) : zero()),
                  right + (with_bias ? load(bias + 16) : zero()));
    }
};

template <class Kind>
void gemm_by_tiles(const GemmParams& p) {
    switch (p.then) {
        case Then::store:
            return gemm_with<Kind>(p, Output<Kind, ToPlain>{{p}});
        case Then::add:
            return gemm_with<Kind>(p, Output<Kind, ToResidual>{{p}});
        case Then::quick_gelu:
            return gemm_with<Kind>(p, Output<Kind, ToTiles<quick_gelu_near>>{{p}});
        case Then::gelu_tanh:
            return gemm_with<Kind>(p, Output<Kind, ToTiles<gelu_tanh_near>>{{p}});
        case Then::gelu_erf:
            return gemm_with<Kind>(p, Output<Kind, ToTiles<GeluErf<Fine>::value>>{{p}});
    }
}

}  // namespace
}  // namespace igpt::cpu
