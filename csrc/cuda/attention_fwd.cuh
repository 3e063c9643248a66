// Causal attention, forward:
//
//   S = scale Q K^T, where query i shows key j if j <= i + t_k - t_q and the key itself is shown (starts, key_mask)
//   out = softmax(S) V,  lse = log(sum over the shown keys of exp(S));  without a shown key out = 0, lse = -infinity
//
//   q, out (B, H, T_q, D), k, v (B, H, T_k, D) of one dtype, bfloat16 or float16, any strides but 1 for the last
//   dimension, rows aligned to 16 bytes; lse (B, H, T_q) float32, contiguous; starts (B,) int32; key_mask (B, T_k)
//   bytes. Scores, softmax and sums are in float32; its weights are rounded to the dtype for the product with V.
//   Launch: a block of 4 warps for 128 queries (64 where those fill no GPU, and with D of 128, for which registers do
//   not suffice), 16 or 32 to a warp, which keeps their part of out and the running maximum and sum in registers. K and
//   V pass through shared memory in tiles of 64 keys, the next one being copied while this one is used. Hidden keys are
//   not read: they are zeros in shared memory. Tiles beyond the last query and before `starts` are skipped; only a tile
//   with a hidden key in it pays for a mask. Bound by issue slots and the tensor cores: 4 T_q T_k D FLOPs for a head,
//   half of it causal, against 2 D (2 T_q + 2 T_k) bytes.
//
// Source: FlashAttention-2, algorithm 1 (Dao, 2023; arXiv 2307.08691).
#pragma once

#include "attention_common.cuh"

namespace igpt::cuda::attention {

struct FwdArgs {
    AttentionFwdParams p;
    Order order;
    float scale_log2;  // scale * log2(e): the softmax is in powers of 2
};

template <int D_, int R_>
struct Fwd {
    static constexpr int D = D_, R = R_, kRows = kTile * R;
    static constexpr bool kHeld = R == 1 || D < 96;            // the queries in registers, where there is room for them
    static constexpr int kBlocks = R == 1 && D <= 64 ? 3 : 2;  // that an SM shall hold
    static constexpr int kShared = (R + 4) * Tile<D>::kBytes;  // Q; K and V, twice
};

// The softmax of a lane's rows so far: their maximum in powers of 2, the lane's part of their sums.
template <int R>
struct Softmax {
    float maximum[R][2], sum[R][2];

    __device__ __forceinline__ Softmax() {
        each_row<R>([&](int r, int i) {
            maximum[r][i] = -INFINITY;
            sum[r][i] = 0.0f;
        });
    }

    // Turns row (r, i) of the scores into weights; gives what all before has to be multiplied with.
    template <int N>
    __device__ __forceinline__ float update(float (&s)[R][N][4], int r, int i, float scale_log2) {
        float top = s[r][0][2 * i];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[r][n][2 * i], s[r][n][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
        top = fmaxf(maximum[r][i], top * scale_log2);
        const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen no key yet
        const float before = ptx::exp2_approx(maximum[r][i] - base);
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) {
                s[r][n][e] = ptx::exp2_approx(__fmaf_rn(s[r][n][e], scale_log2, -base));
                total += s[r][n][e];
            }
        }
        maximum[r][i] = top;
        sum[r][i] = sum[r][i] * before + total;
        return before;
    }

    // The whole row's sum.
    __device__ __forceinline__ float total(int r, int i) const {
        float x = sum[r][i];
        x += __shfl_xor_sync(kFullMask, x, 1);
        return x + __shfl_xor_sync(kFullMask, x, 2);
    }

    // What the row's weighted values have to be multiplied with; writes its lse, where it is one of `end`.
    __device__ __forceinline__ float finish(int r, int i, float* lse, int row, int end) const {
        const float x = total(r, i);
        if (threadIdx.x % 4 == 0 && row < end) {
            store_global(lse + row, x == 0.0f ? -INFINITY : (maximum[r][i] + log2f(x)) * kLn2);
        }
        return x == 0.0f ? 0.0f : 1.0f / x;
    }
};

template <typename T, int D, int R>
__global__ void __launch_bounds__(kThreads, (Fwd<D, R>::kBlocks)) attention_fwd_kernel(const FwdArgs args) {
    using F = Fwd<D, R>;
    using L = Tile<D>;
    const AttentionShape& shape = args.p.shape;
    const Block block = find_block(args.order, shape.heads);
    const int q0 = (int(args.order.tiles) - 1 - block.tile) * F::kRows;  // the last ones see the most keys
    const int past = shape.t_k - shape.t_q;
    const int warp_row = threadIdx.x / kWarpSize * 16 * R;
    const int last = q0 + warp_row + past;  // the last key of the warp's first query

    unsigned char* const shared = dynamic_shared<unsigned char>();
    const uint32_t q_tile = ptx::shared_address(shared), kv_tiles = q_tile + R * L::kBytes;
    Keys keys(shape, block.batch);
    const int first = keys.start / kTile * kTile, end = min(shape.t_k, q0 + F::kRows + past);
    const Loader<T, D> k(args.p.k, block.batch, block.head), v(args.p.v, block.batch, block.head);
    if (first < end) {
        const Loader<T, D> q(args.p.q, block.batch, block.head);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int row = q0 + r * kTile;
            q.load(q_tile + r * L::kBytes, row, bits_between(row, keys.start - past, shape.t_q));
        }
        const uint64_t bits = keys.bits(first);
        k.load(kv_tiles, first, bits);
        v.load(kv_tiles + L::kBytes, first, bits);
        ptx::cp_async_commit();
    }

    OwnRows<D, R, F::kHeld> queries(q_tile + warp_row * L::kRowBytes);
    Softmax<R> softmax;
    float out[R][D / 8][4];
    clear(out);
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
        if (n0 == first) queries.load();       // they came with the first tile
        if (n0 > last + 16 * R - 1) continue;  // beyond all queries of the warp

        const uint64_t bits = keys.bits(n0);
        const bool some_hidden = bits != kAll || n0 + kTile - 1 > last;
        float s[R][kTile / 8][4];
        clear(s);
        multiply<T>(s, queries, here + L::crossed());
        if (some_hidden) {
            each_row<R>([&](int r, int i) { hide(s, r, i, bits & bits_below(last + own_row(r, i) - n0 + 1)); });
        }
        each_row<R>([&](int r, int i) {
            const float before = softmax.update(s, r, i, args.scale_log2);
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                out[r][d][2 * i] *= before;
                out[r][d][2 * i + 1] *= before;
            }
        });
        accumulate<T, D>(out, s, here + L::kBytes + L::straight());
    }

    float factor[R][2];
    float* const lse = args.p.lse + (int64_t(block.batch) * shape.heads + block.head) * shape.t_q;
    each_row<R>(
        [&](int r, int i) { factor[r][i] = softmax.finish(r, i, lse, q0 + warp_row + own_row(r, i), shape.t_q); });
    store_rows<T, D, R>(out, factor, shared + warp_row * L::kRowBytes, head_of<T>(args.p.out, block.batch, block.head),
                        args.p.out.position, q0 + warp_row, shape.t_q);
}

template <int D, int R>
int launch_forward(const AttentionFwdParams& params) {
    using F = Fwd<D, R>;
    const AttentionShape& shape = params.shape;
    const FwdArgs args{params, make_order(shape, tiles_of(shape.t_q, F::kRows), int64_t(shape.t_k) * D * 4),
                       shape.scale * kLog2e};
    return dispatch_half(shape.dtype, [&](auto t) {
        return launch_blocks(attention_fwd_kernel<decltype(t), D, R>, blocks(args.order), F::kShared, shape.stream,
                             args);
    });
}

template <int D>
int forward(const AttentionFwdParams& params) {
    const AttentionShape& shape = params.shape;
    constexpr int64_t kFull = 264;  // two blocks for each of an H100's SMs
    const bool fills = tiles_of(shape.t_q, 2 * kTile) * shape.batch * shape.heads >= kFull;
    const int rows = params.rows > 0 ? params.rows : D < 128 && fills ? 2 * kTile : kTile;
    if (rows == kTile) return launch_forward<D, 1>(params);
    if constexpr (D < 128) {
        if (rows == 2 * kTile) return launch_forward<D, 2>(params);
    }
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda::attention
