// The tile unit (AMX). Included by bodies where __AMX_TILE__ is defined.
#pragma once

#include <cstdint>

#include "simd.h"

namespace igpt::cpu {
namespace {

#if defined(__AMX_TILE__)

struct alignas(64) TileLayout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileLayout kTileLayout{};

// For the calling thread, while it lives: eight tiles of 16 rows of 64 bytes. Other libraries configure the unit for
// themselves, so every kernel that uses it begins with one of these; the end gives the unit's state back.
class Tiles {
  public:
    Tiles() { _tile_loadconfig(&kTileLayout); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace
}  // namespace igpt::cpu
