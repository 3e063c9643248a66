// Philox4x32-10, a counter-based generator: no state, so that a number depends on its key and counter alone.
// Source: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011), table 2 and section 3.3.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace igpt::cuda {

// The first of the four words for a counter under a key.
__device__ __forceinline__ uint32_t philox_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

// The uniform number in [0, 1) of a stream at a position, a multiple of 2^-24; see reference.uniform.
__device__ __forceinline__ float philox_uniform(uint64_t seed, int64_t stream, int32_t position) {
    const uint64_t s = uint64_t(stream);
    return float(philox_word(uint32_t(position), 0, uint32_t(s), uint32_t(s >> 32), seed) >> 8) * 0x1p-24f;
}

}  // namespace igpt::cuda
