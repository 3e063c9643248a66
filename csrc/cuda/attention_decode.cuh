// What the kernels of attention_decode share: the softmax of a part of the keys, and where parts wait to be put
// together.
#pragma once

#include <cmath>
#include <cstdint>

#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"
#include "ptx.cuh"

namespace igpt::cuda::decode {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kKeys = 64;                    // a block's at a time; parts of a cache are multiples of it
constexpr int kMostClusters = 8;             // parts that the blocks of a cluster put together
constexpr int kMostKeys = INT32_MAX - 1024;  // so that their numbers and what is added to them are ints

// A part's softmax: the largest score m (times log2 e), and the sum l of 2^(score - m). m is -infinity where the part
// has no visible key.
struct alignas(8) Stats {
    float m, l;
};

// What is subtracted from scores for m: nothing where there is no key, since -inf - -inf is NaN.
__device__ __forceinline__ float reference_of(float m) { return m == -INFINITY ? 0.0f : m; }

// What a part's sums are worth beside the largest score of all.
__device__ __forceinline__ float weight_of(float m, float all) { return ptx::exp2_approx(m - reference_of(all)); }

// How many parts a (row, head) has.
__host__ __device__ __forceinline__ int slots_of(const AttentionDecodeParams& p) { return p.prefix_splits + p.splits; }

// The (row, head)'s parts in AttentionDecodeParams.partial: sums (rows, heads, slots, dim), then Stats (rows, heads,
// slots). The prefix's slots come first.
struct Slots {
    float* sums;
    Stats* stats;
    int dim;

    __device__ __forceinline__ Slots(const AttentionDecodeParams& p, int64_t row, int64_t head) : dim(p.dim) {
        const int64_t first = (row * p.heads + head) * slots_of(p);
        sums = p.partial + first * dim;
        stats = reinterpret_cast<Stats*>(p.partial + p.rows * p.heads * slots_of(p) * dim) + first;
    }
    __device__ __forceinline__ float* at(int slot) const { return sums + int64_t(slot) * dim; }
};

// The keys of a row's own cache: those before the new one that it sees, in parts of `chunk`; the last part has the new
// one as well. Lengths are of the moment, so that all blocks have work at every position.
struct Own {
    int position, start;
    int first, chunk, parts;
    bool valid;    // the position is one of the cache's
    bool sees_it;  // the new key is visible

    __device__ __forceinline__ Own(const AttentionDecodeParams& p, int64_t row) {
        position = ptx::load_past_l1(p.position + row * p.position_step);
        start = p.starts ? ptx::load_past_l1(p.starts + row) : 0;
        valid = position >= 0 && position < p.positions;
        const int64_t own_start = start - p.prefix;
        sees_it = own_start <= position;
        first = own_start <= 0 ? 0 : sees_it ? int(own_start) : position;
        const int count = valid ? position - first : 0;
        const int share = (count + p.splits - 1) / p.splits;
        chunk = share <= kKeys ? kKeys : (share + kKeys - 1) / kKeys * kKeys;
        parts = count == 0 ? 1 : (count + chunk - 1) / chunk;
    }
};

// Writes element i of a row's output.
template <typename T>
__device__ __forceinline__ void store_out(const AttentionDecodeParams& p, int64_t row_head, int i, bool valid,
                                          float sum, float l) {
    const float value = !valid ? NAN : l == 0.0f ? 0.0f : sum / l;
    store_global(static_cast<T*>(p.out) + row_head * p.dim + i, from_float<T>(value));
}

// attention_decode_prefix.cu: fills the prefix's slots.
int launch_prefix(const AttentionDecodeParams& p);

// attention_decode_merge.cu: puts the slots together.
int launch_merge(const AttentionDecodeParams& p);

// attention_decode_ring.cuh: for the cache, by blocks that stay; puts together what it can of the slots.
bool has_ring();  // whether the current device runs them
int launch_ring_bf16(const AttentionDecodeParams& p);
int launch_ring_f16(const AttentionDecodeParams& p);

}  // namespace igpt::cuda::decode
