// Causal attention, backward. With S, lse, starts and key_mask as in attention_fwd.cuh:
//
//   P = exp(S - lse), 0 for a hidden key;  dP = dout V^T;  delta = rowsum(dout * out);  dS = P * (dP - delta)
//   dv = P^T dout,  dk = scale dS^T Q,  dq = scale dS K;  0 for a hidden key and for a query that is shown none
//
//   q, out, dout, dq (B, H, T_q, D), k, v, dk, dv (B, H, T_k, D) of one dtype, bfloat16 or float16, any strides but 1
//   for the last dimension, rows aligned to 16 bytes; lse (B, H, T_q) float32, contiguous; terms (B, H, T_q, 2)
//   float32, to work in: for each query what the other kernels need of lse, in powers of 2, and delta. P and dS are in
//   float32 and rounded to the dtype for the products.
//   Launch: three kernels. attention_terms_kernel has four lanes for a query. attention_dkv_kernel has a block for 128
//   keys (64 for D of 96 and 128), which runs over tiles of 64 queries; attention_dq_kernel one for as many queries,
//   which runs over tiles of 64 keys: in both the sums stay in the registers of the warp that owns the rows, and P and
//   dS go from one product into the next without shared memory. A key's rows are a warp's own in the former, so that
//   hidden keys need no mask there: their sums are dropped. Hidden keys, and the queries before the first key that is
//   shown, are zeros in shared memory and are not read.
//   Bound by the tensor cores: 7 products of T_q T_k D multiply-adds a head, half of it causal.
//
// Seven products and not five: S and dP are formed in both kernels. One kernel for all three gradients has to add up dq
// across blocks, either by float atomics, whose order changes from run to run, or by waiting for one another in turn,
// or through partial sums in memory: T_k / 128 tensors of the size of dq in float32, whose traffic costs about what
// the two products do at T = 1024. As it is, nothing is added across blocks, and the same input gives the same bits;
// there is no faster mode that does not.
//
// Source: FlashAttention-2, algorithm 2 (Dao, 2023; arXiv 2307.08691), with dq in a kernel of its own. Where Hopper's
// own instructions can be used, attention_bwd_hopper.cuh follows on attention_terms_kernel.
#pragma once

#include "attention_common.cuh"

namespace igpt::cuda::attention {

struct BwdArgs {
    AttentionBwdParams p;
    Order order;
    float scale_log2;  // scale * log2(e)
};

template <int D_>
struct Bwd {
    static constexpr int D = D_, R = D <= 64 ? 2 : 1, kRows = kTile * R;
    // Columns of S and dP at a time, so that the registers hold them.
    static constexpr int kStepDkv = D == 64 || D == 128 ? 16 : 32, kStepDq = 32;
    static constexpr bool kHeld = D == 32;  // the own rows in registers
    static constexpr int kBlocks = 2;       // that an SM shall hold
    static constexpr int kTerms = kTile * int(sizeof(float2));
    static constexpr int kSharedDq = (2 * R + 4) * Tile<D>::kBytes;  // q and dout; k and v, twice
    static constexpr int kSharedDkv = kSharedDq + 2 * kTerms;        // k and v; q, dout and terms, twice
};

// What a query that is shown no key, or is none, has for lse: every P becomes 0.
constexpr float kNoKey = INFINITY;

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) attention_terms_kernel(const BwdArgs args) {
    using V = Vector<T>;
    constexpr int kLanes = 4, kQueries = kThreads / kLanes;
    const AttentionShape& shape = args.p.shape;
    const uint32_t parts = args.order.tiles, pair = blockIdx.x / parts;
    const int batch = int(pair / uint32_t(shape.heads)), head = int(pair % uint32_t(shape.heads));
    const int lane = threadIdx.x % kLanes;
    const int query = int(blockIdx.x % parts) * kQueries + int(threadIdx.x / kLanes);
    float delta = 0.0f;
    if (query < shape.t_q) {
        const V* out =
            reinterpret_cast<const V*>(head_of<const T>(args.p.out, batch, head) + query * args.p.out.position);
        const V* dout =
            reinterpret_cast<const V*>(head_of<const T>(args.p.dout, batch, head) + query * args.p.dout.position);
#pragma unroll
        for (int i = 0; i < D / 8 / kLanes; ++i) {
            const V a = load_global(out + i * kLanes + lane), b = load_global(dout + i * kLanes + lane);
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) delta = __fmaf_rn(to_float(a.at[e]), to_float(b.at[e]), delta);
        }
    }
    delta += __shfl_xor_sync(kFullMask, delta, 1);
    delta += __shfl_xor_sync(kFullMask, delta, 2);
    if (lane == 0 && query < shape.t_q) {
        const int64_t row = int64_t(pair) * shape.t_q + query;
        const float lse = load_global(args.p.lse + row);
        // A query that is shown no key has no part in anything, be its upstream gradient NaN.
        const float2 terms = lse == -INFINITY ? make_float2(kNoKey, 0.0f) : make_float2(lse * kLog2e, delta);
        store_global(reinterpret_cast<float2*>(args.p.terms) + row, terms);
    }
}

// A query's terms; those of none where there is no such query.
__device__ __forceinline__ float2 load_terms(const BwdArgs& args, const Block& block, int query) {
    const AttentionShape& shape = args.p.shape;
    if (query >= shape.t_q) return make_float2(kNoKey, 0.0f);
    const int64_t row = (int64_t(block.batch) * shape.heads + block.head) * shape.t_q + query;
    return load_global(reinterpret_cast<const float2*>(args.p.terms) + row);
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, Bwd<D>::kBlocks) attention_dq_kernel(const BwdArgs args) {
    using K = Bwd<D>;
    using L = Tile<D>;
    constexpr int R = K::R;
    const AttentionShape& shape = args.p.shape;
    const Block block = find_block(args.order, shape.heads);
    const int q0 = (int(args.order.tiles) - 1 - block.tile) * K::kRows;
    const int past = shape.t_k - shape.t_q;
    const int warp_row = threadIdx.x / kWarpSize * 16 * R;
    const int last = q0 + warp_row + past;  // the last key of the warp's first query

    unsigned char* const shared = dynamic_shared<unsigned char>();
    const uint32_t q_tile = ptx::shared_address(shared), dout_tile = q_tile + R * L::kBytes;
    const uint32_t kv_tiles = dout_tile + R * L::kBytes;
    Keys keys(shape, block.batch);
    keys.skip_hidden();  // q and dout of a query that is shown no key, be they NaN, become zeros
    const int first = keys.start / kTile * kTile, end = min(shape.t_k, q0 + K::kRows + past);
    const Loader<T, D> k(args.p.k, block.batch, block.head), v(args.p.v, block.batch, block.head);
    if (first < end) {
        const Loader<T, D> q(args.p.q, block.batch, block.head), dout(args.p.dout, block.batch, block.head);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int row = q0 + r * kTile;
            const uint64_t rows = bits_between(row, keys.start - past, shape.t_q);
            q.load(q_tile + r * L::kBytes, row, rows);
            dout.load(dout_tile + r * L::kBytes, row, rows);
        }
        const uint64_t bits = keys.bits(first);
        k.load(kv_tiles, first, bits);
        v.load(kv_tiles + L::kBytes, first, bits);
        ptx::cp_async_commit();
    }

    float lse[R][2], delta[R][2];
    each_row<R>([&](int r, int i) {
        const float2 terms = load_terms(args, block, q0 + warp_row + own_row(r, i));
        lse[r][i] = terms.x;
        delta[r][i] = terms.y;
    });
    OwnRows<D, R, K::kHeld> queries(q_tile + warp_row * L::kRowBytes), douts(dout_tile + warp_row * L::kRowBytes);
    float dq[R][D / 8][4];
    clear(dq);
    uint32_t tile = 0;  // the stage that is used, in bytes
    for (int n0 = first; n0 < end; n0 += kTile) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        const uint32_t here = kv_tiles + tile;
        tile = 2 * L::kBytes - tile;
        if (n0 + kTile < end) {
            const uint64_t bits = keys.bits(n0 + kTile);
            k.load(kv_tiles + tile, n0 + kTile, bits);
            v.load(kv_tiles + tile + L::kBytes, n0 + kTile, bits);
            ptx::cp_async_commit();
        }
        if (n0 == first) {  // they came with the first tile
            queries.load();
            douts.load();
        }
        if (n0 > last + 16 * R - 1) continue;  // beyond all queries of the warp

        const uint64_t bits = keys.bits(n0);
        const bool some_hidden = bits != kAll || n0 + kTile - 1 > last;
#pragma unroll 1  // the registers hold S and dP of one step
        for (int step = 0; step < kTile; step += K::kStepDq) {
            const uint32_t rows = here + step * L::kRowBytes;
            float s[R][K::kStepDq / 8][4], ds[R][K::kStepDq / 8][4];
            clear(s);
            multiply<T>(s, queries, rows + L::crossed());
            if (some_hidden) {
                each_row<R>(
                    [&](int r, int i) { hide(s, r, i, (bits & bits_below(last + own_row(r, i) - n0 + 1)) >> step); });
            }
            each_element<R, K::kStepDq / 8>([&](int r, int n, int e) { ds[r][n][e] = -delta[r][e / 2]; });
            multiply<T>(ds, douts, rows + L::kBytes + L::crossed());
            each_element<R, K::kStepDq / 8>([&](int r, int n, int e) {
                ds[r][n][e] *= ptx::exp2_approx(__fmaf_rn(s[r][n][e], args.scale_log2, -lse[r][e / 2]));
            });
            accumulate<T, D>(dq, ds, rows + L::straight());
        }
    }

    float factor[R][2];
#pragma unroll
    for (int r = 0; r < R; ++r) factor[r][0] = factor[r][1] = shape.scale;
    store_rows<T, D, R>(dq, factor, shared + warp_row * L::kRowBytes, head_of<T>(args.p.dq, block.batch, block.head),
                        args.p.dq.position, q0 + warp_row, shape.t_q);
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, Bwd<D>::kBlocks) attention_dkv_kernel(const BwdArgs args) {
    using K = Bwd<D>;
    using L = Tile<D>;
    constexpr int R = K::R;
    const AttentionShape& shape = args.p.shape;
    const Block block = find_block(args.order, shape.heads);
    const int n0 = block.tile * K::kRows;  // the first ones are seen by the most queries
    const int past = shape.t_k - shape.t_q;
    const int warp_row = threadIdx.x / kWarpSize * 16 * R;
    const int own = n0 + warp_row - past;  // the first query that is shown the warp's first key

    unsigned char* const shared = dynamic_shared<unsigned char>();
    const uint32_t k_tile = ptx::shared_address(shared), v_tile = k_tile + R * L::kBytes;
    const uint32_t q_tiles = v_tile + R * L::kBytes;
    float2* const all_terms = reinterpret_cast<float2*>(shared + (2 * R + 4) * L::kBytes);
    Keys keys(shape, block.batch);
    keys.skip_hidden();  // q and dout of a query that is shown no key, be they NaN, become zeros
    uint64_t shown[R], any = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        shown[r] = keys.bits(n0 + r * kTile);
        any |= shown[r];
    }
    const int begin = max(0, keys.start - past);  // queries before see no key
    const int first = max(begin, n0 - past) / kTile * kTile, end = any == 0 ? first : shape.t_q;
    const Loader<T, D> q(args.p.q, block.batch, block.head), dout(args.p.dout, block.batch, block.head);
    float2 terms = make_float2(kNoKey, 0.0f);  // of query threadIdx.x of the next tile
    if (first < end) {
        const Loader<T, D> k(args.p.k, block.batch, block.head), v(args.p.v, block.batch, block.head);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            k.load(k_tile + r * L::kBytes, n0 + r * kTile, shown[r]);
            v.load(v_tile + r * L::kBytes, n0 + r * kTile, shown[r]);
        }
        const uint64_t rows = bits_between(first, begin, shape.t_q);
        q.load(q_tiles, first, rows);
        dout.load(q_tiles + L::kBytes, first, rows);
        ptx::cp_async_commit();
        if (threadIdx.x < kTile) terms = load_terms(args, block, first + threadIdx.x);
    }

    OwnRows<D, R, K::kHeld> k_rows(k_tile + warp_row * L::kRowBytes), v_rows(v_tile + warp_row * L::kRowBytes);
    float dk[R][D / 8][4], dv[R][D / 8][4];
    clear(dk);
    clear(dv);
    uint32_t tile = 0;  // the stage that is used, in bytes
    for (int i0 = first; i0 < end; i0 += kTile) {
        float2* const here_terms = all_terms + (tile ? kTile : 0);
        if (threadIdx.x < kTile) store_shared(here_terms + threadIdx.x, terms);
        ptx::cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        const uint32_t here = q_tiles + tile;
        tile = 2 * L::kBytes - tile;
        if (i0 + kTile < end) {
            const uint64_t rows = bits_between(i0 + kTile, begin, shape.t_q);
            q.load(q_tiles + tile, i0 + kTile, rows);
            dout.load(q_tiles + tile + L::kBytes, i0 + kTile, rows);
            ptx::cp_async_commit();
            if (threadIdx.x < kTile) terms = load_terms(args, block, i0 + kTile + threadIdx.x);
        }
        if (i0 == first) {  // they came with the first tile
            k_rows.load();
            v_rows.load();
        }
        if (i0 + kTile - 1 < own) continue;  // before all keys of the warp

        const bool some_hidden = i0 < own + 16 * R - 1;
#pragma unroll 1  // the registers hold S and dP of one step
        for (int step = 0; step < kTile; step += K::kStepDkv) {
            const uint32_t rows = here + step * L::kRowBytes;
            float p[R][K::kStepDkv / 8][4], ds[R][K::kStepDkv / 8][4];
            clear(p);
            multiply<T>(p, k_rows, rows + L::crossed());
            if (some_hidden) {
                each_row<R>([&](int r, int i) { hide(p, r, i, bits_from(own + own_row(r, i) - i0) >> step); });
            }
#pragma unroll
            for (int n = 0; n < K::kStepDkv / 8; ++n) {
                // lse and delta of the two queries of a lane's columns.
                const float4 two =
                    load_shared(reinterpret_cast<const float4*>(here_terms + step + 8 * n) + threadIdx.x % 4);
#pragma unroll
                for (int r = 0; r < R; ++r) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        p[r][n][e] = ptx::exp2_approx(__fmaf_rn(p[r][n][e], args.scale_log2, -(e % 2 ? two.z : two.x)));
                        ds[r][n][e] = -(e % 2 ? two.w : two.y);
                    }
                }
            }
            multiply<T>(ds, v_rows, rows + L::kBytes + L::crossed());
            accumulate<T, D>(dv, p, rows + L::kBytes + L::straight());
            each_element<R, K::kStepDkv / 8>([&](int r, int n, int e) { ds[r][n][e] *= p[r][n][e]; });
            accumulate<T, D>(dk, ds, rows + L::straight());
        }
    }

    float scale[R][2], one[R][2];
    each_row<R>([&](int r, int i) {
        const int row = warp_row + own_row(r, i);  // of the block's tile; which of its masks is known with R = 1 only
        const uint64_t bits = R == 2 && row >= kTile ? shown[R - 1] : shown[0];
        const bool is_shown = bits >> (row % kTile) & 1;
        scale[r][i] = is_shown ? shape.scale : 0.0f;
        one[r][i] = is_shown ? 1.0f : 0.0f;
    });
    unsigned char* const rows = shared + warp_row * L::kRowBytes;
    store_rows<T, D, R>(dk, scale, rows, head_of<T>(args.p.dk, block.batch, block.head), args.p.dk.position,
                        n0 + warp_row, shape.t_k);
    store_rows<T, D, R>(dv, one, rows + R * L::kBytes, head_of<T>(args.p.dv, block.batch, block.head),
                        args.p.dv.position, n0 + warp_row, shape.t_k);
}

inline BwdArgs make_bwd_args(const AttentionBwdParams& params, int64_t rows, int64_t tile, int64_t shared_rows) {
    const AttentionShape& shape = params.shape;
    return {params, make_order(shape, tiles_of(rows, tile), shared_rows * shape.head_dim * 4), shape.scale * kLog2e};
}

template <int D>
int backward_terms(const AttentionBwdParams& params) {
    const AttentionShape& shape = params.shape;
    const BwdArgs args = make_bwd_args(params, shape.t_q, kThreads / 4, 0);
    return dispatch_half(shape.dtype, [&](auto t) {
        return launch_blocks(attention_terms_kernel<decltype(t), D>, blocks(args.order), 0, shape.stream, args);
    });
}

template <int D>
int backward(const AttentionBwdParams& params) {
    using K = Bwd<D>;
    const AttentionShape& shape = params.shape;
    const BwdArgs dkv = make_bwd_args(params, shape.t_k, K::kRows, shape.t_q),
                  dq = make_bwd_args(params, shape.t_q, K::kRows, shape.t_k);
    return dispatch_half(shape.dtype, [&](auto t) {
        using T = decltype(t);
        const cudaError_t error =
            launch_blocks(attention_dkv_kernel<T, D>, blocks(dkv.order), K::kSharedDkv, shape.stream, dkv);
        if (error != cudaSuccess) return error;
        return launch_blocks(attention_dq_kernel<T, D>, blocks(dq.order), K::kSharedDq, shape.stream, dq);
    });
}

}  // namespace igpt::cuda::attention
