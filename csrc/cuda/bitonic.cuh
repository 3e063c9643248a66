// A bitonic sort of a block's keys in registers, four to a thread: key e stands in thread e / 4. Exchanges at distances
// 1 and 2 are within a thread, up to 64 within a warp, and the few others go through shared memory.
// Source: "Sorting networks and their applications" (Batcher, 1968).
#pragma once

#include "memory.cuh"
#include "primitives.cuh"

namespace igpt::cuda {

constexpr int kThreadKeys = 4;

// Of two keys at a distance: the first keeps the larger one where `larger_first`.
template <typename Key>
__device__ __forceinline__ void sort_pair(Key& first, Key& second, bool larger_first) {
    const Key a = first, b = second;
    const bool swap = larger_first ? a < b : b < a;
    first = swap ? b : a;
    second = swap ? a : b;
}

// Sorts 4 * kThreads keys, the largest first. `scratch`: 4 * kThreads keys that no thread may still be reading, nor may
// one write them before a further barrier. All threads of the block take part.
template <int kThreads, typename Key>
__device__ __forceinline__ void sort_descending(Key (&keys)[kThreadKeys], Key* scratch) {
    constexpr int kKeys = kThreads * kThreadKeys;
    const int thread = threadIdx.x;
    // Not unrolled: 45 exchanges for 512 keys, and their code would not fit the instruction cache.
#pragma unroll 1
    for (int size = 2; size <= kKeys; size *= 2) {
#pragma unroll 1
        for (int distance = size / 2; distance >= kThreadKeys; distance /= 2) {
            const int flip = distance / kThreadKeys;
            // Sequences of `size` keys are descending and ascending by turns; the lower of two places keeps the larger
            // key in a descending one.
            const bool larger = ((thread & flip) == 0) == ((thread * kThreadKeys & size) == 0);
            if (flip >= kWarpSize) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < kThreadKeys; ++i) store_shared(scratch + i * kThreads + thread, keys[i]);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < kThreadKeys; ++i) {
                const Key other = flip >= kWarpSize ? load_shared(scratch + i * kThreads + (thread ^ flip))
                                                    : __shfl_xor_sync(kFullMask, keys[i], flip);
                keys[i] = (other > keys[i]) == larger ? other : keys[i];
            }
        }
        if (size > 2) {
            const bool descending = (thread * kThreadKeys & size) == 0;
            sort_pair(keys[0], keys[2], descending);
            sort_pair(keys[1], keys[3], descending);
            sort_pair(keys[0], keys[1], descending);
            sort_pair(keys[2], keys[3], descending);
        } else {
            sort_pair(keys[0], keys[1], true);
            sort_pair(keys[2], keys[3], false);
        }
    }
}

}  // namespace igpt::cuda
