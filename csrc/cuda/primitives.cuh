// What kernels share: 16-byte vectors, conversions, warp and block sums. Sums are in a fixed order, so that the same
// input gives the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "memory.cuh"
#include "ops.h"
#include "ptx.cuh"

namespace igpt::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// e^x, as accurately as T can show it.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 4) return expf(x);
    return ptx::exp2_approx(kLog2e * x);
}

// What one thread moves with one instruction: 16 bytes.
template <typename T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    T at[kSize];
};

// The sum over the warp, in every lane. All 32 lanes take part.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
    return x;
}

// The N sums over a block of kWarps warps, in every thread, with one barrier. `scratch`: kWarps * N floats of shared
// memory, which the caller may use again only behind a further barrier.
template <int kWarps, int N>
__device__ __forceinline__ void block_sum(float (&x)[N], float* scratch) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = warp_sum(x[i]);
        if (lane == 0) store_shared(scratch + N * warp + i, x[i]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) x[i] += load_shared(scratch + N * w + i);
    }
}

// Calls f with a value of the C++ type behind a DType.
template <typename F>
int dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32:
            return f(float());
        case DType::bf16:
            return f(__nv_bfloat16());
        case DType::f16:
            return f(__half());
    }
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
