// The tile unit (AMX). Included by bodies where __AMX_TILE__ is defined.
#pragma once

#include <cstdint>

#include "simd.h"

namespace igpt::cpu {
namespace {

#if defined(__AMX_TILE__)

// For the calling thread, while it lives: eight tiles of 16 rows of 64 bytes. Other libraries configure the unit for
// themselves, so every kernel that uses it begins with one of these; the end gives the unit's state back.
class Tiles {
  public:
    Tiles() { _tile_loadconfig(&layout); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    struct alignas(64) Layout {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Layout layout{};
};

#endif

}  // namespace
}  // namespace igpt::cpu
