// Causal attention, forward, the body. Formula: attention_kernels.h; layouts: attention_operands.h.
//
// 32 queries walk over the keys, a block at a time, with a running maximum and sum (FlashAttention, Dao et al.,
// arXiv 2205.14135): the scores of a block are float32, its weights what the products take, both in the nearest cache.
// A block's scores cost 4 32 D FLOPs a key and about 15 vector instructions for a register of them, which bound it by
// tiles; without, the products do.
//
// `By` is who multiplies, S what tensors hold.
#pragma once

#include "attention_blocks.h"

namespace igpt::cpu {
namespace {

// Keys at a time: what 32 queries' scores, and 32 columns of the values, leave room for in the nearest cache.
template <class E>
constexpr int64_t kKeyBlock = sizeof(E) == 2 ? 256 : 128;

template <class E>
struct FwdScratch : Carve {
    const int64_t d, rounded;
    E *const keys = take<E>(rounded * d), *const values = take<E>(rounded * d);  // as columns and in groups
    float* const hidden = take<float>(rounded);
    E* const q = take<E>(kStrip * d);
    float* const scores = take<float>(kStrip * kKeyBlock<E>);
    E* const weights = sizeof(E) == 4 ? reinterpret_cast<E*>(scores) : take<E>(kStrip * kKeyBlock<E>);
    float* const out = take<float>(kStrip * d);  // to be divided by `sum`
    float* const largest = take<float>(kStrip);  // of each query, as exponents
    float* const sum = take<float>(kStrip);

    FwdScratch(const CausalAttentionParams& p, char* memory)
        : Carve{memory}, d(p.head_dim), rounded(padded(p.t_k, kStrip)) {}
};

// x, and minus infinity from lane `count` on.
inline Vec hide_from(int64_t count, Vec x) {
    return by_sign(set1(float(count - 1)) - load(kCount), set1(-__builtin_inff()), x);
}

// From the scores of query `r` with a block of n keys, of which it sees the first `visible`, to weights.
template <class E>
inline void weigh_row(const FwdScratch<E>& s, int64_t r, int64_t n, int64_t visible, const float* hidden, float scale) {
    constexpr int64_t width = kKeyBlock<E>;
    constexpr bool fine = sizeof(E) == 4;
    const auto at = [&](int64_t i) { return sum_at(s.scores, width, r, i); };
    visible = most(0, least(visible, n));
    for (int64_t i = 0; hidden && i < n; i += kLanes) {
        const Vec away = load(hidden + i);
        store(at(i), drop_below(load(at(i)), away, zero()) + away);
    }
    for (int64_t i = visible / kLanes * kLanes; i < n; i += kLanes) store(at(i), hide_from(visible - i, load(at(i))));
    Vec even = load(at(0)), odd = load(at(kLanes));
    for (int64_t i = 2 * kLanes; i < n; i += 2 * kLanes) {
        even = max(load(at(i)), even);
        odd = max(load(at(i + kLanes)), odd);
    }
    const float before = s.largest[r], here = reduce_max(max(even, odd)) * scale;
    const float now = here > before ? here : before, base = base_of(now);
    const Vec less = set1(base), factor = set1(scale);
    Vec total = zero();
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
        const Vec a = weigh<E>(load(at(i)), factor, less);
        const Vec b = weigh<E>(load(at(i + kLanes)), factor, less);
        total = total + (a + b);
        if constexpr (fine) {
            store(at(i), a);
            store(at(i + kLanes), b);
        } else {
            write_two(line_at(s.weights, width, r, i), a, b);
        }
    }
    const Vec keep = power<E>(set1(before - base));
    s.largest[r] = now;
    s.sum[r] = s.sum[r] * reduce_max(keep) + reduce_add(total);
    if (now == before) return;
    for (int64_t i = 0; i < s.d; i += kLanes) {
        float* out = sum_at(s.out, s.d, r, i);
        store(out, load(out) * keep);
    }
}

// Divides, and writes the queries' outputs and lse.
template <class S, class E>
inline void finish_queries(const CausalAttentionParams& p, const FwdScratch<E>& s, int64_t b, int64_t h, int64_t q0,
                           int64_t rows) {
    constexpr float unit = sizeof(E) == 4 ? 1.0f : 0.693147181f;  // what an exponent is in powers of e
    S* out = head_of<S>(p.out, b, h) + q0 * p.out.row;
    float* lse = p.lse + (b * p.heads + h) * p.t_q + q0;
    for (int64_t r = 0; r < rows; ++r) {
        const float sum = s.sum[r];
        lse[r] = sum == 0.0f ? -__builtin_inff() : s.largest[r] * unit + __builtin_logf(sum);
        write_row(s.out, p.head_dim, r, set1(sum == 0.0f ? 0.0f : 1.0f / sum), out + r * p.out.row);
    }
}

template <class By, class S>
void causal_fwd(const CausalAttentionParams& p, int64_t head, int64_t first, int64_t end, char* memory) {
    using E = typename By::Element;
    constexpr int64_t width = kKeyBlock<E>;
    const int64_t b = head / p.heads, h = head % p.heads, d = p.head_dim, past = p.t_k - p.t_q;
    const int64_t used = padded(end + past, kStrip);  // keys that a query of these sees
    [[maybe_unused]] const typename By::Session session;
    const FwdScratch<E> s(p, memory);
    const float* hidden = hidden_keys(p, b, s.hidden);
    pack_columns(rows_of<S>(p.k, b, h, p.t_k, d, hidden), 0, used, d, s.keys);
    pack_groups(rows_of<S>(p.v, b, h, p.t_k, d, hidden), 0, used, d, s.values);
    const HeadRows<S> queries = rows_of<S>(p.q, b, h, p.t_q, d);
    for (int64_t q0 = first; q0 < end; q0 += kStrip) {
        const int64_t rows = least(kStrip, end - q0), seen = padded(q0 + rows + past, kStrip);
        pack_lines(queries, q0, kStrip, d, s.q);
        for (int64_t r = 0; r < kStrip; ++r) s.largest[r] = -__builtin_inff(), s.sum[r] = 0.0f;
        for (int64_t i = 0; i < kStrip * d; i += kLanes) store(s.out + i, zero());
        for (int64_t k0 = first_strip(p, b); k0 < seen; k0 += width) {
            const int64_t n = least(width, seen - k0), bytes = int64_t(sizeof(E)) * d;
            By::multiply({s.q, 16 * bytes, s.keys + k0 * d, kTileBytes, 16 * bytes, d / kLine<E>, n / 16, s.scores,
                          16 * width, true});
            for (int64_t r = 0; r < rows; ++r)
                weigh_row(s, r, n, q0 + r + past + 1 - k0, hidden ? hidden + k0 : nullptr, p.scale * kExponent<E>);
            By::multiply({s.weights, 16 * width * int64_t(sizeof(E)), s.values + k0 * d, d / 16 * kTileBytes,
                          kTileBytes, n / kLine<E>, d / 16, s.out, 16 * d, false});
        }
        finish_queries<S>(p, s, b, h, q0, rows);
    }
}

}  // namespace
}  // namespace igpt::cpu
