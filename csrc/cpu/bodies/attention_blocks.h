// The products of attention without tiles. Layouts: attention_operands.h.
//
// A block of C, R rows of P tiles, stays in registers along a few lines of k, whose sum is then added to C: long sums
// are made of short ones, in the order of k. Bound by multiply-adds: a word of k takes R + P 16 / kLanes loads for
// R P 16 / kLanes of them.
#pragma once

#include "attention_operands.h"
#include "block.h"

namespace igpt::cpu {
namespace {

// C (32 x 16 panels) += A B, 16 words of k a line; bytes.
struct TileProduct {
    const void* a;    // lines, one after the other
    int64_t a_below;  // from the first 16 rows to the others
    const void* b;    // tiles
    int64_t b_line, b_panel;
    int64_t lines, panels;  // panels: even
    float* c;               // tiles of C, one after the other
    int64_t c_below;        // numbers, from the first 16 rows to the others
    bool first;             // C begins at zero
};

// c += the products of a word of x with words w.
inline Vec add_word(const float* x, Ints w, Vec c) { return fma(floats(w), set1(*x), c); }
template <class V>
inline V add_word(const uint16_t* x, Ints w, V c) {
    return add_pairs(c, x, w);
}

// R rows from `row` on, P tiles.
template <class E, int R, int P>
inline void add_rows(const TileProduct& p, int row) {
    const auto *a = static_cast<const char*>(p.a) + row * 64, *b = static_cast<const char*>(p.b);
    float* c = p.c + row * 16;
    constexpr int per = 16 / kLanes, unrolled = 2;
    Vec acc[R][P * per];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < P * per; ++i) acc[r][i] = zero();
    for (int64_t l = 0; l < p.lines; ++l, a += kTileBytes, b += p.b_line)
        for (int64_t word = 0; word < 16; word += unrolled)
            for (int64_t u = word; u < word + unrolled; ++u) {
                Ints w[P * per];
                for (int i = 0; i < P * per; ++i)
                    w[i] = load_ints(b + i / per * p.b_panel + u * 64 + i % per * kLanes * 4);
                for (int r = 0; r < R; ++r) {
                    const auto* x = reinterpret_cast<const E*>(a + r * 64 + u * 4);
                    for (int i = 0; i < P * per; ++i) acc[r][i] = add_word(x, w[i], acc[r][i]);
                }
            }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < P * per; ++i) {
            float* sum = c + i / per * kTileSums + r * 16 + i % per * kLanes;
            store(sum, p.first ? acc[r][i] : load(sum) + acc[r][i]);
        }
}

// 16 rows as blocks of R, and what is left over as one.
template <class E, int R, int P>
inline void add_tile(const TileProduct& p) {
    int r = 0;
    for (; r + R <= 16; r += R) add_rows<E, R, P>(p, r);
    if constexpr (16 % R != 0) add_rows<E, 16 % R, P>(p, r);
}

constexpr int64_t kLinesAtOnce = 4;

// Pairs of bf16 where kTwoByTwo, by block.h's kernel, to which a line of B is 16 groups of a tile's weights: panel n,
// some lines.
template <class Vector>
inline void multiply_two_by_two(const TileProduct& p, int64_t n, int64_t line, int64_t lines, bool first) {
    alignas(64) char turned[kLinesAtOnce * kTileBytes];
    const auto *a = static_cast<const char*>(p.a) + line * kTileBytes,
               *b = static_cast<const char*>(p.b) + n * p.b_panel + line * p.b_line;
    for (int64_t l = 0; l < lines; ++l) turn_weights<Vector>(b + l * p.b_line, 16, turned + l * kTileBytes);
    const int64_t depth = lines * kLine<uint16_t>;
    float* c = p.c + n * kTileSums;
    for (int64_t below = 0; below < 2; ++below, a += p.a_below, c += p.c_below)
        run_blocks<OfManyRows<Pairs>, 16>({a, kLineBytes, kTileBytes, turned, depth, c, 16, first}, 16 / kLanes);
}

template <class E>
struct ByBlocks {
    using Element = E;
    struct Session {};
    // As many rows and tiles as the registers hold: AVX-512's 32 and AVX2's 16. Of four lanes a tile's row takes four:
    // NEON's 32 have four rows, 16 have two.
    static constexpr int kRowsAtOnce = kLanes == 16 ? 8 : kLanes == 8 ? 6 : kMaxRows, kPanels = kLanes == 16 ? 2 : 1;

    static void multiply(const TileProduct& p) {
        const auto *a = static_cast<const char*>(p.a), *b = static_cast<const char*>(p.b);
        for (int64_t n = 0; n < p.panels; n += kPanels)
            for (int64_t line = 0; line < p.lines; line += kLinesAtOnce) {
                const bool first = p.first && line == 0;
                const int64_t lines = least(kLinesAtOnce, p.lines - line);
                if constexpr (kTwoByTwo && sizeof(E) == 2) {
                    multiply_two_by_two<Ints>(p, n, line, lines, first);
                    continue;
                }
                for (int64_t below = 0; below < 2; ++below)
                    add_tile<E, kRowsAtOnce, kPanels>({a + below * p.a_below + line * kTileBytes, 0,
                                                       b + n * p.b_panel + line * p.b_line, p.b_line, p.b_panel, lines,
                                                       0, p.c + below * p.c_below + n * kTileSums, 0, first});
            }
    }
};

}  // namespace
}  // namespace igpt::cpu
