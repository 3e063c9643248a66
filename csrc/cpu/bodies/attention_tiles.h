// The products of attention, and of all else, by tiles. Layouts: attention_operands.h.
//
// A product of tiles is C (16 x 16 float32) += A (16 x 32 bf16) B, and B holds its rows in pairs: (16 pairs, 16
// columns, 2).
#pragma once

#include "attention_blocks.h"
#include "simd/tiles.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kTileSize = 512;  // elements of a bf16 tile

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

// C += A B: twice 16 rows of A, `row` bytes apart, and two tiles of B, whose lines are `line` bytes apart; of bf16, or
// of signed bytes.
template <bool Signed, int C, int A, int B>
inline void multiply_pair() {
    if constexpr (Signed)
        multiply_signed_bytes<C, A, B>();
    else
        multiply_bf16<C, A, B>();
}
template <bool Signed = false>
inline void multiply_tiles(const void* a, const void* a_below, int64_t row, const void* b, const void* b_next,
                           int64_t line = 64) {
    load_tile<4>(a, row);
    load_tile<6>(b, line);
    multiply_pair<Signed, 0, 4, 6>();
    load_tile<7>(b_next, line);
    multiply_pair<Signed, 1, 4, 7>();
    load_tile<5>(a_below, row);
    multiply_pair<Signed, 2, 5, 6>();
    multiply_pair<Signed, 3, 5, 7>();
}

struct ByTiles {
    using Element = uint16_t;
    using Session = Tiles;

    static void multiply(const TileProduct& p) {
        for (int64_t n = 0; n < p.panels; n += 2) {
            const auto *a = static_cast<const char*>(p.a), *b = static_cast<const char*>(p.b) + n * p.b_panel;
            float* c = p.c + n * kTileSums;
            if (p.first)
                zero_tiles();
            else
                load_tiles(c, 16, kTileSums, p.c_below);
            for (int64_t l = 0; l < p.lines; ++l, a += kTileBytes, b += p.b_line)
                multiply_tiles(a, a + p.a_below, 64, b, b + p.b_panel);
            store_tiles(c, 16, kTileSums, p.c_below);
        }
    }
};

}  // namespace
}  // namespace igpt::cpu
