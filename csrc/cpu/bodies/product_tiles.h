// Products of several rows by tiles (AMX), bf16 and int8: a tile of inputs, 16 rows of 64 bytes, with up to four tiles
// of 16 outputs each. The packed weights are such tiles as they lie: 16 groups along k, a line of each.
//
// bf16: a row of the tile is a sequence. int8: two rows are, its high and its low half; 8 sequences a tile. Rows that
// are not there hold whatever lies behind; no row meets another. Bound by reading the weights.
#pragma once

#include "linear.h"
#include "simd/tiles.h"

namespace igpt::cpu {
namespace {

constexpr bool tiled(int64_t rows, Format format) { return rows > 1 && format != Format::fp32; }

template <int Step, int RowBytes>
struct Tiled {
    static constexpr bool tiled = true, splits = Step == 4;
    static constexpr int step = Step, bytes = 64, max_rows = 16 * 64 / RowBytes;
    static constexpr int64_t deep = 16 * Step;  // of k, a tile
    static constexpr ptrdiff_t row_bytes = RowBytes;
    static constexpr auto whole = Int8::whole<float>;

    static void set_inputs(Piece& p, const Rows& rows, int64_t row, int64_t k) {
        p.tiles_step = rows.count * row_bytes;
        p.tiles = rows.tiles + k / deep * p.tiles_step + row * row_bytes;
    }
    // From one row of the sums to the next.
    static ptrdiff_t sums_bytes(const Piece& p) { return ptrdiff_t(sizeof(float)) * 2 * p.width * 64 / row_bytes; }

    // Tile c += inputs (tile 4) x weights of column c, while what comes later is prefetched.
    template <int C>
    static void multiply_columns(const char* w, ptrdiff_t stride, const char* far, ptrdiff_t far_step) {
        each<C>([&](auto column) {
            constexpr int weights = 5 + column % 2;
            for (int i = 0; i < 16; ++i) prefetch(far + i * far_step + column * bytes);
            load_tile<weights>(w + column * bytes, stride);
            if constexpr (splits)
                multiply_bytes<column, 4, weights>();
            else
                multiply_bf16<column, 4, weights>();
        });
    }

    template <int R, int C>
    static void run(const Piece& p) {
        each<C>([&](auto c) {
            if (p.first)
                zero_tile<c>();
            else
                load_tile<c>(p.sums + c * kLanes, sums_bytes(p));
        });
        const int64_t tiles = p.count / deep;
        Piece by_tile = p;
        by_tile.stride = 16 * p.stride;
        by_tile.far_step = 16 * p.far_step;
        by_tile.jump_at = (p.jump_at + 15) / 16;
        const char* inputs = p.tiles;
        each_group(by_tile, tiles, [&](const char* w, const char* far, int64_t) {
            load_tile<4>(inputs, 64);
            multiply_columns<C>(w, p.stride, far, p.far_step);
            inputs += p.tiles_step;
        });
        if (const int64_t rest = p.count % deep / step) {
            // What lies behind the last group is something else.
            alignas(64) char weights[16 * C * bytes] = {};
            for (int64_t g = 0; g < rest; ++g)
                __builtin_memcpy(weights + g * C * bytes, p.weights + (16 * tiles + g) * p.stride, C * bytes);
            load_tile<4>(inputs, 64);
            multiply_columns<C>(weights, C * bytes, weights, 0);
        }
        each<C>([&](auto c) { store_tile<c>(p.sums + c * kLanes, sums_bytes(p)); });
    }
};

using TiledBf16 = Tiled<2, 64>;
using TiledInt8 = Tiled<4, 128>;

// Rounds rows to bf16, or splits them into halves, into `rows.tiles`.
inline void split_tiles(const Rows& rows, int64_t k, Format format) {
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* x = rows.x + r * rows.ld;
        if (format == Format::int8) {
            auto* high = reinterpret_cast<uint8_t*>(rows.tiles + r * TiledInt8::row_bytes);
            rows.scale[r] = Int8::split_row<true>(x, k, high, high + 64, rows.count * TiledInt8::row_bytes);
            continue;
        }
        char* out = rows.tiles + r * TiledBf16::row_bytes;
        for (int64_t i = 0; i < k; i += 32, out += rows.count * TiledBf16::row_bytes) {
            const __mmask32 mask = k - i < 32 ? (__mmask32(1) << (k - i)) - 1 : ~__mmask32(0);
            const Vec first = _mm512_maskz_loadu_ps(__mmask16(mask), x + i),
                      second = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + i + 16);
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));  // zeros behind the end
        }
    }
}

void split_by_tiles(const Rows& rows, int64_t k, Format format) {
    tiled(rows.count, format) ? split_tiles(rows, k, format) : split(rows, k, format);
}

void linear_by_tiles(const LinearParams& p) {
    if (!tiled(p.rows->count, p.matrix->format)) return linear(p);
    const Tiles unit;
    p.matrix->format == Format::bf16 ? linear_in<TiledBf16>(p) : linear_in<TiledInt8>(p);
}

}  // namespace
}  // namespace igpt::cpu
