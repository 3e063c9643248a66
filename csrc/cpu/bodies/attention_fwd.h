// Causal attention, forward, the body. Formula and layouts: attention_kernels.h, attention_tiles.h.
//
// 32 queries walk over the keys, kKeyBlock at a time, with a running maximum and sum (FlashAttention, Dao et al.,
// arXiv 2205.14135): the scores of a block are float32, its weights bf16, both in the nearest cache. A block's scores
// cost 4 32 kKeyBlock D FLOPs of tiles and about 15 vector instructions for each 16 of them, which bound it.
#pragma once

#include "attention_tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kKeyBlock = 256;

struct FwdScratch : Carve {
    const int64_t d, rounded;
    // Packed as columns and as pairs.
    uint16_t *const keys = take<uint16_t>(rounded * d), *const values = take<uint16_t>(rounded * d);
    float* const hidden = take<float>(rounded);
    uint16_t* const q = take<uint16_t>(kStrip * d);
    float* const scores = take<float>(kStrip * kKeyBlock);
    uint16_t* const weights = take<uint16_t>(kStrip * kKeyBlock);
    float* const out = take<float>(kStrip * d);  // to be divided by `sum`
    float* const largest = take<float>(kStrip);  // of each query, in powers of 2
    float* const sum = take<float>(kStrip);

    FwdScratch(const CausalAttentionParams& p, char* memory)
        : Carve{memory}, d(p.head_dim), rounded(padded(p.t_k, kStrip)) {}
};

// From the scores of query `r` with a block of n keys, of which it sees the first `visible`, to weights.
inline void weigh_row(const FwdScratch& s, int64_t r, int64_t n, int64_t visible, const float* hidden, __m512 scale,
                      int64_t d) {
    float* scores = s.scores + r * kKeyBlock;
    uint16_t* weights = s.weights + r * kKeyBlock;
    visible = most(0, least(visible, n));
    if (hidden)
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 away = _mm512_cmp_ps_mask(_mm512_loadu_ps(hidden + i), zero(), _CMP_NEQ_UQ);
            _mm512_mask_storeu_ps(scores + i, away, set1(-__builtin_inff()));
        }
    const __m512 nothing = set1(-__builtin_inff());
    __m512 top = nothing;
    const int64_t whole = visible / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) top = max(load(scores + i), top);
    const __mmask16 rest = lanes_below(visible - whole);
    if (rest) top = max(_mm512_mask_loadu_ps(nothing, rest, scores + whole), top);

    const float before = s.largest[r], here = _mm512_reduce_max_ps(top) * _mm512_cvtss_f32(scale);
    const float now = here > before ? here : before, base = now == -__builtin_inff() ? 0.0f : now;
    const __m512 offset = set1(-base);
    __m512 total = zero();
    int64_t i = 0;
    for (; i + 32 <= visible; i += 32) {
        const __m512 a = exp2(fma(load(scores + i), scale, offset)),
                     b = exp2(fma(load(scores + i + 16), scale, offset));
        total = total + (a + b);
        _mm512_store_si512(weights + i, to_bf16(a, b));
    }
    for (; i < n; i += 32) {
        const __mmask16 first = lanes_below(visible - i), second = lanes_below(visible - i - 16);
        const __m512 a = _mm512_maskz_mov_ps(first, exp2(fma(load(scores + i), scale, offset)));
        const __m512 b = _mm512_maskz_mov_ps(second, exp2(fma(load(scores + i + 16), scale, offset)));
        total = total + (a + b);
        _mm512_store_si512(weights + i, to_bf16(a, b));
    }
    const __m512 keep = exp2(set1(before - base));
    s.largest[r] = now;
    s.sum[r] = s.sum[r] * _mm512_cvtss_f32(keep) + reduce_add(total);
    if (now == before) return;
    for (int64_t j = 0; j < d; j += 16) store(s.out + r * d + j, load(s.out + r * d + j) * keep);
}

// Divides, and writes the queries' outputs and lse.
inline void finish_queries(const CausalAttentionParams& p, const FwdScratch& s, int64_t b, int64_t h, int64_t q0,
                           int64_t rows) {
    const int64_t d = p.head_dim;
    uint16_t* out = p.out.data + b * p.out.batch + h * p.out.head + q0 * p.out.row;
    float* lse = p.lse + (b * p.heads + h) * p.t_q + q0;
    for (int64_t r = 0; r < rows; ++r) {
        const float sum = s.sum[r];
        lse[r] = sum == 0.0f ? -__builtin_inff() : s.largest[r] * kLn2 + __builtin_logf(sum);
        const __m512 inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
        for (int64_t i = 0; i < d; i += 32) {
            const float* from = s.out + r * d + i;
            _mm512_storeu_si512(out + r * p.out.row + i, to_bf16(load(from) * inverse, load(from + 16) * inverse));
        }
    }
}

void causal_fwd(const CausalAttentionParams& p, int64_t head, int64_t first, int64_t end, char* memory) {
    const int64_t b = head / p.heads, h = head % p.heads, d = p.head_dim, past = p.t_k - p.t_q;
    const int64_t used = padded(end + past, kStrip);  // keys that a query of these sees
    const Tiles tiles;
    const FwdScratch s(p, memory);
    const float* hidden = hidden_keys(p, b, s.hidden);
    pack_columns(rows_of(p.k, b, h, p.t_k, hidden), d, used, s.keys);
    pack_pairs(rows_of(p.v, b, h, p.t_k, hidden), d, used, s.values);
    const Rows16 queries = rows_of(p.q, b, h, p.t_q);
    const __m512 scale = set1(p.scale * kLog2e);
    for (int64_t q0 = first; q0 < end; q0 += kStrip) {
        const int64_t rows = least(kStrip, end - q0), seen = padded(q0 + rows + past, kStrip);
        pack_rows(queries, q0, d, kStrip, s.q);
        for (int64_t r = 0; r < kStrip; ++r) s.largest[r] = -__builtin_inff(), s.sum[r] = 0.0f;
        for (int64_t i = 0; i < kStrip * d; i += 16) store(s.out + i, zero());
        for (int64_t k0 = first_strip(p, b); k0 < seen; k0 += kKeyBlock) {
            const int64_t n = least(kKeyBlock, seen - k0);
            multiply_columns(s.q, 32, d, d, s.keys + k0 * d, n, s.scores, kKeyBlock);
            for (int64_t r = 0; r < rows; ++r)
                weigh_row(s, r, n, q0 + r + past + 1 - k0, hidden ? hidden + k0 : nullptr, scale, d);
            accumulate_pairs(s.weights, kKeyBlock, s.values + k0 * d, n, d, s.out);
        }
        finish_queries(p, s, b, h, q0, rows);
    }
}

}  // namespace
}  // namespace igpt::cpu
