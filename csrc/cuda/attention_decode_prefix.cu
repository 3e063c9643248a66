// The part of attention_decode that is over a prefix of the keys which `group` rows share: every key and value is read
// once for 16 rows. It fills the prefix's slots of AttentionDecodeParams.partial, and attention_decode.cu does the
// rest.
//
//   scores (16 queries, keys) = q K^T, sums (16, dim) = p V by mma.sync of 16x8x16, in bfloat16 or float16 with float32
//   sums; p = 2^(score - m), rounded to the dtype, has m of the moment: the online softmax.
//
//   Launch: 4 warps for every (prefix, head, 16 rows, split of the keys); each warp takes 16 or 32 keys by turns and
//   has a softmax of its own; they are put together in shared memory in the warps' order.
//
//   Fragments come straight from global memory, 16 bytes a lane. A product's sum over dim is in any order, so the lane
//   with columns 2t, 2t + 1, 2t + 8, 2t + 9 of a step takes elements 8t to 8t + 7 for two steps, of q as of K. The
//   columns of p V are in any order, too: lane group g has elements 8g to 8g + 7, one for each of 8 products, and a
//   register's pair is two keys' elements, put together from two loads.
//
//   Bound by bytes: 2 * prefix * dim elements for every (prefix, head, 16 rows).
//
// Source: as attention_decode.cu; the shared prefix: Hydragen (Juravsky et al., 2024).
#include "attention_decode.cuh"
#include "launch.cuh"

namespace igpt::cuda {
namespace {

using namespace decode;

constexpr int kRows = 16;

template <typename T_, int kDim_>
struct Shape {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kUnits = kDim <= 64 ? 2 : 1;  // of 16 keys, for a warp at a time
    static constexpr int kTile = 16 * kUnits;
    static constexpr int kSteps = kDim / 16;        // of a score
    static constexpr int kWide = kDim / 64;         // columns of V in sixty-fours, 8 for each lane group
    static constexpr int kNarrow = kDim % 64 / 32;  // and in thirty-twos, 4 for each
    static constexpr int kProducts = kDim / 8;
    static constexpr int kPitch = kDim + 4;  // of a row of sums in shared memory
    static constexpr size_t kShared = kWarps * kRows * (kPitch + 2) * sizeof(float);
};

struct alignas(16) Words4 {
    uint32_t at[4];
};
struct alignas(8) Words2 {
    uint32_t at[2];
};

template <typename W, typename T>
__device__ __forceinline__ W load_words(const T* address) {
    return load_global(reinterpret_cast<const W*>(address));
}

// The same half of two registers as a register: element 2i (or 2i + 1) of two keys.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | (b << 16); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xffff0000u); }

// Where a block is.
struct Place {
    int64_t first_row, head, keys;  // keys: elements before the prefix's first
    int rows;                       // of the 16
    int begin, end;                 // keys of the split
    int split;

    __device__ __forceinline__ explicit Place(const AttentionDecodeParams& p) {
        const unsigned tiles = unsigned((p.group + kRows - 1) / kRows);
        const unsigned i = blockIdx.x / unsigned(p.prefix_splits), prefix_head = i / tiles;
        split = int(blockIdx.x % unsigned(p.prefix_splits));
        const int64_t tile = i % tiles;
        head = prefix_head % unsigned(p.heads);
        first_row = int64_t(prefix_head / unsigned(p.heads)) * p.group + tile * kRows;
        const int64_t left = p.group - tile * kRows;
        rows = left < kRows ? int(left) : kRows;
        keys = prefix_head / unsigned(p.heads) * p.prefix_row + head * p.prefix_head;
        const int share = (int(p.prefix) + p.prefix_splits - 1) / p.prefix_splits;
        begin = split * share;
        end = begin + share < p.prefix ? begin + share : int(p.prefix);
    }
};

// The lane's part of 16 queries: rows g and g + 8 of A for every step.
template <typename S>
__device__ __forceinline__ void load_queries(uint32_t (&a)[S::kSteps][4], const AttentionDecodeParams& p,
                                             const Place& place) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = place.first_row + g + 8 * half;
        const auto* q = static_cast<const typename S::T*>(p.q) + row * p.q_row + place.head * p.q_head;
#pragma unroll
        for (int i = 0; i < S::kSteps / 2; ++i) {
            Words4 words = {};
            if (g + 8 * half < place.rows) words = load_words<Words4>(q + 8 * (t + 4 * i));
#pragma unroll
            for (int w = 0; w < 4; ++w) a[2 * i + w / 2][half + 2 * (w % 2)] = words.at[w];
        }
    }
}

// A warp's keys and values of one turn: zeros behind the end, since a weight of 0 does not silence a NaN.
template <typename S>
struct Tile {
    Words4 k[2 * S::kUnits][S::kSteps / 2];
    Words4 wide[S::kUnits][4][S::kWide + 1];  // [unit][key]; one more than are used: none is no array
    Words2 narrow[S::kUnits][4];

    __device__ __forceinline__ void load(const typename S::T* keys, const typename S::T* values, int base, int end) {
        const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < 2 * S::kUnits; ++n) {
            const int key = base + 8 * n + g;
#pragma unroll
            for (int i = 0; i < S::kSteps / 2; ++i) {
                k[n][i] = {};
                if (key < end) k[n][i] = load_words<Words4>(keys + int64_t(key) * S::kDim + 8 * (t + 4 * i));
            }
        }
#pragma unroll
        for (int u = 0; u < S::kUnits; ++u) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = base + 16 * u + 2 * t + j % 2 + 8 * (j / 2);
                const typename S::T* value = values + int64_t(key) * S::kDim;
#pragma unroll
                for (int c = 0; c < S::kWide; ++c) {
                    wide[u][j][c] = {};
                    if (key < end) wide[u][j][c] = load_words<Words4>(value + 64 * c + 8 * g);
                }
                if constexpr (S::kNarrow > 0) {
                    narrow[u][j] = {};
                    if (key < end) narrow[u][j] = load_words<Words2>(value + 64 * S::kWide + 4 * g);
                }
            }
        }
    }
};

// The softmax of a warp's keys for the lane's rows, g and g + 8.
template <typename S>
struct State {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};  // l: of the lane's columns alone, until the end
    float sums[S::kProducts][4] = {};

    // scores: of keys base + 8n + 2t and the next one, for row g, then g + 8.
    __device__ __forceinline__ void add(float (&scores)[2 * S::kUnits][4], const Tile<S>& tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = m[half];
#pragma unroll
            for (int n = 0; n < 2 * S::kUnits; ++n) {
                largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
            const float factor = weight_of(m[half], largest);
            m[half] = largest;
            l[half] *= factor;
#pragma unroll
            for (int i = 0; i < S::kProducts; ++i) {
                sums[i][2 * half] *= factor;
                sums[i][2 * half + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < 2 * S::kUnits; ++n) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    scores[n][e] = weight_of(scores[n][e], largest);
                    l[half] += scores[n][e];
                }
            }
        }
#pragma unroll
        for (int u = 0; u < S::kUnits; ++u) multiply(scores[2 * u], scores[2 * u + 1], tile, u);
    }

    // sums += p V for 16 keys.
    __device__ __forceinline__ void multiply(const float (&low)[4], const float (&high)[4], const Tile<S>& tile,
                                             int u) {
        using T = typename S::T;
        const uint32_t p[4] = {ptx::pack2<T>(low[0], low[1]), ptx::pack2<T>(low[2], low[3]),
                               ptx::pack2<T>(high[0], high[1]), ptx::pack2<T>(high[2], high[3])};
#pragma unroll
        for (int c = 0; c < S::kWide; ++c) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                product(sums[8 * c + 2 * w], sums[8 * c + 2 * w + 1], p, tile.wide[u][0][c].at[w],
                        tile.wide[u][1][c].at[w], tile.wide[u][2][c].at[w], tile.wide[u][3][c].at[w]);
            }
        }
        if constexpr (S::kNarrow > 0) {
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                product(sums[8 * S::kWide + 2 * w], sums[8 * S::kWide + 2 * w + 1], p, tile.narrow[u][0].at[w],
                        tile.narrow[u][1].at[w], tile.narrow[u][2].at[w], tile.narrow[u][3].at[w]);
            }
        }
    }

    // Two columns: v0 to v3 hold them for the keys 2t, 2t + 1, 2t + 8, 2t + 9.
    __device__ __forceinline__ static void product(float (&even)[4], float (&odd)[4], const uint32_t (&p)[4],
                                                   uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
        ptx::mma_m16n8k16<typename S::T>(even, p, low_halves(v0, v1), low_halves(v2, v3));
        ptx::mma_m16n8k16<typename S::T>(odd, p, high_halves(v0, v1), high_halves(v2, v3));
    }
};

template <typename S>
__device__ __forceinline__ void score_tile(float (&scores)[2 * S::kUnits][4], const uint32_t (&q)[S::kSteps][4],
                                           const Tile<S>& tile, const int (&starts)[2], float scale, int base,
                                           int end) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2 * S::kUnits; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kSteps; ++i) {
            const Words4& words = tile.k[n][i / 2];
            ptx::mma_m16n8k16<typename S::T>(scores[n], q[i], words.at[2 * (i % 2)], words.at[2 * (i % 2) + 1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = base + 8 * n + 2 * t + e % 2;
            scores[n][e] = key < end && key >= starts[e / 2] ? scores[n][e] * scale : -INFINITY;
        }
    }
}

// A warp's sums and Stats into shared memory.
template <typename S>
__device__ __forceinline__ void store_warp(State<S>& state, float* sums, Stats* stats) {
    const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float l = state.l[half];
        l += __shfl_xor_sync(kFullMask, l, 1);
        l += __shfl_xor_sync(kFullMask, l, 2);
        const int row = warp * kRows + g + 8 * half;
        if (t == 0) store_shared(stats + row, Stats{state.m[half], l});
        // Columns 2t and 2t + 1 of a product are of the lane groups 2t and 2t + 1: 4 elements each at a time.
#pragma unroll
        for (int i = 0; i < S::kProducts; i += 4) {
            const bool wide = i < 8 * S::kWide;
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                const int e = 2 * half + column, at = 2 * t + column;
                const int element = wide ? 64 * (i / 8) + 8 * at + i % 8 : 64 * S::kWide + 4 * at;
                const float4 four =
                    make_float4(state.sums[i][e], state.sums[i + 1][e], state.sums[i + 2][e], state.sums[i + 3][e]);
                store_shared(reinterpret_cast<float4*>(sums + row * S::kPitch + element), four);
            }
        }
    }
}

// Puts the warps together, in their order, into the rows' slots.
template <typename S>
__device__ __forceinline__ void merge_block(const AttentionDecodeParams& p, const Place& place, const float* sums,
                                            const Stats* stats) {
    for (int i = threadIdx.x; i < place.rows * S::kDim; i += kThreads) {
        const int row = i / S::kDim, element = i % S::kDim;
        Stats all = {-INFINITY, 0.0f};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) all.m = fmaxf(all.m, load_shared(stats + w * kRows + row).m);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const Stats one = load_shared(stats + w * kRows + row);
            const float weight = weight_of(one.m, all.m);
            all.l += weight * one.l;
            sum += weight * load_shared(sums + (w * kRows + row) * S::kPitch + element);
        }
        const Slots slots(p, place.first_row + row, place.head);
        store_global(slots.at(place.split) + element, sum);
        if (element == 0) store_global(slots.stats + place.split, all);
    }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) attention_decode_prefix_kernel(AttentionDecodeParams p) {
    using T = typename S::T;
    float* sums = dynamic_shared<float>();
    Stats* stats = reinterpret_cast<Stats*>(sums + kWarps * kRows * S::kPitch);
    const Place place(p);
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    uint32_t q[S::kSteps][4];
    load_queries<S>(q, p, place);
    const int g = threadIdx.x % kWarpSize / 4;
    int starts[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = place.first_row + min(g + 8 * half, place.rows - 1);
        if (p.starts) starts[half] = load_global(p.starts + row);
    }
    // What no row sees is not read, for speed and because a weight of 0 does not silence a NaN.
    int first = min(starts[0], starts[1]);
#pragma unroll
    for (int lane = 4; lane < kWarpSize; lane *= 2) first = min(first, __shfl_xor_sync(kFullMask, first, lane));
    first = max(first, place.begin);
    const T* keys = static_cast<const T*>(p.prefix_k) + place.keys;
    const T* values = static_cast<const T*>(p.prefix_v) + place.keys;
    State<S> state;
    for (int base = first + int(threadIdx.x / kWarpSize) * S::kTile; base < place.end; base += kWarps * S::kTile) {
        Tile<S> tile;
        tile.load(keys, values, base, place.end);
        float scores[2 * S::kUnits][4];
        score_tile<S>(scores, q, tile, starts, p.scale * kLog2e, base, place.end);
        state.add(scores, tile);
    }
    if (p.dependent == Dependent::late) ptx::grid_dependency_launch();
    store_warp(state, sums, stats);
    __syncthreads();
    merge_block<S>(p, place, sums, stats);
}

template <typename T, int kDim>
int launch_dim(const AttentionDecodeParams& p, int64_t blocks) {
    using S = Shape<T, kDim>;
    return launch(attention_decode_prefix_kernel<S>, unsigned(blocks), kThreads, S::kShared, p.stream, p, 1,
                  p.dependent != Dependent::none);
}

template <typename T>
int launch_dtype(const AttentionDecodeParams& p, int64_t blocks) {
    if (p.dim == 32) return launch_dim<T, 32>(p, blocks);
    if (p.dim == 64) return launch_dim<T, 64>(p, blocks);
    if (p.dim == 96) return launch_dim<T, 96>(p, blocks);
    if (p.dim == 128) return launch_dim<T, 128>(p, blocks);
    return cudaErrorInvalidValue;
}

}  // namespace

int decode::launch_prefix(const AttentionDecodeParams& p) {
    if (p.prefix < 1 || p.prefix > kMostKeys || p.group < 1) return cudaErrorInvalidValue;
    const int64_t tiles = (p.group + kRows - 1) / kRows;
    const int64_t blocks = p.rows / p.group * p.heads * tiles * p.prefix_splits;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (p.dtype == DType::bf16) return launch_dtype<__nv_bfloat16>(p, blocks);
    if (p.dtype == DType::f16) return launch_dtype<__half>(p, blocks);
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
