// cross_entropy over the last dimension, in nats, and its backward.
//
//   m = max(x), l = log(sum(exp(x - m))), loss of a row = l - (x[label] - m)
//   dx = (exp(x - m - l) - [i = label]) * scale, scale = the row's upstream gradient (/ rows that count, for a mean)
//
//   logits x, dlogits (rows, k) float32, bfloat16 or float16, contiguous, k up to 65536; labels (rows,) int64; losses
//   (rows,), statistics (rows, 2) = (m, l), loss and count (1,) float32. Everything is computed in float32. m and l are
//   kept apart: their sum, the log-sum-exp, rounded to float32 would show in the gradients of logits far from zero.
//   A row whose label is ignore_index counts for nothing: it is not read, its loss and gradient are zero. A label that
//   is neither that nor in [0, k) gives NaN, which no one overlooks, and a gradient of zero: nothing outside the row is
//   read. Launch: a warp for a row at a time, four in a block, grid-stride. Rows of up to 1024, a multiple of 8, stay
//   in registers for both passes over them; others go by in one pass with a running maximum. Each block leaves its sum
//   and count, and a second kernel of one block adds those up: no atomics, the same bits every time, and the mean never
//   passes through the host. 0 / 0 is NaN, as torch has it.
//   Bound by bytes, of 16-bit logits 2 an element forward, 4 backward. The forward could write the gradient as well, 4
//   in place of 2, but the upstream gradient is known only later: applying it would read and write all of it again, 8
//   in all against these 6.
//
// Source: torch.nn.functional.cross_entropy; Milakov & Gimelshein, 2018 (the running maximum).
#include <algorithm>

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"

namespace igpt::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kTotalWarps = 8;
constexpr int kBlocks = 132 * 8;  // fill the largest GPU

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, lane));
    return x;
}

// What the lanes load of rows that are no multiple of 16 bytes.
template <typename T>
struct Single {
    static constexpr int kSize = 1;
    T at[1];
};

struct alignas(8) Pair {
    float first, second;
};

// The largest logit and the logarithm of the sum of exponentials less it, of a row in registers. -inf contributes
// nothing, NaN and +inf make a NaN of the sum; so does a row of nothing but -inf, as torch has it.
template <typename T_, int kVectors>
struct InRegisters {
    using T = T_;

    __device__ __forceinline__ static Pair statistics(const T* row, int k) {
        using V = Vector<T>;
        const int lane = threadIdx.x % kWarpSize;
        V x[kVectors];
        float largest = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int start = (lane + v * kWarpSize) * V::kSize;
            if (start < k) x[v] = load_global(reinterpret_cast<const V*>(row + start));
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if ((lane + v * kWarpSize) * V::kSize >= k) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) largest = fmaxf(largest, to_float(x[v].at[e]));
        }
        largest = warp_max(largest);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if ((lane + v * kWarpSize) * V::kSize >= k) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) sum += exponential<T>(to_float(x[v].at[e]) - largest);
        }
        return {largest, logf(warp_sum(sum))};
    }
};

// The same in one pass, for any k.
template <typename T_, typename V>
struct Streamed {
    using T = T_;

    __device__ __forceinline__ static Pair statistics(const T* row, int k) {
        float largest = -INFINITY, sum = 0.0f;
        for (int start = threadIdx.x % kWarpSize * V::kSize; start < k; start += kWarpSize * V::kSize) {
            const V x = load_global(reinterpret_cast<const V*>(row + start));
            float next = largest;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) next = fmaxf(next, to_float(x.at[e]));
            sum *= exponential<T>(largest - base(next));
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) sum += exponential<T>(to_float(x.at[e]) - base(next));
            largest = next;
        }
        const float all = warp_max(largest);
        return {all, logf(warp_sum(sum * exponential<T>(largest - base(all))))};
    }

    // What is subtracted: nothing while all was -inf, of which -inf would make a NaN.
    __device__ __forceinline__ static float base(float largest) { return largest == -INFINITY ? 0.0f : largest; }
};

template <typename Rows>
__global__ void __launch_bounds__(kThreads) cross_entropy_fwd_kernel(CrossEntropyFwdParams p) {
    using T = typename Rows::T;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    float sum = 0.0f, count = 0.0f;  // the same in all lanes
    for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < p.rows; row += stride) {
        const int64_t label = load_global(p.labels + row);
        float loss = 0.0f;
        Pair statistics{0.0f, 0.0f};
        if (label != p.ignore_index) {
            loss = NAN;
            if (label >= 0 && label < p.k) {
                const T* logits = static_cast<const T*>(p.logits) + row * p.k;
                const float wanted = to_float(load_global(logits + label));
                statistics = Rows::statistics(logits, p.k);
                loss = statistics.second - (wanted - statistics.first);
            }
            sum += loss;
            count += 1.0f;
        }
        if (lane > 0) continue;
        store_global(reinterpret_cast<Pair*>(p.statistics) + row, statistics);
        if (p.losses) store_global(p.losses + row, loss);
    }
    if (!p.loss) return;
    Pair* scratch = dynamic_shared<Pair>();
    if (lane == 0) store_shared(scratch + warp, Pair{sum, count});
    __syncthreads();
    if (threadIdx.x > 0) return;
    Pair block{0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const Pair one = load_shared(scratch + w);
        block = {block.first + one.first, block.second + one.second};
    }
    store_global(reinterpret_cast<Pair*>(p.partial) + blockIdx.x, block);
}

__global__ void __launch_bounds__(kTotalWarps* kWarpSize) cross_entropy_total_kernel(CrossEntropyFwdParams p) {
    float sums[2] = {0.0f, 0.0f};
    for (int part = threadIdx.x; part < p.parts; part += kTotalWarps * kWarpSize) {
        const Pair one = load_global(reinterpret_cast<const Pair*>(p.partial) + part);
        sums[0] += one.first;
        sums[1] += one.second;
    }
    block_sum<kTotalWarps>(sums, dynamic_shared<float>());
    if (threadIdx.x > 0) return;
    store_global(p.loss, p.mean ? sums[0] / sums[1] : sums[0]);
    store_global(p.count, sums[1]);
}

template <typename T, typename V>
__global__ void __launch_bounds__(kThreads) cross_entropy_bwd_kernel(CrossEntropyBwdParams p) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t stride = int64_t(gridDim.x) * kWarps;
    const float divisor = p.count ? load_global(p.count) : 1.0f;
    for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < p.rows; row += stride) {
        const int64_t label = load_global(p.labels + row);
        const T* logits = static_cast<const T*>(p.logits) + row * p.k;
        T* dlogits = static_cast<T*>(p.dlogits) + row * p.k;
        if (label == p.ignore_index || label < 0 || label >= p.k) {
            V zero;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) zero.at[e] = from_float<T>(0.0f);
            for (int start = lane * V::kSize; start < p.k; start += kWarpSize * V::kSize) {
                store_global(reinterpret_cast<V*>(dlogits + start), zero);
            }
            continue;
        }
        const float scale = load_global(p.dloss + (p.for_each ? row : 0)) / divisor;
        const Pair statistics = load_global(reinterpret_cast<const Pair*>(p.statistics) + row);
#pragma unroll 2  // vectors on their way at once
        for (int start = lane * V::kSize; start < p.k; start += kWarpSize * V::kSize) {
            V x = load_global(reinterpret_cast<const V*>(logits + start));
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
                const float share = exponential<T>(to_float(x.at[e]) - statistics.first - statistics.second);
                x.at[e] = from_float<T>((share - (start + e == label ? 1.0f : 0.0f)) * scale);
            }
            store_global(reinterpret_cast<V*>(dlogits + start), x);
        }
    }
}

// Calls f with the way of reading rows of k logits.
template <typename T, typename F>
int dispatch_rows(int k, F&& f) {
    constexpr int kSize = Vector<T>::kSize;
    if (k % 8 == 0 && k <= 512) return f(InRegisters<T, 512 / kSize / kWarpSize>());
    if (k % 8 == 0 && k <= 1024) return f(InRegisters<T, 1024 / kSize / kWarpSize>());
    if (k % kSize == 0) return f(Streamed<T, Vector<T>>());
    return f(Streamed<T, Single<T>>());
}

bool takes(int64_t k) { return k >= 1 && k <= 65536; }

}  // namespace

int cross_entropy_fwd(const CrossEntropyFwdParams& p) {
    if (!takes(p.k) || p.parts < 0) return cudaErrorInvalidValue;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    if (p.parts > 0) {
        const int error = dispatch_dtype(p.dtype, [&](auto t) -> int {
            return dispatch_rows<decltype(t)>(p.k, [&](auto rows) -> int {
                return launch(cross_entropy_fwd_kernel<decltype(rows)>, unsigned(p.parts), kThreads,
                              kWarps * sizeof(Pair), p.stream, p);
            });
        });
        if (error != cudaSuccess) return error;
    }
    if (!p.loss) return cudaSuccess;
    return launch(cross_entropy_total_kernel, 1, kTotalWarps * kWarpSize, kTotalWarps * sizeof(Pair), p.stream, p);
}

int cross_entropy_bwd(const CrossEntropyBwdParams& p) {
    if (!takes(p.k)) return cudaErrorInvalidValue;
    if (p.rows == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const unsigned blocks = unsigned(std::min<int64_t>((p.rows + kWarps - 1) / kWarps, 2 * kBlocks));
    return dispatch_dtype(p.dtype, [&](auto t) -> int {
        using T = decltype(t);
        const auto kernel = p.k % Vector<T>::kSize == 0 ? cross_entropy_bwd_kernel<T, Vector<T>>
                                                        : cross_entropy_bwd_kernel<T, Single<T>>;
        return launch(kernel, blocks, kThreads, 0, p.stream, p);
    });
}

}  // namespace igpt::cuda
