// rms_norm and layer_norm with an optional residual addition before them, and their backward: one template.
//
//   h = x + residual (rounded to the dtype); layer_norm: c = h - mean(h), rms_norm: c = h
//   r = rsqrt(mean(c^2) + eps), out = c * r * weight (+ bias, layer_norm's, where there is one)
//   dx = r * (g - c * r^2 * mean(g * c) - mean(g)) + dsum with g = dout * weight, the last mean layer_norm's alone
//   dweight = sum over rows of dout * c * r;  dbias = sum over rows of dout
//
//   x, residual, sum (h), out, dout, dsum, dx (rows, n) and weight, bias, dweight, dbias (n,) of one dtype: float32,
//   bfloat16 or float16; partial (1 or 2, parts, n) float32. Contiguous, n a multiple of 8. Everything is computed in
//   float32; the variance is that of the values less their mean, from registers, and not a difference of two sums; what
//   the mean loses by its own rounding is made good by the mean of those differences.
//   Mixed, rms_norm's alone: what stands beside a residual, out and dout, and the weight may have dtypes of their own,
//   as under autocast a float32 stream of residuals and 16-bit branches; which, the kernel learns where it runs.
//   Elements are converted as they come and go, and the bits are those of conversions apart; dbranch is dx in the dtype
//   of what stood beside the residual.
//   Launch: a team of 1, 4 or 8 warps for a row, each thread with up to 8 vectors of 16 bytes of it in registers, so
//   that a row is read once; four one-warp teams make a block, which then needs no barrier for a row. The backward
//   makes the statistics anew, which costs no bytes. It runs up to `parts` blocks over all rows, keeps the gradients of
//   weight and bias in registers, writes a partial sum for each block, and columns.cuh adds those up. Bound by bytes:
//   the forward moves 2 (4 with residual) tensors of (rows, n), the backward 3 (4 with dsum); of an autocast's stream 6
//   (12) bytes an element, and 10 (16).
//
// Source: openai/image-gpt src/model.py norm; Ba, Kiros & Hinton, 2016. Backward: the derivatives, written out.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "columns.cuh"
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
    static constexpr bool kMixed = false;
    static constexpr int kWarps = kWarps_, kVectors = kVectors_;
    static constexpr int kTeams = kWarps == 1 ? 4 : 1;
    static constexpr int kTeamThreads = kWarps * kWarpSize;
    static constexpr int kThreads = kTeams * kTeamThreads;
    // Blocks of the backward on a multiprocessor, by its registers.
    static constexpr int at_a_time(bool centred) {
        return kVectors == 1 ? 6 : kVectors == 2 ? 4 : kWarps > 4 ? 1 : sizeof(T) == 4 || !centred ? 3 : 2;
    }
};
constexpr int kMultiprocessors = 132;  // of an H100

// Of tensors of several dtypes, float32 in registers: a vector is four elements of each.
template <typename S>
struct Mixed : S {
    static constexpr bool kMixed = true;
};

__device__ __forceinline__ float bits_to_float(uint16_t bits, DType dtype) {
    if (dtype == DType::bf16) return __uint_as_float(uint32_t(bits) << 16);
    return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_bits(float x, DType dtype) {
    return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

template <typename Tensor>
__device__ __forceinline__ Tensor* row_of(Tensor* tensor, int64_t row, int n, size_t size) {
    using Byte = std::conditional_t<std::is_const_v<Tensor>, const char, char>;
    return static_cast<Byte*>(tensor) + row * n * int64_t(size);
}

// The part of a row that one thread has: vectors thread, thread + kTeamThreads, ...
template <typename S>
struct Piece {
    using V = Vector<typename S::T>;
    struct alignas(8) Four {
        uint16_t at[4];
    };
    V vectors[S::kVectors];

    __device__ static bool is_narrow(DType dtype) { return S::kMixed && dtype != DType::f32; }

    // Whether vector v of this thread is in the row, and the element of the row that it starts with.
    __device__ static int start(int v) { return (threadIdx.x % S::kTeamThreads + v * S::kTeamThreads) * V::kSize; }

    // Row `row` of a tensor; `dtype` its own where S is mixed. A 16-bit one is not converted before settle(): loads
    // that follow are on their way before the first has to be there.
    __device__ __forceinline__ void load(const void* tensor, int64_t row, int n, DType dtype) {
        if (is_narrow(dtype)) {
            const auto* from = static_cast<const uint16_t*>(row_of(tensor, row, n, sizeof(uint16_t)));
#pragma unroll
            for (int v = 0; v < S::kVectors; ++v) {
                if (start(v) >= n) break;
                const Four four = load_global(reinterpret_cast<const Four*>(from + start(v)));
                memcpy(&vectors[v], &four, sizeof(four));  // its front half
            }
            return;
        }
        const auto* from = static_cast<const typename S::T*>(row_of(tensor, row, n, sizeof(typename S::T)));
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
            vectors[v] = load_global(reinterpret_cast<const V*>(from + start(v)));
        }
    }
    __device__ __forceinline__ void settle(int n, DType dtype) {
        if (!is_narrow(dtype)) return;
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
            Four four;
            memcpy(&four, &vectors[v], sizeof(four));
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) set(v, e, bits_to_float(four.at[e % 4], dtype));
        }
    }
    __device__ __forceinline__ void store(void* tensor, int64_t row, int n, DType dtype) const {
        if (is_narrow(dtype)) {
            auto* to = static_cast<uint16_t*>(row_of(tensor, row, n, sizeof(uint16_t)));
#pragma unroll
            for (int v = 0; v < S::kVectors; ++v) {
                if (start(v) >= n) break;
                Four four;
#pragma unroll
                for (int e = 0; e < V::kSize; ++e) four.at[e % 4] = float_to_bits(get(v, e), dtype);
                store_global(reinterpret_cast<Four*>(to + start(v)), four);
            }
            return;
        }
        auto* to = static_cast<typename S::T*>(row_of(tensor, row, n, sizeof(typename S::T)));
#pragma unroll
        for (int v = 0; v < S::kVectors; ++v) {
            if (start(v) >= n) break;
            store_global(reinterpret_cast<V*>(to + start(v)), vectors[v]);
        }
    }
    // As it would come back from a tensor of `dtype`.
    __device__ __forceinline__ void round(int n, DType dtype) {
        if (!is_narrow(dtype)) return;
        each(n, [&](int v, int e) { set(v, e, bits_to_float(float_to_bits(get(v, e), dtype), dtype)); });
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

template <typename S, bool kCentred>
__global__ void __launch_bounds__(S::kThreads) norm_fwd_kernel(NormFwdParams p) {
    const int n = p.n_embd;
    const int64_t row = int64_t(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeamThreads;
    if (row >= p.rows) return;  // a whole team, and where a block has several they meet at no barrier
    float* scratch = dynamic_shared<float>();
    Piece<S> h, weight, bias;
    h.load(p.x, row, n, p.x_dtype);
    if (p.residual) {
        Piece<S> residual;
        residual.load(p.residual, row, n, p.dtype);
        h.settle(n, p.x_dtype);
        residual.settle(n, p.dtype);
        Piece<S>::each(n, [&](int v, int e) { h.set(v, e, h.get(v, e) + residual.get(v, e)); });
        h.store(p.sum, row, n, p.dtype);
        h.round(n, p.dtype);
    } else {
        h.settle(n, p.x_dtype);
    }
    weight.load(p.weight, 0, n, p.weight_dtype);     // on its way while the sums are made
    float mean[1] = {0.0f}, sums[2] = {0.0f, 0.0f};  // of c^2 and, layer_norm's, of c
    if constexpr (kCentred) {
        if (p.bias) bias.load(p.bias, 0, n, p.weight_dtype);
        Piece<S>::each(n, [&](int v, int e) { mean[0] += h.get(v, e); });
        team_sum<S>(mean, scratch + 2 * S::kWarps);  // a place of its own, so that no barrier parts the sums
        mean[0] /= float(n);
    }
    Piece<S>::each(n, [&](int v, int e) {
        const float c = h.get(v, e) - mean[0];
        sums[0] += c * c;
        if constexpr (kCentred) sums[1] += c;
    });
    float shift = 0.0f;  // what the mean lost where it was rounded
    if constexpr (kCentred) {
        team_sum<S>(sums, scratch);
        shift = sums[1] / float(n);
    } else {
        float square[1] = {sums[0]};
        team_sum<S>(square, scratch);
        sums[0] = square[0];
    }
    const float scale = rsqrtf(sums[0] / float(n) - shift * shift + p.eps);
    weight.settle(n, p.weight_dtype);
    Piece<S>::each(n, [&](int v, int e) {
        float y = (h.get(v, e) - mean[0] - shift) * scale * weight.get(v, e);
        if constexpr (kCentred) {
            if (p.bias) y += bias.get(v, e);
        }
        h.set(v, e, y);
    });
    h.store(p.out, row, n, p.out_dtype);
}

// Writes the block's sum of its teams' gradients: gradient[v][e] of each thread.
template <typename S>
__device__ __forceinline__ void store_partial(const float (&gradient)[S::kVectors][Piece<S>::V::kSize], float* partial,
                                              float* scratch, int n) {
    using V4 = Vector<float>;
    constexpr int kSize = Piece<S>::V::kSize;
    float* target = S::kTeams == 1 ? partial : scratch + threadIdx.x / S::kTeamThreads * n;
    // Where a thread has two V4, at distances of 32 bytes from the next thread's, every other four threads begin with
    // the second, so that the eight which share a turn at the banks use all of them.
    const bool swap = kSize > V4::kSize && threadIdx.x % 8 >= 4;
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
        const int start = Piece<S>::start(v);
        if (start >= n) break;
#pragma unroll
        for (int e = 0; e < kSize; e += V4::kSize) {
            V4 four;
#pragma unroll
            for (int i = 0; i < V4::kSize; ++i) {
                four.at[i] = swap ? gradient[v][(e + i + V4::kSize) % kSize] : gradient[v][e + i];
            }
            V4* address = reinterpret_cast<V4*>(target + start + (swap ? (e + V4::kSize) % kSize : e));
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

// The sums over a row that the backward needs, divided by n: of c^2 and g * c, and for layer_norm of h and g.
template <typename S, bool kCentred>
struct Means {
    static constexpr int kSums = kCentred ? 3 : 2;  // at once; two scratch areas of kWarps * kSums are taken by turns
    float h = 0.0f, g = 0.0f, shift = 0.0f, square = 0.0f, product = 0.0f;

    __device__ __forceinline__ float centre(float x) const { return kCentred ? x - h - shift : x; }

    // A fast warp is at most one barrier ahead of one that still reads: hence the two areas.
    __device__ __forceinline__ void find(const Piece<S>& row, const Piece<S>& dout, const Piece<S>& weight, int n,
                                         float* scratch, int& turn) {
        if constexpr (kCentred) {
            float sums[2] = {0.0f, 0.0f};
            Piece<S>::each(n, [&](int v, int e) {
                sums[0] += row.get(v, e);
                sums[1] += dout.get(v, e) * weight.get(v, e);
            });
            team_sum<S>(sums, scratch + turn * kSums * S::kWarps);
            turn ^= 1;
            h = sums[0] / float(n);
            g = sums[1] / float(n);
        }
        float sums[kSums] = {};
        Piece<S>::each(n, [&](int v, int e) {
            const float c = row.get(v, e) - h;
            sums[0] += c * c;
            sums[1] += dout.get(v, e) * weight.get(v, e) * c;
            if constexpr (kCentred) sums[2] += c;
        });
        team_sum<S>(sums, scratch + turn * kSums * S::kWarps);
        turn ^= 1;
        if constexpr (kCentred) shift = sums[2] / float(n);
        square = sums[0] / float(n) - shift * shift;
        product = sums[1] / float(n) - shift * g;
    }
};

template <typename S, bool kCentred>
__global__ void __launch_bounds__(S::kThreads, S::at_a_time(kCentred)) norm_bwd_kernel(NormBwdParams p) {
    const int n = p.n_embd;
    float* scratch = dynamic_shared<float>();
    float dweight[S::kVectors][Piece<S>::V::kSize] = {}, dbias[S::kVectors][Piece<S>::V::kSize] = {};
    Piece<S> weight;
    weight.load(p.weight, 0, n, p.weight_dtype);
    weight.settle(n, p.weight_dtype);
    const int64_t stride = int64_t(gridDim.x) * S::kTeams;
    int turn = 0;
    for (int64_t row = int64_t(blockIdx.x) * S::kTeams + threadIdx.x / S::kTeamThreads; row < p.rows; row += stride) {
        Piece<S> h, dout;
        h.load(p.x, row, n, p.dtype);
        dout.load(p.dout, row, n, p.out_dtype);
        h.settle(n, p.dtype);
        dout.settle(n, p.out_dtype);
        Means<S, kCentred> mean;
        mean.find(h, dout, weight, n, scratch, turn);
        const float scale = rsqrtf(mean.square + p.eps), slope = scale * scale * mean.product;
        Piece<S>::each(n, [&](int v, int e) {
            dweight[v][e] += dout.get(v, e) * (mean.centre(h.get(v, e)) * scale);
            if constexpr (kCentred) dbias[v][e] += dout.get(v, e);
        });
        Piece<S>::each(n, [&](int v, int e) {
            const float g = dout.get(v, e) * weight.get(v, e);
            dout.set(v, e, scale * (g - mean.centre(h.get(v, e)) * slope - mean.g));
        });
        if (p.dsum) {
            Piece<S> dsum;
            dsum.load(p.dsum, row, n, p.dtype);
            dsum.settle(n, p.dtype);
            Piece<S>::each(n, [&](int v, int e) { dout.set(v, e, dout.get(v, e) + dsum.get(v, e)); });
        }
        dout.store(p.dx, row, n, p.dtype);
        if constexpr (S::kMixed) {
            if (p.dbranch) dout.store(p.dbranch, row, n, p.x_dtype);
        }
    }
    store_partial<S>(dweight, p.partial + int64_t(blockIdx.x) * n, scratch, n);
    if constexpr (kCentred) {
        if constexpr (S::kTeams > 1) __syncthreads();  // the scratch has been read
        store_partial<S>(dbias, p.partial + (int64_t(gridDim.x) + blockIdx.x) * n, scratch, n);
    }
}

// Calls f with the smallest Shape that holds a row of n. Where kLone, one warp has up to 128 vectors, not four:
// layer_norm's forward is faster so, with its two sums one after the other, and all else slower.
template <typename T, bool kLone, typename F>
int dispatch_shape(int n, F&& f) {
    const int vectors = n / Vector<T>::kSize;
    if (n < 8 || n % 8 != 0 || n > 8192) return cudaErrorInvalidValue;
    if (vectors <= 64) return f(Shape<T, 1, 2>());
    if (vectors <= 128) return f(std::conditional_t<kLone, Shape<T, 1, 4>, Shape<T, 4, 1>>());
    if (vectors <= 256) return f(Shape<T, 4, 2>());
    if (vectors <= 512) return f(Shape<T, 4, 4>());
    if (vectors <= 1024) return f(Shape<T, 8, 4>());
    if constexpr (sizeof(T) == 4) return f(Shape<T, 8, 8>());
    return cudaErrorInvalidValue;
}

template <bool kCentred, typename S>
int launch_fwd(const NormFwdParams& p) {
    const int64_t blocks = (p.rows + S::kTeams - 1) / S::kTeams;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const size_t floats = S::kWarps == 1 ? 0 : (kCentred ? 3 : 1) * S::kWarps;
    return launch(norm_fwd_kernel<S, kCentred>, unsigned(blocks), S::kThreads, floats * sizeof(float), p.stream, p);
}

template <bool kCentred, typename S>
int launch_bwd(const NormBwdParams& p) {
    const size_t floats = S::kTeams == 1 ? 2 * Means<S, kCentred>::kSums * S::kWarps : S::kTeams * p.n_embd;
    // No more than run at a time: a few that come later would have as many rows each, and the GPU for themselves.
    const int parts = std::min(p.parts, kMultiprocessors * S::at_a_time(kCentred));
    if (parts > 0) {
        const int error =
            launch(norm_bwd_kernel<S, kCentred>, unsigned(parts), S::kThreads, floats * sizeof(float), p.stream, p);
        if (error != cudaSuccess) return error;
    }
    return dispatch_dtype(p.weight_dtype, [&](auto t) {
        return launch_column_sums<decltype(t)>(p.partial, p.dweight, p.dbias, p.n_embd, parts, p.stream);
    });
}

// Calls f with the Shape for a row of n of these dtypes.
template <bool kCentred, bool kLone, typename F>
int dispatch_dtypes(bool mixed, DType dtype, int n, F&& f) {
    if (mixed) {
        if constexpr (kCentred) return cudaErrorInvalidValue;
        if constexpr (!kCentred)
            return dispatch_shape<float, kLone>(n, [&](auto s) { return f(Mixed<decltype(s)>()); });
    }
    return dispatch_dtype(dtype, [&](auto t) { return dispatch_shape<decltype(t), kLone>(n, f); });
}

template <bool kCentred>
int forward(const NormFwdParams& p) {
    if (p.rows == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const bool mixed = p.x_dtype != p.dtype || p.weight_dtype != p.dtype || p.out_dtype != p.dtype;
    return dispatch_dtypes<kCentred, kCentred>(mixed, p.dtype, p.n_embd,
                                               [&](auto s) { return launch_fwd<kCentred, decltype(s)>(p); });
}

template <bool kCentred>
int backward(const NormBwdParams& p) {
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const bool mixed = p.dbranch || p.weight_dtype != p.dtype || p.out_dtype != p.dtype;
    return dispatch_dtypes<kCentred, false>(mixed, p.dtype, p.n_embd,
                                            [&](auto s) { return launch_bwd<kCentred, decltype(s)>(p); });
}

}  // namespace

int norm_fwd(const NormFwdParams& p) { return p.centred ? forward<true>(p) : forward<false>(p); }
int norm_bwd(const NormBwdParams& p) { return p.centred ? backward<true>(p) : backward<false>(p); }

}  // namespace igpt::cuda
