// q, k and v of each head, and their attention, in the forward pass by tiles, the body. Layouts: forward_kernels.h.
//
// Attention is FlashAttention (Dao et al., arXiv 2205.14135): 32 queries walk over the keys, kSpan at a time, with a
// running maximum and sum. The maxima of all 32 rows come before their exponentials, so that a row waits for no
// other's. Bound by the exponentials: some 12 vector instructions for 16 scores, twice the time of their tiles.
#pragma once

#include "../forward_kernels.h"
#include "attention_tiles.h"
#include "rows.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kSpan = 256;  // keys

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

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
    uint16_t *q = static_cast<uint16_t*>(p.q) + at, *k = static_cast<uint16_t*>(p.k) + at;
    uint16_t* v = static_cast<uint16_t*>(p.v) + at;
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
        const uint16_t* from = static_cast<const uint16_t*>(p.qkv) + head * 3 * d;
        p.flawed[head * p.flawed_stride] = 0;
        for (int64_t i = 0; i < d; i += 32) pack_slice(p, from, head, i);
        for (int64_t t = 0; p.keys != nullptr && t < p.seen; ++t) {
            const int64_t to = head * p.cache_stride + t * d;
            __builtin_memcpy(static_cast<uint16_t*>(p.keys) + to, from + t * p.ld + d, size_t(d) * 2);
            __builtin_memcpy(static_cast<uint16_t*>(p.values) + to, from + t * p.ld + 2 * d, size_t(d) * 2);
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
        uint16_t* to = tiles_at<uint16_t>(p.tiles, p.width, block * kRows + r);
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
    const auto *q = static_cast<const uint16_t*>(p.q), *k = static_cast<const uint16_t*>(p.k),
               *v = static_cast<const uint16_t*>(p.v);
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
            multiply_columns(q + block * kRows * wide, kTileSize, 32, wide, k + from * wide, count, s.scores, kSpan);
            if (from + count == keys) hide_later(count, s);
            raise_tops(count, scale, wide, from == 0, s);
            weigh_rows(count, scale, s);
            accumulate_pairs(s.weights, kSpan, v + from * wide, count, wide, s.out);
        }
        if (flawed) spread_flaws(p, block, wide, s);
        finish_block(p, block, wide, s);
    }
}

}  // namespace
}  // namespace igpt::cpu
