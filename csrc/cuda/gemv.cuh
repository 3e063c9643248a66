// What gemv for up to 8 rows (gemv.cu) and for up to 64 (gemv_rows.cu) share: a block's 64 columns of the weight,
// straight from memory into registers as tensor cores want them, and what comes after the product.
#pragma once

#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"
#include "ptx.cuh"

namespace igpt::cuda {

constexpr int kColumns = 64;  // of a block
constexpr int kChunk = 32;    // of n_in, of a warp at a time
constexpr int kSplits = 8;    // blocks of a cluster, at most
// That clusters can count on. An H100 has 132 multiprocessors, but a cluster stays in one of 8 groups of up to 18, and
// some may be left over in each: 256 blocks in clusters of 4 or 8, two for a multiprocessor, take two waves, 216 one.
constexpr int kMultiprocessors = 8 * 14;
constexpr int kPitch = kColumns + 2;  // of a row of sums: float2, and few bank conflicts

struct alignas(16) Words {
    uint32_t at[4];
};

// Where a lane's part of the warp's next chunk is, kStep behind the last: its own eight of n_in begin at k. Of Conv1D
// it has the columns from 8 g of the tile on, with g = lane / 4, of Linear column g of every eight.
template <typename T, bool kTransposed, int kStep>
struct Cursor {
    const T* at;
    int64_t ld;
    int k, end, columns;  // columns: of the tile that are there, a multiple of 8

    __device__ __forceinline__ Cursor(const GemvParams& p, int tile, int begin, int end_) : ld(p.ld), end(end_) {
        const int g = int(threadIdx.x) % kWarpSize / 4;
        k = begin + int(threadIdx.x) % 4 * 8;
        columns = p.n_out - tile;
        at = static_cast<const T*>(p.weight);
        // A lane whose columns are not there has others, and nobody looks at its sums.
        at += kTransposed ? (tile + g) * ld + k : k * ld + tile + (8 * g < columns ? 8 * g : 0);
    }
    __device__ __forceinline__ void advance() {
        k += kStep;
        at += kTransposed ? kStep : kStep * ld;
    }
};

// What a lane has of 32 of n_in by 64 columns of the weight.
template <typename T, bool kTransposed>
struct Chunk {
    // Conv1D: vector i is eight columns at the lane's k number i. Linear: its eight k at column 8 i + g.
    Words vectors[8];

    template <int kStep>
    __device__ __forceinline__ void load(Cursor<T, kTransposed, kStep>& from) {
        const T* at = from.at;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool there = from.k < from.end && (!kTransposed || 8 * i < from.columns);
            vectors[i] = there ? ptx::load_once(reinterpret_cast<const Words*>(at)) : Words{};
            at += kTransposed ? 8 * from.ld : from.ld;
        }
        from.advance();
    }

    // mma's A of 16 columns, number m, and the lane's own k from 4 j on. Its row g is column_of(m, 0, g), its row g + 8
    // column_of(m, 1, g).
    __device__ __forceinline__ void fragment(uint32_t (&a)[4], int m, int j) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kTransposed) {
                a[i] = vectors[2 * m + i % 2].at[2 * j + i / 2];
            } else {  // two k, one column: halves of two vectors
                const Words &low = vectors[4 * j + i / 2 * 2], &high = vectors[4 * j + i / 2 * 2 + 1];
                a[i] = __byte_perm(low.at[m], high.at[m], i % 2 == 0 ? 0x5410 : 0x7632);
            }
        }
    }
    __device__ static int column_of(int m, int half, int g) {
        return kTransposed ? 16 * m + 8 * half + g : 8 * g + 2 * m + half;
    }
};

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const void* tensor, int64_t at) {
    return load_global(reinterpret_cast<const Vector<T>*>(static_cast<const T*>(tensor) + at));
}

__device__ __forceinline__ float activate(Activation activation, float x) {
    switch (activation) {
        case Activation::none:
            break;
        case Activation::quick_gelu:
            return x / (1.0f + __expf(-1.702f * x));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
        case Activation::gelu_erf:
            return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
    }
    return x;
}

inline int divide_up(int a, int b) { return a / b + (a % b != 0); }

// Where the part of n_in begins that a block has, p.share at most: whole chunks, and some for each.
__device__ __forceinline__ int begin_of(const GemvParams& p, int split) {
    return (p.n_in + kChunk - 1) / kChunk * split / p.splits * kChunk;
}

// Blocks of `warps` that share n_in, of which a multiprocessor has `at_a_time`: as many as leave a warp the fewest
// chunks while all blocks run in one wave, and no more: a power of two, which fills the groups of multiprocessors.
inline int choose_splits(void (*kernel)(GemvParams), int tiles, int chunks, int warps, int at_a_time) {
    const int most = std::min(kSplits, kMultiprocessors * at_a_time / tiles);
    int splits = 1;
    if (most < 2 || !has_clusters(kernel)) return splits;
    for (int more = 2; more <= most; more *= 2) {
        if (divide_up(chunks, more * warps) < divide_up(chunks, splits * warps)) splits = more;
    }
    return splits;
}

// 9 to 64 rows; the device is the current one.
int gemv_rows(const GemvParams& params);

}  // namespace igpt::cuda
