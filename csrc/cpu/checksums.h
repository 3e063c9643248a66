// Whether memory still holds what it held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace igpt::cpu {

// A number for what lies in each block of memory, (address, bytes): it changes when a byte changes, but once in 2^64
// times.
std::vector<uint64_t> checksums(const std::vector<std::pair<uintptr_t, size_t>>& blocks, int threads);

}  // namespace igpt::cpu
