// Draws a token of each row of logits, and may write the input of the next step:
//
//   score = (logit - max) / temperature;  top-k keeps the scores not below the k-th largest
//   weight = exp(score), fp32;  top-p keeps the shortest run, from the heaviest down (the lower id first on ties),
//     whose weight reaches top_p of the total;  min-p keeps the scores not below min_score = log(min_p)
//   token = first id at which the cumulative weight exceeds uniform * total;  temperature 0: the largest logit
//   logprob = (logit - max) - log(sum exp(logit - max)) of the token, whatever is drawn from; NaN where a logit is no
//     number or infinite
//   embedding = wte[token] + wpe[index + 1], index = position + offset; with `advance`, position += 1
//
//   logits (rows, k <= 1024) fp32 | bf16 | fp16, rows at any distance, uniform (rows,) fp32, tokens (rows, columns)
//   int64 and logprobs of the same shape, fp32, written at column index - first where there is one, embedding
//   (rows, n_embd), wte (.., n_embd), wpe (n_positions, n_embd) of one dtype, 16-byte aligned. Without `uniform` the
//   number is word 0 of Philox4x32-10 under the seed at the counter (index, 0, stream). What differs from call to call
//   may stand on the device, `settings`, for a captured graph. With `advance` every row has a position of its own, so
//   that no block adds to what another one reads.
//   Sums are in fp64, so that their order does not decide a draw, and a row is a matter of its own: neither the batch
//   nor the schedule changes a bit. A row whose largest logit is not a number or infinite gives token 0, as the
//   definition does.
//   Launch, dependent or not: a block for each row, 128 threads (256 where k > 512), 4 neighbouring logits to a thread,
//   which stay in registers. Without top-k and top-p three barriers; a sort of the row (bitonic.cuh) for each of the
//   two. Bound by latency: one row is 1 to 2 KB. The row's sum of exponentials goes through the barriers of the draw.
//
// Source: reference.sample, reference.sample_next and reference.sample_step, the definition.
#include "bitonic.cuh"
#include "launch.cuh"
#include "ops.h"
#include "philox.cuh"
#include "primitives.cuh"
#include "ptx.cuh"

namespace igpt::cuda {
namespace {

constexpr int kOwn = kThreadKeys;  // logits of a thread: ids 4 * thread to 4 * thread + 3

// A place for each step, so that none has to wait until all threads have read what another left.
template <int kThreads>
struct Shared {
    static constexpr int kWarps = kThreads / kWarpSize;
    uint64_t keys[kThreads * kOwn];
    double sums[kWarps];
    double exponentials[kWarps];
    uint64_t largest[kWarps];
    float peaks[kWarps];
    int counts[kWarps];
    float threshold;
    alignas(4) uint8_t kept[kThreads * kOwn];
};

// What is drawn by: of the launch, or what stands on the device. Read where it is used: registers are few.
template <typename T, typename M>
__device__ __forceinline__ T setting(const SampleParams& p, T of_launch, M SampleSettings::* member) {
    return p.settings ? T(load_global(&(p.settings->*member))) : of_launch;
}

__device__ __forceinline__ int first_id() { return int(threadIdx.x) * kOwn; }

template <typename T>
__device__ __forceinline__ void load_row(const T* row, int k, bool vector, float (&x)[kOwn]) {
    struct alignas(kOwn * sizeof(T)) Four {
        T at[kOwn];
    };
    if (vector && first_id() < k) {
        const Four four = load_global(reinterpret_cast<const Four*>(row) + threadIdx.x);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) x[i] = to_float(four.at[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int id = first_id() + i;
        x[i] = id < k ? to_float(load_global(row + id)) : -INFINITY;
    }
}

__device__ __forceinline__ void load_logits(const SampleParams& p, float (&x)[kOwn]) {
    const int64_t at = int64_t(blockIdx.x) * p.row_stride;
    switch (p.dtype) {
        case DType::f32:
            return load_row(static_cast<const float*>(p.logits) + at, p.k, p.vector, x);
        case DType::bf16:
            return load_row(static_cast<const __nv_bfloat16*>(p.logits) + at, p.k, p.vector, x);
        case DType::f16:
            return load_row(static_cast<const __half*>(p.logits) + at, p.k, p.vector, x);
    }
}

// The id of the largest logit, the lowest one on ties; NaN is above all numbers.
template <int kThreads>
__device__ __forceinline__ int block_argmax(const float (&x)[kOwn], int k, Shared<kThreads>& shared) {
    uint64_t largest = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const unsigned bits = __float_as_uint(x[i] + 0.0f);  // -0 counts as 0
        const unsigned order = x[i] != x[i] ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
        const unsigned id = unsigned(first_id() + i);
        if (id < unsigned(k)) largest = max(largest, uint64_t(order) << 32 | ~id);
    }
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
        largest = max(largest, __shfl_xor_sync(kFullMask, largest, lane));
    }
    if (threadIdx.x % kWarpSize == 0) store_shared(shared.largest + threadIdx.x / kWarpSize, largest);
    __syncthreads();
    for (int w = 0; w < shared.kWarps; ++w) largest = max(largest, load_shared(shared.largest + w));
    return int(~unsigned(largest));
}

// The largest logit; infinity if one is NaN.
template <int kThreads>
__device__ __forceinline__ float block_max(const float (&x)[kOwn], Shared<kThreads>& shared) {
    float peak = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) peak = fmaxf(peak, x[i] != x[i] ? INFINITY : x[i]);
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, lane));
    if (threadIdx.x % kWarpSize == 0) store_shared(shared.peaks + threadIdx.x / kWarpSize, peak);
    __syncthreads();
    for (int w = 0; w < shared.kWarps; ++w) peak = fmaxf(peak, load_shared(shared.peaks + w));
    return peak;
}

// Leaves what `log_probability` needs behind the block's next barrier: each warp's sum of exp(logit - peak).
template <int kThreads>
__device__ __forceinline__ void add_exponentials(const float (&x)[kOwn], float peak, Shared<kThreads>& shared) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += double(expf(x[i] - peak));
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
    if (threadIdx.x % kWarpSize == 0) store_shared(shared.exponentials + threadIdx.x / kWarpSize, sum);
}

// Of a logit of the row.
template <int kThreads>
__device__ __forceinline__ float log_probability(float logit, float peak, Shared<kThreads>& shared) {
    if (!(fabsf(peak) < INFINITY)) return NAN;
    double total = 0.0;
    for (int w = 0; w < shared.kWarps; ++w) total += load_shared(shared.exponentials + w);
    return logit - peak - logf(float(total));
}

// Makes of four numbers the sums of all up to each of them; returns the last of the block's. `warps`: one number for
// each warp, which no thread may still be reading.
template <int kThreads>
__device__ __forceinline__ double block_cumulate(double (&x)[kOwn], double* warps) {
    constexpr int kWarps = kThreads / kWarpSize;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 1; i < kOwn; ++i) x[i] += x[i - 1];
    double sum = x[kOwn - 1];
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const double below = __shfl_up_sync(kFullMask, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == kWarpSize - 1) store_shared(warps + warp, sum);
    __syncthreads();
    double before = sum - x[kOwn - 1], total = 0.0;
    for (int w = 0; w < kWarps; ++w) {
        const double of_warp = load_shared(warps + w);
        if (w < warp) before += of_warp;
        total += of_warp;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) x[i] += before;
    return total;
}

// Minus infinity in place of the scores below the k-th largest. No score is above 0.
template <int kThreads>
__device__ __forceinline__ void keep_top_k(float (&score)[kOwn], int top_k, Shared<kThreads>& shared) {
    uint32_t keys[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) keys[i] = ~__float_as_uint(0.0f - score[i]);  // -0 and 0 have one key
    sort_descending<kThreads>(keys, reinterpret_cast<uint32_t*>(shared.keys));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (first_id() + i == top_k - 1) store_shared(&shared.threshold, -__uint_as_float(~keys[i]));
    }
    __syncthreads();
    const float threshold = load_shared(&shared.threshold);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) score[i] = score[i] < threshold ? -INFINITY : score[i];
}

// Zero in place of the weights behind the shortest run that reaches top_p.
template <int kThreads>
__device__ __forceinline__ void keep_top_p(float (&weight)[kOwn], double top_p, Shared<kThreads>& shared) {
    uint64_t keys[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        keys[i] = uint64_t(__float_as_uint(weight[i])) << 32 | ~unsigned(first_id() + i);
    }
    sort_descending<kThreads>(keys, shared.keys);
    double ordered[kOwn], sums[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums[i] = ordered[i] = double(__uint_as_float(unsigned(keys[i] >> 32)));
    const double total = block_cumulate<kThreads>(sums, shared.sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        store_shared(shared.kept + ~unsigned(keys[i]), uint8_t(sums[i] - ordered[i] < top_p * total));
    }
    __syncthreads();
    const uint32_t kept = load_shared(reinterpret_cast<const uint32_t*>(shared.kept) + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) weight[i] = kept >> 8 * i & 1 ? weight[i] : 0.0f;
}

// How many cumulative weights do not exceed the target. Behind the row's end they are the total, which does.
template <int kThreads>
__device__ __forceinline__ int block_count(const double (&cumulative)[kOwn], double target, Shared<kThreads>& shared) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        count += __popc(__ballot_sync(kFullMask, cumulative[i] <= target));
    }
    if (threadIdx.x % kWarpSize == 0) store_shared(shared.counts + threadIdx.x / kWarpSize, count);
    __syncthreads();
    count = 0;
    for (int w = 0; w < shared.kWarps; ++w) count += load_shared(shared.counts + w);
    return count;
}

// There is a barrier in it, unless the peak is no number.
template <int kThreads>
__device__ __forceinline__ int draw(const SampleParams& p, const float (&x)[kOwn], float peak, float temperature,
                                    float uniform, Shared<kThreads>& shared) {
    if (!(fabsf(peak) < INFINITY)) return 0;  // the whole block
    float score[kOwn], weight[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) score[i] = (x[i] - peak) / temperature;
    const int top_k = setting(p, p.top_k, &SampleSettings::top_k);
    if (top_k > 0 && top_k < p.k) keep_top_k(score, top_k, shared);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) weight[i] = expf(score[i]);
    const double top_p = setting(p, p.top_p, &SampleSettings::top_p);
    if (top_p < 1.0) keep_top_p(weight, top_p, shared);
    const float min_score = setting(p, p.min_score, &SampleSettings::min_score);
    double cumulative[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) cumulative[i] = score[i] < min_score ? 0.0 : double(weight[i]);
    const double total = block_cumulate<kThreads>(cumulative, shared.sums);
    return min(block_count(cumulative, double(uniform) * total, shared), p.k - 1);
}

// embedding = wte + wpe, or zeros where there is no next position. All of the block.
template <int kThreads, typename E>
__device__ __forceinline__ void embed(const void* wte, const void* wpe, void* embedding, int n, bool inside) {
    using V = Vector<E>;
    const E *token = static_cast<const E*>(wte), *position = static_cast<const E*>(wpe);
    E* out = static_cast<E*>(embedding);
    const int vectors = n % V::kSize == 0 ? n / V::kSize : 0;
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
        V sum = {};
        if (inside) {
            const V a = load_global(reinterpret_cast<const V*>(token) + v);
            const V b = load_global(reinterpret_cast<const V*>(position) + v);
#pragma unroll
            for (int e = 0; e < V::kSize; ++e) sum.at[e] = from_float<E>(to_float(a.at[e]) + to_float(b.at[e]));
        }
        store_global(reinterpret_cast<V*>(out) + v, sum);
    }
    for (int i = vectors * V::kSize + threadIdx.x; i < n; i += kThreads) {
        store_global(out + i, from_float<E>(inside ? to_float(token[i]) + to_float(position[i]) : 0.0f));
    }
}

template <int kThreads>
__device__ __forceinline__ void write_next(const SampleParams& p, int64_t token, int64_t next, bool inside) {
    const auto of = [&](auto e) {
        using E = decltype(e);
        const int64_t n = p.n_embd;
        embed<kThreads, E>(static_cast<const E*>(p.wte) + token * n, static_cast<const E*>(p.wpe) + next * n,
                           static_cast<E*>(p.embedding) + int64_t(blockIdx.x) * n, p.n_embd, inside);
    };
    if (p.embed_dtype == DType::f32) of(float());
    if (p.embed_dtype == DType::bf16) of(__nv_bfloat16());
    if (p.embed_dtype == DType::f16) of(__half());
}

// The token and its log-probability, by the thread that has its logit.
template <int kThreads>
__device__ __forceinline__ void write_drawn(const SampleParams& p, const float (&x)[kOwn], float peak, int token,
                                            int64_t column, Shared<kThreads>& shared) {
    if (int(threadIdx.x) != token / kOwn || column < 0 || column >= p.columns) return;
    const int64_t at = int64_t(blockIdx.x) * p.columns + column;
    p.tokens[at] = token;
    if (!p.logprobs) return;
    float logit = 0.0f;  // a sum: of a choice the compiler makes an index, and of registers memory
#pragma unroll
    for (int i = 0; i < kOwn; ++i) logit += first_id() + i == token ? x[i] : 0.0f;
    p.logprobs[at] = log_probability(logit, peak, shared);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleParams p) {
    Shared<kThreads>& shared = *dynamic_shared<Shared<kThreads>>();
    const int64_t row = blockIdx.x;
    // Before all: settings and streams change between replays, and L1 may hold the old ones.
    ptx::grid_dependency_wait();
    const float temperature = setting(p, p.temperature, &SampleSettings::temperature);
    const uint64_t seed = setting(p, p.seed, &SampleSettings::seed);
    const int offset = setting(p, 0, &SampleSettings::offset);
    const int64_t stream = p.streams ? load_global(p.streams + row) : 0;
    const int64_t position = p.position ? int64_t(load_global(p.position + p.position_stride * row)) : 0;
    const int64_t index = position + offset, next = index + 1;
    const bool inside = next >= 0 && next < p.n_positions;
    float x[kOwn];
    load_logits(p, x);
    if (p.embedding && inside) {  // the row of wpe is on its way while the token is drawn
        const int bytes = p.n_embd * (p.embed_dtype == DType::f32 ? 4 : 2);
        const char* from = static_cast<const char*>(p.wpe) + next * bytes;
        for (int at = 128 * int(threadIdx.x); at < bytes; at += 128 * kThreads) ptx::prefetch_l2(from + at);
    }
    const bool greedy = temperature == 0.0f;
    float peak = 0.0f;
    if (!greedy || p.logprobs) peak = block_max(x, shared);
    if (p.logprobs) add_exponentials(x, peak, shared);
    const float uniform = p.uniform ? load_global(p.uniform + row) : philox_uniform(seed, stream, int32_t(index));
    const int token = greedy ? block_argmax(x, p.k, shared) : draw(p, x, peak, temperature, uniform, shared);
    write_drawn(p, x, peak, token, p.settings ? index - setting(p, 0, &SampleSettings::first) : 0, shared);
    if (p.embedding) write_next<kThreads>(p, token, inside ? next : 0, inside);
    if (p.advance && threadIdx.x == 0) store_global(p.position + row, int32_t(uint32_t(position) + 1));
}

template <int kThreads>
int launch_rows(const SampleParams& p) {
    return launch(sample_kernel<kThreads>, unsigned(p.rows), kThreads, sizeof(Shared<kThreads>), p.stream, p, 1,
                  p.dependent != Dependent::none);
}

}  // namespace

int sample(SampleParams p) {
    if (p.k < 1 || p.k > 1024 || p.rows > INT32_MAX) return cudaErrorInvalidValue;
    if (p.rows == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const uintptr_t bytes = kOwn * (p.dtype == DType::f32 ? 4 : 2);
    p.vector = p.k % kOwn == 0 && p.row_stride % kOwn == 0 && reinterpret_cast<uintptr_t>(p.logits) % bytes == 0;
    return p.k <= 512 ? launch_rows<128>(p) : launch_rows<256>(p);
}

}  // namespace igpt::cuda
