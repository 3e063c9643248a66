// q, k and v of each head, and their attention, in the forward pass, the body. Layouts: forward_kernels.h.
//
// Attention is FlashAttention (Dao et al., arXiv 2205.14135): 32 queries walk over the keys, kKeyBlock at a time, with
// a running maximum and sum. The maxima of all 32 rows come before their exponentials, so that a row waits for no
// other's. By tiles it is bound by the exponentials, some 12 vector instructions for a register of scores, twice the
// time of their tiles; without, by the products.
#pragma once

#include "../forward_kernels.h"
#include "attention_fwd.h"

namespace igpt::cpu {
namespace {

// ---- q, k, v ------------------------------------------------------------------------------------------------

// Of 32 values, `count` of which are there: a bit for each that is not finite.
template <class E>
inline uint32_t flaws_of(const E* v, int64_t count) {
    const Vec largest = set1(3.40282347e38f);
    uint32_t finite = 0;
    sweep<1>(least(count, 32),
             [&](int64_t i, int, auto part) { finite |= at_most(abs(read(v + i, part)), largest) << i; });
    return ~finite & ~uint32_t(0) >> most(0, 32 - count);
}

// The values of a head, kRows positions, without what is not finite; `clean` has room for them.
template <class E>
inline HeadRows<E> finite_values(const HeadsParams& p, int64_t head, const HeadRows<E>& values, E* clean) {
    const int64_t d = p.head_dim, slices = (d + 31) / 32;
    uint32_t* flaws = p.flaws + head * p.flaw_stride;
    uint32_t any = 0;
    for (int64_t t = 0; t < kRows; ++t)
        for (int64_t i = 0; i < slices; ++i)
            any |= flaws[t * slices + i] = flaws_of(values.data + t * values.row + 32 * i, d - 32 * i);
    p.flawed[head * p.flawed_stride] = any != 0;
    if (any == 0) return values;
    for (int64_t t = 0; t < kRows; ++t)
        for (int64_t i = 0; i < d; ++i)
            clean[t * d + i] = flaws[t * slices + i / 32] >> i % 32 & 1 ? E(0) : values.data[t * values.row + i];
    return {clean, d, kRows, d, nullptr};
}

// Rows of a head into a cache of another format, or the same.
template <class E>
inline void copy_rows(const HeadRows<E>& rows, int64_t count, Format format, char* out) {
    const int64_t d = rows.width;
    for (int64_t t = 0; t < count; ++t)
        dispatch_format(format, [&](auto type) {
            using T = decltype(type);
            const E* from = rows.data + t * rows.row;
            T* to = reinterpret_cast<T*>(out) + t * d;
            sweep<1>(d, [&](int64_t i, int, auto part) { write(to + i, read(from + i, part), part); });
        });
}

template <class E>
void pack_heads(const HeadsParams& p) {
    const int64_t d = p.head_dim, wide = padded(d, 32), cached = p.cache_stride * format_bytes(p.cache);
    for (int64_t head = 0; head < p.heads; ++head) {
        const E* from = static_cast<const E*>(p.qkv) + head * 3 * d;
        const HeadRows<E> q{from, p.ld, kRows, d, nullptr}, k{from + d, p.ld, kRows, d, nullptr},
            v{from + 2 * d, p.ld, kRows, d, nullptr};
        const int64_t at = head * p.head_stride;
        alignas(64) E clean[kRows * max_head_dim];
        pack_lines(q, 0, kRows, wide, static_cast<E*>(p.q) + at);
        pack_columns(k, 0, kRows, wide, static_cast<E*>(p.k) + at);
        pack_groups(finite_values(p, head, v, clean), 0, kRows, wide, static_cast<E*>(p.v) + at);
        if (p.keys == nullptr) continue;
        copy_rows(k, p.seen, p.cache, static_cast<char*>(p.keys) + head * cached);
        copy_rows(v, p.seen, p.cache, static_cast<char*>(p.values) + head * cached);
    }
}

// ---- Attention ----------------------------------------------------------------------------------------------

// 32 queries of one head at work.
template <class E>
struct Queries {
    static constexpr int64_t span = kKeyBlock<E>;
    alignas(64) float scores[kRows * span];
    alignas(64) E other[sizeof(E) == 4 ? 16 : kRows * span];
    alignas(64) float out[kRows * max_head_dim];
    alignas(64) float sums[kRows * kLanes];
    float top[kRows];

    float* score(int64_t r, int64_t t) { return sum_at(scores, span, r, t); }
    E* weights() { return sizeof(E) == 4 ? reinterpret_cast<E*>(scores) : other; }
};

// Hides from each query what comes after it; the queries are the last 32 of the keys.
template <class E>
inline void hide_later(int64_t count, Queries<E>& s) {
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t t = (r + 1) / kLanes * kLanes; t < kRows; t += kLanes) {
            float* at = s.score(r, count - kRows + t);
            store(at, hide_from(r + 1 - t, load(at)));
        }
}

// The new maxima of all rows, as exponents, and what the sums and outputs until now are to be multiplied by.
template <class E>
inline void raise_tops(int64_t count, float scale, int64_t wide, bool first, Queries<E>& s) {
    for (int64_t r = 0; r < kRows; ++r) {
        Vec even = load(s.score(r, 0)), odd = load(s.score(r, kLanes));
        for (int64_t t = 2 * kLanes; t < count; t += 2 * kLanes) {
            even = max(even, load(s.score(r, t)));
            odd = max(odd, load(s.score(r, t + kLanes)));
        }
        const float here = reduce_max(max(even, odd)) * scale, before = s.top[r];
        const float now = here > before || first ? here : before;
        s.top[r] = now;
        if (first || now == before) continue;
        const Vec keep = power<E>(set1(before - base_of(now)));
        store(s.sums + r * kLanes, load(s.sums + r * kLanes) * keep);
        for (int64_t i = 0; i < wide; i += kLanes) {
            float* out = sum_at(s.out, wide, r, i);
            store(out, load(out) * keep);
        }
    }
}

template <class E>
inline void weigh_rows(int64_t count, float scale, Queries<E>& s) {
    constexpr bool fine = sizeof(E) == 4;
    const Vec factor = set1(scale);
    for (int64_t r = 0; r < kRows; ++r) {
        const Vec less = set1(base_of(s.top[r]));
        Vec even = load(s.sums + r * kLanes), odd = zero();
        for (int64_t t = 0; t < count; t += 2 * kLanes) {
            const Vec a = weigh<E>(load(s.score(r, t)), factor, less);
            const Vec b = weigh<E>(load(s.score(r, t + kLanes)), factor, less);
            even = even + a;
            odd = odd + b;
            if constexpr (fine) {
                store(s.score(r, t), a);
                store(s.score(r, t + kLanes), b);
            } else {
                write_two(line_at(s.weights(), s.span, r, t), a, b);
            }
        }
        store(s.sums + r * kLanes, even + odd);
    }
}

// Not a number, where a value that the query sees is none.
inline void spread_flaws(const AttentionBlocksParams& p, int64_t block, int64_t wide, float* out) {
    for (int64_t i = 0; i < p.head_dim; ++i) {
        bool met = false;
        for (int64_t t = 0; t < (block + 1) * kRows; ++t) {
            met |= (p.flaws[t * (wide / 32) + i / 32] >> i % 32 & 1) != 0;
            if (met && t >= block * kRows) *sum_at(out, wide, t - block * kRows, i) = __builtin_nanf("");
        }
    }
}

// Divides by the sums.
template <class E>
inline void finish_block(const AttentionBlocksParams& p, int64_t block, int64_t wide, const Queries<E>& s) {
    constexpr int64_t line = kLine<E>;
    E* tiles = static_cast<E*>(p.tiles);
    const int64_t end = p.column + p.head_dim;
    for (int64_t r = 0; r < kRows; ++r) {
        const auto at = [&](int64_t n) { return line_at(tiles, p.width, block * kRows + r, n); };
        alignas(64) E row[max_head_dim];
        write_row(s.out, wide, r, set1(1.0f / reduce_add(load(s.sums + r * kLanes))), row);
        int64_t i = 0;
        for (; p.column % line == 0 && i + line <= p.head_dim; i += line)
            __builtin_memcpy(at(p.column + i), row + i, 64);
        for (; i < p.head_dim; i += 8) __builtin_memcpy(at(p.column + i), row + i, 8 * sizeof(E));
        for (int64_t n = end; end == p.columns && n < p.width; n += 8) __builtin_memset(at(n), 0, 8 * sizeof(E));
    }
}

template <class By>
void causal_attention_blocks(const AttentionBlocksParams& p) {
    using E = typename By::Element;
    [[maybe_unused]] const typename By::Session session;
    const int64_t wide = padded(p.head_dim, 32), bytes = int64_t(sizeof(E)) * wide;
    const auto *q = static_cast<const E*>(p.q), *k = static_cast<const E*>(p.k), *v = static_cast<const E*>(p.v);
    const float scale = p.scale * kExponent<E>;
    Queries<E> s;
    bool flawed = false;
    for (int64_t block = 0; block < p.begin; ++block) flawed |= p.flawed[block] != 0;
    for (int64_t block = p.begin; block < p.end; ++block) {
        flawed |= p.flawed[block] != 0;
        const int64_t keys = (block + 1) * kRows;
        for (int64_t i = 0; i < kRows * kLanes; i += kLanes) store(s.sums + i, zero());
        for (int64_t from = 0; from < keys; from += s.span) {
            const int64_t count = least(s.span, keys - from);
            By::multiply({q + block * kRows * wide, 16 * bytes, k + from * wide, kTileBytes, 16 * bytes,
                          wide / kLine<E>, count / 16, s.scores, 16 * s.span, true});
            if (from + count == keys) hide_later(count, s);
            raise_tops(count, scale, wide, from == 0, s);
            weigh_rows(count, scale, s);
            By::multiply({s.weights(), 16 * s.span * int64_t(sizeof(E)), v + from * wide, wide / 16 * kTileBytes,
                          kTileBytes, count / kLine<E>, wide / 16, s.out, 16 * wide, from == 0});
        }
        if (flawed) spread_flaws(p, block, wide, s.out);
        finish_block(p, block, wide, s);
    }
}

}  // namespace
}  // namespace igpt::cpu
