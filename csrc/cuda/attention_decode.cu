// Attention of one new position of each sequence against its cache, into which the new key and value are written.
//
//   out[b, h] = softmax(scale * q[b, h] . K) V over the keys that row b sees: of prefix b / group, then of the cache at
//   0 to position, without the first starts[b] of them all. Zero where it sees none. If the position is outside the
//   cache, nothing is written and out is NaN.
//
//   q, k, v, out (rows, heads, dim); k_cache, v_cache (rows, heads, positions, dim); prefix (rows / group, heads,
//   prefix, dim). float32 (without prefix), bfloat16, float16; sums and softmax in float32. position and starts are
//   read by the kernels alone, so that a captured graph goes on as they change.
//
//   With v_scale (rows, heads, positions), float32, v_cache is in e4m3: V = v_scale * v_cache. The new value goes into
//   it with the scale max |v| / 448: codes of v / scale, or 0 where all is 0. A NaN or an infinity among its elements
//   makes the scale and all its codes NaN. So with k_scale, which comes with v_scale: K = k_scale * k_cache, the new
//   key among them as it is kept.
//
//   Launch: `splits` blocks of 4 warps for every (row, head), more than one where these are few. 2, 4 or 8 lanes have
//   a key, 16 bytes at a time; a warp's load is contiguous, and a thread has its part of 2 or 4 keys and their values
//   on the way at once. A vector of e4m3 has twice the elements: where a value has fewer of them than the group has
//   lanes, these have the values of two keys at a time. Each such group of lanes has a softmax of its own, in order;
//   they are put together by shuffles, the warps' in shared memory, the blocks' by a second kernel: no atomics, an
//   order that depends on nothing but the position. The block whose part ends at the position takes the new key and
//   value from registers, and nothing is read that this launch writes. Blocks beyond the position end at once. The
//   prefix: attention_decode_prefix.cu.
//
//   Bound by bytes: 2 * (position + 1) * dim elements for every (row, head), those in e4m3 of one byte.
//
// Source: the online softmax of Milakov & Gimelshein, 2018; its split over keys: Flash-Decoding (Dao et al., 2023).
#include "attention_decode.cuh"
#include "attention_decode_vectors.cuh"
#include "launch.cuh"

namespace igpt::cuda {
namespace {

using namespace decode;

// As many as share a key of so many vectors.
constexpr int lanes_of(int vectors) { return vectors % 8 == 0 ? 8 : vectors % 4 == 0 ? 4 : 2; }

template <typename T_, typename StoredKey, typename StoredValue, int kDim_>
struct Shape {
    using T = T_;
    static constexpr int kDim = kDim_;
    static constexpr int kLanes = lanes_of(kDim / Vector<StoredKey>::kSize);
    using Keys = Layout<T, StoredKey, kDim, kLanes>;
    using Values = Layout<T, StoredValue, kDim, kLanes>;
    static constexpr int kTogether = Values::kTogether, kGroups = Keys::kGroups;
    // Keys after one another, loaded at once with their values.
    static constexpr int kFewest = Keys::kScaled ? 4 : kKeys / kGroups;
    static constexpr int kUnroll = Keys::kVectors == 1 ? kFewest : 2;
    static constexpr int kSpan = kGroups * kUnroll;
    static constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;  // for a multiprocessor, at least
    static constexpr size_t kShared = kWarps * (kTogether * kDim + 2) * sizeof(float);
    static_assert(Keys::kTogether == 1 && kUnroll % kTogether == 0);
};

// The softmax of the keys that a group of lanes has seen. sums: of the lane's elements.
template <typename S>
struct State {
    float m = -INFINITY, l = 0.0f;
    float sums[S::Values::kElements] = {};

    // The score of a key in every lane of its group; q is scaled.
    __device__ __forceinline__ static float score(const float (&q)[S::Keys::kElements],
                                                  const Cached<typename S::Keys>& k) {
        constexpr int kSize = S::Keys::Codes::kSize;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::Keys::kVectors; ++i) {
            float numbers[kSize];
            k.get(i, numbers);
#pragma unroll
            for (int e = 0; e < kSize; ++e) sum += q[i * kSize + e] * numbers[e];
        }
#pragma unroll
        for (int lane = 1; lane < S::kLanes; lane *= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
        if constexpr (S::Keys::kScaled) sum *= k.scales[0];
        return sum;
    }

    // Takes N keys in, whose scores it makes weights; a score of -infinity stands for none.
    template <int N>
    __device__ __forceinline__ void add(float (&scores)[N],
                                        const Cached<typename S::Values> (&values)[N / S::kTogether]) {
        constexpr int kSize = S::Values::Codes::kSize;
        float largest = m;
#pragma unroll
        for (int n = 0; n < N; ++n) largest = fmaxf(largest, scores[n]);
        rescale(largest);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            scores[n] = weight_of(scores[n], m);
            l += scores[n];
        }
#pragma unroll
        for (int n = 0; n < N; n += S::kTogether) {
            const auto& some = values[n / S::kTogether];
#pragma unroll
            for (int i = 0; i < S::Values::kVectors; ++i) {
                const float p = some.weight(scores + n, i);
                float numbers[kSize];
                some.get(i, numbers);
#pragma unroll
                for (int e = 0; e < kSize; ++e) sums[i * kSize + e] += p * numbers[e];
            }
        }
    }

    __device__ __forceinline__ void rescale(float largest) {
        const float factor = weight_of(m, largest);
        m = largest;
        l *= factor;
#pragma unroll
        for (int i = 0; i < S::Values::kElements; ++i) sums[i] *= factor;
    }

    // Puts the warp's groups together, in every one of them.
    __device__ __forceinline__ void merge_warp() {
        float largest = m;
#pragma unroll
        for (int lane = S::kLanes; lane < kWarpSize; lane *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, lane));
        }
        rescale(largest);
#pragma unroll
        for (int lane = S::kLanes; lane < kWarpSize; lane *= 2) {
            l += __shfl_xor_sync(kFullMask, l, lane);
#pragma unroll
            for (int i = 0; i < S::Values::kElements; ++i) sums[i] += __shfl_xor_sync(kFullMask, sums[i], lane);
        }
    }
};

// The caches of a (row, head).
template <typename S>
struct Caches {
    void *keys, *values;
    float *key_scales, *value_scales;

    __device__ __forceinline__ Caches(const AttentionDecodeParams& p, unsigned row_head) {
        const int64_t first = int64_t(row_head) * p.positions;
        keys = offset(p.k_cache, first * S::kDim, sizeof(typename S::Keys::Stored));
        values = offset(p.v_cache, first * S::kDim, sizeof(typename S::Values::Stored));
        key_scales = S::Keys::kScaled ? p.k_scale + first : nullptr;
        value_scales = S::Values::kScaled ? p.v_scale + first : nullptr;
    }
};

// Takes the cached keys from `begin` to `end` in.
template <typename S>
__device__ __forceinline__ void add_cached(State<S>& state, const float (&q)[S::Keys::kElements],
                                           const Caches<S>& caches, int begin, int end) {
    const int group = int(threadIdx.x) / S::kLanes;
    for (int base = begin; base < end; base += S::kSpan) {
        Cached<typename S::Keys> k[S::kUnroll];
        Cached<typename S::Values> v[S::kUnroll / S::kTogether];
#pragma unroll
        for (int u = 0; u < S::kUnroll; ++u) {
            const int key = base + u * S::kGroups + group;
            auto& values = v[u / S::kTogether];
            if (key < end) {
                k[u].load(caches.keys, caches.key_scales, key, end);
                if (u % S::kTogether == 0) values.load(caches.values, caches.value_scales, key, end);
            } else {
                k[u].clear();
                if (u % S::kTogether == 0) values.clear();
            }
        }
        float scores[S::kUnroll];
#pragma unroll
        for (int u = 0; u < S::kUnroll; ++u) {
            const float score = State<S>::score(q, k[u]);
            scores[u] = base + u * S::kGroups + group < end ? score : -INFINITY;
        }
        state.add(scores, v);
    }
}

// Writes the new key and value into the caches, and takes them in as these keep them.
template <typename S>
__device__ __forceinline__ void add_new(State<S>& state, const float (&q)[S::Keys::kElements],
                                        const New<typename S::Keys>& k, const New<typename S::Values>& v,
                                        const Caches<S>& caches, const Own& own) {
    Cached<typename S::Keys> key;
    Cached<typename S::Values> values[1];
    k.keep(key);
    float scores[S::kTogether];
#pragma unroll
    for (int n = 0; n < S::kTogether; ++n) scores[n] = -INFINITY;
    scores[0] = State<S>::score(q, key);
    v.keep(values[0]);
    if (threadIdx.x >= S::kLanes) return;
    key.store(caches.keys, own.position);
    values[0].store(caches.values, own.position);
    if (threadIdx.x == 0) {
        if constexpr (S::Keys::kScaled) store_global(caches.key_scales + own.position, key.scales[0]);
        if constexpr (S::Values::kScaled) store_global(caches.value_scales + own.position, values[0].scales[0]);
    }
    if (own.sees_it) state.add(scores, values);
}

// Puts the block's warps together. Thread i < dim has element i of the sum, all have the Stats.
template <typename S>
__device__ __forceinline__ float merge_block(State<S>& state, Stats& stats) {
    float* sums = dynamic_shared<float>();
    using Piece = Cached<typename S::Values>;
    constexpr int kWarpSums = S::kTogether * S::kDim, kSize = S::Values::Codes::kSize;
    Stats* all = reinterpret_cast<Stats*>(sums + kWarps * kWarpSums);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    state.merge_warp();
    if (lane < S::kLanes) {
#pragma unroll
        for (int i = 0; i < S::Values::kElements; i += 4) {
            const float4 four = make_float4(state.sums[i], state.sums[i + 1], state.sums[i + 2], state.sums[i + 3]);
            const int vector = i / kSize;
            const int element = Piece::which(vector) * S::kDim + Piece::start(vector) + i % kSize;
            store_shared(reinterpret_cast<float4*>(sums + warp * kWarpSums + element), four);
        }
    }
    if (lane == 0) store_shared(all + warp, Stats{state.m, state.l});
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
#pragma unroll
        for (int n = 0; n < S::kTogether; ++n) {
            const float* part = sums + w * kWarpSums + n * S::kDim;
            if (threadIdx.x < S::kDim) sum += weight * load_shared(part + threadIdx.x);
        }
    }
    return sum;
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) attention_decode_kernel(AttentionDecodeParams p) {
    using T = typename S::T;
    const unsigned row_head = blockIdx.x / unsigned(p.splits), row = row_head / unsigned(p.heads);
    const int split = int(blockIdx.x % unsigned(p.splits));
    const int64_t head = row_head % unsigned(p.heads);
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();  // before every return: the next launch counts on this one having waited
    New<typename S::Keys> q, k;   // on their way while the position is
    New<typename S::Values> v;
    q.load(offset(p.q, row * p.q_row + head * p.q_head, sizeof(T)));
    k.load(offset(p.k, row * p.k_row + head * p.k_head, sizeof(T)));
    v.load(offset(p.v, row * p.v_row + head * p.v_head, sizeof(T)));
    const Own own(p, row);
    if (split >= own.parts || (!own.valid && slots_of(p) > 1)) return;
    State<S> state;
    if (own.valid) {
        constexpr int kSize = S::Keys::Codes::kSize;
        float scaled[S::Keys::kElements];
#pragma unroll
        for (int i = 0; i < S::Keys::kElements; ++i) scaled[i] = q.get(i / kSize, i % kSize) * (p.scale * kLog2e);
        const Caches<S> caches(p, row_head);
        const bool has_new = split == own.parts - 1;  // of all the block's threads
        if (has_new) add_new(state, scaled, k, v, caches, own);
        const int begin = own.first + split * own.chunk;
        add_cached(state, scaled, caches, begin, has_new ? own.position : begin + own.chunk);
    }
    Stats stats;
    const float sum = merge_block(state, stats);
    if (p.dependent == Dependent::late) ptx::grid_dependency_launch();
    if (slots_of(p) == 1) {
        if (threadIdx.x < S::kDim) store_out<T>(p, row_head, int(threadIdx.x), own.valid, sum, stats.l);
        return;
    }
    const Slots slots(p, row, head);
    const int slot = p.prefix_splits + split;
    if (threadIdx.x < S::kDim) store_global(slots.at(slot) + threadIdx.x, sum);
    if (threadIdx.x == 0) store_global(slots.stats + slot, stats);
}

template <typename T, typename StoredKey, typename StoredValue, int kDim>
int launch_own(const AttentionDecodeParams& p, int64_t blocks) {
    using S = Shape<T, StoredKey, StoredValue, kDim>;
    return launch(attention_decode_kernel<S>, unsigned(blocks), kThreads, S::kShared, p.stream, p, 1,
                  p.dependent != Dependent::none);
}

template <typename T, typename StoredKey, typename StoredValue>
int launch_all(const AttentionDecodeParams& p) {
    const int64_t blocks = p.rows * p.heads * p.splits;
    int error = cudaErrorInvalidValue;
    if (p.dim == 32) error = launch_own<T, StoredKey, StoredValue, 32>(p, blocks);
    if (p.dim == 64) error = launch_own<T, StoredKey, StoredValue, 64>(p, blocks);
    if (p.dim == 96) error = launch_own<T, StoredKey, StoredValue, 96>(p, blocks);
    if (p.dim == 128) error = launch_own<T, StoredKey, StoredValue, 128>(p, blocks);
    return error != cudaSuccess || slots_of(p) == 1 ? error : launch_merge(p);
}

}  // namespace

int attention_decode(const AttentionDecodeParams& p) {
    if (p.rows == 0 || p.heads == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    if (p.rows * p.heads * p.splits > INT32_MAX || p.positions > kMostKeys || p.splits < 1) {
        return cudaErrorInvalidValue;
    }
    if (p.prefix_splits > 0) {
        const int error = launch_prefix(p);
        if (error != cudaSuccess) return error;
    }
    const bool ring = p.ring && has_ring();
    if (ring && p.dtype == DType::bf16) return launch_ring_bf16(p);
    if (ring && p.dtype == DType::f16) return launch_ring_f16(p);
    return dispatch_dtype(p.dtype, [&](auto t) -> int {
        using T = decltype(t);
        if (!p.k_scale && !p.v_scale) return launch_all<T, T, T>(p);
        if constexpr (sizeof(T) == 2) {
            if (p.k_scale && p.v_scale) return launch_all<T, E4M3, E4M3>(p);
            if (p.v_scale) return launch_all<T, T, E4M3>(p);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace igpt::cuda
