// The second stage of a sum over rows: the blocks of a kernel each leave a partial sum of every column, and this adds
// them up in a fixed order. No atomics, the same bits every time.
#pragma once

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"

namespace igpt::cuda {
namespace {

// Up to two sums in one launch. partial (sums, parts, n) float32, out[sum] (n,) T.
struct ColumnSumParams {
    const float* partial;
    void* out[2];
    int32_t n;
    int32_t parts;
};

constexpr int kSumColumns = 32, kSumGroups = 16;

// out[i] = sum of partial[:, i]: 32 columns for a block, every 16th partial sum for a warp.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumGroups) column_sum_kernel(ColumnSumParams p) {
    float* scratch = dynamic_shared<float>();
    const int column = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
    const int i = blockIdx.x * kSumColumns + column;
    const float* partial = p.partial + int64_t(blockIdx.y) * p.parts * p.n;
    float sum = 0.0f;
    if (i < p.n) {
        for (int part = group; part < p.parts; part += kSumGroups)
            sum += load_global(partial + int64_t(part) * p.n + i);
    }
    store_shared(scratch + threadIdx.x, sum);
    __syncthreads();
    if (group > 0 || i >= p.n) return;
    sum = 0.0f;
#pragma unroll
    for (int g = 0; g < kSumGroups; ++g) sum += load_shared(scratch + g * kSumColumns + column);
    store_global(static_cast<T*>(blockIdx.y == 0 ? p.out[0] : p.out[1]) + i, from_float<T>(sum));
}

// `second` null: one sum.
template <typename T>
int launch_column_sums(const float* partial, void* first, void* second, int32_t n, int32_t parts, void* stream) {
    const unsigned columns = unsigned((int64_t(n) + kSumColumns - 1) / kSumColumns);
    return launch(column_sum_kernel<T>, dim3(columns, second ? 2 : 1), kSumColumns * kSumGroups,
                  kSumColumns * kSumGroups * sizeof(float), stream,
                  ColumnSumParams{partial, {first, second}, n, parts});
}

}  // namespace
}  // namespace igpt::cuda
