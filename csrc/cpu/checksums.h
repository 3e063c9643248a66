// Whether memory still holds what it held.
#pragma once

#include <cstddef>
#include <cstdint>

namespace igpt::cpu {

// A number for what lies in each of `count` blocks of memory: it changes when a byte changes, but once in 2^64 times.
struct Block {
    const void* data;
    size_t bytes;
};
void checksums(const Block* blocks, int64_t count, uint64_t* out, int threads);

// CRC-32C (Castagnoli; RFC 3720, B.4) of what came before, whose CRC is `before` (0: nothing), and these bytes: by the
// processor's instruction where the chosen instruction set is above the generic one, else by eight tables.
uint32_t crc32c(const void* data, size_t bytes, uint32_t before);

}  // namespace igpt::cpu
