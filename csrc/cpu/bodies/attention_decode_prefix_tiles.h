// attention_decode_prefix by tiles (AMX), the body: queries and probabilities go into the primer's products as tiles.
#pragma once

#include "attention_decode_prefix.h"
#include "product_tiles.h"

namespace igpt::cpu {
namespace {

struct TiledRows : SplitRows<shared_rows> {
    alignas(64) char tiles[kKeys / 32][shared_rows][2][64];  // two halves of each
};

template <class F>
struct SharedTiles : F {
    using Inputs = TiledRows;
    // Where a product finds its rows.
    static void set_inputs(Piece& p, const TiledRows& x) {
        p.tiles = x.tiles[0][0][0];
        p.tiles_step = sizeof x.tiles[0];
    }
};

// A number is the sum of two in bf16, which have 16 bits together.
struct SharedTiledBf16 : SharedTiles<Tiled<2, 128>> {
    template <bool Signed>
    static void split(TiledRows& rows, int64_t r, int64_t n) {
        for (int64_t i = 0; i < n; i += kLanes) {
            const __mmask16 mask = n - i < kLanes ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
            const Vec v = _mm512_maskz_loadu_ps(mask, rows.x[r] + i);
            const auto most = (__m256i)_mm512_cvtneps_pbh(v);
            const auto rest = (__m256i)_mm512_cvtneps_pbh(v - floats(shift_left<16>(_mm512_cvtepu16_epi32(most))));
            auto& row = rows.tiles[i / deep][r];
            __builtin_memcpy(row[0] + i % deep * 2, &most, sizeof most);
            __builtin_memcpy(row[1] + i % deep * 2, &rest, sizeof rest);
        }
        // The other half of the last tile meets zeros, which a NaN that was left there would outlive.
        if (const int64_t end = padded(n, kLanes); end % deep != 0)
            for (auto& half : rows.tiles[end / deep][r]) __builtin_memset(half + 32, 0, 32);
    }
};

struct SharedTiledInt8 : SharedTiles<TiledInt8> {
    static_assert(max_rows == shared_rows);
    template <bool Signed>
    static void split(TiledRows& rows, int64_t r, int64_t n) {
        auto* high = reinterpret_cast<uint8_t*>(rows.tiles[0][r][0]);
        rows.scale[r] = Int8::split_row<Signed>(rows.x[r], n, high, high + 64, sizeof rows.tiles[0]);
    }
};

void attention_decode_prefix_by_tiles(const AttentionDecodeParams& primer, const AttentionDecodeParams* sequences,
                                      int64_t count) {
    attend_with<SharedTiledBf16, SharedTiledInt8, Tiles>(primer, sequences, count);
}

}  // namespace
}  // namespace igpt::cpu
