// Packs one tile of a matrix, the body; layouts: decoder_kernels.h. Bound by reading the source and writing the tile.
#pragma once

#include "simd/registers.h"

namespace igpt::cpu {
namespace {

inline uint16_t to_bf16(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // rounding could make a NaN infinite
}

// A row of the tile, as fp32, padded with zeros. Columns that follow each other are read as they lie.
inline void gather_row(const PackParams& p, int64_t k, bool in_a_row, float* out) {
    const auto* wide = static_cast<const float*>(p.source) + k * p.stride_k;
    const auto* narrow = static_cast<const uint16_t*>(p.source) + k * p.stride_k;
    const int64_t first = p.order[0] * p.stride_n;
    for (int64_t n = p.count; n < kTile; ++n) out[n] = 0.0f;
    if (in_a_row && !p.is_bf16) {
        for (int64_t n = 0; n < p.count; ++n) out[n] = wide[first + n];
    } else if (in_a_row) {
        for (int64_t n = 0; n < p.count; ++n) {
            const uint32_t u = uint32_t(narrow[first + n]) << 16;
            __builtin_memcpy(out + n, &u, 4);
        }
    } else {
        for (int64_t n = 0; n < p.count; ++n) {
            const int64_t at = p.order[n] * p.stride_n;
            const uint32_t u = p.is_bf16 ? uint32_t(narrow[at]) << 16 : 0;
            __builtin_memcpy(out + n, &u, 4);
            if (!p.is_bf16) out[n] = wide[at];
        }
    }
}

// Group g of the tile from its `Step` rows in fp32.
template <int Step, class T, class Convert>
inline void write_group(const float* rows, T* out, Convert convert) {
    for (int n = 0; n < kTile; ++n)
        for (int s = 0; s < Step; ++s) out[n * Step + s] = convert(rows[s * kTile + n]);
}

// The scale of each column, which is NaN when one of its weights is not finite, and its inverse.
inline void column_scales(const PackParams& p, bool in_a_row, float* scale, float* inverse) {
    alignas(64) float row[kTile], most[kTile] = {}, poison[kTile] = {};
    for (int64_t k = 0; k < p.k; ++k) {
        gather_row(p, k, in_a_row, row);
        for (int n = 0; n < kTile; ++n) {
            const float magnitude = __builtin_fabsf(row[n]);
            most[n] = magnitude > most[n] ? magnitude : most[n];
            poison[n] += row[n] * 0.0f;
        }
    }
    for (int n = 0; n < kTile; ++n) {
        const float step = most[n] / 127.0f;
        scale[n] = step + poison[n];
        inverse[n] = step > 1e-37f && scale[n] == step ? 1.0f / step : 0.0f;
    }
}

template <int Step>
inline void pack_int8(const PackParams& p, bool in_a_row) {
    alignas(64) float rows[Step * kTile], inverse[kTile];
    alignas(64) int32_t sums[kTile] = {};
    column_scales(p, in_a_row, p.scale, inverse);
    auto* out = reinterpret_cast<int8_t*>(p.out);
    for (int64_t k = 0; k < p.k; k += Step, out += Step * kTile) {
        for (int s = 0; s < Step; ++s) {
            gather_row(p, k + s, in_a_row, rows + s * kTile);
            for (int n = 0; n < kTile; ++n) {
                const float q = rows[s * kTile + n] * inverse[n];
                // To nearest; what is not a number, or infinite, is 0: its column's scale is NaN.
                const float rounded = q >= -127.5f && q <= 127.5f ? q + (q < 0.0f ? -0.5f : 0.5f) : 0.0f;
                rows[s * kTile + n] = float(int32_t(rounded));
                sums[n] += int32_t(rounded);
            }
        }
        write_group<Step>(rows, out, [](float x) { return int8_t(int32_t(x)); });
    }
    for (int n = 0; n < kTile; ++n) p.sums[n] = sums[n];
}

template <int Int8Step>
void pack_tile(const PackParams& p) {
    bool in_a_row = p.stride_n == 1;
    for (int64_t n = 1; n < p.count; ++n) in_a_row &= p.order[n] == p.order[0] + n;
    alignas(64) float rows[2 * kTile];
    if (p.format == Format::int8) return pack_int8<Int8Step>(p, in_a_row);
    if (p.format == Format::fp32) {
        for (int64_t k = 0; k < p.k; ++k) gather_row(p, k, in_a_row, reinterpret_cast<float*>(p.out) + k * kTile);
        return;
    }
    auto* out = reinterpret_cast<uint16_t*>(p.out);
    for (int64_t k = 0; k < p.k; k += 2, out += 2 * kTile) {
        gather_row(p, k, in_a_row, rows);
        gather_row(p, k + 1, in_a_row, rows + kTile);
        write_group<2>(rows, out, [](float x) { return to_bf16(x); });
    }
}

}  // namespace
}  // namespace igpt::cpu
