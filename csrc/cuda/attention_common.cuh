// What the attention kernels share: tiles in shared memory, their loading, products of tiles, the mask, the order of
// the blocks.
//
// Every kernel has the same shape. A block of four warps owns a tile of 64 R rows (queries, or keys), each warp 16 R of
// them, and runs over tiles of 64 rows of the other side. With A the own rows and B the other tile it forms
//   S = A B^T    multiply():   own rows by 64 columns, in registers
//   C += P B     accumulate(): own rows by D, in registers, where P came out of S element by element
// so that nothing but the loaded tiles is ever in shared memory, and every sum has one order.
//
// R = 2 halves the reads of shared memory for a product: an ldmatrix.x4 then feeds four mma instead of two, which take
// longer than it does.
//
// Source of the blocked algorithm: FlashAttention-2 (Dao, 2023; arXiv 2307.08691).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"
#include "ptx.cuh"

namespace igpt::cuda::attention {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kTile = 64;  // rows that a bit mask of 64 bits describes
constexpr float kLn2 = 0.693147180559945309f;
constexpr uint64_t kAll = ~uint64_t(0);

// The launchers of one head dimension: attention_hdim*.cu.
template <int D>
int forward(const AttentionFwdParams& params);
template <int D>
int backward(const AttentionBwdParams& params);
// What the backward begins with: writes `terms`.
template <int D>
int backward_terms(const AttentionBwdParams& params);
// Those for Hopper: attention_fwd_hopper.cu, attention_bwd_hopper.cu. D is 64, 96 or 128; there is no key_mask; TMA
// takes q, k, v and dout.
template <int D>
int forward_hopper(const AttentionFwdParams& params);
template <int D>
int backward_hopper(const AttentionBwdParams& params);

// ---- Bit masks of 64 rows or columns ---------------------------------------------------------------------------

__device__ __forceinline__ uint64_t bits_below(int n) { return n <= 0 ? 0 : n >= 64 ? kAll : (uint64_t(1) << n) - 1; }
__device__ __forceinline__ uint64_t bits_from(int n) { return ~bits_below(n); }
// Bit i: whether begin <= first + i < end.
__device__ __forceinline__ uint64_t bits_between(int first, int begin, int end) {
    return bits_from(begin - first) & bits_below(end - first);
}

// Which keys a batch row shows: those from `start` on that key_mask does not hide.
struct Keys {
    const uint8_t* mask;  // of this batch row, or null
    int start, end;

    __device__ __forceinline__ Keys(const AttentionShape& shape, int batch)
        : mask(shape.key_mask ? shape.key_mask + batch * shape.key_mask_stride : nullptr),
          start(shape.starts ? max(0, min(load_global(shape.starts + batch), shape.t_k)) : 0),
          end(shape.t_k) {}

    // Of keys first .. first + 63. All lanes of the warp take part. Asked for twice a tile, when it is copied and when
    // it is used, rather than kept: registers are what the kernels are short of.
    __device__ __forceinline__ uint64_t bits(int first) const {
        const uint64_t inside = bits_between(first, start, end);
        if (!mask) return inside;
        const int key = first + int(threadIdx.x % kWarpSize);
        const bool low = key < end && load_global(mask + key) != 0;
        const bool high = key + 32 < end && load_global(mask + key + 32) != 0;
        return inside & (__ballot_sync(kFullMask, low) | uint64_t(__ballot_sync(kFullMask, high)) << 32);
    }

    // Moves `start` on to the first key that is shown. Queries before it see none, and are then told by it alone. All
    // lanes of the warp take part.
    __device__ __forceinline__ void skip_hidden() {
        if (!mask) return;
        for (; start < end; start += kTile) {
            if (const uint64_t shown = bits(start)) {
                start += __ffsll(static_cast<long long>(shown)) - 1;
                return;
            }
        }
        start = end;
    }
};

// ---- Tiles -----------------------------------------------------------------------------------------------------

// A tile has rows of D 16-bit elements without gaps, and the 16-byte vectors of a row in an order that depends on the
// row, so that neither the eight rows that ldmatrix takes at a time nor eight lanes that copy share a bank: with 8
// vectors to 128 bytes, vector v of row r is in place v ^ (r % 8) of its eight; where a row is an odd multiple of 64
// bytes (D of 32 and 96), two rows lie in different halves of the banks already and v ^ (r / 2 % 4) of its four does.
template <int D>
struct Tile {
    static constexpr int kLanes = D % 64 == 0 ? 8 : 4;  // vectors that are shuffled among themselves
    static constexpr int kRowBytes = 2 * D;
    static constexpr int kBytes = kTile * kRowBytes;

    __device__ static __forceinline__ uint32_t offset(int row, int vector) {
        const int turn = kLanes == 8 ? row % 8 : row / 2 % 4;
        return uint32_t(row * kRowBytes + (vector ^ turn) * 16);
    }
    // From an address of vector 0 or 1 of a row to that of the vector 2k further.
    __device__ static __forceinline__ uint32_t column(uint32_t address, int k) {
        return (address ^ uint32_t(k % (kLanes / 2) * 32)) + uint32_t(k / (kLanes / 2) * kLanes * 16);
    }
    // Where a lane points ldmatrix at for 16 rows and 16 columns: for an A operand, and for a B operand whose rows are
    // the sum's index (.trans) ...
    __device__ static __forceinline__ uint32_t straight() {
        const int lane = threadIdx.x % kWarpSize;
        return offset(lane % 16, lane / 16);
    }
    // ... and for a B operand whose rows are the result's columns.
    __device__ static __forceinline__ uint32_t crossed() {
        const int lane = threadIdx.x % kWarpSize;
        return offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
};

// A thread's part in copying tiles of one tensor.
template <typename T, int D>
struct Loader {
    using L = Tile<D>;
    static constexpr int kRowsAtOnce = kThreads / L::kLanes;

    const T* source;   // this thread's vector of row 0
    int64_t position;  // elements from a row to the next
    int row;
    uint32_t offset;

    __device__ __forceinline__ Loader(const AttentionTensor& tensor, int batch, int head)
        : position(tensor.position), row(threadIdx.x / L::kLanes) {
        const int vector = threadIdx.x % L::kLanes;
        source = static_cast<const T*>(tensor.data) + batch * tensor.batch + head * tensor.head + row * position +
                 vector * 8;
        offset = L::offset(row, vector);
    }

    // Begins to copy rows first .. first + 63; those without a bit become zeros and are not read.
    __device__ __forceinline__ void load(uint32_t tile, int first, uint64_t bits) const {
        const T* from = source + first * position;
        tile += offset;
        if (bits == kAll) {
#pragma unroll
            for (int i = 0; i < kTile / kRowsAtOnce; ++i) copy(tile + i * kBytesAtOnce, from + i * step(), 16);
        } else {
            bits >>= row;
#pragma unroll 1  // the few tiles at an edge shall not cost the others registers
            for (int i = 0; i < kTile / kRowsAtOnce; ++i, bits >>= kRowsAtOnce) {
                copy(tile + i * kBytesAtOnce, from + i * step(), bits & 1 ? 16 : 0);
            }
        }
    }

  private:
    static constexpr int kBytesAtOnce = kRowsAtOnce * L::kRowBytes;

    __device__ __forceinline__ int64_t step() const { return kRowsAtOnce * position; }
    __device__ __forceinline__ static void copy(uint32_t to, const T* from, int bytes) {
#pragma unroll
        for (int j = 0; j < D / 8 / L::kLanes; ++j) {
            ptx::cp_async16(to + j * L::kLanes * 16, from + j * L::kLanes * 8, bytes);
        }
    }
};

// ---- Products --------------------------------------------------------------------------------------------------

// The warp's own 16 R rows as an A operand: kept in registers, or read again for every product.
template <int D, int R, bool kHeld>
struct OwnRows {
    uint32_t address;
    uint32_t held[kHeld ? D / 16 : 1][R][4];

    // `rows`: the first of the warp's rows in its tile.
    __device__ __forceinline__ explicit OwnRows(uint32_t rows) : address(rows + Tile<D>::straight()) {}
    __device__ __forceinline__ void load() {
        if constexpr (kHeld) {
#pragma unroll
            for (int k = 0; k < D / 16; ++k) read(held[k], k);
        }
    }
    __device__ __forceinline__ void get(uint32_t (&a)[R][4], int k) const {
        if constexpr (kHeld) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[r][i] = held[k][r][i];
            }
        } else {
            read(a, k);
        }
    }

  private:
    __device__ __forceinline__ void read(uint32_t (&a)[R][4], int k) const {
#pragma unroll
        for (int r = 0; r < R; ++r) ptx::ldmatrix_x4(a[r], Tile<D>::column(address, k) + r * 16 * Tile<D>::kRowBytes);
    }
};

// f(r, i) for a lane's rows: half i of fragment r (see ptx.cuh).
template <int R, typename F>
__device__ __forceinline__ void each_row(F&& f) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) f(r, i);
    }
}

// f(r, n, e) for a lane's elements of 8 N columns: in half e / 2 of fragment r.
template <int R, int N, typename F>
__device__ __forceinline__ void each_element(F&& f) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) f(r, n, e);
        }
    }
}

template <int R, int N>
__device__ __forceinline__ void clear(float (&x)[R][N][4]) {
    each_element<R, N>([&](int r, int n, int e) { x[r][n][e] = 0.0f; });
}

// s += A B^T: s holds the 8 N columns that are rows of B; `b`: where `crossed` is in the first of them.
template <typename T, int D, int R, int N, bool kHeld>
__device__ __forceinline__ void multiply(float (&s)[R][N][4], const OwnRows<D, R, kHeld>& a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t left[R][4];
        a.get(left, k);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            uint32_t right[4];
            ptx::ldmatrix_x4(right, Tile<D>::column(b, k) + n * 16 * Tile<D>::kRowBytes);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                ptx::mma_m16n8k16<T>(s[r][2 * n], left[r], right[0], right[1]);
                ptx::mma_m16n8k16<T>(s[r][2 * n + 1], left[r], right[2], right[3]);
            }
        }
    }
}

// c += P B: P, rounded to T, has 8 N columns, which are rows of B; `b`: where `straight` is in the first of them.
template <typename T, int D, int R, int N>
__device__ __forceinline__ void accumulate(float (&c)[R][D / 8][4], const float (&p)[R][N][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
        uint32_t left[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &p[r][2 * k + i / 2][i % 2 * 2];
                left[r][i] = ptx::pack2<T>(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t right[4];
            ptx::ldmatrix_x4_trans(right, Tile<D>::column(b, d) + k * 16 * Tile<D>::kRowBytes);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                ptx::mma_m16n8k16<T>(c[r][2 * d], left[r], right[0], right[1]);
                ptx::mma_m16n8k16<T>(c[r][2 * d + 1], left[r], right[2], right[3]);
            }
        }
    }
}

// A lane's row (r, i) among the warp's.
__device__ __forceinline__ int own_row(int r, int i) { return 16 * r + 8 * i + int(threadIdx.x % kWarpSize / 4); }

// In row (r, i) of a lane: -infinity where the column has no bit.
template <int R, int N>
__device__ __forceinline__ void hide(float (&s)[R][N][4], int r, int i, uint64_t bits) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint32_t word = uint32_t(bits >> (n / 4 * 32)) >> (2 * (threadIdx.x % 4));
        if (!(word >> (n % 4 * 8) & 1)) s[r][n][2 * i] = -INFINITY;
        if (!(word >> (n % 4 * 8) & 2)) s[r][n][2 * i + 1] = -INFINITY;
    }
}

// Writes c, times `factor` of each row, to the rows `first` + 0 .. 16 R - 1 of a tensor that are below `end`. A factor
// of 0 gives zeros, whatever c has. `rows`: the warp's own rows of a tile, which are read no more; through them the
// elements that lanes hold in pairs become vectors of 16 bytes, whole sectors of memory.
template <typename T, int D, int R>
__device__ __forceinline__ void store_rows(const float (&c)[R][D / 8][4], const float (&factor)[R][2],
                                           unsigned char* rows, T* tensor, int64_t position, int first, int end) {
    using L = Tile<D>;
    using V = Vector<T>;
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();  // all lanes have read their part of the rows
    each_row<R>([&](int r, int i) {
        const float f = factor[r][i];
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            const float lo = f == 0.0f ? 0.0f : c[r][d][2 * i] * f, hi = f == 0.0f ? 0.0f : c[r][d][2 * i + 1] * f;
            uint32_t* to = reinterpret_cast<uint32_t*>(rows + L::offset(own_row(r, i), d)) + lane % 4;
            store_shared(to, ptx::pack2<T>(lo, hi));
        }
    });
    __syncwarp();  // and have written the result
    constexpr int kRowsAtOnce = kWarpSize / L::kLanes;
#pragma unroll
    for (int i = 0; i < 16 * R / kRowsAtOnce; ++i) {
        const int row = i * kRowsAtOnce + lane / L::kLanes;
        T* to = tensor + (first + row) * position;
#pragma unroll
        for (int j = 0; j < D / 8 / L::kLanes; ++j) {
            const int vector = j * L::kLanes + lane % L::kLanes;
            const V v = load_shared(reinterpret_cast<const V*>(rows + L::offset(row, vector)));
            if (first + row < end) store_global(reinterpret_cast<V*>(to + 8 * vector), v);
        }
    }
}

template <typename T>
__device__ __forceinline__ T* head_of(const AttentionTensor& tensor, int batch, int head) {
    return static_cast<T*>(tensor.data) + batch * tensor.batch + head * tensor.head;
}

// ---- The order of the blocks -----------------------------------------------------------------------------------

// The (batch, head) pairs are taken in groups whose tensors fit into half of an H100's L2, so that the tiles of a pair
// read them from there; within a group a tile's number rises slowest, so that what is heaviest begins first. Groups are
// of one size, or nearly: a small last one would leave multiprocessors idle beside its heaviest tiles.
struct Order {
    uint32_t pairs, tiles, group;
};
struct Block {
    int tile, batch, head;
};

// bytes: what the tiles of a pair share.
inline Order make_order(const AttentionShape& shape, int64_t tiles, int64_t bytes) {
    constexpr int64_t kCache = 24 << 20;
    const int64_t pairs = int64_t(shape.batch) * shape.heads;
    const int64_t fitting = std::max(int64_t(1), kCache / std::max(int64_t(1), bytes));
    const int64_t groups = std::max(int64_t(1), (pairs + fitting - 1) / fitting);
    return {uint32_t(pairs), uint32_t(tiles), uint32_t((pairs + groups - 1) / groups)};
}
inline int64_t blocks(const Order& order) { return int64_t(order.pairs) * order.tiles; }

__device__ __forceinline__ Block find_block(const Order& order, int heads) {
    const uint32_t section = blockIdx.x / (order.tiles * order.group), first = section * order.group;
    const uint32_t size = min(order.group, order.pairs - first);
    const uint32_t within = blockIdx.x - first * order.tiles;
    const uint32_t pair = first + within % size;
    return {int(within / size), int(pair / uint32_t(heads)), int(pair % uint32_t(heads))};
}

inline int64_t tiles_of(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }

// Launches f's kernel, f(T()) for the C++ type of the elements.
template <typename F>
int dispatch_half(DType dtype, F&& f) {
    if (dtype == DType::bf16) return f(__nv_bfloat16());
    if (dtype == DType::f16) return f(__half());
    return cudaErrorInvalidValue;
}

// Nothing for an empty grid; an error for one that is too large.
template <typename Args>
cudaError_t launch_blocks(void (*kernel)(Args), int64_t count, size_t shared_bytes, void* stream, const Args& args) {
    if (count == 0) return cudaSuccess;
    if (count > INT32_MAX) return cudaErrorInvalidValue;
    return launch(kernel, dim3(uint32_t(count)), dim3(kThreads), shared_bytes, stream, args);
}

}  // namespace igpt::cuda::attention
