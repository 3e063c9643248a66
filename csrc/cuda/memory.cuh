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
template <typename V>
__device__ __forceinline__ void store_global(V* address, const V& value) {
    *address = value;
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
