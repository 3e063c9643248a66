// What hopper.cpp and wgmma.cpp share: TensorShape and Major stand in csrc/cuda/hopper.cuh, which includes hopper.h.
#pragma once

#include <cstdint>

#include "../cuda/hopper.cuh"
#include "running.h"

namespace igpt::emulator {

// Where 16 bytes of a tile with rows of 128 bytes are, by their shared address without the swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address / 128 % 8 * 16); }

// Fails if a thread has written these 16 bytes and has not made it visible to copies and wgmma.
void check_async_visible(const char* name, uint32_t address, Where where);

}  // namespace igpt::emulator
