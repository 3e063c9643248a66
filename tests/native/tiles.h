// In place of csrc/cpu/bodies/simd/tiles.h, for tests: the tile unit's eight tiles as memory of the thread, and its
// products by AVX-512's, which round as a tile's row does but for the order of a sum. What the unit forbids ends the
// program: a tile that is used while the unit is not configured, and a configuration inside another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "registers.h"

namespace igpt::cpu {
namespace {

struct TileUnit {
    alignas(64) unsigned char tiles[8][1024];
    bool configured;
};
thread_local TileUnit tile_unit{};

class Tiles {
  public:
    Tiles() {
        if (tile_unit.configured) __builtin_trap();
        __builtin_memset(&tile_unit, 0, sizeof tile_unit);
        tile_unit.configured = true;
    }
    ~Tiles() { tile_unit.configured = false; }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int T>
inline unsigned char* tile() {
    static_assert(T >= 0 && T < 8);
    if (!tile_unit.configured) __builtin_trap();
    return tile_unit.tiles[T];
}

template <int T>
inline void zero_tile() {
    __builtin_memset(tile<T>(), 0, 1024);
}
template <int T>
inline void load_tile(const void* p, ptrdiff_t row_bytes) {
    for (int row = 0; row < 16; ++row)
        __builtin_memcpy(tile<T>() + 64 * row, static_cast<const unsigned char*>(p) + row * row_bytes, 64);
}
template <int T>
inline void store_tile(void* p, ptrdiff_t row_bytes) {
    for (int row = 0; row < 16; ++row)
        __builtin_memcpy(static_cast<unsigned char*>(p) + row * row_bytes, tile<T>() + 64 * row, 64);
}

// Row by row: sums + add(a group of four bytes of A in every lane, a line of B).
template <int C, int A, int B, class Add>
inline void multiply(Add add) {
    for (int row = 0; row < 16; ++row) {
        __m512i sums = _mm512_load_si512(tile<C>() + 64 * row);
        for (int k = 0; k < 16; ++k) {
            int32_t group;
            __builtin_memcpy(&group, tile<A>() + 64 * row + 4 * k, 4);
            sums = add(sums, _mm512_set1_epi32(group), _mm512_load_si512(tile<B>() + 64 * k));
        }
        _mm512_store_si512(tile<C>() + 64 * row, sums);
    }
}
template <int C, int A, int B>
inline void multiply_bf16() {
    multiply<C, A, B>([](__m512i sums, __m512i a, __m512i b) {
        return __m512i(_mm512_dpbf16_ps(__m512(sums), __m512bh(a), __m512bh(b)));
    });
}
template <int C, int A, int B>
inline void multiply_bytes() {
    multiply<C, A, B>([](__m512i sums, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sums, a, b); });
}
template <int C, int A, int B>
inline void multiply_signed_bytes() {
    multiply<C, A, B>([](__m512i sums, __m512i a, __m512i b) {
        const __m512i offset = _mm512_set1_epi8(char(128)), none = _mm512_setzero_si512();
        sums = _mm512_dpbusd_epi32(sums, _mm512_xor_si512(a, offset), b);
        return _mm512_sub_epi32(sums, _mm512_dpbusd_epi32(none, offset, b));
    });
}

}  // namespace
}  // namespace igpt::cpu
