// attention_decode through a ring of asynchronous copies: what attention_decode.cu computes, for caches of 16 bits and
// of e4m3, by blocks that stay. For sm_90 and later: below it every lane would have to ask for its own 16 bytes, as it
// does straight into registers in attention_decode.cu, which has them sooner and takes no shared memory.
//
//   A work item is a part of a (row, head)'s keys: (row * heads + head) * splits + split. As many blocks as run at a
//   time take items blockIdx.x, blockIdx.x + gridDim.x, ... Of an item's keys its block's 4 warps take tiles of 16 (8
//   of 96 or 128 dimensions) by turns. A warp has a ring of stages in shared memory for itself: a tile's keys and
//   values, which are contiguous. It waits for a stage, takes its tile in, and asks for the tile that comes a ring
//   later into the same place: of this item, the next one, or the one after. So loads do not stop where an item ends,
//   and no warp waits for another but to put an item's sums together.
//
//   Copies: one lane asks for whole tiles (cp.async.bulk, counted by a barrier of the stage). Scales of e4m3 come by
//   cp.async, 4 bytes each, for a part may begin at any key: they go through L1, so that none is asked for before
//   grid_dependency_wait. Only keys that the row sees are asked for. What stands behind them in a stage is neither read
//   nor multiplied by a weight of 0, which would not silence a NaN.
//
//   4 or 8 lanes have a key and its value. Each such group of lanes has a softmax of its own, in order; they are put
//   together by shuffles, the warps' in shared memory, the parts' by the blocks of a cluster, of which the first has
//   all sums written into its shared memory (`cluster`), or by the kernel of attention_decode_merge.cu. No
//   atomics; which block takes an item changes nothing: an output depends on the position, the row's start and the
//   number of splits.
//
//   Before grid_dependency_wait the position, the starts, and the old keys and values are read. That is right where
//   none of them is written by a launch that may still be running: within one step no kernel writes old positions, and
//   the position moves at the end of a step; a step's first launch must not be a dependent one, so that all of the step
//   before has ended when it begins, and with it every launch that follows. Replays of a graph are ordered like that.
//   Only the query and the new key and value are of this step, and everything that is written comes behind the wait.
//
//   Bound by bytes: 2 * (position + 1) * dim elements for every (row, head), those of e4m3 of one byte.
//
// Source: FlashInfer's multi-stage loads (Ye et al., 2025), the idea alone; cp.async.bulk, mbarrier: PTX ISA.
#pragma once

#include <algorithm>

#include "attention_decode_lanes.cuh"
#include "hopper.cuh"
#include "launch.cuh"

namespace igpt::cuda::decode {

constexpr int kRingBytes = 64 * 1024;                               // of a block
constexpr int kBlocks = 3;                                          // of a multiprocessor of sm_90, at least
constexpr int kReserved = 1024, kMultiprocessorBytes = 228 * 1024;  // of shared memory: of a block, and in all

template <typename T_, typename StoredK, typename StoredV, int kDim_>
struct RingShape {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kLanes = kDim % 64 == 0 ? 8 : 4;
    using K = Part<StoredK, kDim, kLanes>;
    using V = Part<StoredV, kDim, kLanes>;
    static constexpr int kGroups = kWarpSize / kLanes;  // keys side by side
    static constexpr int kTile = kDim > 64 ? 8 : 16;    // keys of a stage
    static constexpr int kUnroll = kTile / kGroups;     // of a group
    static constexpr int kStride = kWarps * kTile;      // keys from a warp's tile to its next one
    static constexpr int kKeys = 0, kValues = kTile * K::kBytes, kKeyScales = kValues + kTile * V::kBytes;
    static constexpr int kValueScales = kKeyScales + (K::kScaled ? kTile * 4 : 0);
    static constexpr int kStage = kValueScales + (V::kScaled ? kTile * 4 : 0);  // bytes, and where in them is what
    static constexpr int kStages = std::min(8, kRingBytes / (kWarps * kStage));
    static constexpr size_t kBarriers = size_t(kWarps) * kStages * kStage;  // behind the stages
    static constexpr size_t kSums = kBarriers + size_t(kWarps) * kStages * sizeof(uint64_t);
    static constexpr size_t kInbox = kSums + kWarps * (kDim + 2) * sizeof(float);
    // The first block of a cluster has the blocks' sums of this item and of the one before.
    static constexpr size_t shared(int splits) { return kInbox + size_t(2) * splits * (kDim + 2) * sizeof(float); }
    static_assert(kBlocks * (shared(kMostClusters) + kReserved) <= kMultiprocessorBytes);
    static_assert(kTile % kGroups == 0 && decode::kKeys % kStride == 0 && kStages >= 2 && kStage % 32 == 0);
};

__device__ __forceinline__ unsigned items_of(const AttentionDecodeParams& p) {
    return unsigned(p.rows * p.heads * p.splits);
}

// A warp's way through its block's items, and through its tiles of each.
template <typename S>
struct Way {
    Own own;
    unsigned item, row_head;
    int split, key, end;  // the next tile's first key, and behind the item's last one

    __device__ __forceinline__ explicit Way(const AttentionDecodeParams& p)
        : own(p, blockIdx.x / unsigned(p.splits) / unsigned(p.heads)), item(blockIdx.x) {
        enter(p);
    }
    __device__ __forceinline__ bool over(const AttentionDecodeParams& p) const { return item >= items_of(p); }
    __device__ __forceinline__ bool last(const AttentionDecodeParams& p) const {
        return item + gridDim.x >= items_of(p);
    }
    // Whether the new key is the item's.
    __device__ __forceinline__ bool has_new() const { return split == own.parts - 1; }
    __device__ __forceinline__ int count() const { return min(S::kTile, end - key); }

    __device__ __forceinline__ void enter(const AttentionDecodeParams& p) {
        row_head = item / unsigned(p.splits);
        split = int(item % unsigned(p.splits));
        const bool there = own.valid && split < own.parts;
        const int begin = there ? own.first + split * own.chunk : 0;
        end = !there ? 0 : has_new() ? own.position : begin + own.chunk;
        key = begin + int(threadIdx.x) / kWarpSize * S::kTile;
    }
    __device__ __forceinline__ void go_on(const AttentionDecodeParams& p) {
        item += gridDim.x;
        if (over(p)) return;
        if (p.position_step || p.starts) own = Own(p, item / unsigned(p.splits) / unsigned(p.heads));
        enter(p);
    }
};

// A warp's stages, and the tile that is asked for next.
template <typename S>
struct Ring {
    static constexpr bool kScaled = S::K::kScaled || S::V::kScaled;
    unsigned char* stages;
    uint32_t barriers;  // one for a stage
    Way<S> ahead;
    int stage = 0, parity = 0;

    __device__ __forceinline__ explicit Ring(const AttentionDecodeParams& p) : ahead(p) {
        const int warp = int(threadIdx.x) / kWarpSize;
        unsigned char* shared = dynamic_shared<unsigned char>();
        stages = shared + warp * S::kStages * S::kStage;
        barriers = ptx::shared_address(shared + S::kBarriers) + uint32_t(warp * S::kStages) * 8;
        if (threadIdx.x % kWarpSize == 0) {
            for (uint32_t i = 0; i < S::kStages; ++i) ptx::mbarrier_init(barriers + 8 * i, 1);
            ptx::mbarrier_fence_init();
        }
        __syncwarp();
    }
    __device__ __forceinline__ const unsigned char* now() const { return stages + stage * S::kStage; }

    // Asks for the next tile, or its scales, or both, into the stage that is the turn's, which nobody reads any more.
    __device__ __forceinline__ void fill(const AttentionDecodeParams& p, bool tile = true, bool scales = true) {
        while (!ahead.over(p) && ahead.key >= ahead.end) ahead.go_on(p);
        if (!ahead.over(p)) {
            const int64_t first = int64_t(ahead.row_head) * p.positions + ahead.key;
            const auto* keys = static_cast<const unsigned char*>(p.k_cache) + first * S::K::kBytes;
            const auto* values = static_cast<const unsigned char*>(p.v_cache) + first * S::V::kBytes;
            const uint32_t to = ptx::shared_address(now());
            const int count = ahead.count(), lane = int(threadIdx.x) % kWarpSize;
            if (tile && lane == 0) {
                const uint32_t barrier = barriers + 8 * uint32_t(stage);
                ptx::mbarrier_expect_tx(barrier, count * (S::K::kBytes + S::V::kBytes));
                ptx::bulk_load(to + S::kKeys, keys, count * S::K::kBytes, barrier);
                ptx::bulk_load(to + S::kValues, values, count * S::V::kBytes, barrier);
            }
            if (scales && lane < count) {
                if (S::K::kScaled) ptx::cp_async4(to + S::kKeyScales + 4 * lane, p.k_scale + first + lane);
                if (S::V::kScaled) ptx::cp_async4(to + S::kValueScales + 4 * lane, p.v_scale + first + lane);
            }
            ahead.key += S::kStride;
        }
        if (kScaled && scales) ptx::cp_async_commit();  // one a stage, be it empty: they are counted
    }
    // All stages, from the block's first item on.
    __device__ __forceinline__ void fill_all(const AttentionDecodeParams& p, const Way<S>& from, bool tile) {
        ahead = from;
        for (stage = 0; stage < S::kStages; ++stage) fill(p, tile, !tile);
        stage = 0;
    }
    // The stage of the turn has its tile, for every lane.
    __device__ __forceinline__ void wait() const {
        ptx::mbarrier_wait(barriers + 8 * uint32_t(stage), parity);
        if (!kScaled) return;
        ptx::cp_async_wait<S::kStages - 1>();
        __syncwarp();
    }
    __device__ __forceinline__ void turn() {
        if (++stage < S::kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

// The query, scaled, and what the item with the new key does with that: writes it to the cache and takes it in.
template <typename S>
struct Query {
    using T = typename S::T;
    using K = typename S::K;
    using V = typename S::V;
    float elements[K::kElements];

    __device__ __forceinline__ Query(const AttentionDecodeParams& p, int64_t row, int64_t head) {
        Fresh<T, K, S::kLanes> q;
        q.load(static_cast<const T*>(p.q) + row * p.q_row + head * p.q_head);
#pragma unroll
        for (int e = 0; e < K::kElements; ++e) elements[e] = q.get(e) * (p.scale * kLog2e);
    }

    // By the first warp. Its first group of lanes takes the key in; all others would have it once more.
    __device__ __forceinline__ void add_new(const AttentionDecodeParams& p, int64_t row, int64_t head, const Own& own,
                                            Sums<S>& sums) const {
        Fresh<T, K, S::kLanes> k;
        Fresh<T, V, S::kLanes> v;
        k.load(static_cast<const T*>(p.k) + row * p.k_row + head * p.k_head);
        v.load(static_cast<const T*>(p.v) + row * p.v_row + head * p.v_head);
        K key;
        V value;
        const float key_scale = k.keep(key), value_scale = v.keep(value);
        const float score = Sums<S>::score(elements, key, key_scale);
        if (threadIdx.x >= S::kLanes) return;
        const int64_t at = (row * p.heads + head) * p.positions + own.position;
        key.store(static_cast<unsigned char*>(p.k_cache) + at * K::kBytes);
        value.store(static_cast<unsigned char*>(p.v_cache) + at * V::kBytes);
        if (K::kScaled && threadIdx.x == 0) store_global(p.k_scale + at, key_scale);
        if (V::kScaled && threadIdx.x == 0) store_global(p.v_scale + at, value_scale);
        if (!own.sees_it) return;
        sums.rescale(fmaxf(sums.m, score));
        const float weight = weight_of(score, sums.m);
        sums.l += weight;
        sums.add(V::kScaled ? weight * value_scale : weight, value);
    }
};

// Puts the block's warps together. Thread i < dim has element i of the sum, all have the Stats.
template <typename S>
__device__ __forceinline__ float merge_block(Sums<S>& own, Stats& stats) {
    float* sums = reinterpret_cast<float*>(dynamic_shared<unsigned char>() + S::kSums);
    Stats* all = reinterpret_cast<Stats*>(sums + kWarps * S::kDim);
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    own.merge_warp();
    __syncthreads();  // those of the item before have been read
    if (lane < S::kLanes) {
#pragma unroll
        for (int e = 0; e < S::V::kElements; e += 4) {
            const float4 four = make_float4(own.sums[e], own.sums[e + 1], own.sums[e + 2], own.sums[e + 3]);
            const int element = S::V::start(e / S::V::kSize) + e % S::V::kSize;
            store_shared(reinterpret_cast<float4*>(sums + warp * S::kDim + element), four);
        }
    }
    if (lane == 0) store_shared(all + warp, Stats{own.m, own.l});
    __syncthreads();
    stats = {-INFINITY, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) stats.m = fmaxf(stats.m, load_shared(all + w).m);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const Stats one = load_shared(all + w);
        const float weight = weight_of(one.m, stats.m);
        stats.l += weight * one.l;
        if (threadIdx.x < S::kDim) sum += weight * load_shared(sums + w * S::kDim + threadIdx.x);
    }
    return sum;
}

// The parts of a (row, head) by the blocks of a cluster: every block writes its sums into the first one's inbox, which
// adds them up in their order, behind the prefix's. Inboxes by turns: that a block is at the next item's barrier means
// that it has read what came before this one's.
template <typename S>
struct Inbox {
    float* from;  // sums and Stats of every split

    __device__ __forceinline__ Inbox(const AttentionDecodeParams& p, int turn) {
        from =
            reinterpret_cast<float*>(dynamic_shared<unsigned char>() + S::kInbox) + turn % 2 * p.splits * (S::kDim + 2);
    }
    __device__ __forceinline__ void send(int split, float sum, Stats stats) const {
        float* to = from + split * (S::kDim + 2);
        if (threadIdx.x < S::kDim) ptx::store_cluster(to + threadIdx.x, 0, sum);
        if (threadIdx.x == 0) ptx::store_cluster(to + S::kDim, 0, stats.m);
        if (threadIdx.x == 0) ptx::store_cluster(to + S::kDim + 1, 0, stats.l);
    }
    __device__ __forceinline__ void finish(const AttentionDecodeParams& p, int64_t row, int64_t head,
                                           const Own& own) const {
        if (threadIdx.x >= S::kDim) return;
        const Slots slots(p, row, head);
        const int count = own.valid ? p.prefix_splits + own.parts : 0;
        const auto stats_of = [&](int slot) {
            if (slot < p.prefix_splits) return load_global(slots.stats + slot);
            const float* stats = from + (slot - p.prefix_splits) * (S::kDim + 2) + S::kDim;
            return Stats{load_shared(stats), load_shared(stats + 1)};
        };
        Stats all = {-INFINITY, 0.0f};
        float sum = 0.0f;
        for (int slot = 0; slot < count; ++slot) all.m = fmaxf(all.m, stats_of(slot).m);
        for (int slot = 0; slot < count; ++slot) {
            const Stats one = stats_of(slot);
            const float weight = weight_of(one.m, all.m);
            const float part = slot < p.prefix_splits
                                   ? load_global(slots.at(slot) + threadIdx.x)
                                   : load_shared(from + (slot - p.prefix_splits) * (S::kDim + 2) + threadIdx.x);
            all.l += weight * one.l;
            sum += weight * part;
        }
        store_out<typename S::T>(p, row * p.heads + head, int(threadIdx.x), own.valid, sum, all.l);
    }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, kBlocks) attention_decode_ring_kernel(AttentionDecodeParams p) {
    if (!ptx::has_bulk_copies()) return __trap();  // see has_ring; there is no code of it then
    if (p.cluster) ptx::cluster_arrive_relaxed();
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    Ring<S> ring(p);
    Way<S> way = ring.ahead;
    ring.fill_all(p, way, true);
    ptx::grid_dependency_wait();
    if (ring.kScaled) ring.fill_all(p, way, false);
    if (p.cluster) ptx::cluster_wait();  // all blocks have begun
    for (int turn = 0; !way.over(p); way.go_on(p), ++turn) {
        const int64_t row = way.row_head / unsigned(p.heads), head = way.row_head % unsigned(p.heads);
        const bool there = way.split < way.own.parts && way.own.valid;
        Sums<S> sums;
        if (there) {
            const Query<S> query(p, row, head);
            if (way.has_new() && threadIdx.x < kWarpSize) query.add_new(p, row, head, way.own, sums);
            for (; way.key < way.end; way.key += S::kStride) {
                ring.wait();
                sums.add_tile(query.elements, ring.now(), way.count());
                __syncwarp();  // the stage has been read
                ring.fill(p);
                ring.turn();
            }
        }
        if (p.dependent == Dependent::late && way.last(p)) ptx::grid_dependency_launch();
        Stats stats = {-INFINITY, 0.0f};
        const bool alone = slots_of(p) == 1;
        const float sum = there ? merge_block(sums, stats) : 0.0f;
        if (p.cluster) {
            const Inbox<S> inbox(p, turn);
            if (there) inbox.send(way.split, sum, stats);
            ptx::cluster_arrive();
            ptx::cluster_wait();
            if (way.split == 0) inbox.finish(p, row, head, way.own);
        } else if (alone) {
            if (threadIdx.x < S::kDim) {
                store_out<typename S::T>(p, way.row_head, int(threadIdx.x), way.own.valid, sum, stats.l);
            }
        } else if (there) {
            const Slots slots(p, row, head);
            const int slot = p.prefix_splits + way.split;
            if (threadIdx.x < S::kDim) store_global(slots.at(slot) + threadIdx.x, sum);
            if (threadIdx.x == 0) store_global(slots.stats + slot, stats);
        }
    }
}

template <typename S>
int launch_ring(AttentionDecodeParams p) {
    const auto kernel = attention_decode_ring_kernel<S>;
    p.cluster = p.cluster && p.splits > 1 && p.splits <= kMostClusters &&
                resident_blocks(kernel, p.device, kThreads, S::shared(p.splits), unsigned(p.splits)) >= p.splits;
    const unsigned cluster = p.cluster ? unsigned(p.splits) : 1;
    const size_t shared = p.cluster ? S::shared(p.splits) : S::kInbox;
    const int resident = resident_blocks(kernel, p.device, kThreads, shared, cluster);
    if (resident == 0) return cudaErrorInvalidValue;
    const auto blocks = unsigned(std::min<int64_t>(p.rows * p.heads * p.splits, resident));
    const int error = launch(kernel, blocks, kThreads, shared, p.stream, p, cluster, p.dependent != Dependent::none);
    return error != cudaSuccess || p.cluster || slots_of(p) == 1 ? error : launch_merge(p);
}

template <typename T, typename StoredK, typename StoredV>
int launch_ring_of(const AttentionDecodeParams& p) {
    if (p.dim == 32) return launch_ring<RingShape<T, StoredK, StoredV, 32>>(p);
    if (p.dim == 64) return launch_ring<RingShape<T, StoredK, StoredV, 64>>(p);
    if (p.dim == 96) return launch_ring<RingShape<T, StoredK, StoredV, 96>>(p);
    if (p.dim == 128) return launch_ring<RingShape<T, StoredK, StoredV, 128>>(p);
    return cudaErrorInvalidValue;
}

template <typename T>
int launch_ring_of(const AttentionDecodeParams& p) {
    if (p.k_scale) return p.v_scale ? launch_ring_of<T, E4M3, E4M3>(p) : cudaErrorInvalidValue;
    return p.v_scale ? launch_ring_of<T, T, E4M3>(p) : launch_ring_of<T, T, T>(p);
}

}  // namespace igpt::cuda::decode
