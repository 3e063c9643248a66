// Causal attention, backward, the body. Formula and layouts: attention_kernels.h, attention_tiles.h.
//
//   P = exp(S - lse), 0 for a hidden key;  dP = dout V^T;  delta = rowsum(dout * out);  dS = P * (dP - delta)
//   dV = P^T dout;  dK = scale dS^T Q;  dQ = scale dS K
//
// One thread does a head: kKeyRows keys at a time, whose dK and dV it holds, walk over the queries, kQueryBlock at a
// time; dQ is summed up in float32 in the order of the keys. Everything is computed with keys as rows: S^T and dP^T
// come out of the tiles, P^T and dS^T go back into them as they are, for dV and dK; for dQ^T = K^T dS^T two rows of
// dS^T become one of pairs by unpacking, which leaves the queries of a strip in another order (see `query_of`).
// 5 products of 2 D FLOPs for each score, and about 20 vector instructions for 16 of them.
//
// Source: FlashAttention-2 (Dao, 2023; arXiv 2307.08691), algorithm 2.
#pragma once

#include "attention_tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kKeyRows = 64;
constexpr int64_t kQueryBlock = 128;

struct BwdScratch : Carve {
    const int64_t d, queries, all_keys;
    uint16_t *const q_columns = take<uint16_t>(queries * d), *const dout_columns = take<uint16_t>(queries * d);
    uint16_t *const q_pairs = take<uint16_t>(queries * d), *const dout_pairs = take<uint16_t>(queries * d);
    float* const lse = take<float>(queries);  // in powers of 2, infinite for a query that sees nothing or is none
    float* const delta = take<float>(queries);
    // Tile (query / 32, i / 16, half of the strip): dQ^T, (16 of D, 16 queries).
    float* const dq = take<float>(queries * d);
    float* const hidden = take<float>(all_keys);
    uint16_t *const keys = take<uint16_t>(kKeyRows * d), *const values = take<uint16_t>(kKeyRows * d);
    uint16_t* const keys_turned = take<uint16_t>(kKeyRows * d);  // K^T: tile (key / 32, i / 16), (16 of D, 32 keys)
    // Of a strip of keys, (32, kQueryBlock) each.
    float *const scores = take<float>(kStrip * kQueryBlock), *const dweights = take<float>(kStrip * kQueryBlock);
    uint16_t* const weights = take<uint16_t>(kStrip * kQueryBlock);
    uint16_t* const dscores = take<uint16_t>(kStrip * kQueryBlock);
    uint16_t* const dscore_pairs = take<uint16_t>(kKeyRows * kQueryBlock);  // tile (key / 32, query / 32, half)
    float *const dk = take<float>(kKeyRows * d), *const dv = take<float>(kKeyRows * d);

    BwdScratch(const CausalAttentionParams& p, char* memory)
        : Carve{memory}, d(p.head_dim), queries(padded(p.t_q, kStrip)), all_keys(padded(p.t_k, kStrip)) {}
};

// Which query of its strip column `column` of half `half` of a pair of unpacked rows belongs to.
inline int64_t query_of(int64_t half, int64_t column) { return column / 4 * 8 + half * 4 + column % 4; }

// Packs the queries and their upstream gradients; lse and delta.
inline void prepare_queries(const CausalAttentionGradParams& p, const BwdScratch& s, int64_t b, int64_t h) {
    const CausalAttentionParams& of = p.of;
    const int64_t d = of.head_dim, count = of.t_q, rounded = padded(count, kStrip);
    const Rows16 q = rows_of(of.q, b, h, count), dout = rows_of(p.dout, b, h, count),
                 out = rows_of(of.out, b, h, count);
    pack_columns(q, d, rounded, s.q_columns);
    pack_columns(dout, d, rounded, s.dout_columns);
    pack_pairs(q, d, rounded, s.q_pairs);
    pack_pairs(dout, d, rounded, s.dout_pairs);
    const float* lse = of.lse + (b * of.heads + h) * count;
    for (int64_t t = 0; t < rounded; ++t) {
        __m512 sum = zero();
        for (int64_t i = 0; i < d; i += 32) {
            const __m512i x = dout.load(t, i), y = out.load(t, i);
            sum = fma(bf16_even(x), bf16_even(y), fma(bf16_odd(x), bf16_odd(y), sum));
        }
        const bool sees = t < count && lse[t] != -__builtin_inff();
        s.lse[t] = sees ? lse[t] * kLog2e : __builtin_inff();
        s.delta[t] = sees ? reduce_add(sum) : 0.0f;
    }
    for (int64_t i = 0; i < rounded * d; i += 16) store(s.dq + i, zero());
}

// K^T of 32 keys, from their rows.
inline void turn_keys(const uint16_t* keys, int64_t d, uint16_t* out) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t i = 0; i < d; i += 32) {
        __m512i low[16], high[16];  // a pair of D for 16 keys each
        for (int j = 0; j < 16; ++j) {
            low[j] = _mm512_load_si512(keys + j * d + i);
            high[j] = _mm512_load_si512(keys + (16 + j) * d + i);
        }
        transpose(low);
        transpose(high);
        for (int j = 0; j < 16; ++j) {
            uint16_t* at = out + i / 16 * kTileSize + 64 * j;
            _mm512_store_si512(at, _mm512_permutex2var_epi16(low[j], even, high[j]));
            _mm512_store_si512(at + 32, _mm512_permutex2var_epi16(low[j], odd, high[j]));
        }
    }
}

// From the scores of key `r` of the strip and 32 queries, from `n` of the block on, to weights and gradients.
// `from`: the first of these queries that sees the key.
inline __m512i weigh_key(const BwdScratch& s, int64_t r, int64_t n, const float* lse, const float* delta, __m512 scale,
                         int64_t from) {
    const int64_t at = r * kQueryBlock + n;
    __m512 weights[2], gradients[2];
    for (int j = 0; j < 2; ++j) {
        const int64_t i = 16 * j;
        const __mmask16 seen = __mmask16(~lanes_below(from - i));
        weights[j] = _mm512_maskz_mov_ps(seen, exp2(fma(load(s.scores + at + i), scale, zero() - load(lse + n + i))));
        const __m512 difference = load(s.dweights + at + i) - load(delta + n + i);
        gradients[j] = _mm512_maskz_mul_ps(seen, weights[j], difference);
    }
    _mm512_store_si512(s.weights + at, to_bf16(weights[0], weights[1]));
    const __m512i row = to_bf16(gradients[0], gradients[1]);
    _mm512_store_si512(s.dscores + at, row);
    return row;
}

// What the products of one head need.
struct KeyBlock {
    int64_t d, past;
    int64_t first, rows;  // keys
    const float* hidden;
    __m512 scale;

    // The first query that sees a key of the strip that begins at `key`, rounded down to a strip.
    int64_t first_query(int64_t key) const { return most(0, key - past) / kStrip * kStrip; }
};

// One strip of keys against the queries q0 .. q1 - 1 (multiples of 32): dV, dK, and dS^T in pairs.
inline void strip_gradients(const KeyBlock& k, const BwdScratch& s, int64_t strip, int64_t block, int64_t q0,
                            int64_t q1) {
    const int64_t key = k.first + strip * kStrip, d = k.d, n0 = q0 - block, n1 = q1 - block;
    const uint16_t *keys = s.keys + strip * kStrip * d, *values = s.values + strip * kStrip * d;
    multiply_columns(keys, 32, d, d, s.q_columns + q0 * d, q1 - q0, s.scores + n0, kQueryBlock);
    multiply_columns(values, 32, d, d, s.dout_columns + q0 * d, q1 - q0, s.dweights + n0, kQueryBlock);
    uint16_t* pairs = s.dscore_pairs + strip * kStrip * kQueryBlock;
    const float *lse = s.lse + block, *delta = s.delta + block;
    for (int64_t r = 0; r < kStrip; r += 2)
        for (int64_t n = n0; n < n1; n += kStrip) {
            __m512i row[2];
            for (int j = 0; j < 2; ++j) {
                const int64_t t = key + r + j, from = k.hidden && k.hidden[t] != 0.0f ? kStrip : t - k.past - block - n;
                row[j] = weigh_key(s, r + j, n, lse, delta, k.scale, from);
            }
            uint16_t* at = pairs + n / kStrip * 2 * kTileSize + 16 * r;
            _mm512_store_si512(at, _mm512_unpacklo_epi16(row[0], row[1]));
            _mm512_store_si512(at + kTileSize, _mm512_unpackhi_epi16(row[0], row[1]));
        }
    accumulate_pairs(s.weights + n0, kQueryBlock, s.dout_pairs + q0 * d, q1 - q0, d, s.dv + strip * kStrip * d);
    accumulate_pairs(s.dscores + n0, kQueryBlock, s.q_pairs + q0 * d, q1 - q0, d, s.dk + strip * kStrip * d);
}

// dQ^T += K^T dS^T of the queries q0 .. q1 - 1, of every strip of keys that they see.
inline void query_gradients(const KeyBlock& k, const BwdScratch& s, int64_t block, int64_t q0, int64_t q1) {
    for (int64_t q = q0; q < q1; q += kStrip) {
        int64_t strips = 0;
        while (strips < k.rows / kStrip && k.first_query(k.first + strips * kStrip) <= q) ++strips;
        const uint16_t* pairs = s.dscore_pairs + (q - block) / kStrip * 2 * kTileSize;
        for (int64_t i = 0; i < k.d; i += 32) {
            float* dq = s.dq + q * k.d + i * kStrip;  // 4 tiles of 256
            load_tiles(dq, 16, 256, 512);
            for (int64_t strip = 0; strip < strips; ++strip) {
                const uint16_t* turned = s.keys_turned + strip * kStrip * k.d + i / 16 * kTileSize;
                const uint16_t* b = pairs + strip * kStrip * kQueryBlock;
                multiply_tiles(turned, turned + kTileSize, 64, b, b + kTileSize);
            }
            store_tiles(dq, 16, 256, 512);
        }
    }
}

// Rows of d, float32, as bf16 rows of a tensor.
inline void write_rows(const float* from, int64_t d, __m512 scale, const AttentionTensor& to, int64_t b, int64_t h,
                       int64_t first, int64_t rows) {
    uint16_t* out = to.data + b * to.batch + h * to.head + first * to.row;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < d; i += 32)
            _mm512_storeu_si512(out + r * to.row + i,
                                to_bf16(load(from + r * d + i) * scale, load(from + r * d + i + 16) * scale));
}

// dQ^T, as bf16 rows of dQ.
inline void write_queries(const CausalAttentionGradParams& p, const BwdScratch& s, int64_t b, int64_t h) {
    const int64_t d = p.of.head_dim;
    float* rows = s.scores;  // (32, d): no larger than what it held
    static_assert(kMaxWidth <= kQueryBlock, "a strip of queries");
    for (int64_t q = 0; q < p.of.t_q; q += kStrip) {
        for (int64_t i = 0; i < d; i += 16)
            for (int64_t half = 0; half < 2; ++half) {
                const float* tile = s.dq + q * d + (i / 16 * 2 + half) * 256;
                __m512i r[16];
                for (int j = 0; j < 16; ++j) r[j] = _mm512_load_si512(tile + 16 * j);
                transpose(r);
                for (int j = 0; j < 16; ++j) _mm512_store_si512(rows + query_of(half, j) * d + i, r[j]);
            }
        write_rows(rows, d, set1(p.of.scale), p.dq, b, h, q, least(kStrip, p.of.t_q - q));
    }
}

void causal_bwd(const CausalAttentionGradParams& p, int64_t head, char* memory) {
    const CausalAttentionParams& of = p.of;
    const int64_t b = head / of.heads, h = head % of.heads, d = of.head_dim, past = of.t_k - of.t_q;
    const int64_t queries = padded(of.t_q, kStrip);
    const Tiles tiles;
    const BwdScratch s(of, memory);
    const float* hidden = hidden_keys(of, b, s.hidden);
    prepare_queries(p, s, b, h);
    const Rows16 keys = rows_of(of.k, b, h, of.t_k, hidden), values = rows_of(of.v, b, h, of.t_k, hidden);
    for (int64_t first = 0; first < of.t_k; first += kKeyRows) {
        const KeyBlock k{
            d, past, first, least(kKeyRows, padded(of.t_k - first, kStrip)), hidden, set1(of.scale * kLog2e)};
        for (int64_t i = 0; i < kKeyRows * d; i += 16) store(s.dk + i, zero()), store(s.dv + i, zero());
        if (first + k.rows > first_strip(of, b)) {
            pack_rows(keys, first, d, k.rows, s.keys);
            pack_rows(values, first, d, k.rows, s.values);
            for (int64_t j = 0; j < k.rows; j += kStrip) turn_keys(s.keys + j * d, d, s.keys_turned + j * d);
            const int64_t begin = k.first_query(first);
            for (int64_t block = begin / kQueryBlock * kQueryBlock; block < queries; block += kQueryBlock) {
                const int64_t end = least(block + kQueryBlock, queries);
                for (int64_t strip = 0; strip < k.rows / kStrip; ++strip) {
                    const int64_t q0 = most(block, k.first_query(first + strip * kStrip));
                    if (q0 < end) strip_gradients(k, s, strip, block, q0, end);
                }
                query_gradients(k, s, block, most(block, begin), end);
            }
        }
        const int64_t rows = least(kKeyRows, of.t_k - first);
        write_rows(s.dk, d, set1(of.scale), p.dk, b, h, first, rows);
        write_rows(s.dv, d, set1(1.0f), p.dv, b, h, first, rows);
    }
    write_queries(p, s, b, h);
}

}  // namespace
}  // namespace igpt::cpu
