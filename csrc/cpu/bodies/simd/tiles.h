// The tile unit (AMX). Included by the bodies of isa/amx.cpp alone, over AVX-512 with its products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "registers.h"

namespace igpt::cpu {
namespace {

struct alignas(64) TileLayout {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
constexpr TileLayout kTileLayout{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// For the calling thread, while it lives: eight tiles of 16 rows of 64 bytes. Other libraries configure the unit for
// themselves, so every kernel that uses it begins with one of these; the end gives the unit's state back.
class Tiles {
  public:
    Tiles() { _tile_loadconfig(&kTileLayout); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tile T. The compilers' own functions differ in what they take for T, and GCC's do not say that they touch memory.
template <int T>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load_tile(const void* p, ptrdiff_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(row_bytes) : "memory");
}
template <int T>
inline void store_tile(void* p, ptrdiff_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(row_bytes) : "memory");
}
// C += A B: fp32 from pairs of bf16, rows of A with columns of B.
template <int C, int A, int B>
inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A B: int32 from fours of unsigned bytes of A and signed ones of B.
template <int C, int A, int B>
inline void multiply_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// And from signed bytes of both.
template <int C, int A, int B>
inline void multiply_signed_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace igpt::cpu
