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

}  // namespace igpt::cpu
