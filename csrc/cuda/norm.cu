// rms_norm with an optional residual addition before it, and its backward.
//
//   h = x + residual (rounded to the dtype), r = rsqrt(mean(h^2) + eps), out = h * r * weight
//   dx = r * (g - h * r^2 * mean(g * h)) + dsum with g = dout * weight;  dweight = sum over rows of dout * h * r
//
//   x, residual, sum (h), out, dout, dsum, dx (rows, n) and weight, dweight (n,) of one dtype: float32, bfloat16 or
//   float16; partial (parts, n) float32. Contiguous, n a multiple of 8. Everything is computed in float32.
//   Launch: a team of 1, 4 or 8 warps for a row, each thread with up to 8 vectors of 16 bytes of it in registers, so
//   that a row is read once; four one-warp teams make a block, which then needs no barrier for a row. The backward
//   runs `parts` blocks over all rows, keeps the weight's gradient in registers, writes a partial sum for each block,
//   and a second kernel adds those up: no atomics, the same bits every time.
//   Bound by bytes: the forward moves 2 (4 with residual) tensors of (rows, n), the backward 3 (4 with dsum).
//
// Source: openai/image-gpt src/model.py norm. Backward: the derivative, written out.
#include <type_traits>

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"

namespace igpt::cuda {
namespace {

// kWarps warps have a row, kVectors vectors in each of their threads; kTeams rows at a time for a block.
template <typename T_, int kWarps_, int kVectors_>
struct Shape {
    using T = T_;
    static constexpr int kWarps = kWarps_, kVectors = kVectors_;
    static constexpr int kTeams = kWarps == 1 ? 4 : 1;
    static constexpr int kTeamThreads = kWarps * kWarpSize;
    static constexpr int kThreads = kTeams * kTeamThreads;
};

// The part of a row that one thread has: vectors thread, thread + kTeamThreads, ...
template <typename S>
struct Piece {
    using V = Vector<typename S::T>;
    V vectors[S::kVectors];

    // Whether vector v of this thread is in the row, and the element of the row that it starts with.
    __device__ static int start(int v) { return (threadIdx.x % S::kTeamThreads + v * S::kTeamThreads) * V::kSize; }

    __device__ __forceinline__ void load(const void* row, int n) {
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
            vectors[v] = load_global(reinterpret_cast<const V*>(static_cast<const typename S::T*>(row) + start(v)));
        }
    }
    __device__ __forceinline__ void store(void* row, int n) const {
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
            store_global(reinterpret_cast<V*>(static_cast<typename S::T*>(row) + start(v)), vectors[v]);
        }
    }
    __device__ __forceinline__ float get(int v, int e) const { return to_float(vectors[v].at[e]); }
    __device__ __forceinline__ void set(int v, int e, float x) { vectors[v].at[e] = from_float<typename S::T>(x); }

    // f(v, e) for every element that the row has here.
    template <typename F>
    __device__ __forceinline__ static void each(int n, F&& f) {
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) f(v, e);
        }
    }
};

// Sums over the team. `scratch`: kWarps * N floats that no thread may still be reading.
template <typename S, int N>
__device__ __forceinline__ void team_sum(float (&x)[N], float* scratch) {
    if constexpr (S::kWarps == 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    } else {
        block_sum<S::kWarps>(x, scratch);
    }
}

template <typename Tensor>
__device__ __forceinline__ Tensor* row_of(Tensor* tensor, int64_t row, int n, size_t size) {
    using Byte = std::conditional_t<std::is_const_v<Tensor>, const char, char>;
    return static_cast<Byte*>(tensor) + row * n * int64_t(size);
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads) rms_norm_fwd_kernel(RmsNormFwdParams p) {
    using T = typename S::T;
    const int n = p.n_embd;
    const int64_t row = int64_t(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeamThreads;
    if (row >= p.rows) return;  // a whole team, and where a block has several they meet at no barrier
    Piece<S> h, weight;
    h.load(row_of(p.x, row, n, sizeof(T)), n);
    if (p.residual) {
        Piece<S> residual;
        residual.load(row_of(p.residual, row, n, sizeof(T)), n);
        Piece<S>::each(n, [&](int v, int e) { h.set(v, e, h.get(v, e) + residual.get(v, e)); });
        h.store(row_of(p.sum, row, n, sizeof(T)), n);
    }
    weight.load(p.weight, n);  // on its way while the sum is made
    float square[1] = {0.0f};
    Piece<S>::each(n, [&](int v, int e) { square[0] += h.get(v, e) * h.get(v, e); });
    team_sum<S>(square, dynamic_shared<float>());
    const float scale = rsqrtf(square[0] / float(n) + p.eps);
    Piece<S>::each(n, [&](int v, int e) { h.set(v, e, h.get(v, e) * scale * weight.get(v, e)); });
    h.store(row_of(p.out, row, n, sizeof(T)), n);
}

// Writes the block's sum of its teams' gradients: dweight[v][e] of each thread.
template <typename S>
__device__ __forceinline__ void store_partial(const float (&dweight)[S::kVectors][Piece<S>::V::kSize], float* partial,
                                              float* scratch, int n) {
    using V4 = Vector<float>;
    constexpr int kSize = Piece<S>::V::kSize;
    float* target = S::kTeams == 1 ? partial : scratch + threadIdx.x / S::kTeamThreads * n;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
        const int start = Piece<S>::start(v);
        if (start >= n) break;
#pragma unroll
        for (int e = 0; e < kSize; e += V4::kSize) {
            const V4 four{{dweight[v][e], dweight[v][e + 1], dweight[v][e + 2], dweight[v][e + 3]}};
            V4* address = reinterpret_cast<V4*>(target + start + e);
            if constexpr (S::kTeams == 1) {
                store_global(address, four);
            } else {
                store_shared(address, four);
            }
        }
    }
    if constexpr (S::kTeams > 1) {
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += S::kThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int team = 0; team < S::kTeams; ++team) sum += load_shared(scratch + team * n + i);
            store_global(partial + i, sum);
        }
    }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads) rms_norm_bwd_kernel(RmsNormBwdParams p) {
    using T = typename S::T;
    const int n = p.n_embd;
    float* scratch = dynamic_shared<float>();
    float dweight[S::kVectors][Piece<S>::V::kSize] = {};
    Piece<S> weight;
    weight.load(p.weight, n);
    const int64_t stride = int64_t(gridDim.x) * S::kTeams;
    int turn = 0;
    for (int64_t row = int64_t(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeamThreads; row < p.rows; row += stride) {
        Piece<S> h, dout;
        h.load(row_of(p.x, row, n, sizeof(T)), n);
        dout.load(row_of(p.dout, row, n, sizeof(T)), n);
        float sums[2] = {0.0f, 0.0f};  // of h^2 and of dout * weight * h
        Piece<S>::each(n, [&](int v, int e) {
            sums[0] += h.get(v, e) * h.get(v, e);
            sums[1] += dout.get(v, e) * weight.get(v, e) * h.get(v, e);
        });
        // Two scratch areas by turns: a fast warp is at most one barrier ahead of one that still reads.
        team_sum<S>(sums, scratch + turn * 2 * S::kWarps);
        turn ^= 1;
        const float scale = rsqrtf(sums[0] / float(n) + p.eps);
        const float slope = scale * scale * (sums[1] / float(n));
        Piece<S>::each(n, [&](int v, int e) { dweight[v][e] += dout.get(v, e) * (h.get(v, e) * scale); });
        Piece<S>::each(n, [&](int v, int e) {
            dout.set(v, e, scale * (dout.get(v, e) * weight.get(v, e) - h.get(v, e) * slope));
        });
        if (p.dsum) {
            Piece<S> dsum;
            dsum.load(row_of(p.dsum, row, n, sizeof(T)), n);
            Piece<S>::each(n, [&](int v, int e) { dout.set(v, e, dout.get(v, e) + dsum.get(v, e)); });
        }
        dout.store(row_of(p.dx, row, n, sizeof(T)), n);
    }
    store_partial<S>(dweight, p.partial + int64_t(blockIdx.x) * n, scratch, n);
}

constexpr int kColumns = 32, kGroups = 16;

// dweight[i] = sum of partial[:, i]: 32 columns for a block, every 16th partial sum for a warp.
template <typename T>
__global__ void __launch_bounds__(kColumns* kGroups) rms_norm_dweight_kernel(RmsNormBwdParams p) {
    float* scratch = dynamic_shared<float>();
    const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    const int i = blockIdx.x * kColumns + column;
    float sum = 0.0f;
    if (i < p.n_embd) {
        for (int part = group; part < p.parts; part += kGroups) {
            sum += load_global(p.partial + int64_t(part) * p.n_embd + i);
        }
    }
    store_shared(scratch + threadIdx.x, sum);
    __syncthreads();
    if (group > 0 || i >= p.n_embd) return;
    sum = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sum += load_shared(scratch + g * kColumns + column);
    store_global(static_cast<T*>(p.dweight) + i, from_float<T>(sum));
}

// Calls f with the smallest Shape that holds a row of n.
template <typename T, typename F>
int dispatch_shape(int n, F&& f) {
    const int vectors = n / Vector<T>::kSize;
    if (n < 8 || n % 8 != 0 || n > 8192) return cudaErrorInvalidValue;
    if (vectors <= 64) return f(Shape<T, 1, 2>());
    if (vectors <= 128) return f(Shape<T, 1, 4>());
    if (vectors <= 256) return f(Shape<T, 4, 2>());
    if (vectors <= 512) return f(Shape<T, 4, 4>());
    if (vectors <= 1024) return f(Shape<T, 8, 4>());
    if constexpr (sizeof(T) == 4) return f(Shape<T, 8, 8>());
    return cudaErrorInvalidValue;
}

template <typename S>
int launch_fwd(const RmsNormFwdParams& p) {
    const int64_t blocks = (p.rows + S::kTeams - 1) / S::kTeams;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const size_t shared = S::kWarps == 1 ? 0 : S::kWarps * sizeof(float);
    return launch(rms_norm_fwd_kernel<S>, unsigned(blocks), S::kThreads, shared, p.stream, p);
}

template <typename S>
int launch_bwd(const RmsNormBwdParams& p) {
    const size_t floats = S::kTeams == 1 ? 4 * S::kWarps : S::kTeams * p.n_embd;
    const unsigned parts = unsigned(p.parts), columns = unsigned(p.n_embd + kColumns - 1) / kColumns;
    if (parts > 0) {
        const int error = launch(rms_norm_bwd_kernel<S>, parts, S::kThreads, floats * sizeof(float), p.stream, p);
        if (error != cudaSuccess) return error;
    }
    return launch(rms_norm_dweight_kernel<typename S::T>, columns, kColumns * kGroups,
                  kColumns * kGroups * sizeof(float), p.stream, p);
}

}  // namespace

int rms_norm_fwd(const RmsNormFwdParams& p) {
    if (p.rows == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return dispatch_dtype(p.dtype, [&](auto t) {
        return dispatch_shape<decltype(t)>(p.n_embd, [&](auto s) { return launch_fwd<decltype(s)>(p); });
    });
}

int rms_norm_bwd(const RmsNormBwdParams& p) {
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return dispatch_dtype(p.dtype, [&](auto t) {
        return dispatch_shape<decltype(t)>(p.n_embd, [&](auto s) { return launch_bwd<decltype(s)>(p); });
    });
}

}  // namespace igpt::cuda
