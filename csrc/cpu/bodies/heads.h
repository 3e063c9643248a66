// The rest of the forward pass by tiles, the body: embedding, norm, q, k and v of each head, attention. Layouts:
// forward_kernels.h.
//
// Attention is FlashAttention (Dao et al., arXiv 2205.14135): 32 queries walk over the keys, kSpan at a time, with a
// running maximum and sum. The maxima of all 32 rows come before their exponentials, so that a row waits for no
// other's. Bound by the exponentials: some 12 vector instructions for 16 scores, twice the time of their tiles.
#pragma once

#include "../forward_kernels.h"
#include "attention_tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kSpan = 256;  // keys

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

// ---- Rows ---------------------------------------------------------------------------------------------------

inline float* residual_at(const float* residual, int64_t width, int64_t row) {
    return const_cast<float*>(residual) + row / kRows * kRows * width + row % kRows * 32;
}

inline uint16_t* tiles_at(const uint16_t* tiles, int64_t width, int64_t row) {
    return const_cast<uint16_t*>(tiles) + row / 16 * 16 * width + row % 16 * 32;
}

void embed_row(const float* a, const float* b, int64_t n, int64_t width, int64_t row, float* residual) {
    float* to = residual_at(residual, width, row);
    for (int64_t i = 0; i < width; i += 16) {
        const bool there = a != nullptr && i < n;
        store(to + i / 32 * kRows * 32 + i % 32, there ? load(a + i) + load(b + i) : zero());
    }
}

void norm_tiles(const NormTiles& p) {
    for (int64_t row = p.first; row < p.first + p.count; ++row) {
        const float* x = residual_at(p.residual, p.width, row);
        uint16_t* to = tiles_at(p.tiles, p.width, row);
        Vec even = zero(), odd = zero();
        for (int64_t i = 0; i < p.width; i += 32) {
            const Vec a = load(x + i * kRows), b = i + 16 < p.n ? load(x + i * kRows + 16) : zero();
            even = fma(a, a, even);
            odd = fma(b, b, odd);
        }
        const Vec scale = set1(1.0f / __builtin_sqrtf(reduce_add(even + odd) / float(p.n) + p.eps));
        for (int64_t i = 0; i < p.width; i += 32) {
            const Vec a = load(x + i * kRows) * scale * load(p.weight + i);
            const Vec b = i + 16 < p.n ? load(x + i * kRows + 16) * scale * load(p.weight + i + 16) : zero();
            _mm512_store_si512(to + i * 16, to_bf16(a, b));
        }
    }
}

void residual_row(const float* residual, int64_t n, int64_t width, int64_t row, uint16_t* out) {
    const float* x = residual_at(residual, width, row);
    for (int64_t i = 0; i < n; i += 32)
        _mm512_mask_storeu_epi16(out + i, first_of_32(n - i), to_bf16(load(x + i * kRows), load(x + i * kRows + 16)));
}

void tiles_row(const uint16_t* tiles, int64_t n, int64_t width, int64_t row, uint16_t* out) {
    const uint16_t* x = tiles_at(tiles, width, row);
    for (int64_t i = 0; i < n; i += 32) _mm512_mask_storeu_epi16(out + i, first_of_32(n - i), load_ints(x + i * 16));
}

// `row_at` gives where the 32 columns of a row begin.
template <class RowAt>
inline void mean_rows(const MeanParams& p, RowAt row_at) {
    Vec left = zero(), right = zero();
    for (int64_t row = p.first; row < p.first + p.count; ++row) {
        const auto* x = row_at(row);
        left = left + read(x, Whole());
        right = right + read(x + 16, Whole());
    }
    const Vec count = set1(float(p.count));
    const __mmask32 there = first_of_32(p.n - p.column);
    _mm512_mask_storeu_ps(p.out + p.column, __mmask16(there), left / count);
    _mm512_mask_storeu_ps(p.out + p.column + 16, __mmask16(there >> 16), right / count);
}

void mean_residual(const float* residual, const MeanParams& p) {
    mean_rows(p, [&](int64_t row) { return residual_at(residual, p.width, row) + p.column * kRows; });
}

void mean_tiles(const uint16_t* tiles, const MeanParams& p) {
    mean_rows(p, [&](int64_t row) { return tiles_at(tiles, p.width, row) + p.column * 16; });
}

// ---- q, k, v ------------------------------------------------------------------------------------------------

// Values without what is not finite; its places go into `flaw`.
inline __m512i finite(__m512i v, uint32_t& flaw) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const __mmask32 bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, exponent), exponent);
    flaw = bad;
    return _mm512_maskz_mov_epi16(__mmask32(~bad), v);
}

// 32 of D, from `i` on, of a head whose q, k and v begin at `from`.
inline void pack_slice(const HeadsParams& p, const uint16_t* from, int64_t head, int64_t i) {
    const int64_t d = p.head_dim, wide = padded(d, 32), at = head * p.head_stride;
    const __mmask32 there = first_of_32(d - i);
    uint16_t *q = p.q + at, *k = p.k + at, *v = p.v + at;
    uint32_t* flaws = p.flaws + head * p.flaw_stride + i / 32;
    uint32_t any = 0;
    for (int64_t t = 0; t < kRows; t += 16) {
        const uint16_t* row = from + t * p.ld + i;
        __m512i r[16];
        for (int64_t j = 0; j < 16; ++j) {
            const __m512i x = _mm512_maskz_loadu_epi16(there, row + j * p.ld);
            _mm512_store_si512(q + t * wide + i * 16 + j * 32, x);
            r[j] = _mm512_maskz_loadu_epi16(there, row + j * p.ld + d);
        }
        transpose(r);
        for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(k + t * wide + i * 16 + j * 32, r[j]);
        for (int64_t j = 0; j < 16; j += 2) {
            __m512i pair[2];
            for (int64_t s = 0; s < 2; ++s) {
                uint32_t flaw;
                pair[s] = finite(_mm512_maskz_loadu_epi16(there, row + (j + s) * p.ld + 2 * d), flaw);
                flaws[(t + j + s) * (wide / 32)] = flaw;
                any |= flaw;
            }
            uint16_t* to = v + i / 16 * kTileSize + (t + j) * 16;
            interleave(pair[0], pair[1], to, to + kTileSize);
        }
    }
    if (any) p.flawed[head * p.flawed_stride] = 1;
}

void pack_heads(const HeadsParams& p) {
    const int64_t d = p.head_dim;
    for (int64_t head = 0; head < p.heads; ++head) {
        const uint16_t* from = p.qkv + head * 3 * d;
        p.flawed[head * p.flawed_stride] = 0;
        for (int64_t i = 0; i < d; i += 32) pack_slice(p, from, head, i);
        for (int64_t t = 0; p.keys != nullptr && t < p.seen; ++t) {
            const int64_t to = head * p.cache_stride + t * d;
            __builtin_memcpy(p.keys + to, from + t * p.ld + d, size_t(d) * 2);
            __builtin_memcpy(p.values + to, from + t * p.ld + 2 * d, size_t(d) * 2);
        }
    }
}

// ---- Attention ----------------------------------------------------------------------------------------------

// 32 queries of one head at work.
struct Queries {
    alignas(64) float scores[kRows * kSpan];
    alignas(64) uint16_t weights[kRows * kSpan];
    alignas(64) float out[kRows * max_head_dim];
    alignas(64) float sums[kRows * 16];
    alignas(64) float top[kRows];
};

// Hides from each query what comes after it; the queries are the last 32 of the keys.
inline void hide_later(int64_t count, Queries& s) {
    const Vec hidden = set1(-__builtin_inff());
    for (int64_t r = 0; r < kRows; ++r) {
        float* last = s.scores + r * kSpan + count - 32;
        const uint32_t seen = ~uint32_t(0) >> (31 - r);
        _mm512_mask_storeu_ps(last, __mmask16(~seen), hidden);
        _mm512_mask_storeu_ps(last + 16, __mmask16(~(seen >> 16)), hidden);
    }
}

// The new maxima of all rows, in powers of 2, and what the sums and outputs until now are to be multiplied by.
inline void raise_tops(int64_t count, float scale, int64_t wide, bool first, Queries& s) {
    for (int64_t r = 0; r < kRows; ++r) {
        const float* row = s.scores + r * kSpan;
        Vec even = load(row), odd = load(row + 16);
        for (int64_t t = 32; t < count; t += 32) {
            even = max(even, load(row + t));
            odd = max(odd, load(row + t + 16));
        }
        const float here = reduce_max(max(even, odd)) * scale, before = s.top[r];
        const float now = here > before || first ? here : before;
        s.top[r] = now;
        if (first || now == before) continue;
        const Vec keep = exp2(set1(before - now));
        store(s.sums + r * 16, load(s.sums + r * 16) * keep);
        for (int64_t i = 0; i < wide; i += 16) store(s.out + r * wide + i, load(s.out + r * wide + i) * keep);
    }
}

inline void weigh_rows(int64_t count, float scale, Queries& s) {
    const Vec factor = set1(scale);
    for (int64_t r = 0; r < kRows; ++r) {
        const float* row = s.scores + r * kSpan;
        uint16_t* to = s.weights + r * kSpan;
        const Vec offset = set1(-s.top[r]);
        Vec even = load(s.sums + r * 16), odd = zero();
        for (int64_t t = 0; t < count; t += 32) {
            const Vec a = exp2(fma(load(row + t), factor, offset)), b = exp2(fma(load(row + t + 16), factor, offset));
            even = even + a;
            odd = odd + b;
            _mm512_store_si512(to + t, to_bf16(a, b));
        }
        store(s.sums + r * 16, even + odd);
    }
}

// Not a number, where a value that the query sees is none.
inline void spread_flaws(const AttentionBlocksParams& p, int64_t block, int64_t wide, Queries& s) {
    for (int64_t i = 0; i < p.head_dim; ++i) {
        bool met = false;
        for (int64_t t = 0; t < (block + 1) * kRows; ++t) {
            met |= (p.flaws[t * (wide / 32) + i / 32] >> i % 32 & 1) != 0;
            if (met && t >= block * kRows) s.out[(t - block * kRows) * wide + i] = __builtin_nanf("");
        }
    }
}

// Divides by the sums.
inline void finish_block(const AttentionBlocksParams& p, int64_t block, int64_t wide, const Queries& s) {
    for (int64_t r = 0; r < kRows; ++r) {
        const Vec inverse = set1(1.0f / reduce_add(load(s.sums + r * 16)));
        uint16_t* to = tiles_at(p.tiles, p.width, block * kRows + r);
        alignas(64) uint16_t row[max_head_dim];
        for (int64_t i = 0; i < wide; i += 32) {
            const float* from = s.out + r * wide + i;
            const __m512i y = to_bf16(load(from) * inverse, load(from + 16) * inverse);
            if (p.column % 32 == 0 && i + 32 <= p.head_dim)
                _mm512_store_si512(to + (p.column + i) * 16, y);
            else
                _mm512_store_si512(row + i, y);
        }
        const int64_t whole = p.column % 32 == 0 ? p.head_dim / 32 * 32 : 0;
        for (int64_t i = whole; i < p.head_dim; i += 8) {
            const int64_t n = p.column + i;
            __builtin_memcpy(to + n / 32 * kTileSize + n % 32, row + i, 16);
        }
        const int64_t end = p.column + p.head_dim;
        for (int64_t n = end; end == p.columns && n < p.width; n += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + n / 32 * kTileSize + n % 32), _mm_setzero_si128());
    }
}

void causal_attention_blocks(const AttentionBlocksParams& p) {
    const Tiles tiles;
    const int64_t wide = padded(p.head_dim, 32);
    const float scale = p.scale * kLog2e;
    Queries s;
    bool flawed = false;
    for (int64_t block = 0; block < p.begin; ++block) flawed |= p.flawed[block] != 0;
    for (int64_t block = p.begin; block < p.end; ++block) {
        flawed |= p.flawed[block] != 0;
        const int64_t keys = (block + 1) * kRows;
        for (int64_t i = 0; i < kRows * wide; i += 16) store(s.out + i, zero());
        for (int64_t i = 0; i < kRows * 16; i += 16) store(s.sums + i, zero());
        for (int64_t from = 0; from < keys; from += kSpan) {
            const int64_t count = least(kSpan, keys - from);
            multiply_columns(p.q + block * kRows * wide, kTileSize, 32, wide, p.k + from * wide, count, s.scores,
                             kSpan);
            if (from + count == keys) hide_later(count, s);
            raise_tops(count, scale, wide, from == 0, s);
            weigh_rows(count, scale, s);
            accumulate_pairs(s.weights, kSpan, p.v + from * wide, count, wide, s.out);
        }
        if (flawed) spread_flaws(p, block, wide, s);
        finish_block(p, block, wide, s);
    }
}

}  // namespace
}  // namespace igpt::cpu
