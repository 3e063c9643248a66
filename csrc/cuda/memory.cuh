// Loads and stores whose access pattern matters: plain ones under nvcc, counted ones in the emulator
// (../emulator/memory.h), so that coalescing and bank conflicts can be asserted without a GPU.
// V is any type of 1, 2, 4, 8 or 16 bytes with its natural alignment.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace igpt::cuda {

template <typename V>
__device__ __forceinline__ V load_global(const V* address) {
    return *address;
}
// 16 bytes leave as one word: written as an assignment, the compiler takes a struct apart, and does not always put it
// together again, so that a vector can become eight stores of two bytes.
template <typename V>
__device__ __forceinline__ void store_global(V* address, const V& value) {
    if constexpr (sizeof(V) == 16) {
        __stwb(reinterpret_cast<uint4*>(address), *reinterpret_cast<const uint4*>(&value));
    } else {
        *address = value;
    }
}
template <typename V>
__device__ __forceinline__ V load_shared(const V* address) {
    return *address;
}
template <typename V>
__device__ __forceinline__ void store_shared(V* address, const V& value) {
    *address = value;
}

}  // namespace igpt::cuda
#else
#include "../emulator/memory.h"
#endif
