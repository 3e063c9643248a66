// What the attention bodies share: operands, packed in tiles. See attention_kernels.h.
//
// An element is a bf16 (uint16_t), two of which are a word, or a float, which is one. A tile is 1 KB, (16, 16) words,
// whatever the machine:
//   lines     A of a product over k: of 16 rows and 16 words of k, (16 rows, 16 words)
//   columns   B of a product over D: of 16 words of D and 16 positions, (16 words, 16 positions)
//   groups    B of a product over positions: of 16 words of positions and 16 of D, (16 words, 16 of D); a word of bf16
//             is of two positions
//   C         (16, 16) floats; scores in float32 become lines where they stand
// Positions that are hidden, or lie beyond the last, are zeros: what stands there is not read.
#pragma once

#include "../attention_kernels.h"
#include "../format.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kStrip = 32;  // positions at a time: two tiles
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileSums = 256;  // of a tile of C
alignas(64) constexpr float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class E>
constexpr int64_t kWord = 4 / int64_t(sizeof(E));  // elements
template <class E>
constexpr int64_t kLine = 16 * kWord<E>;
template <class E>
constexpr int64_t kTileOf = 16 * kLine<E>;

// Scores as exponents: of e where products are fp32, whose rounding their error has to match, else of 2, by this
// factor.
template <class E>
constexpr float kExponent = sizeof(E) == 4 ? 1.0f : kLog2e;
template <class E>
inline Vec power(Vec x) {
    if constexpr (sizeof(E) == 4)
        return exp_down(x);
    else
        return exp2(x);
}
// Of scores times a scale, less an exponent. That one is made of such a product, rounded, and the largest has to meet
// it: a fused product would differ by its rounding, which is hundreds where scores are huge.
template <class E>
inline Vec weigh(Vec scores, Vec scale, Vec less) {
    return power<E>(scores * scale - less);
}

// What exponents are lessened by, of which `top` is the largest: of minus infinity, where all are, they stay. A
// difference of such would be no number.
inline float base_of(float top) { return top == -__builtin_inff() ? 0.0f : top; }

// Where element i of row r is: among tiles of C whose rows have `width` columns, and among lines of k.
inline float* sum_at(const float* tiles, int64_t width, int64_t r, int64_t i) {
    return const_cast<float*>(tiles) + (r / 16 * (width / 16) + i / 16) * kTileSums + r % 16 * 16 + i % 16;
}
template <class E>
inline E* line_at(const E* tiles, int64_t width, int64_t r, int64_t i) {
    constexpr int64_t line = kLine<E>;
    return const_cast<E*>(tiles) + (r / 16 * (width / line) + i / line) * kTileOf<E> + r % 16 * line + i % line;
}

// Positions of one head, as they lie in a tensor: rows of `width`, and zeros behind. `hidden`: of each, 0 or minus
// infinity; null: none is.
template <class S>
struct HeadRows {
    const S* data;
    int64_t row, count, width;
    const float* hidden;

    bool shown(int64_t t) const { return t < count && (hidden == nullptr || hidden[t] == 0.0f); }

    // A register of words of position t, from `i` of D on.
    template <class E>
    Ints words(int64_t t, int64_t i) const {
        constexpr int64_t n = kLanes * kWord<E>;
        if (!shown(t) || i >= width) return bits(zero());
        const S* from = data + t * row + i;
        S some[n] = {};
        if (__builtin_expect(i + n > width, 0)) {
            for (int64_t j = 0; j < width - i; ++j) some[j] = from[j];
            from = some;
        }
        if constexpr (sizeof(E) == sizeof(S))
            return load_ints(from);
        else
            return bits(read(from, Whole{}));
    }
};

// (16, 16) words turned over. load(i, j): a register of words of row i, from j on.
template <class Load>
inline void turn_tile(Load load, void* out) {
    for (int i = 0; i < 16; i += kLanes)
        for (int j = 0; j < 16; j += kLanes) {
            Ints r[kLanes];
            for (int n = 0; n < kLanes; ++n) r[n] = load(i + n, j);
            transpose(r);
            for (int n = 0; n < kLanes; ++n) store(static_cast<float*>(out) + (j + n) * 16 + i, floats(r[n]));
        }
}

// Positions first .. first + count - 1, a multiple of 32, of D rounded up to `wide`: as lines, tile (position / 16,
// line of D);
template <class E, class S>
inline void pack_lines(const HeadRows<S>& x, int64_t first, int64_t count, int64_t wide, E* out) {
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < wide; i += kLanes * kWord<E>)
            store(reinterpret_cast<float*>(line_at(out, wide, t, i)), floats(x.template words<E>(first + t, i)));
}

// as columns, tile (position / 16, words of D / 16);
template <class E, class S>
inline void pack_columns(const HeadRows<S>& x, int64_t first, int64_t count, int64_t wide, E* out) {
    for (int64_t t = 0; t < count; t += 16)
        for (int64_t i = 0; i < wide; i += kLine<E>, out += kTileOf<E>)
            turn_tile([&](int64_t j, int64_t word) { return x.template words<E>(first + t + j, i + word * kWord<E>); },
                      out);
}

// and in groups, tile (words of positions / 16, D / 16).
template <class E, class S>
inline void pack_groups(const HeadRows<S>& x, int64_t first, int64_t count, int64_t wide, E* out) {
    constexpr int64_t step = kWord<E>;
    for (int64_t t = 0; t < count; t += step)
        for (int64_t i = 0; i < wide; i += kLanes * step) {
            // A group's rows are words of 16 of D: as lines of floats.
            const auto at = [&](int64_t d) {
                return reinterpret_cast<float*>(out) + (t / kLine<E> * (wide / 16) + d / 16) * kTileSums +
                       t % kLine<E> / step * 16 + d % 16;
            };
            auto a = x.template words<E>(first + t, i);
            if constexpr (step == 2) {
                const auto b = x.template words<E>(first + t + 1, i);
                auto next = a;
                interleave(a, b, a, next);
                store(at(i + kLanes), floats(next));
            }
            store(at(i), floats(a));
        }
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

// Rows of head (b, h) of a tensor.
template <class S>
inline S* head_of(const AttentionTensor& x, int64_t b, int64_t h) {
    return static_cast<S*>(x.data) + b * x.batch + h * x.head;
}
template <class S>
inline HeadRows<S> rows_of(const AttentionTensor& x, int64_t b, int64_t h, int64_t count, int64_t d,
                           const float* hidden = nullptr) {
    return {head_of<S>(x, b, h), x.row, count, d, hidden};
}

// Row r of tiles of C, d columns, times `scale`.
template <class S>
inline void write_row(const float* tiles, int64_t d, int64_t r, Vec scale, S* out) {
    for (int64_t i = 0; i < d; i += 2 * kLanes)
        write_two(out + i, load(sum_at(tiles, d, r, i)) * scale, load(sum_at(tiles, d, r, i + kLanes)) * scale);
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
