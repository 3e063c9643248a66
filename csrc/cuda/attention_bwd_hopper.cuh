// Causal attention, backward, for Hopper: the formulas and the tensors of attention_bwd.cuh, without a key_mask, with
// wgmma and TMA.
//
//   Launch: attention_terms_kernel, and then one kernel twice: for dk and dv, whose warpgroups have 64 keys each, and
//   for dq, whose warpgroups have 64 queries. Either has two own tiles each, K and V or Q and dout, and runs over
//   tiles of 64 rows of the other side, X and Y: Q and dout, or K and V. One warp of a further warpgroup, which gives
//   most of its registers to the others, copies the own tiles once, and X and Y through a ring of kStages places, each
//   with a barrier that says that it is full and one that says that all warps have done with it; another warp brings
//   the queries' terms there, where they belong to columns. Of a tile j a warpgroup forms in registers
//     S(j) = K Q^T or Q K^T and dP(j) = V dout^T or dout V^T, and P(j) = exp(S(j) - lse) while dP(j) is multiplied,
//     dv += P(j) Y(j), in the kernel of dk and dv, and dS(j) = P(j) (dP(j) - delta) meanwhile,
//     dk or dq += dS(j) X(j), behind which S(j + 1) and dP(j + 1) are begun at once.
//   P and dS go into their products from the registers that they were formed in. With D of 64, K and V or Q are in
//   registers too: a product of two operands of 64 rows in shared memory takes all that this can be read of.
//   Tiles of queries begin with the first one that is shown any of the block's keys, tiles of keys with the first one
//   that is shown: what reaches no result, be it NaN, is not copied, and rows of the own side whose sums are not asked
//   for, as hidden keys, spoil none but their own. What is left to mask is the diagonal. A warpgroup whose keys are all
//   hidden, beside one with shown keys, multiplies the tiles of the block for nothing.
//   Bound by the tensor cores: 7 products of T_q T_k D multiply-adds a head, half of it causal; of the exponentials,
//   2 T_q T_k, a multiprocessor does 16 a clock, which takes 0.5 to 0.67 of the time of the products at D of 64.
//
// Sources: FlashAttention-3, section 3 (Shah et al., 2024; arXiv 2407.08608); see attention_bwd.cuh.
#pragma once

#include "attention_bwd.cuh"
#include "attention_hopper.cuh"

namespace igpt::cuda::attention {

// kOfKeys: for dk and dv.
template <int D_, bool kOfKeys_>
struct HopperBwd {
    static constexpr int D = D_, kKeys = kTile;
    static constexpr bool kOfKeys = kOfKeys_;
    static constexpr int kHeld = D > 64 ? 0 : kOfKeys ? 2 : 1;  // of the own tiles in registers
    // Whether dv is still multiplied while dS is formed; with D of 128 there are no registers for both.
    static constexpr bool kDvGoesOn = kOfKeys && D < 128;
    static constexpr int kGroups = kOfKeys || D == 128 ? 2 : 3, kStages = 4;
    static constexpr int kRows = kTile * kGroups, kThreads = kGroupThreads * (kGroups + 1);
    // Of a thread: as many as there are, 65536 for all, are divided anew.
    static constexpr int kRegisters = kGroups == 2 ? 240 : 160, kLoaderRegisters = kGroups == 2 ? 24 : 32;

    static constexpr int kPanels = (D + 63) / 64;
    static constexpr int kQPanel = kTile * kPanelRow, kKeyPanel = kQPanel;
    static constexpr int kBytes = kPanels * kQPanel;  // of a tile
    static constexpr int kTerms = kOfKeys ? 2 * kTile * int(sizeof(float)) : 0;
    static constexpr int kShared = 1024 + 2 * (kGroups + kStages) * kBytes + kStages * kTerms + 8 * (1 + 2 * kStages);
    // A warpgroup leaves the block's tiles before its own ones at once, in the first turn of the ring, and its last one
    // and those behind it never: their places are not filled again.
    static_assert(kGroups <= kStages);
    static_assert(registers_suffice(kThreads, kGroups, kRegisters, kLoaderRegisters));
    static_assert(kShared <= kMaxShared);
};

struct HopperBwdArgs {
    ptx::TensorMap q, k, v, dout;
    BwdArgs bwd;
};

// Addresses in shared memory.
template <typename F>
struct HopperBwdShared {
    uint32_t begin;  // a multiple of 1024

    __device__ __forceinline__ HopperBwdShared()
        : begin((ptx::shared_address(dynamic_shared<unsigned char>()) + 1023) / 1024 * 1024) {}
    // K and V, or Q and dout, of a warpgroup.
    __device__ __forceinline__ uint32_t own(int group, int i) const { return begin + (2 * group + i) * F::kBytes; }
    __device__ __forceinline__ uint32_t ring(int stage, int i) const { return own(F::kGroups + stage, i); }
    // lse of 64 queries, and then delta.
    __device__ __forceinline__ uint32_t terms(int stage) const { return ring(F::kStages, 0) + stage * F::kTerms; }
    __device__ __forceinline__ uint32_t own_full() const { return terms(F::kStages); }
    __device__ __forceinline__ uint32_t full(int stage) const { return own_full() + 8 + 8 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(F::kStages) + 8 * stage; }

    __device__ __forceinline__ static unsigned char* pointer(uint32_t address) {
        unsigned char* const shared = dynamic_shared<unsigned char>();
        return shared + (address - ptx::shared_address(shared));
    }

    __device__ __forceinline__ const float* lse(int stage) const {
        return reinterpret_cast<const float*>(pointer(terms(stage)));
    }

    // For as many warpgroups as have rows. By one thread.
    __device__ __forceinline__ void init_barriers(int groups) const {
        ptx::mbarrier_init(own_full(), 1);
        for (int i = 0; i < F::kStages; ++i) {
            ptx::mbarrier_init(full(i), F::kOfKeys ? 2 : 1);
            ptx::mbarrier_init(empty(i), kWarps * groups);
        }
        ptx::mbarrier_fence_init();
    }
};

// What a block has to do.
template <typename F>
struct HopperBwdWork {
    Block block;
    int own0, groups;  // its first own row, how many warpgroups have any
    int first, tiles;  // the first row of the ring, tiles of it
    int past, start;   // keys before that of query 0; the first key that is shown

    __device__ __forceinline__ explicit HopperBwdWork(const BwdArgs& args) {
        const AttentionShape& shape = args.p.shape;
        block = find_block(args.order, shape.heads);
        past = shape.t_k - shape.t_q;
        start = Keys(shape, block.batch).start;
        if constexpr (F::kOfKeys) {
            own0 = block.tile * F::kRows;  // the first ones are seen by the most queries
            first = max(0, max(start, own0) - past);
            tiles = own0 + F::kRows <= start ? 0 : tiles_before(shape.t_q);
        } else {
            own0 = (int(args.order.tiles) - 1 - block.tile) * F::kRows;  // the last ones see the most keys
            first = start;
            tiles = tiles_before(min(shape.t_k, own0 + F::kRows + past));
        }
        groups = min(F::kGroups, ((F::kOfKeys ? shape.t_k : shape.t_q) - own0 + kTile - 1) / kTile);
    }
    // Tiles that begin before row `end` of the other side.
    __device__ __forceinline__ int tiles_before(int end) const {
        return end <= first ? 0 : (end - first + kTile - 1) / kTile;
    }
    // The tiles that a warpgroup needs: those before its keys' first query, or behind its queries' last key, are not.
    __device__ __forceinline__ int group_begin(int group) const {
        return F::kOfKeys ? min(tiles, max(0, own0 + group * kTile - past - first) / kTile) : 0;
    }
    __device__ __forceinline__ int group_end(int group) const {
        return F::kOfKeys ? tiles : min(tiles, tiles_before(own0 + (group + 1) * kTile + past));
    }
};

// ---- The warpgroup that loads: two warps of it -----------------------------------------------------------------

// Waits until tile j's place in the ring is free.
template <typename F>
__device__ __forceinline__ void wait_for_place(HopperBwdShared<F> at, int j) {
    if (j >= F::kStages) ptx::mbarrier_wait(at.empty(j % F::kStages), (j / F::kStages - 1) % 2);
}

// By one thread.
template <typename F>
__device__ __forceinline__ void load_tiles(const HopperBwdArgs& args, const HopperBwdWork<F>& work,
                                           HopperBwdShared<F> at) {
    const ptx::TensorMap* const own[2] = {F::kOfKeys ? &args.k : &args.q, F::kOfKeys ? &args.v : &args.dout};
    const ptx::TensorMap* const ring[2] = {F::kOfKeys ? &args.q : &args.k, F::kOfKeys ? &args.dout : &args.v};
    ptx::mbarrier_expect_tx(at.own_full(), 2 * work.groups * F::kBytes);
    for (int g = 0; g < work.groups; ++g) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_panels<F>(at.own(g, i), F::kQPanel, own[i], at.own_full(), work.own0 + g * kTile, work.block);
        }
    }
    for (int j = 0; j < work.tiles; ++j) {
        const int stage = j % F::kStages;
        wait_for_place(at, j);
        ptx::mbarrier_expect_tx(at.full(stage), 2 * F::kBytes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_panels<F>(at.ring(stage, i), F::kKeyPanel, ring[i], at.full(stage), work.first + j * kTile,
                           work.block);
        }
    }
}

// By one warp: of two queries a lane. Those of the next tile are on their way while it waits.
template <typename F>
__device__ __forceinline__ void load_all_terms(const BwdArgs& args, const HopperBwdWork<F>& work,
                                               HopperBwdShared<F> at) {
    const int lane = threadIdx.x % kWarpSize;
    float2 terms[2];
    for (int j = 0; j <= work.tiles; ++j) {
        if (j > 0) {
            const int stage = (j - 1) % F::kStages;
            wait_for_place(at, j - 1);
            float* const to = reinterpret_cast<float*>(at.pointer(at.terms(stage))) + lane;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                store_shared(to + i * kWarpSize, terms[i].x);
                store_shared(to + i * kWarpSize + kTile, terms[i].y);
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(at.full(stage));
        }
        if (j < work.tiles) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                terms[i] = load_terms(args, work.block, work.first + j * kTile + i * kWarpSize + lane);
            }
        }
    }
}

// ---- The warpgroups that compute -------------------------------------------------------------------------------

// Begins s = A B^T, A in registers.
template <typename T, typename F>
__device__ __forceinline__ void begin_scores(float (&s)[1][kTile / 8][4], uint32_t (&a)[F::D / 16][1][4], uint32_t b) {
    static_assert(F::kPanels == 1);
    const uint64_t right = ptx::swizzled_operand(b, 0, 8 * kPanelRow);
    ptx::fence_registers(flat(s));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::D / 16; ++i) {
        ptx::wgmma_rs<T, kTile>(flat(s), a[i][0], ptx::further(right, i * 32), i > 0);
    }
    ptx::wgmma_commit();
}

// The state of a warpgroup: dx, and dv where its rows are keys.
template <typename T, typename F>
struct HopperSums {
    static constexpr int kColumns = kTile / 8;
    using Tile64 = float[1][kColumns][4];
    using Fragments = uint32_t[kColumns / 2][4];

    OwnRows<F::D, 1, (F::kHeld > 0)> first;  // of the own side; read in the layout of Tile, as D is 64 then
    OwnRows<F::D, 1, (F::kHeld > 1)> second;
    uint32_t own;  // where the first of the two own tiles is
    Tile64 s, dp;
    Fragments p, ds;
    float dx[1][F::D / 8][4], dv[1][F::kOfKeys ? F::D / 8 : 1][4];
    float lse[2], delta[2];  // of the lane's queries, where they are its rows
    int row;                 // the lane's first row, its place in the other side's numbers
    float scale_log2;

    __device__ __forceinline__ HopperSums(HopperBwdShared<F> at, int group, int warp)
        : first(at.own(group, 0) + warp * 16 * kPanelRow),
          second(at.own(group, 1) + warp * 16 * kPanelRow),
          own(at.own(group, 0)) {
        clear(dx);
        clear(dv);
    }

    // Begins the two products of a tile of the ring.
    __device__ __forceinline__ void begin(uint32_t x, uint32_t y) {
        if constexpr (F::kHeld > 0) begin_scores<T, F>(s, first.held, x);
        if constexpr (F::kHeld == 0) begin_scores<T, F>(s, own, x);
        if constexpr (F::kHeld > 1) begin_scores<T, F>(dp, second.held, y);
        if constexpr (F::kHeld < 2) begin_scores<T, F>(dp, own + F::kBytes, y);
    }
    // Hides what is beyond the diagonal in a tile that begins with row n0: of keys behind the own query, or of queries
    // before the own key.
    __device__ __forceinline__ void hide_beyond(int n0) {
        const int warp_row = row - int(threadIdx.x % kWarpSize / 4);
        const int place = row - n0 - 2 * int(threadIdx.x % 4);
        if (F::kOfKeys ? warp_row + 15 > n0 : warp_row < n0 + kTile - 1) {
            each_element<1, kColumns>([&](int r, int n, int e) {
                const int column = 8 * n + e % 2, limit = place + e / 2 * 8;
                if (F::kOfKeys ? column < limit : column > limit) s[r][n][e] = -INFINITY;
            });
        }
    }
    // f(n, e, of) for all elements; of(n) gives the lane's two floats at `terms` for columns 8 n and on, or, where a
    // query is a row, those of `rows`.
    template <typename G>
    __device__ __forceinline__ void with_terms(const float (&rows)[2], const float* terms, G&& f) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            float2 two = make_float2(0.0f, 0.0f);
            if constexpr (F::kOfKeys)
                two = load_shared(reinterpret_cast<const float2*>(terms + 8 * n) + threadIdx.x % 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) f(n, e, F::kOfKeys ? (e % 2 ? two.y : two.x) : rows[e / 2]);
        }
    }
    // P out of S.
    __device__ __forceinline__ void weigh(int n0, const float* terms) {
        hide_beyond(n0);
        with_terms(lse, terms, [&](int n, int e, float of) {
            s[0][n][e] = ptx::exp2_approx(__fmaf_rn(s[0][n][e], scale_log2, -of));
        });
    }
    // dS out of P and dP.
    __device__ __forceinline__ void differentiate(const float* terms) {
        with_terms(delta, terms, [&](int n, int e, float of) { dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - of); });
        round_to<T>(ds, dp);
    }
};

// The first half of tile j of those before `end`, whose S is there: forms P and begins its product.
template <typename T, typename F>
__device__ __forceinline__ void weigh_tile(HopperSums<T, F>& sums, int j, int end, const HopperBwdWork<F>& work,
                                           HopperBwdShared<F> at) {
    sums.weigh(work.first + j * kTile, at.lse(j % F::kStages));
    if constexpr (F::kOfKeys) {
        round_to<T>(sums.p, sums.s);
        begin_out<T, F>(sums.dv, sums.p, at.ring(j % F::kStages, 1));
    }
    // The wait for the next tile stands here, in the way of the assembler, which would put off all that weigh() does
    // until dP has been waited for.
    if (j + 1 < end) ptx::mbarrier_wait(at.full((j + 1) % F::kStages), (j + 1) / F::kStages % 2);
    ptx::wgmma_wait<F::kDvGoesOn>();  // dP is there
    ptx::fence_registers(flat(sums.dp));
}

// The other half: forms dS and begins its product.
template <typename T, typename F>
__device__ __forceinline__ void differentiate_tile(HopperSums<T, F>& sums, int j, HopperBwdShared<F> at) {
    sums.differentiate(at.lse(j % F::kStages) + kTile);
    begin_out<T, F>(sums.dx, sums.ds, at.ring(j % F::kStages, 0));
}

// Runs over the tiles of the warpgroup, one or more.
template <typename T, typename F>
__device__ __forceinline__ void attend(HopperSums<T, F>& sums, int begin, int end, const HopperBwdWork<F>& work,
                                       HopperBwdShared<F> at) {
    for (int j = 0; j < begin; ++j) leave(at.empty(j));  // as many as there are warpgroups before at most
    sums.first.load();
    sums.second.load();
    ptx::mbarrier_wait(at.full(begin), 0);
    ptx::fence_registers(flat(sums.dx));
    ptx::fence_registers(flat(sums.dv));
    sums.begin(at.ring(begin, 0), at.ring(begin, 1));
    ptx::wgmma_wait<1>();  // S is there, dP goes on
    ptx::fence_registers(flat(sums.s));
    weigh_tile(sums, begin, end, work, at);
    for (int j = begin; j + 1 < end; ++j) {
        differentiate_tile(sums, j, at);
        const int next = (j + 1) % F::kStages;
        sums.begin(at.ring(next, 0), at.ring(next, 1));
        ptx::wgmma_wait<1>();  // the next S is there, and all before; dP goes on
        ptx::fence_registers(flat(sums.s));
        leave(at.empty(j % F::kStages));
        weigh_tile(sums, j + 1, end, work, at);
    }
    differentiate_tile(sums, end - 1, at);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(flat(sums.dx));
    ptx::fence_registers(flat(sums.dv));
}

template <typename T, typename F>
__device__ __forceinline__ void compute(const BwdArgs& args, const HopperBwdWork<F>& work, int group,
                                        HopperBwdShared<F> at) {
    const AttentionShape& shape = args.p.shape;
    const Block& block = work.block;
    const int warp = threadIdx.x / kWarpSize % kWarps, own0 = work.own0 + group * kTile + warp * 16;
    HopperSums<T, F> sums(at, group, warp);
    sums.scale_log2 = args.scale_log2;
    sums.row = own0 + own_row(0, 0) + (F::kOfKeys ? -work.past : work.past);
    float factor[1][2], one[1][2];
    each_row<1>([&](int r, int i) {
        const int row = own0 + own_row(r, i);
        bool is_shown = row >= work.start;
        if constexpr (!F::kOfKeys) {
            const float2 terms = load_terms(args, block, row);
            sums.lse[i] = terms.x;
            sums.delta[i] = terms.y;
            is_shown = terms.x != kNoKey;
        }
        factor[r][i] = is_shown ? shape.scale : 0.0f;
        one[r][i] = is_shown ? 1.0f : 0.0f;
    });
    const int begin = work.group_begin(group), end = work.group_end(group);
    if (work.tiles > 0) ptx::mbarrier_wait(at.own_full(), 0);  // those who need none write over their own tiles too
    if (begin < end) attend(sums, begin, end, work, at);

    ptx::named_barrier_sync(1 + group, kGroupThreads);  // the own tiles are read no more
    const auto store = [&](const auto& sum, const float (&factors)[1][2], int i, const AttentionTensor& tensor) {
        unsigned char* const rows = at.pointer(at.own(group, i)) + warp * 16 * Tile<F::D>::kRowBytes;
        store_rows<T, F::D, 1>(sum, factors, rows, head_of<T>(tensor, block.batch, block.head), tensor.position, own0,
                               F::kOfKeys ? shape.t_k : shape.t_q);
    };
    store(sums.dx, factor, 0, F::kOfKeys ? args.p.dk : args.p.dq);
    if constexpr (F::kOfKeys) store(sums.dv, one, 1, args.p.dv);
}

template <typename T, typename F>
__global__ void __launch_bounds__(F::kThreads, 1)
    attention_bwd_hopper_kernel(const __grid_constant__ HopperBwdArgs args) {
    if constexpr (ptx::kHopper) {
        const HopperBwdShared<F> at;
        const HopperBwdWork<F> work(args.bwd);
        if (threadIdx.x == 0) at.init_barriers(work.groups);
        __syncthreads();  // before anybody waits at one
        // The same in all lanes, as the compiler then knows: operands' addresses stay in uniform registers.
        const int group = __shfl_sync(kFullMask, int(threadIdx.x) / kGroupThreads, 0);
        if (group == F::kGroups) {
            ptx::lower_registers<F::kLoaderRegisters>();
            const int thread = int(threadIdx.x) % kGroupThreads;
            if (thread == 0 && work.tiles > 0) load_tiles(args, work, at);
            if (F::kOfKeys && thread / kWarpSize == 1) load_all_terms(args.bwd, work, at);
        } else {
            ptx::raise_registers<F::kRegisters>();
            if (group < work.groups) compute<T>(args.bwd, work, group, at);
        }
    } else {
        __trap();
    }
}

// ---- The launcher ----------------------------------------------------------------------------------------------

template <typename T, typename F>
cudaError_t launch_bwd_hopper(HopperBwdArgs& args) {
    const AttentionShape& shape = args.bwd.p.shape;
    const int64_t rows = F::kOfKeys ? shape.t_k : shape.t_q, others = F::kOfKeys ? shape.t_q : shape.t_k;
    args.bwd.order = make_order(shape, tiles_of(rows, F::kRows), others * F::D * 4);
    const int64_t count = blocks(args.bwd.order);
    if (count == 0) return cudaSuccess;
    if (count > INT32_MAX) return cudaErrorInvalidValue;
    return launch(attention_bwd_hopper_kernel<T, F>, dim3(uint32_t(count)), dim3(F::kThreads), F::kShared, shape.stream,
                  args);
}

template <int D>
int backward_hopper(const AttentionBwdParams& params) {
    const AttentionShape& shape = params.shape;
    HopperBwdArgs args;
    args.bwd = {params, {}, shape.scale * kLog2e};
    cudaError_t error = make_map(&args.q, params.q, shape, shape.t_q, kTile);
    if (error == cudaSuccess) error = make_map(&args.k, params.k, shape, shape.t_k, kTile);
    if (error == cudaSuccess) error = make_map(&args.v, params.v, shape, shape.t_k, kTile);
    if (error == cudaSuccess) error = make_map(&args.dout, params.dout, shape, shape.t_q, kTile);
    if (error != cudaSuccess) return error;
    return dispatch_half(shape.dtype, [&](auto t) {
        using T = decltype(t);
        const cudaError_t first = launch_bwd_hopper<T, HopperBwd<D, true>>(args);
        return first != cudaSuccess ? first : launch_bwd_hopper<T, HopperBwd<D, false>>(args);
    });
}

}  // namespace igpt::cuda::attention
