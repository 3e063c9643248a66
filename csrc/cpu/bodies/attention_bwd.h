// Causal attention, backward, the body. Formula: attention_kernels.h; layouts: attention_operands.h.
//
//   P = exp(S - lse), 0 for a hidden key;  dP = dout V^T;  delta = rowsum(dout * out);  dS = P * (dP - delta)
//   dV = P^T dout;  dK = scale dS^T Q;  dQ = scale dS K
//
// One thread does a head: kKeyRows keys at a time, whose dK and dV it holds, walk over the queries, kQueryBlock at a
// time; dQ is summed up in float32 in the order of the keys. Everything is computed with keys as rows: S^T and dP^T
// come out of the products as tiles, P^T and dS^T go back into them as lines, for dV and dK, and for dQ^T = K^T dS^T in
// groups of keys: of float32 these are the same tiles, of bf16 two rows become one. 5 products of 2 D FLOPs for each
// score, and about 20 vector instructions for a register of them.
//
// Source: FlashAttention-2 (Dao, 2023; arXiv 2307.08691), algorithm 2.
#pragma once

#include "attention_blocks.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kKeyRows = 64;
constexpr int64_t kQueryBlock = 128;
constexpr int64_t kStripSums = kStrip * kQueryBlock;

template <class E>
struct BwdScratch : Carve {
    static constexpr bool in_place = sizeof(E) == 4;
    const int64_t d, queries, all_keys;
    E *const q_columns = take<E>(queries * d), *const dout_columns = take<E>(queries * d);
    E *const q_groups = take<E>(queries * d), *const dout_groups = take<E>(queries * d);
    float* const lse = take<float>(queries);  // as exponents, infinite for a query that sees nothing or is none
    float* const delta = take<float>(queries);
    float* const dq = take<float>(queries * d);  // tile (query / 32, i / 16, half of the strip): dQ^T
    float* const hidden = take<float>(all_keys);
    E *const keys = take<E>(kKeyRows * d), *const values = take<E>(kKeyRows * d);
    E* const group = in_place ? keys : take<E>(kKeyRows * d);  // lines of float32 are groups
    E* const keys_turned = take<E>(kKeyRows * d);              // lines of K^T: tile (i / 16, line of keys)
    // Of a strip of keys and kQueryBlock queries: S^T and dP^T, then P^T and dS^T as lines.
    float *const scores = take<float>(kStripSums), *const dweights = take<float>(2 * kStripSums);
    E* const weights = in_place ? reinterpret_cast<E*>(scores) : take<E>(kStripSums);
    E* const dscores = in_place ? reinterpret_cast<E*>(dweights) : take<E>(kStripSums);
    // dS^T of all keys in groups: tile (line of keys, query / 16).
    E* const dscore_groups = in_place ? dscores : take<E>(2 * kStripSums);
    float *const dk = take<float>(kKeyRows * d), *const dv = take<float>(kKeyRows * d);

    BwdScratch(const CausalAttentionParams& p, char* memory)
        : Carve{memory}, d(p.head_dim), queries(padded(p.t_q, kStrip)), all_keys(padded(p.t_k, kStrip)) {}
    // Of a strip of the keys: each has its own where groups are what they came from.
    float* dweights_of(int64_t strip) const { return dweights + (in_place ? strip * kStripSums : 0); }
    E* dscores_of(int64_t strip) const { return dscores + (in_place ? strip * kStripSums : 0); }
};
static_assert(kKeyRows == 2 * kStrip, "two strips");

// Lanes of x y, from element i of row t on, added to `sum`: a register of words.
template <class S>
inline Vec add_dot(const HeadRows<S>& x, const HeadRows<S>& y, int64_t t, int64_t i, Vec sum) {
    const Ints a = x.template words<S>(t, i), b = y.template words<S>(t, i);
    if constexpr (sizeof(S) == 4) return fma(floats(a), floats(b), sum);
    return fma(bf16_even(a), bf16_even(b), fma(bf16_odd(a), bf16_odd(b), sum));
}

// Packs the queries and their upstream gradients; lse and delta.
template <class S, class E>
inline void prepare_queries(const CausalAttentionGradParams& p, const BwdScratch<E>& s, int64_t b, int64_t h) {
    const CausalAttentionParams& of = p.of;
    const int64_t d = of.head_dim, count = of.t_q;
    const auto q = rows_of<S>(of.q, b, h, count, d), dout = rows_of<S>(p.dout, b, h, count, d),
               out = rows_of<S>(of.out, b, h, count, d);
    pack_columns(q, 0, s.queries, d, s.q_columns);
    pack_columns(dout, 0, s.queries, d, s.dout_columns);
    pack_groups(q, 0, s.queries, d, s.q_groups);
    pack_groups(dout, 0, s.queries, d, s.dout_groups);
    const float* lse = of.lse + (b * of.heads + h) * count;
    for (int64_t t = 0; t < s.queries; ++t) {
        Vec sum = zero();
        for (int64_t i = 0; i < d; i += kLanes * kWord<S>) sum = add_dot(dout, out, t, i, sum);
        const bool sees = t < count && lse[t] != -__builtin_inff();
        s.lse[t] = sees ? lse[t] * kExponent<E> : __builtin_inff();
        s.delta[t] = sees ? reduce_add(sum) : 0.0f;
    }
    for (int64_t i = 0; i < s.queries * d; i += kLanes) store(s.dq + i, zero());
}

// Packs `count` keys and values from `first` on.
template <class S, class E>
inline void prepare_keys(const HeadRows<S>& keys, const HeadRows<S>& values, int64_t first, int64_t count,
                         const BwdScratch<E>& s) {
    pack_lines(keys, first, count, s.d, s.keys);
    pack_lines(values, first, count, s.d, s.values);
    if constexpr (sizeof(E) == 2) pack_groups(keys, first, count, s.d, s.group);
    const int64_t lines = kKeyRows / kLine<E>;
    for (int64_t line = 0; line < count / kLine<E>; ++line)
        for (int64_t i = 0; i < s.d / 16; ++i) {
            const E* from = s.group + (line * (s.d / 16) + i) * kTileOf<E>;
            turn_tile([&](int64_t row, int64_t word) { return load_ints(from + (row * 16 + word) * kWord<E>); },
                      s.keys_turned + (i * lines + line) * kTileOf<E>);
        }
}

// What the products of one head need.
struct KeyBlock {
    int64_t past;
    int64_t first, rows;  // keys
    const float* hidden;
    float scale;

    // The first query that sees a key of the strip that begins at `key`, rounded down to a strip.
    int64_t first_query(int64_t key) const { return most(0, key - past) / kStrip * kStrip; }
};

// From the scores of key `r` of a strip and 32 queries, from `n` of the block on, to weights and gradients. `from`: the
// first of these queries that sees the key.
template <class E>
inline void weigh_key(const BwdScratch<E>& s, int64_t strip, int64_t r, int64_t n, const float* lse, const float* delta,
                      Vec scale, int64_t from) {
    constexpr bool fine = sizeof(E) == 4;
    const Vec first = set1(float(from));
    float* dweights = s.dweights_of(strip);
    for (int64_t i = n; i < n + kStrip; i += 2 * kLanes) {
        Vec weights[2], gradients[2];
        for (int j = 0; j < 2; ++j) {
            const int64_t at = i + j * kLanes;
            const Vec query = set1(float(at - n)) + load(kCount);
            const Vec weight = weigh<E>(load(sum_at(s.scores, kQueryBlock, r, at)), scale, load(lse + at));
            const Vec difference = load(sum_at(dweights, kQueryBlock, r, at)) - load(delta + at);
            weights[j] = drop_below(weight, query, first);
            gradients[j] = drop_below(weights[j] * difference, query, first);
        }
        for (int j = 0; j < 2 && fine; ++j) {
            store(sum_at(s.scores, kQueryBlock, r, i + j * kLanes), weights[j]);
            store(sum_at(dweights, kQueryBlock, r, i + j * kLanes), gradients[j]);
        }
        if constexpr (!fine) {
            write_two(line_at(s.weights, kQueryBlock, r, i), weights[0], weights[1]);
            write_two(line_at(s.dscores, kQueryBlock, r, i), gradients[0], gradients[1]);
        }
    }
}

// dS^T of keys r and r + 1 of a strip and the 32 queries from n on, in groups.
template <class E>
inline void group_keys(const BwdScratch<E>& s, int64_t strip, int64_t r, int64_t n) {
    const E* from = line_at(s.dscores, kQueryBlock, r, n);
    E* to = s.dscore_groups + strip * kStripSums + n / 16 * kTileOf<E> + r * 16;
    for (int64_t i = 0; i < kStrip; i += 2 * kLanes) {
        auto first = load_ints(from + i), second = load_ints(from + kLine<E> + i);
        interleave(first, second, first, second);
        const auto at = [&](int64_t query) {
            return reinterpret_cast<float*>(to + query / 16 * kTileOf<E> + query % 16 * 2);
        };
        store(at(i), floats(first));
        store(at(i + kLanes), floats(second));
    }
}

// One strip of keys against the queries q0 .. q1 - 1 (multiples of 32): dV, dK, and dS^T in groups.
template <class By, class E>
inline void strip_gradients(const KeyBlock& k, const BwdScratch<E>& s, int64_t strip, int64_t block, int64_t q0,
                            int64_t q1) {
    constexpr int64_t size = sizeof(E), below = 16 * kQueryBlock;
    const int64_t key = k.first + strip * kStrip, d = s.d, n0 = q0 - block, n1 = q1 - block;
    const int64_t panels = (q1 - q0) / 16, bytes = 16 * d * size;
    float *scores = sum_at(s.scores, kQueryBlock, 0, n0), *dweights = sum_at(s.dweights_of(strip), kQueryBlock, 0, n0);
    By::multiply({s.keys + strip * kStrip * d, bytes, s.q_columns + q0 * d, kTileBytes, bytes, d / kLine<E>, panels,
                  scores, below, true});
    By::multiply({s.values + strip * kStrip * d, bytes, s.dout_columns + q0 * d, kTileBytes, bytes, d / kLine<E>,
                  panels, dweights, below, true});
    const Vec scale = set1(k.scale);
    for (int64_t r = 0; r < kStrip; r += 2)
        for (int64_t n = n0; n < n1; n += kStrip) {
            for (int64_t t = key + r; t < key + r + 2; ++t)
                weigh_key(s, strip, t - key, n, s.lse + block, s.delta + block, scale,
                          k.hidden && k.hidden[t] != 0.0f ? kStrip : t - k.past - block - n);
            if constexpr (size == 2) group_keys(s, strip, r, n);
        }
    const int64_t line = d / 16 * kTileBytes, lines = (q1 - q0) / kLine<E>;
    By::multiply({line_at(s.weights, kQueryBlock, 0, n0), below * size, s.dout_groups + q0 * d, line, kTileBytes, lines,
                  d / 16, s.dv + strip * kStrip * d, 16 * d, false});
    By::multiply({line_at(s.dscores_of(strip), kQueryBlock, 0, n0), below * size, s.q_groups + q0 * d, line, kTileBytes,
                  lines, d / 16, s.dk + strip * kStrip * d, 16 * d, false});
}

// dQ^T += K^T dS^T of the queries q0 .. q1 - 1, of every strip of keys that they see.
template <class By, class E>
inline void query_gradients(const KeyBlock& k, const BwdScratch<E>& s, int64_t block, int64_t q0, int64_t q1) {
    constexpr int64_t lines = kKeyRows / kLine<E>;
    for (int64_t q = q0; q < q1; q += kStrip) {
        int64_t strips = 0;
        while (strips < k.rows / kStrip && k.first_query(k.first + strips * kStrip) <= q) ++strips;
        const E* groups = s.dscore_groups + (q - block) / 16 * kTileOf<E>;
        for (int64_t i = 0; i < s.d; i += 32)
            By::multiply({s.keys_turned + i / 16 * lines * kTileOf<E>, lines * kTileBytes, groups,
                          kQueryBlock / 16 * kTileBytes, kTileBytes, strips * kStrip / kLine<E>, 2,
                          s.dq + q * s.d + i * kStrip, 2 * kTileSums, false});
    }
}

template <class S>
inline void write_rows(const float* from, int64_t d, Vec scale, const AttentionTensor& to, int64_t b, int64_t h,
                       int64_t first, int64_t rows) {
    S* out = head_of<S>(to, b, h) + first * to.row;
    for (int64_t r = 0; r < rows; ++r) write_row(from, d, r, scale, out + r * to.row);
}

// dQ^T, as rows of dQ.
template <class S, class E>
inline void write_queries(const CausalAttentionGradParams& p, const BwdScratch<E>& s, int64_t b, int64_t h) {
    const int64_t d = s.d, tiles = d / 16;
    float* rows = s.scores;  // (32, d): no larger than what it held
    static_assert(kMaxWidth <= kQueryBlock, "a strip of queries");
    for (int64_t q = 0; q < p.of.t_q; q += kStrip) {
        for (int64_t i = 0; i < tiles; ++i)
            for (int64_t half = 0; half < 2; ++half) {
                const float* tile = s.dq + q * d + (i * 2 + half) * kTileSums;
                turn_tile([&](int64_t row, int64_t word) { return load_ints(tile + row * 16 + word); },
                          rows + (half * tiles + i) * kTileSums);
            }
        write_rows<S>(rows, d, set1(p.of.scale), p.dq, b, h, q, least(kStrip, p.of.t_q - q));
    }
}

template <class By, class S>
void causal_bwd(const CausalAttentionGradParams& p, int64_t head, char* memory) {
    using E = typename By::Element;
    const CausalAttentionParams& of = p.of;
    const int64_t b = head / of.heads, h = head % of.heads, d = of.head_dim;
    [[maybe_unused]] const typename By::Session session;
    const BwdScratch<E> s(of, memory);
    const float* hidden = hidden_keys(of, b, s.hidden);
    prepare_queries<S>(p, s, b, h);
    const auto keys = rows_of<S>(of.k, b, h, of.t_k, d, hidden), values = rows_of<S>(of.v, b, h, of.t_k, d, hidden);
    for (int64_t first = 0; first < of.t_k; first += kKeyRows) {
        const KeyBlock k{of.t_k - of.t_q, first, least(kKeyRows, padded(of.t_k - first, kStrip)), hidden,
                         of.scale * kExponent<E>};
        for (int64_t i = 0; i < kKeyRows * d; i += kLanes) store(s.dk + i, zero()), store(s.dv + i, zero());
        if (first + k.rows > first_strip(of, b)) {
            prepare_keys(keys, values, first, k.rows, s);
            const int64_t begin = k.first_query(first);
            for (int64_t block = begin / kQueryBlock * kQueryBlock; block < s.queries; block += kQueryBlock) {
                const int64_t end = least(block + kQueryBlock, s.queries);
                for (int64_t strip = 0; strip < k.rows / kStrip; ++strip) {
                    const int64_t q0 = most(block, k.first_query(first + strip * kStrip));
                    if (q0 < end) strip_gradients<By>(k, s, strip, block, q0, end);
                }
                query_gradients<By>(k, s, block, most(block, begin), end);
            }
        }
        const int64_t rows = least(kKeyRows, of.t_k - first);
        write_rows<S>(s.dk, d, set1(of.scale), p.dk, b, h, first, rows);
        write_rows<S>(s.dv, d, set1(1.0f), p.dv, b, h, first, rows);
    }
    write_queries<S>(p, s, b, h);
}

}  // namespace
}  // namespace igpt::cpu
