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
//   Launch: `splits` blocks of 4 warps for every (row, head), more than one where these are few. 4 or 8 lanes have a
//   key, 16 bytes at a time; a warp's load is contiguous, and a thread has its part of 2 or 4 keys and their values on
//   the way at once. Each such group of lanes has a softmax of its own, in order; they are put together by shuffles,
//   the warps' in shared memory, the blocks' by a second kernel: no atomics, an order that depends on nothing but the
//   position. The block whose part ends at the position takes the new key and value from registers, and nothing is
//   read that this launch writes. Blocks beyond the position end at once. The prefix: attention_decode_prefix.cu.
//
//   Bound by bytes: 2 * (position + 1) * dim elements for every (row, head).
//
// Source: the online softmax of Milakov & Gimelshein, 2018; its split over keys: Flash-Decoding (Dao et al., 2023).
#include "attention_decode.cuh"
#include "launch.cuh"

namespace igpt::cuda {
namespace {

using namespace decode;

template <typename T_, int kDim_>
struct Shape {
    using T = T_;
    using V = Vector<T>;
    static constexpr int kDim = kDim_;
    static constexpr int kVectors = kDim / V::kSize;          // of a key
    static constexpr int kLanes = kVectors % 8 == 0 ? 8 : 4;  // that share it
    static constexpr int kOwn = kVectors / kLanes;            // vectors of a lane
    static constexpr int kElements = kOwn * V::kSize;         // elements of a lane
    static constexpr int kGroups = kThreads / kLanes;         // keys side by side
    // Keys after one another, loaded at once with their values.
    static constexpr int kUnroll = kOwn == 1 ? kKeys / kGroups : 2;
    static constexpr int kSpan = kGroups * kUnroll;
    static constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;  // for a multiprocessor, at least
    static constexpr size_t kShared = kWarps * (kDim + 2) * sizeof(float);
};

// A lane's part of a key, value or query: vectors lane, lane + kLanes, ...
template <typename S>
struct Piece {
    typename S::V vectors[S::kOwn];

    __device__ static int start(int i) { return (int(threadIdx.x % S::kLanes) + i * S::kLanes) * S::V::kSize; }

    __device__ __forceinline__ void load(const void* row) {
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) {
            vectors[i] =
                load_global(reinterpret_cast<const typename S::V*>(static_cast<const typename S::T*>(row) + start(i)));
        }
    }
    __device__ __forceinline__ void store(void* row) const {
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) {
            store_global(reinterpret_cast<typename S::V*>(static_cast<typename S::T*>(row) + start(i)), vectors[i]);
        }
    }
    // In place of load(): a weight of 0 does not silence a NaN.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S::kElements; ++i)
            vectors[i / S::V::kSize].at[i % S::V::kSize] = from_float<typename S::T>(0);
    }
    __device__ __forceinline__ float get(int i) const { return to_float(vectors[i / S::V::kSize].at[i % S::V::kSize]); }
};

template <typename T>
__device__ __forceinline__ T* offset(T* base, int64_t elements, size_t size) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return static_cast<Byte*>(base) + elements * int64_t(size);
}

// The softmax of the keys that a group of lanes has seen. sums: of the lane's elements.
template <typename S>
struct State {
    float m = -INFINITY, l = 0.0f;
    float sums[S::kElements] = {};

    // The score of a key in every lane of its group; q is scaled.
    __device__ __forceinline__ static float score(const float (&q)[S::kElements], const Piece<S>& k) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S::kElements; ++i) sum += q[i] * k.get(i);
#pragma unroll
        for (int lane = 1; lane < S::kLanes; lane *= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
        return sum;
    }

    // Takes N keys in; a score of -infinity stands for none.
    template <int N>
    __device__ __forceinline__ void add(const float (&scores)[N], const Piece<S> (&values)[N]) {
        float largest = m;
#pragma unroll
        for (int n = 0; n < N; ++n) largest = fmaxf(largest, scores[n]);
        rescale(largest);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float p = weight_of(scores[n], m);
            l += p;
#pragma unroll
            for (int i = 0; i < S::kElements; ++i) sums[i] += p * values[n].get(i);
        }
    }

    __device__ __forceinline__ void rescale(float largest) {
        const float factor = weight_of(m, largest);
        m = largest;
        l *= factor;
#pragma unroll
        for (int i = 0; i < S::kElements; ++i) sums[i] *= factor;
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
            for (int i = 0; i < S::kElements; ++i) sums[i] += __shfl_xor_sync(kFullMask, sums[i], lane);
        }
    }
};

// Takes the cached keys from `begin` to `end` in.
template <typename S>
__device__ __forceinline__ void add_cached(State<S>& state, const float (&q)[S::kElements], const void* keys,
                                           const void* values, int begin, int end) {
    constexpr size_t kSize = sizeof(typename S::T);
    const int group = int(threadIdx.x) / S::kLanes;
    for (int base = begin; base < end; base += S::kSpan) {
        Piece<S> k[S::kUnroll], v[S::kUnroll];
#pragma unroll
        for (int u = 0; u < S::kUnroll; ++u) {
            const int key = base + u * S::kGroups + group;
            if (key < end) {
                k[u].load(offset(keys, int64_t(key) * S::kDim, kSize));
                v[u].load(offset(values, int64_t(key) * S::kDim, kSize));
            } else {
                k[u].clear();
                v[u].clear();
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

// Puts the block's warps together. Thread i < dim has element i of the sum, all have the Stats.
template <typename S>
__device__ __forceinline__ float merge_block(State<S>& state, Stats& stats) {
    float* sums = dynamic_shared<float>();
    Stats* all = reinterpret_cast<Stats*>(sums + kWarps * S::kDim);
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    state.merge_warp();
    if (lane < S::kLanes) {
#pragma unroll
        for (int i = 0; i < S::kElements; i += 4) {
            const float4 four = make_float4(state.sums[i], state.sums[i + 1], state.sums[i + 2], state.sums[i + 3]);
            const int element = Piece<S>::start(i / S::V::kSize) + i % S::V::kSize;
            store_shared(reinterpret_cast<float4*>(sums + warp * S::kDim + element), four);
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
        if (threadIdx.x < S::kDim) sum += weight * load_shared(sums + w * S::kDim + threadIdx.x);
    }
    return sum;
}

// Writes element i of a row's output.
template <typename T>
__device__ __forceinline__ void store_out(const AttentionDecodeParams& p, int64_t row_head, int i, bool valid,
                                          float sum, float l) {
    const float value = !valid ? NAN : l == 0.0f ? 0.0f : sum / l;
    store_global(static_cast<T*>(p.out) + row_head * p.dim + i, from_float<T>(value));
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) attention_decode_kernel(AttentionDecodeParams p) {
    using T = typename S::T;
    const unsigned row_head = blockIdx.x / unsigned(p.splits), row = row_head / unsigned(p.heads);
    const int split = int(blockIdx.x % unsigned(p.splits));
    const int64_t head = row_head % unsigned(p.heads);
    ptx::grid_dependency_wait();  // before every return: the next launch counts on this one having waited
    Piece<S> q, k[1], v[1];       // on their way while the position is
    q.load(offset(p.q, row * p.q_row + head * p.q_head, sizeof(T)));
    k[0].load(offset(p.k, row * p.k_row + head * p.k_head, sizeof(T)));
    v[0].load(offset(p.v, row * p.v_row + head * p.v_head, sizeof(T)));
    const Own own(p, row);
    if (split >= own.parts || (!own.valid && slots_of(p) > 1)) return;
    State<S> state;
    if (own.valid) {
        float scaled[S::kElements];
#pragma unroll
        for (int i = 0; i < S::kElements; ++i) scaled[i] = q.get(i) * (p.scale * kLog2e);
        const int64_t cached = int64_t(row_head) * p.positions * S::kDim;
        const bool has_new = split == own.parts - 1;
        const float score = State<S>::score(scaled, k[0]);
        if (has_new && threadIdx.x < S::kLanes) {
            const int64_t to = cached + int64_t(own.position) * S::kDim;
            k[0].store(offset(p.k_cache, to, sizeof(T)));
            v[0].store(offset(p.v_cache, to, sizeof(T)));
            const float scores[1] = {score};
            if (own.sees_it) state.add(scores, v);
        }
        const int begin = own.first + split * own.chunk;
        const int end = has_new ? own.position : begin + own.chunk;
        add_cached(state, scaled, offset<const void>(p.k_cache, cached, sizeof(T)),
                   offset<const void>(p.v_cache, cached, sizeof(T)), begin, end);
    }
    Stats stats;
    const float sum = merge_block(state, stats);
    ptx::grid_dependency_launch();
    if (slots_of(p) == 1) {
        if (threadIdx.x < S::kDim) store_out<T>(p, row_head, int(threadIdx.x), own.valid, sum, stats.l);
        return;
    }
    const Slots slots(p, row, head);
    const int slot = p.prefix_splits + split;
    if (threadIdx.x < S::kDim) store_global(slots.at(slot) + threadIdx.x, sum);
    if (threadIdx.x == 0) store_global(slots.stats + slot, stats);
}

// One block for a (row, head), one thread for an element: adds its parts up in their order.
template <typename T>
__global__ void __launch_bounds__(128) attention_decode_merge_kernel(AttentionDecodeParams p) {
    const unsigned row_head = blockIdx.x, row = row_head / unsigned(p.heads);
    ptx::grid_dependency_wait();
    const Own own(p, row);
    Stats all = {-INFINITY, 0.0f};
    float sum = 0.0f;
    if (own.valid) {
        const Slots slots(p, row, row_head % unsigned(p.heads));
        const int count = p.prefix_splits + own.parts;
#pragma unroll 4
        for (int slot = 0; slot < count; ++slot) all.m = fmaxf(all.m, load_global(slots.stats + slot).m);
#pragma unroll 4
        for (int slot = 0; slot < count; ++slot) {
            const Stats one = load_global(slots.stats + slot);
            const float weight = weight_of(one.m, all.m);
            all.l += weight * one.l;
            sum += weight * load_global(slots.at(slot) + threadIdx.x);
        }
    }
    ptx::grid_dependency_launch();
    store_out<T>(p, row_head, int(threadIdx.x), own.valid, sum, all.l);
}

template <typename T, int kDim>
int launch_own(const AttentionDecodeParams& p, int64_t blocks) {
    using S = Shape<T, kDim>;
    return launch(attention_decode_kernel<S>, unsigned(blocks), kThreads, S::kShared, p.stream, p, 1, p.dependent);
}

template <typename T>
int launch_all(const AttentionDecodeParams& p) {
    const int64_t rows = p.rows * p.heads, blocks = rows * p.splits;
    if (blocks > INT32_MAX || p.positions > kMostKeys || p.splits < 1) return cudaErrorInvalidValue;
    if (p.prefix_splits > 0) {
        const int error = launch_prefix(p);
        if (error != cudaSuccess) return error;
    }
    int error = cudaErrorInvalidValue;
    if (p.dim == 32) error = launch_own<T, 32>(p, blocks);
    if (p.dim == 64) error = launch_own<T, 64>(p, blocks);
    if (p.dim == 96) error = launch_own<T, 96>(p, blocks);
    if (p.dim == 128) error = launch_own<T, 128>(p, blocks);
    if (error != cudaSuccess || slots_of(p) == 1) return error;
    return launch(attention_decode_merge_kernel<T>, unsigned(rows), unsigned(p.dim), 0, p.stream, p, 1, p.dependent);
}

}  // namespace

int attention_decode(const AttentionDecodeParams& p) {
    if (p.rows == 0 || p.heads == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return dispatch_dtype(p.dtype, [&](auto t) { return launch_all<decltype(t)>(p); });
}

}  // namespace igpt::cuda
