// Writes launches down instead of running them: which kernel, how many blocks and threads, how much shared memory.
// For launches of a model's size, which the emulator is too slow for; their tensors are never touched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace igpt::emulator {

struct Launch {
    uint64_t kernel;  // its address, less where the module that holds it begins
    dim3 grid, block;
    size_t shared_bytes;
};

// From now on launches are written down, and nothing runs.
void start_recording();
// Back to running; the launches since the start.
std::vector<Launch> stop_recording();
// Called by every launch. Whether it was written down.
bool record(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);

}  // namespace igpt::emulator
