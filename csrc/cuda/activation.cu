// quick_gelu, gelu_tanh and gelu_erf with an optional bias added before, and their backward.
//
//   z = x + bias; quick_gelu: z s(1.702 z); gelu_tanh: z s(2 sqrt(2/pi) (z + 0.044715 z^3)), which is the usual form
//   with tanh; gelu_erf: z (1 + erf(z / sqrt(2))) / 2; s the logistic function
//   dx = dout * f'(z);  dbias = sum over rows of dx, before it is rounded
//
//   x, out, dout, dx (rows, n) and bias, dbias (n,) of one dtype: float32, bfloat16 or float16; partial (parts, n)
//   float32. Contiguous, n a multiple of 8. Computed in float32, z included, and rounded once. out may be x, and dx may
//   be dout: a thread reads what it writes over. An argument of any finite size gives a finite result.
//   Launch: without bias, 256 threads take 16-byte vectors from anywhere, grid-stride. With bias, a lane stays with the
//   columns of one vector, so that their bias is in its registers, and the 8 warps of a block go down the rows: in the
//   forward two of them for a warp, since many short blocks are faster than a few that stay. A block of the backward
//   sums its dbias through shared memory and leaves a partial sum, which columns.cuh adds up. (With n far below 32
//   vectors most lanes then idle; no model of ours has such a layer.)
//   Bound by bytes: the forward moves 2 tensors of (rows, n), the backward 3. Two approximate instructions for an
//   element of 16 bits keep the arithmetic below that; float32 has twice the time and takes the accurate functions.
//
// Source: openai/image-gpt src/model.py gelu; Hendrycks & Gimpel, 2016. Backward: the derivatives, written out.
#include <algorithm>

#include "columns.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"

namespace igpt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = kThreads / kWarpSize;  // of a block that goes down columns
constexpr int kBlocks = 132 * 8;                   // fill the largest GPU
constexpr int64_t kMaxGridY = 65535;

template <typename T>
__device__ __forceinline__ float logistic(float x) {
    const float d = 1.0f + exponential<T>(-x);  // infinity, where x is far below zero, has the reciprocal zero
    if constexpr (sizeof(T) == 4) return 1.0f / d;
    return __fdividef(1.0f, d);
}

// The logistic function and its derivative s (1 - s), which must not suffer where s is nearly one.
struct Logistic {
    float value, slope;
};
template <typename T>
__device__ __forceinline__ Logistic logistic_with_slope(float x) {
    const float e = exponential<T>(-fabsf(x)), d = 1.0f + e;
    const float r = sizeof(T) == 4 ? 1.0f / d : __fdividef(1.0f, d);
    return {x < 0.0f ? e * r : r, e * r * r};
}

// Each has its value and its derivative. Products begin with the factors that vanish, so that none of them is infinite.
struct QuickGelu {
    static constexpr float kSlope = 1.702f;

    template <typename T>
    __device__ __forceinline__ static float value(float z) {
        return z * logistic<T>(kSlope * z);
    }
    template <typename T>
    __device__ __forceinline__ static float derivative(float z) {
        const Logistic s = logistic_with_slope<T>(kSlope * z);
        return s.value + z * s.slope * kSlope;
    }
};

struct GeluTanh {
    static constexpr float kLinear = 1.59576912f, kCubic = kLinear * 0.044715f;  // 2 sqrt(2 / pi)

    template <typename T>
    __device__ __forceinline__ static float value(float z) {
        return z * logistic<T>(z * (kLinear + kCubic * (z * z)));
    }
    template <typename T>
    __device__ __forceinline__ static float derivative(float z) {
        const Logistic s = logistic_with_slope<T>(z * (kLinear + kCubic * (z * z)));
        const float square = fminf(z * z, 1e6f);  // the slope is zero long before
        return s.value + z * s.slope * (kLinear + 3.0f * kCubic * square);
    }
};

struct GeluErf {
    static constexpr float kRoot = 0.707106781f, kDensity = 0.398942280f;  // sqrt(1 / 2), 1 / sqrt(2 pi)

    template <typename T>
    __device__ __forceinline__ static float value(float z) {
        return 0.5f * z * (1.0f + erff(kRoot * z));
    }
    template <typename T>
    __device__ __forceinline__ static float derivative(float z) {
        return 0.5f * (1.0f + erff(kRoot * z)) + z * (kDensity * exponential<T>(-0.5f * z * z));
    }
};

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) activation_fwd_kernel(ActivationFwdParams p) {
    using V = Vector<T>;
    constexpr int kUnroll = 4;  // loads on their way at once
    const int64_t vectors = p.rows * p.n / V::kSize, stride = int64_t(gridDim.x) * kThreads * kUnroll;
    const V* x = static_cast<const V*>(p.x);
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kUnroll + threadIdx.x; first < vectors; first += stride) {
        V piece[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * kThreads < vectors) piece[u] = load_global(x + first + u * kThreads);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * kThreads >= vectors) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
                piece[u].at[e] = from_float<T>(F::template value<T>(to_float(piece[u].at[e])));
            }
            store_global(static_cast<V*>(p.out) + first + u * kThreads, piece[u]);
        }
    }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) activation_bwd_kernel(ActivationBwdParams p) {
    using V = Vector<T>;
    constexpr int kUnroll = 2;
    const int64_t vectors = p.rows * p.n / V::kSize, stride = int64_t(gridDim.x) * kThreads * kUnroll;
    const V *x = static_cast<const V*>(p.x), *dout = static_cast<const V*>(p.dout);
    for (int64_t first = int64_t(blockIdx.x) * kThreads * kUnroll + threadIdx.x; first < vectors; first += stride) {
        V piece[kUnroll], upstream[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * kThreads >= vectors) break;
            piece[u] = load_global(x + first + u * kThreads);
            upstream[u] = load_global(dout + first + u * kThreads);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (first + u * kThreads >= vectors) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
                const float z = to_float(piece[u].at[e]);
                piece[u].at[e] = from_float<T>(to_float(upstream[u].at[e]) * F::template derivative<T>(z));
            }
            store_global(static_cast<V*>(p.dx) + first + u * kThreads, piece[u]);
        }
    }
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) bias_activation_fwd_kernel(ActivationFwdParams p) {
    using V = Vector<T>;
    constexpr int kUnroll = 2;
    const int64_t across = p.n / V::kSize, column = int64_t(blockIdx.x) * kWarpSize + threadIdx.x % kWarpSize;
    if (column >= across) return;
    const V bias = load_global(static_cast<const V*>(p.bias) + column);
    const V* x = static_cast<const V*>(p.x) + column;
    V* out = static_cast<V*>(p.out) + column;
    const int64_t step = int64_t(gridDim.y) * kRowsAtOnce;
    for (int64_t row = int64_t(blockIdx.y) * kRowsAtOnce + threadIdx.x / kWarpSize; row < p.rows;
         row += kUnroll * step) {
        V piece[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (row + u * step < p.rows) piece[u] = load_global(x + (row + u * step) * across);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (row + u * step >= p.rows) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
                const float z = to_float(piece[u].at[e]) + to_float(bias.at[e]);
                piece[u].at[e] = from_float<T>(F::template value<T>(z));
            }
            store_global(out + (row + u * step) * across, piece[u]);
        }
    }
}

// Adds up what the block's warps have for their columns, `sum` of each thread, into the partial sum.
template <typename T>
__device__ __forceinline__ void store_partial(const float (&sum)[Vector<T>::kSize], float* partial, int32_t n) {
    using V4 = Vector<float>;
    constexpr int kSize = Vector<T>::kSize, kWidth = kWarpSize * kSize;
    float* scratch = dynamic_shared<float>();
    // Two V4 of a thread by turns, so that the eight threads which share a turn at the banks use all of them.
    const bool swap = kSize > V4::kSize && threadIdx.x % 8 >= 4;
#pragma unroll
    for (int e = 0; e < kSize; e += V4::kSize) {
        V4 four;
#pragma unroll
        for (int i = 0; i < V4::kSize; ++i) four.at[i] = swap ? sum[(e + i + V4::kSize) % kSize] : sum[e + i];
        const int place = threadIdx.x * kSize + (swap ? (e + V4::kSize) % kSize : e);
        store_shared(reinterpret_cast<V4*>(scratch + place), four);
    }
    __syncthreads();
    const int64_t column = int64_t(blockIdx.x) * kWidth + threadIdx.x;
    if (threadIdx.x >= kWidth || column >= n) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kRowsAtOnce; ++w) total += load_shared(scratch + w * kWidth + threadIdx.x);
    store_global(partial + int64_t(blockIdx.y) * n + column, total);
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) bias_activation_bwd_kernel(ActivationBwdParams p) {
    using V = Vector<T>;
    constexpr int kUnroll = 2;
    const int64_t across = p.n / V::kSize, column = int64_t(blockIdx.x) * kWarpSize + threadIdx.x % kWarpSize;
    const int64_t rows = column < across ? p.rows : 0;  // all threads take part in the sum
    const int64_t step = int64_t(gridDim.y) * kRowsAtOnce;
    const V bias = column < across ? load_global(static_cast<const V*>(p.bias) + column) : V();
    const V *x = static_cast<const V*>(p.x) + column, *dout = static_cast<const V*>(p.dout) + column;
    V* dx = static_cast<V*>(p.dx) + column;
    float dbias[V::kSize] = {};
    for (int64_t row = int64_t(blockIdx.y) * kRowsAtOnce + threadIdx.x / kWarpSize; row < rows; row += kUnroll * step) {
        V piece[kUnroll], upstream[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (row + u * step >= rows) break;
            piece[u] = load_global(x + (row + u * step) * across);
            upstream[u] = load_global(dout + (row + u * step) * across);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (row + u * step >= rows) break;
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) {
                const float z = to_float(piece[u].at[e]) + to_float(bias.at[e]);
                const float gradient = to_float(upstream[u].at[e]) * F::template derivative<T>(z);
                dbias[e] += gradient;
                piece[u].at[e] = from_float<T>(gradient);
            }
            store_global(dx + (row + u * step) * across, piece[u]);
        }
    }
    store_partial<T>(dbias, p.partial, p.n);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks that share a tensor of `vectors`, each taking `at_once` of them at a time.
unsigned flat_grid(int64_t vectors, int64_t at_once) {
    return unsigned(std::min<int64_t>(divide_up(vectors, at_once), 2 * kBlocks));
}

template <typename T, typename F>
int launch_fwd(const ActivationFwdParams& p) {
    constexpr int kSize = Vector<T>::kSize;
    if (!p.bias) {
        const unsigned blocks = flat_grid(p.rows * p.n / kSize, 4 * kThreads);
        return launch(activation_fwd_kernel<T, F>, blocks, kThreads, 0, p.stream, p);
    }
    const int64_t columns = divide_up(p.n / kSize, kWarpSize);
    const int64_t parts = std::min(divide_up(p.rows, 2 * kRowsAtOnce), kMaxGridY);
    return launch(bias_activation_fwd_kernel<T, F>, dim3(unsigned(columns), unsigned(parts)), kThreads, 0, p.stream, p);
}

template <typename T, typename F>
int launch_bwd(const ActivationBwdParams& p) {
    constexpr int kSize = Vector<T>::kSize;
    if (!p.bias) {
        if (p.rows == 0) return cudaSuccess;
        const unsigned blocks = flat_grid(p.rows * p.n / kSize, 2 * kThreads);
        return launch(activation_bwd_kernel<T, F>, blocks, kThreads, 0, p.stream, p);
    }
    if (p.parts < 0 || p.parts > kMaxGridY) return cudaErrorInvalidValue;
    if (p.parts > 0) {
        const dim3 grid(unsigned(divide_up(p.n / kSize, kWarpSize)), unsigned(p.parts));
        const int error =
            launch(bias_activation_bwd_kernel<T, F>, grid, kThreads, kThreads * kSize * sizeof(float), p.stream, p);
        if (error != cudaSuccess) return error;
    }
    return launch_column_sums<T>(p.partial, p.dbias, nullptr, p.n, p.parts, p.stream);
}

template <typename G>
int dispatch_activation(Activation activation, G&& g) {
    switch (activation) {
        case Activation::none:
            break;
        case Activation::quick_gelu:
            return g(QuickGelu());
        case Activation::gelu_tanh:
            return g(GeluTanh());
        case Activation::gelu_erf:
            return g(GeluErf());
    }
    return cudaErrorInvalidValue;
}

}  // namespace

int activation_fwd(const ActivationFwdParams& p) {
    if (p.n < 8 || p.n % 8 != 0) return cudaErrorInvalidValue;
    if (p.rows == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return dispatch_dtype(p.dtype, [&](auto t) {
        return dispatch_activation(p.activation, [&](auto f) { return launch_fwd<decltype(t), decltype(f)>(p); });
    });
}

int activation_bwd(const ActivationBwdParams& p) {
    if (p.n < 8 || p.n % 8 != 0) return cudaErrorInvalidValue;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return dispatch_dtype(p.dtype, [&](auto t) {
        return dispatch_activation(p.activation, [&](auto f) { return launch_bwd<decltype(t), decltype(f)>(p); });
    });
}

}  // namespace igpt::cuda
