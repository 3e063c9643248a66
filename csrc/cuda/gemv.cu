// A linear layer for up to 8 rows, with the norm before it and what comes after it in one kernel.
//
//   out = activation(s * (x * norm_weight) weight + bias) + residual,  s = rsqrt(mean(x^2) + eps) of each row
//   (without norm_weight: s = 1 and x alone). The norm is not rounded: all is in float32 and out is rounded once.
//
//   x (rows, n_in), bias (n_out,), norm_weight (n_in,), residual and out (rows, n_out) contiguous; weight (n_in, n_out)
//   with n_out contiguous (transformers' Conv1D), or transposed, (n_out, n_in) with n_in contiguous (nn.Linear). All of
//   one dtype, bfloat16 or float16, n_in and n_out multiples of 8.
//
//   Launch: 8 warps for a tile of columns: 16 or 32 of Conv1D's, 16 bytes of a row of the weight for a lane; 4 to 32 of
//   Linear's, 4 for a warp, whose lanes have 8 of n_in each. n_in is divided among the warps so that small layers, too,
//   occupy the GPU. A weight is loaded once, for all rows; the next loads are on their way while the last ones are
//   multiplied, and the first ones before grid_dependency_wait: weight and bias must not come from the launch before
//   (as long as launches are plain ones, all wait for it anyway). x * norm_weight is in shared memory in float32, up to
//   32 KB at a time; since s is a factor of the whole sum, the squares are added up on the way. Sums are put together
//   by shuffles that leave each lane a share of them, then in shared memory in the warps' order.
//
//   Bound by bytes: n_in * n_out elements of the weight.
//
// Source: openai/image-gpt src/model.py conv1d and norm; activations: reference.py.
#include <cmath>
#include <type_traits>

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"
#include "ptx.cuh"

namespace igpt::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kSlabFloats = 8192;  // of x in shared memory at a time

// Adds up the kN values of the lanes that differ in the bits from kLowest on. Each of them ends with an equal share of
// the sums, in values[0 ..], the first of which has number `first`; with more lanes than values some have the same one.
template <int kN, int kLowest>
struct Scatter {
    static constexpr int kShared = 32 / kLowest;  // lanes
    static constexpr int kLeft = kN > kShared ? kN / kShared : 1;
    int first = 0;
    bool alone = true;  // no lane below this one has the same share

    __device__ __forceinline__ explicit Scatter(float (&values)[kN]) { add<kN, 16>(values); }

  private:
    template <int kCount, int kBit>
    __device__ __forceinline__ void add(float (&values)[kN]) {
        const bool upper = threadIdx.x & kBit;
        constexpr int kHalf = kCount / 2;
        if constexpr (kCount > 1) {
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
                const float keep = upper ? values[i + kHalf] : values[i], give = upper ? values[i] : values[i + kHalf];
                values[i] = keep + __shfl_xor_sync(kFullMask, give, kBit);
            }
            first += upper ? kHalf : 0;
        } else {
            values[0] += __shfl_xor_sync(kFullMask, values[0], kBit);
            alone &= !upper;
        }
        if constexpr (kBit > kLowest) add<(kCount > 1 ? kHalf : 1), kBit / 2>(values);
    }
};

// The two layouts of a weight. Each has, for a thread,
//   kUnroll vectors of the weight at a time (Batch), whose first element of n_in is k;
//   kN sums: of row i / kColumns of x and the thread's column i % kColumns;
//   a place for x * norm_weight in shared memory, where it finds its own without bank conflicts;
//   a tile of columns for the block, kWide of them for a warp.

// n_out contiguous. kLanes lanes have a row of the tile, kSteps rows are side by side.
template <typename T_, int kRows_, int kLanes_>
struct Conv {
    using T = T_;
    using V = Vector<T>;
    static constexpr int kRows = kRows_, kLanes = kLanes_, kColumns = V::kSize;
    static constexpr int kTile = kLanes * kColumns, kWide = kTile, kSteps = kThreads / kLanes;
    static constexpr int kUnroll = kRows <= 2 ? 8 : 4;
    static constexpr int kN = kRows * kColumns, kLowest = kLanes;
    static constexpr int kSlab = kSlabFloats / kRows, kSlabShared = kSlabFloats;
    static_assert(kSlab % (kSteps * kUnroll) == 0);

    V batch[kUnroll];

    __device__ static int tile(const GemvParams&) { return kTile; }
    __device__ static int step(const GemvParams&) { return kSteps * kUnroll; }
    __device__ static int first(const GemvParams&) { return int(threadIdx.x) / kLanes; }
    // The thread's first column in its tile.
    __device__ static int column(const GemvParams&) { return int(threadIdx.x) % kLanes * kColumns; }
    // The warps that share the columns of this one, and its number among them.
    __device__ static int splits(const GemvParams&) { return kWarps; }

    __device__ __forceinline__ void load(const GemvParams& p, int column, int k) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int row = k + u * kSteps;
            if (row >= p.n_in || column >= p.n_out) continue;
            const T* address = static_cast<const T*>(p.weight) + row * p.ld + column;
            batch[u] = load_global(reinterpret_cast<const V*>(address));
        }
    }

    // x[k][row]. A thread writes eight k of a row, beside threads with other eights: among its eight they are exchanged
    // so that these meet in different banks. One row's are written as vectors.
    __device__ static int place(int k) { return (kRows == 1 ? k : k ^ (k / 8 % 8)) * kRows; }

    __device__ static void store_x(float* x, int k, int row, const float (&values)[8]) {
        if constexpr (kRows == 1) {
            const bool swap = k / 8 & 4;  // a quarter of a warp has 8 eights: the halves of the last ones first
            const float4 low = make_float4(values[0], values[1], values[2], values[3]);
            const float4 high = make_float4(values[4], values[5], values[6], values[7]);
            store_shared(reinterpret_cast<float4*>(x + k + (swap ? 4 : 0)), swap ? high : low);
            store_shared(reinterpret_cast<float4*>(x + k + (swap ? 0 : 4)), swap ? low : high);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) store_shared(x + place(k + i) + row, values[i]);
        }
    }

    __device__ __forceinline__ void multiply(const GemvParams& p, float (&sums)[kN], const float* x, int k,
                                             int in_slab) {
        struct alignas(kRows >= 4 ? 16 : 4 * kRows) Part {
            float at[kRows >= 4 ? 4 : kRows];
        };
        constexpr int kPart = sizeof(Part) / 4;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (k + u * kSteps >= p.n_in) break;
            float w[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) w[c] = to_float(batch[u].at[c]);
#pragma unroll
            for (int row = 0; row < kRows; row += kPart) {
                const float* address = x + place(in_slab + u * kSteps) + row;
                const Part part = load_shared(reinterpret_cast<const Part*>(address));
#pragma unroll
                for (int i = 0; i < kPart; ++i) {
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) sums[(row + i) * kColumns + c] += w[c] * part.at[i];
                }
            }
        }
    }
};

// n_in contiguous. A warp has kColumns columns and every splits-th 256 of n_in.
template <typename T_, int kRows_>
struct Linear {
    using T = T_;
    using V = Vector<T>;
    static constexpr int kRows = kRows_, kColumns = 4;
    static constexpr int kSpan = kWarpSize * V::kSize;
    static constexpr int kN = kRows * kColumns, kLowest = 1;
    static constexpr int kSlab = kSlabFloats / kRows;
    // Of a row of x: the first halves of its eights, then the second ones, so that lanes read side by side; and so much
    // more that the lanes that write, of all rows and several eights, do not meet.
    static constexpr int kPitch = kSlab + 32 / kRows, kSlabShared = kRows * kPitch;
    static constexpr int kTile = kWarps * kColumns, kWide = kColumns;  // kTile: with all of n_in for each warp

    V batch[kColumns];

    __device__ static int tile(const GemvParams& p) { return kTile / p.splits; }
    __device__ static int step(const GemvParams& p) { return kSpan * p.splits; }
    __device__ static int first(const GemvParams& p) {
        return int(threadIdx.x) / kWarpSize % p.splits * kSpan + int(threadIdx.x) % kWarpSize * V::kSize;
    }
    __device__ static int column(const GemvParams& p) { return int(threadIdx.x) / kWarpSize / p.splits * kColumns; }
    __device__ static int splits(const GemvParams& p) { return p.splits; }

    __device__ __forceinline__ void load(const GemvParams& p, int column, int k) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            if (k >= p.n_in || column >= p.n_out) continue;  // n_out is a multiple of 8
            const T* address = static_cast<const T*>(p.weight) + (column + c) * p.ld + k;
            batch[c] = load_global(reinterpret_cast<const V*>(address));
        }
    }

    __device__ static void store_x(float* x, int k, int row, const float (&values)[8]) {
        float* half = x + row * kPitch + k / 2;
        store_shared(reinterpret_cast<float4*>(half), make_float4(values[0], values[1], values[2], values[3]));
        store_shared(reinterpret_cast<float4*>(half + kSlab / 2),
                     make_float4(values[4], values[5], values[6], values[7]));
    }

    __device__ __forceinline__ void multiply(const GemvParams& p, float (&sums)[kN], const float* x, int k,
                                             int in_slab) {
        if (k >= p.n_in) return;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float* half = x + row * kPitch + in_slab / 2;
            const float4 low = load_shared(reinterpret_cast<const float4*>(half));
            const float4 high = load_shared(reinterpret_cast<const float4*>(half + kSlab / 2));
            const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[row * kColumns + c] += to_float(batch[c].at[i]) * part[i];
            }
        }
    }
};

// What stands in shared memory, one after another.
template <typename L>
struct Shared {
    static constexpr int kSums = kWarps * L::kRows * L::kWide;
    static constexpr size_t kBytes = (L::kSlabShared + kSums + kWarps * L::kRows) * sizeof(float);
    float* x = dynamic_shared<float>();
    float* sums = x + L::kSlabShared;  // [warp][row][column]
    float* squares = sums + kSums;     // [warp][row]
};

// Puts x * norm_weight from `slab` on into shared memory, and adds up the squares of x: each thread those of the row
// with its number modulo kRows. Rows that are not there count as zeros.
template <typename L>
__device__ __forceinline__ void fill_x(const GemvParams& p, float* x, int slab, float& square) {
    using V = Vector<typename L::T>;
    const int end = p.n_in - slab < L::kSlab ? p.n_in - slab : L::kSlab;
    const int row = int(threadIdx.x) % L::kRows;
    for (int k = int(threadIdx.x) / L::kRows * 8; k < end; k += kThreads / L::kRows * 8) {
        float values[8] = {};
        if (row < p.rows) {
            const auto* from = static_cast<const typename L::T*>(p.x) + int64_t(row) * p.n_in + slab + k;
            const V vector = load_global(reinterpret_cast<const V*>(from));
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                values[i] = to_float(vector.at[i]);
                square += values[i] * values[i];
            }
        }
        if (p.norm_weight) {
            const auto* from = static_cast<const typename L::T*>(p.norm_weight) + slab + k;
            const V vector = load_global(reinterpret_cast<const V*>(from));
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] *= to_float(vector.at[i]);
        }
        L::store_x(x, k, row, values);
    }
}

__device__ __forceinline__ float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::quick_gelu:
            return x / (1.0f + __expf(-1.702f * x));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
        case Activation::gelu_erf:
            return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
    }
    return x;
}

// The output that a thread writes, if any, and what is added to it: asked for early, since it takes its time.
template <typename L>
struct Output {
    using T = typename L::T;
    int row, in_tile;
    int64_t at;
    bool there;
    float bias = 0.0f, residual = 0.0f;

    __device__ __forceinline__ explicit Output(const GemvParams& p) {
        static_assert(L::kTile * L::kRows <= kThreads);
        const int tile = L::tile(p), column = int(blockIdx.x) * tile + int(threadIdx.x) % tile;
        row = int(threadIdx.x) / tile;
        in_tile = int(threadIdx.x) % tile;
        at = int64_t(row) * p.n_out + column;
        there = row < p.rows && column < p.n_out;
        if (there && p.bias) bias = to_float(load_global(static_cast<const T*>(p.bias) + column));
    }
    // Behind the wait for the launch before.
    __device__ __forceinline__ void load_residual(const GemvParams& p) {
        if (there && p.residual) residual = to_float(load_global(static_cast<const T*>(p.residual) + at));
    }

    // Adds the warps' shares up, and does to the sum what comes after the product.
    __device__ __forceinline__ void finish(const GemvParams& p, const Shared<L>& shared) const {
        if (!there) return;
        const int splits = L::splits(p), warp = in_tile / L::kWide * splits;
        float y = 0.0f;
        for (int s = 0; s < splits; ++s) {
            y += load_shared(shared.sums + ((warp + s) * L::kRows + row) * L::kWide + in_tile % L::kWide);
        }
        if (p.norm_weight) {
            float square = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) square += load_shared(shared.squares + w * L::kRows + row);
            y *= rsqrtf(square / float(p.n_in) + p.eps);
        }
        y = activate(p.activation, y + bias) + residual;
        store_global(static_cast<T*>(p.out) + at, from_float<T>(y));
    }
};

template <typename L>
__global__ void __launch_bounds__(kThreads, L::kRows == 8 ? 1 : 2) gemv_kernel(GemvParams p) {
    const Shared<L> shared;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int column = int(blockIdx.x) * L::tile(p) + L::column(p), first = L::first(p), step = L::step(p);
    L now, next;
    now.load(p, column, first);  // the weight does not come from the launch before
    Output<L> output(p);
    ptx::grid_dependency_wait();
    output.load_residual(p);
    float sums[L::kN] = {}, square = 0.0f;
    for (int slab = 0; slab < p.n_in; slab += L::kSlab) {
        if (slab > 0) __syncthreads();  // the one before is still being read
        fill_x<L>(p, shared.x, slab, square);
        __syncthreads();
        for (int in_slab = first; in_slab - first < L::kSlab && slab + in_slab - first < p.n_in; in_slab += step) {
            next.load(p, column, slab + in_slab + step);
            if (column < p.n_out) now.multiply(p, sums, shared.x, slab + in_slab, in_slab);
            now = next;
        }
    }
    ptx::grid_dependency_launch();
    const Scatter<L::kN, L::kLowest> scatter(sums);
#pragma unroll
    for (int bit = L::kRows; bit < kWarpSize; bit *= 2) square += __shfl_xor_sync(kFullMask, square, bit);
    if (lane < L::kRows) store_shared(shared.squares + warp * L::kRows + lane, square);
    const int in_warp = L::column(p) % L::kWide;
#pragma unroll
    for (int i = 0; i < scatter.kLeft; ++i) {
        const int row = (scatter.first + i) / L::kColumns, c = (scatter.first + i) % L::kColumns;
        if (scatter.alone) store_shared(shared.sums + (warp * L::kRows + row) * L::kWide + in_warp + c, sums[i]);
    }
    __syncthreads();
    output.finish(p, shared);
}

// About one block for every multiprocessor of an H100.
constexpr int kMultiprocessors = 132;

template <typename L>
int launch_layout(const GemvParams& p, int tile) {
    const unsigned blocks = unsigned((p.n_out + tile - 1) / tile);
    return launch(gemv_kernel<L>, blocks, kThreads, Shared<L>::kBytes, p.stream, p);
}

template <typename T, int kRows>
int launch_rows(GemvParams p) {
    if (!p.transposed) {
        if (p.n_out >= kMultiprocessors * 31) return launch_layout<Conv<T, kRows, 4>>(p, 32);
        return launch_layout<Conv<T, kRows, 2>>(p, 16);
    }
    using L = Linear<T, kRows>;
    p.splits = 1;
    while (p.splits < kWarps && p.n_out * p.splits < kMultiprocessors * L::kTile && L::kSpan * p.splits < p.n_in &&
           L::kSpan * p.splits * 2 <= L::kSlab) {
        p.splits *= 2;
    }
    return launch_layout<L>(p, L::kTile / p.splits);
}

template <typename T>
int launch_dtype(const GemvParams& p) {
    if (p.rows <= 1) return launch_rows<T, 1>(p);
    if (p.rows <= 2) return launch_rows<T, 2>(p);
    if (p.rows <= 4) return launch_rows<T, 4>(p);
    return launch_rows<T, 8>(p);
}

}  // namespace

int gemv(const GemvParams& p) {
    if (p.rows == 0) return cudaSuccess;
    if (p.rows < 0 || p.rows > 8 || p.n_in < 8 || p.n_in % 8 != 0 || p.n_out < 8 || p.n_out % 8 != 0) {
        return cudaErrorInvalidValue;
    }
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    if (p.dtype == DType::bf16) return launch_dtype<__nv_bfloat16>(p);
    if (p.dtype == DType::f16) return launch_dtype<__half>(p);
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
