// Whether memory still holds what it held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace igpt::cpu {

// A number for what lies in each block of memory, (address, bytes), on one instruction set: another one for other
// bytes, but once in 2^64 times.
std::vector<uint64_t> checksums(const std::vector<std::pair<uintptr_t, size_t>>& blocks, int threads);

// CRC-32C (Castagnoli; RFC 3720, B.4) of what came before, whose CRC is `before` (0: nothing), and these bytes: by the
// processor's instruction where the chosen instruction set is above the generic one, else by eight tables.
uint32_t crc32c(const void* data, size_t bytes, uint32_t before);

}  // namespace igpt::cpu
