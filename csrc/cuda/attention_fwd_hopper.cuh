// Causal attention, forward, for Hopper: the formula and the tensors of attention_fwd.cuh, without a key_mask, with
// wgmma and TMA.
//
//   Launch: a block of kGroups warpgroups that compute. Each has 64 queries; their part of out, the scores of one tile
//   of keys and the weights of the one before are in its registers. One thread copies the queries once, and K and V in
//   tiles of kKeys rows through two rings of kStages places, each place with a barrier that says that it is full and
//   one that says that all warps have done with it. That thread belongs to a further warpgroup, which gives most of its
//   registers to the others; with D of 64, where an SM holds two blocks, to the last warpgroup that computes.
//   While the tensor cores multiply the weights of one tile with V, the warpgroup computes those of the next:
//     S(j) = Q K(j)^T and out += P(j - 1) V(j - 1) are begun; S(j) is waited for; P(j) = its softmax; out is waited for
//   and is rescaled. Tiles of keys begin with the first one that is shown, so that a hidden key is not even copied, and
//   end where the warpgroup's last query does: what is left to mask is the diagonal.
//
// Source: FlashAttention-3, section 3 (Shah et al., 2024; arXiv 2407.08608).
#pragma once

#include "attention_fwd.cuh"
#include "attention_hopper.cuh"

namespace igpt::cuda::attention {

template <int D_>
struct HopperFwd {
    static constexpr int D = D_, kKeys = 64;
    static constexpr bool kLoader = D > 64;  // whether there is a warpgroup that loads
    static constexpr int kGroups = kLoader ? 3 : 2, kStages = kLoader ? 3 : 4;
    static constexpr int kBlocks = kLoader ? 1 : 2;  // that an SM shall hold
    static constexpr int kRows = kTile * kGroups, kThreads = kGroupThreads * (kGroups + kLoader);
    // Of a thread, with such a warpgroup: as many as there are, 128 for each of four, are divided anew.
    static constexpr int kRegisters = 160, kLoaderRegisters = 32;

    static constexpr int kPanels = (D + 63) / 64;
    static constexpr int kQPanel = kTile * kPanelRow, kKeyPanel = kKeys * kPanelRow;
    static constexpr int kQBytes = kPanels * kQPanel;  // of a warpgroup
    static constexpr int kKeyBytes = kPanels * kKeyPanel;
    static constexpr int kTiles = kGroups * kQBytes + 2 * kStages * kKeyBytes;
    static constexpr int kShared = 1024 + kTiles + 8 * (1 + 4 * kStages);
    // A warpgroup has no use for the block's last tiles, and leaves neither them nor its own last one: their places are
    // not filled again.
    static_assert((kGroups - 1) * kTile <= (kStages - 1) * kKeys);
    static_assert(!kLoader || registers_suffice(kThreads, kGroups, kRegisters, kLoaderRegisters));
    static_assert(kShared <= kMaxShared);
};

struct HopperFwdArgs {
    ptx::TensorMap q, k, v;
    FwdArgs fwd;
};

// Addresses in shared memory.
template <typename F>
struct HopperShared {
    uint32_t begin;  // a multiple of 1024

    __device__ __forceinline__ HopperShared()
        : begin((ptx::shared_address(dynamic_shared<unsigned char>()) + 1023) / 1024 * 1024) {}
    __device__ __forceinline__ uint32_t q(int group) const { return begin + group * F::kQBytes; }
    __device__ __forceinline__ uint32_t k(int stage) const { return q(F::kGroups) + stage * F::kKeyBytes; }
    __device__ __forceinline__ uint32_t v(int stage) const { return k(F::kStages) + stage * F::kKeyBytes; }
    __device__ __forceinline__ uint32_t q_full() const { return v(F::kStages); }
    __device__ __forceinline__ uint32_t k_full(int stage) const { return q_full() + 8 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_full(int stage) const { return k_full(F::kStages) + 8 * stage; }
    __device__ __forceinline__ uint32_t k_empty(int stage) const { return v_full(F::kStages) + 8 * stage; }
    __device__ __forceinline__ uint32_t v_empty(int stage) const { return k_empty(F::kStages) + 8 * stage; }

    // For as many warpgroups as have queries. By one thread.
    __device__ __forceinline__ void init_barriers(int groups) const {
        ptx::mbarrier_init(q_full(), 1);
        for (int i = 0; i < F::kStages; ++i) {
            ptx::mbarrier_init(k_full(i), 1);
            ptx::mbarrier_init(v_full(i), 1);
            ptx::mbarrier_init(k_empty(i), kWarps * groups);
            ptx::mbarrier_init(v_empty(i), kWarps * groups);
        }
        ptx::mbarrier_fence_init();
    }
};

// What a block has to do.
template <typename F>
struct HopperWork {
    Block block;
    int q0, groups;    // its first query, how many warpgroups have any
    int first, tiles;  // its first key, tiles of keys
    int past;          // keys before that of query 0

    __device__ __forceinline__ explicit HopperWork(const FwdArgs& args) {
        const AttentionShape& shape = args.p.shape;
        block = find_block(args.order, shape.heads);
        q0 = (int(args.order.tiles) - 1 - block.tile) * F::kRows;  // the last ones see the most keys
        groups = min(F::kGroups, (shape.t_q - q0 + kTile - 1) / kTile);
        past = shape.t_k - shape.t_q;
        first = Keys(shape, block.batch).start;
        tiles = tiles_before(min(shape.t_k, q0 + F::kRows + past));
    }
    // Tiles of keys that begin before `end`.
    __device__ __forceinline__ int tiles_before(int end) const {
        return end <= first ? 0 : (end - first + F::kKeys - 1) / F::kKeys;
    }
};

// ---- The warpgroup that loads: one thread of it ----------------------------------------------------------------

template <typename F>
__device__ __forceinline__ void load_keys(uint32_t to, const ptx::TensorMap* map, uint32_t full, uint32_t empty, int j,
                                          const HopperWork<F>& work) {
    if (j >= F::kStages) ptx::mbarrier_wait(empty, (j / F::kStages - 1) % 2);
    ptx::mbarrier_expect_tx(full, F::kKeyBytes);
    load_panels<F>(to, F::kKeyPanel, map, full, work.first + j * F::kKeys, work.block);
}

template <typename F>
__device__ __forceinline__ void load_queries(const HopperFwdArgs& args, const HopperWork<F>& work, HopperShared<F> at) {
    if (work.tiles == 0) return;
    ptx::mbarrier_expect_tx(at.q_full(), work.groups * F::kQBytes);
    for (int g = 0; g < work.groups; ++g) {
        load_panels<F>(at.q(g), F::kQPanel, &args.q, at.q_full(), work.q0 + g * kTile, work.block);
    }
}

template <typename F>
__device__ __forceinline__ void load_all(const HopperFwdArgs& args, const HopperWork<F>& work, HopperShared<F> at) {
    load_queries(args, work, at);
    if (work.tiles == 0) return;
    for (int j = 0; j <= work.tiles; ++j) {  // in the order of their use
        const int here = j % F::kStages, before = (j + F::kStages - 1) % F::kStages;
        if (j < work.tiles) load_keys(at.k(here), &args.k, at.k_full(here), at.k_empty(here), j, work);
        if (j > 0) load_keys(at.v(before), &args.v, at.v_full(before), at.v_empty(before), j - 1, work);
    }
}

// The same where there is no such warpgroup: a thread of one that computes loads the first tiles, and in its step j two
// more, once the others have done with what they had in their places two steps ago.
template <typename F>
__device__ __forceinline__ void load_first(const HopperFwdArgs& args, const HopperWork<F>& work, HopperShared<F> at) {
    load_queries(args, work, at);
    for (int j = 0; j < min(F::kStages, work.tiles); ++j) {
        load_keys(at.k(j), &args.k, at.k_full(j), at.k_empty(j), j, work);
        load_keys(at.v(j), &args.v, at.v_full(j), at.v_empty(j), j, work);
    }
}
template <typename F>
__device__ __forceinline__ void load_more(const HopperFwdArgs& args, const HopperWork<F>& work, HopperShared<F> at,
                                          int j) {
    const int k = j + F::kStages - 2, v = k - 1, k_stage = k % F::kStages, v_stage = v % F::kStages;
    if (k >= F::kStages && k < work.tiles) {
        load_keys(at.k(k_stage), &args.k, at.k_full(k_stage), at.k_empty(k_stage), k, work);
    }
    if (v >= F::kStages && v < work.tiles) {
        load_keys(at.v(v_stage), &args.v, at.v_full(v_stage), at.v_empty(v_stage), v, work);
    }
}

// ---- The warpgroups that compute -------------------------------------------------------------------------------

// The state of a warpgroup's 64 queries.
template <typename T, typename F>
struct HopperRows {
    static constexpr int kColumns = F::kKeys / 8;
    float s[1][kColumns][4], out[1][F::D / 8][4], before[2];
    uint32_t p[F::kKeys / 16][4];  // P as the A operand
    Softmax<1> softmax;
    int last;  // the last key of the lane's first row
    float scale_log2;

    // The weights of the tile that begins with key n0.
    __device__ __forceinline__ void weigh(int n0) {
        const int own = last - n0 - 2 * int(threadIdx.x % 4);
        // The warp's first query does not see all of the tile.
        if (last - int(threadIdx.x % kWarpSize / 4) - n0 < F::kKeys - 1) {
            each_element<1, kColumns>([&](int r, int n, int e) {
                if (8 * n + e % 2 > own + e / 2 * 8) s[r][n][e] = -INFINITY;
            });
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) before[i] = softmax.update(s, 0, i, scale_log2);
    }
    // Once out and P are nobody else's: rounds the weights, and brings out to their maximum.
    __device__ __forceinline__ void rescale() {
        each_element<1, F::D / 8>([&](int, int d, int e) { out[0][d][e] *= before[e / 2]; });
        round();
    }
    __device__ __forceinline__ void round() { round_to<T>(p, s); }
};

// `tiles`: of those that the warpgroup's queries see, 1 or more.
template <typename T, typename F>
__device__ __forceinline__ void attend(HopperRows<T, F>& rows, int tiles, const HopperFwdArgs& args,
                                       const HopperWork<F>& work, int group, HopperShared<F> at) {
    const uint32_t q = at.q(group);
    const int first = work.first;
    const bool loads = !F::kLoader && group == work.groups - 1 && threadIdx.x % kGroupThreads == 0;
    ptx::mbarrier_wait(at.k_full(0), 0);
    begin_scores<T, F>(rows.s, q, at.k(0));
    ptx::wgmma_wait<0>();
    ptx::fence_registers(flat(rows.s));
    leave(at.k_empty(0));
    rows.weigh(first);
    rows.round();
    int v_stage = 0, v_parity = 0;
    if (tiles > 1) ptx::mbarrier_wait(at.k_full(1 % F::kStages), 1 / F::kStages % 2);
    for (int j = 1; j < tiles; ++j) {
        const int k_stage = j % F::kStages;
        begin_scores<T, F>(rows.s, q, at.k(k_stage));
        ptx::mbarrier_wait(at.v_full(v_stage), v_parity);
        begin_out<T, F>(rows.out, rows.p, at.v(v_stage));
        if (!F::kLoader && loads) load_more(args, work, at, j);
        ptx::wgmma_wait<1>();  // S is there, out goes on
        ptx::fence_registers(flat(rows.s));
        leave(at.k_empty(k_stage));
        rows.weigh(first + j * F::kKeys);
        // The wait for the next keys stands here, in the way of the assembler, which would put off all that weigh()
        // does until out is there.
        ptx::fence_registers(flat(rows.s));
        if (j + 1 < tiles) ptx::mbarrier_wait(at.k_full((j + 1) % F::kStages), (j + 1) / F::kStages % 2);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(flat(rows.out));
        leave(at.v_empty(v_stage));
        rows.rescale();
        v_stage = k_stage;
        v_parity = j / F::kStages % 2;
    }
    ptx::mbarrier_wait(at.v_full(v_stage), v_parity);
    begin_out<T, F>(rows.out, rows.p, at.v(v_stage));
    ptx::wgmma_wait<0>();
    ptx::fence_registers(flat(rows.out));
}

template <typename T, typename F>
__device__ __forceinline__ void compute(const HopperFwdArgs& all, const HopperWork<F>& work, int group,
                                        HopperShared<F> at) {
    const FwdArgs& args = all.fwd;
    const AttentionShape& shape = args.p.shape;
    const int q0 = work.q0 + group * kTile, warp_row = threadIdx.x / kWarpSize % kWarps * 16;
    HopperRows<T, F> rows;
    clear(rows.out);
    rows.last = q0 + warp_row + own_row(0, 0) + work.past;
    rows.scale_log2 = args.scale_log2;
    const int tiles = min(work.tiles, work.tiles_before(q0 + kTile + work.past));
    if (work.tiles > 0) ptx::mbarrier_wait(at.q_full(), 0);
    if (tiles > 0) attend(rows, tiles, all, work, group, at);

    float factor[1][2];
    const Block& block = work.block;
    float* const lse = args.p.lse + (int64_t(block.batch) * shape.heads + block.head) * shape.t_q;
    each_row<1>(
        [&](int r, int i) { factor[r][i] = rows.softmax.finish(r, i, lse, q0 + warp_row + own_row(r, i), shape.t_q); });
    ptx::named_barrier_sync(1 + group, kGroupThreads);  // the queries are read no more
    unsigned char* const shared = dynamic_shared<unsigned char>();
    const uint32_t place = at.q(group) - ptx::shared_address(shared) + warp_row * Tile<F::D>::kRowBytes;
    store_rows<T, F::D, 1>(rows.out, factor, shared + place, head_of<T>(args.p.out, block.batch, block.head),
                           args.p.out.position, q0 + warp_row, shape.t_q);
}

template <typename T, typename F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks)
    attention_fwd_hopper_kernel(const __grid_constant__ HopperFwdArgs args) {
    if constexpr (ptx::kHopper) {
        const HopperShared<F> at;
        const HopperWork<F> work(args.fwd);
        if (threadIdx.x == 0) at.init_barriers(work.groups);
        __syncthreads();  // before anybody waits at one
        // The same in all lanes, as the compiler then knows: operands' addresses stay in uniform registers.
        const int group = __shfl_sync(kFullMask, int(threadIdx.x) / kGroupThreads, 0);
        if constexpr (!F::kLoader) {
            if (int(threadIdx.x) == kGroupThreads * (work.groups - 1)) load_first(args, work, at);
            __syncwarp();  // wgmma wants the warp together again
            if (group < work.groups) compute<T>(args, work, group, at);
        } else if (group == F::kGroups) {
            ptx::lower_registers<F::kLoaderRegisters>();
            if (threadIdx.x % kGroupThreads == 0) load_all(args, work, at);
        } else {
            ptx::raise_registers<F::kRegisters>();
            if (group < work.groups) compute<T>(args, work, group, at);
        }
    } else {
        __trap();
    }
}

// ---- The launcher ----------------------------------------------------------------------------------------------

template <typename T, typename F>
int launch_hopper(const AttentionFwdParams& params) {
    const AttentionShape& shape = params.shape;
    HopperFwdArgs args;
    args.fwd = {params, make_order(shape, tiles_of(shape.t_q, F::kRows), int64_t(shape.t_k) * F::D * 4),
                shape.scale * kLog2e};
    const int64_t count = blocks(args.fwd.order);
    if (count == 0) return cudaSuccess;
    if (count > INT32_MAX) return cudaErrorInvalidValue;
    cudaError_t error = make_map(&args.q, params.q, shape, shape.t_q, kTile);
    if (error == cudaSuccess) error = make_map(&args.k, params.k, shape, shape.t_k, F::kKeys);
    if (error == cudaSuccess) error = make_map(&args.v, params.v, shape, shape.t_k, F::kKeys);
    if (error != cudaSuccess) return error;
    return launch(attention_fwd_hopper_kernel<T, F>, dim3(uint32_t(count)), dim3(F::kThreads), F::kShared, shape.stream,
                  args);
}

template <int D>
int forward_hopper(const AttentionFwdParams& params) {
    return dispatch_half(params.shape.dtype, [&](auto t) { return launch_hopper<decltype(t), HopperFwd<D>>(params); });
}

}  // namespace igpt::cuda::attention
