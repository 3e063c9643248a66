// What the attention bodies share: operands in the layouts of the tile unit, and 2^x. See attention_kernels.h.
//
// A product of tiles is C (16 x 16 float32) += A (16 x 32 bf16) B, and B holds its rows in pairs: (16 pairs, 16
// columns, 2). An operand is packed tile by tile, 1 KB each:
//   columns   B of a product over D: of 16 positions and 32 of D, (16 pairs of D, 16 positions, 2)
//   pairs     B of a product over positions: of 32 positions and 16 of D, (16 pairs of positions, 16 of D, 2)
// Positions that are hidden, or lie beyond the last, are zeros: what stands there is not read.
#pragma once

#include "../attention_kernels.h"
#include "../format.h"
#include "simd/registers.h"
#include "simd/tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kStrip = 32;      // positions at a time: two tiles
constexpr int64_t kTileSize = 512;  // elements of a bf16 tile

constexpr float kLn2 = 0.693147181f;

// The positions of one head, as they lie in a tensor. `hidden`: of each, 0 or minus infinity; null: none is.
struct Rows16 {
    const uint16_t* data;
    int64_t row, count;
    const float* hidden;

    bool shown(int64_t t) const { return t < count && (hidden == nullptr || hidden[t] == 0.0f); }
    // 32 of D, from `i` on, of position t.
    __m512i load(int64_t t, int64_t i) const {
        return _mm512_maskz_loadu_epi16(shown(t) ? ~__mmask32(0) : __mmask32(0), data + t * row + i);
    }
};

inline Rows16 rows_of(const AttentionTensor& x, int64_t b, int64_t h, int64_t count, const float* hidden = nullptr) {
    return {x.data + b * x.batch + h * x.head, x.row, count, hidden};
}

// 16 x 16 of 32 bits, in place.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Positions 0 .. rounded - 1: tile (position / 16, i / 32) at (position / 16 * d / 32 + i / 32).
inline void pack_columns(const Rows16& x, int64_t d, int64_t rounded, uint16_t* out) {
    for (int64_t t = 0; t < rounded; t += 16)
        for (int64_t i = 0; i < d; i += 32, out += kTileSize) {
            __m512i r[16];
            for (int j = 0; j < 16; ++j) r[j] = x.load(t + j, i);
            transpose(r);
            for (int j = 0; j < 16; ++j) _mm512_store_si512(out + 32 * j, r[j]);
        }
}

// Two rows of 32 as pairs: of the first 16 columns, and of the others.
inline void interleave(__m512i a, __m512i b, uint16_t* first, uint16_t* second) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_store_si512(first, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(second, _mm512_permutex2var_epi16(a, high, b));
}

// Positions 0 .. rounded - 1: tile (position / 32, i / 16) at (position / 32 * d / 16 + i / 16).
inline void pack_pairs(const Rows16& x, int64_t d, int64_t rounded, uint16_t* out) {
    for (int64_t t = 0; t < rounded; t += 32, out += d / 16 * kTileSize)
        for (int64_t j = 0; j < 32; j += 2)
            for (int64_t i = 0; i < d; i += 32) {
                uint16_t* at = out + i / 16 * kTileSize + 16 * j;
                interleave(x.load(t + j, i), x.load(t + j + 1, i), at, at + kTileSize);
            }
}

// Positions t .. t + rounded - 1 as they are: rows of d.
inline void pack_rows(const Rows16& x, int64_t t, int64_t d, int64_t rounded, uint16_t* out) {
    for (int64_t j = 0; j < rounded; ++j)
        for (int64_t i = 0; i < d; i += 32) _mm512_store_si512(out + j * d + i, x.load(t + j, i));
}

// C of 32 x 32, as the tiles 0 to 3.
inline void zero_tiles() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
}

// Rows `ld` apart, the second and the third tile `right` and `below` of the first.
inline void load_tiles(const float* c, int64_t ld, int64_t right, int64_t below) {
    load_tile<0>(c, 4 * ld);
    load_tile<1>(c + right, 4 * ld);
    load_tile<2>(c + below, 4 * ld);
    load_tile<3>(c + below + right, 4 * ld);
}
inline void load_tiles(const float* c, int64_t ld) { load_tiles(c, ld, 16, 16 * ld); }

inline void store_tiles(float* c, int64_t ld, int64_t right, int64_t below) {
    store_tile<0>(c, 4 * ld);
    store_tile<1>(c + right, 4 * ld);
    store_tile<2>(c + below, 4 * ld);
    store_tile<3>(c + below + right, 4 * ld);
}
inline void store_tiles(float* c, int64_t ld) { store_tiles(c, ld, 16, 16 * ld); }

// C += A B: twice 16 rows of A, `row` bytes apart, and two tiles of B, whose lines are `line` bytes apart.
inline void multiply_tiles(const uint16_t* a, const uint16_t* a_below, int64_t row, const void* b, const void* b_next,
                           int64_t line = 64) {
    load_tile<4>(a, row);
    load_tile<6>(b, line);
    multiply_bf16<0, 4, 6>();
    load_tile<7>(b_next, line);
    multiply_bf16<1, 4, 7>();
    load_tile<5>(a_below, row);
    multiply_bf16<2, 5, 6>();
    multiply_bf16<3, 5, 7>();
}

// c (32 x columns) = a (32 x d) times columns packed by pack_columns, from `b` on; `columns` a multiple of 32. The
// tiles of 16 rows of `a` are `step` apart along d, and their rows `row`.
inline void multiply_columns(const uint16_t* a, int64_t step, int64_t row, int64_t d, const uint16_t* b,
                             int64_t columns, float* c, int64_t ld) {
    const int64_t steps = d / 32;
    for (int64_t n = 0; n < columns; n += 32, b += 2 * steps * kTileSize) {
        zero_tiles();
        for (int64_t s = 0; s < steps; ++s)
            multiply_tiles(a + s * step, a + s * step + 16 * d, 2 * row, b + s * kTileSize,
                           b + (steps + s) * kTileSize);
        store_tiles(c + n, ld);
    }
}

// c (32 x d) += a (32 x positions, `lda` apart) times positions packed by pack_pairs; `positions` a multiple of 32.
inline void accumulate_pairs(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t positions, int64_t d,
                             float* c) {
    for (int64_t i = 0; i < d; i += 32) {
        load_tiles(c + i, d);
        for (int64_t t = 0; t < positions; t += 32) {
            const uint16_t* tile = b + (t / 32 * (d / 16) + i / 16) * kTileSize;
            multiply_tiles(a + t, a + t + 16 * lda, 2 * lda, tile, tile + kTileSize);
        }
        store_tiles(c + i, d);
    }
}

// 2^x, relative error below 3e-6, 0 far down; minus infinity gives 0.
inline __m512 exp2(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x)
    __m512 p = fma(f, set1(0.013534161f), set1(0.052011475f));
    p = fma(p, f, set1(0.241442749f));
    p = fma(p, f, set1(0.693003836f));
    p = fma(p, f, set1(1.000002593f));
    return _mm512_scalef_ps(p, x);  // p 2^floor(x)
}

// The lanes below n.
inline __mmask16 lanes_below(int64_t n) {
    return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1 << n) - 1);
}

// Which keys of batch row b nobody is shown: 0 or minus infinity for each of t_k, rounded up; null when all are.
inline const float* hidden_keys(const CausalAttentionParams& p, int64_t b, float* memory) {
    if (p.starts == nullptr && p.key_mask == nullptr) return nullptr;
    const int64_t first = p.starts ? p.starts[b] : 0;
    const uint8_t* mask = p.key_mask ? p.key_mask + b * p.key_mask_stride : nullptr;
    for (int64_t t = 0; t < padded(p.t_k, kStrip); ++t)
        memory[t] = t >= first && t < p.t_k && (mask == nullptr || mask[t]) ? 0.0f : -__builtin_inff();
    return memory;
}

// The first strip that has a key which may be shown.
inline int64_t first_strip(const CausalAttentionParams& p, int64_t b) {
    return p.starts == nullptr || p.starts[b] <= 0 ? 0 : least(p.starts[b], p.t_k) / kStrip * kStrip;
}

// Hands out scratch, line by line of the cache: what a struct derived from it has for its members.
struct Carve {
    char* at;
    template <class T>
    T* take(int64_t count) {
        T* here = reinterpret_cast<T*>(at);
        at += padded(count * int64_t(sizeof(T)), 64);
        return here;
    }
};

template <class Scratch>
int64_t bytes_of(const CausalAttentionParams& p) {
    return int64_t(reinterpret_cast<uintptr_t>(Scratch(p, nullptr).at));
}

}  // namespace
}  // namespace igpt::cpu
