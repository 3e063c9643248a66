// A linear layer for few rows, with the norm before it and what comes after it in one kernel: up to 8 rows; more, up to
// 64, go to gemv_rows.cu.
//
//   out = activation(norm(x) weight + bias) + residual,  norm(x) = x * rsqrt(mean(x^2) + eps) * norm_weight of each row
//
//   x (rows, n_in), bias (n_out,), norm_weight (n_in,), residual and out (rows, n_out) contiguous; weight (n_in, n_out)
//   with n_out contiguous (transformers' Conv1D), or transposed, (n_out, n_in) with n_in contiguous (nn.Linear). All of
//   one dtype, bfloat16 or float16, n_in and n_out multiples of 8. Sums are in float32, out is rounded once; norm(x) is
//   a pair of numbers of the dtype, its rounded value and what that leaves, so that it has twice the dtype's digits.
//
//   Launch: 8 warps for 64 columns, and where these are few up to 8 such blocks, a cluster, which share n_in (below
//   sm_90 there are none). A warp takes 32 of n_in at a time, straight from memory into registers as tensor cores want
//   them: mma's rows are columns of the weight, its 8 columns the rows of x. What mma calls k is free, as long as both
//   operands mean the same: a lane has eight of n_in that follow one another, of Conv1D in 8 rows of the weight, of
//   which 8 lanes read 128 bytes, and of Linear in one vector of each of 8 columns. Two such chunks of each warp, 4 KB
//   each, are on their way at any time, the first ones before grid_dependency_wait: weight, bias and norm_weight must
//   not come from the launch before, where launches are dependent ones. The rows of x are in shared memory, a warp for
//   a row. The warps' sums are put together in shared memory in their order, the blocks' in that of the first block of
//   the cluster.
//
//   The next launch may begin as soon as all blocks of this one have (Dependent::early). It waits for this one's end,
//   and this one, before any block writes or ends, has waited for the end of the launch before it: so nothing is
//   written that a launch two before still reads, though all three are there at once. Nor can they block one another:
//   who waits has begun after everything that it waits for.
//
//   Bound by bytes: n_in * n_out elements of the weight.
//
// Source: openai/image-gpt src/model.py conv1d and norm; activations: reference.py.
#include "gemv.cuh"

namespace igpt::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kRows = 8;  // of x, at most: mma's n
constexpr int kStep = kWarps * kChunk;
constexpr int kInbox = kRows * kPitch;            // floats: a block's sums
constexpr int kSums = kWarps * kRows * kColumns;  // floats: the warps'

static_assert(kThreads == kRows * kColumns / 2, "a thread has two sums");

// On a multiprocessor: Linear's eight columns take more registers for their addresses. Below sm_90, where there are no
// clusters, one is seldom followed by a second.
constexpr int blocks_at_a_time(bool transposed) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return 1;
#else
    return transposed ? 1 : 2;
#endif
}

// x in shared memory: units of four k of a row, with the norm followed by what their rounding left. Those that a warp
// reads at a time, first and second halves of the lanes' own k, are side by side; rows are exchanged so that lanes that
// write one row meet in different banks.
template <bool kNormed>
struct alignas(kNormed ? 16 : 8) Unit {
    static constexpr int kWords = kNormed ? 4 : 2;
    static constexpr int kSecond = 4 * kRows;            // from the first half to the second
    static constexpr int kSlab = kNormed ? 1024 : 2048;  // of n_in at a time
    static_assert(kSlab % (2 * kStep) == 0);
    uint32_t at[kWords];

    __device__ static int place(int k, int row) {
        return k / kChunk * 2 * kSecond + (row ^ k / kChunk % kRows) * 4 + k / 8 % 4;
    }
    static size_t bytes(int n_in) {
        return size_t((std::min(n_in, kSlab) + kChunk - 1) / kChunk * 2 * kSecond) * 4 * kWords;
    }
};

// The norm's factor of the warp's row.
template <typename T>
__device__ __forceinline__ float norm_of(const GemvParams& p, int row) {
    float square = 0.0f;
#pragma unroll 2  // vectors on their way at once
    for (int k = int(threadIdx.x) % kWarpSize * 8; k < p.n_in; k += kWarpSize * 8) {
        const Vector<T> vector = load_vector<T>(p.x, int64_t(row) * p.n_in + k);
#pragma unroll
        for (int i = 0; i < 8; ++i) square += to_float(vector.at[i]) * to_float(vector.at[i]);
    }
    return rsqrtf(warp_sum(square) / float(p.n_in) + p.eps);
}

// Asks for the norm's weight from `begin` to `end`, a slab at most; it is there when all have waited.
template <typename T>
__device__ __forceinline__ void ask_factors(const GemvParams& p, Vector<T>* factors, int begin, int end) {
    const int k = begin + int(threadIdx.x) * 8;
    if (k < end) {
        ptx::cp_async16(ptx::shared_address(factors + threadIdx.x), static_cast<const T*>(p.norm_weight) + k);
    }
    ptx::cp_async_commit();
}

// Puts x from `begin` to `end` into shared memory, a row for each warp. `factors`: the norm's weight from there on;
// `scales`: the norm's factor of a thread's row.
template <typename T, bool kNormed>
__device__ __forceinline__ void fill_x(const GemvParams& p, Unit<kNormed>* x, int begin, int end,
                                       const Vector<T>* factors, const float* scales) {
    const int row = int(threadIdx.x) / kWarpSize;
    if (row >= p.rows) return;
    const float scale = kNormed ? load_shared(scales + threadIdx.x) : 1.0f;
#pragma unroll 2  // vectors on their way at once
    for (int k = begin + int(threadIdx.x) % kWarpSize * 8; k < end; k += kWarpSize * 8) {
        const Vector<T> vector = load_vector<T>(p.x, int64_t(row) * p.n_in + k);
        Unit<kNormed> units[2];
        if constexpr (kNormed) {
            const Vector<T> factor = load_shared(factors + (k - begin) / 8);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float low = to_float(vector.at[2 * i]) * scale * to_float(factor.at[2 * i]);
                const float high = to_float(vector.at[2 * i + 1]) * scale * to_float(factor.at[2 * i + 1]);
                const uint32_t rounded = ptx::pack2<T>(low, high);
                const float2 had = ptx::unpack2<T>(rounded);
                units[i / 2].at[i % 2] = rounded;
                units[i / 2].at[2 + i % 2] = ptx::pack2<T>(low - had.x, high - had.y);
            }
        } else {
            const Words words = *reinterpret_cast<const Words*>(&vector);
#pragma unroll
            for (int i = 0; i < 4; ++i) units[i / 2].at[i % 2] = words.at[i];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) store_shared(x + Unit<kNormed>::place(k - begin, row) + j * x->kSecond, units[j]);
    }
}

// sums[m] += mma's C of 16 columns, number m, for one chunk, which begins at k in x.
template <typename T, bool kNormed, bool kTransposed>
__device__ __forceinline__ void multiply(const GemvParams& p, float (&sums)[4][4], const Chunk<T, kTransposed>& chunk,
                                         const Unit<kNormed>* x, int k, int end) {
    const int row = int(threadIdx.x) % kWarpSize / 4, own = k + int(threadIdx.x) % 4 * 8;
    const bool there = row < p.rows && own < end;  // else nothing was written
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        Unit<kNormed> unit{};
        if (there) unit = load_shared(x + Unit<kNormed>::place(own, row) + j * x->kSecond);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            uint32_t a[4];
            chunk.fragment(a, m, j);
            ptx::mma_m16n8k16<T>(sums[m], a, unit.at[0], unit.at[1]);
            if constexpr (kNormed) ptx::mma_m16n8k16<T>(sums[m], a, unit.at[2], unit.at[3]);
        }
    }
}

// Two columns of one row, which a thread of the first block writes, and what is added to them: asked for early, since
// it takes its time, and kept in shared memory, which there is more of than registers.
template <typename T>
struct Output {
    uint32_t* kept;  // bias and residual of all threads
    int tile;
    bool there;

    __device__ static int row() { return int(threadIdx.x) / kWarpSize; }
    __device__ static int in_tile() { return int(threadIdx.x) % kWarpSize * 2; }
    __device__ int64_t at(const GemvParams& p) const { return int64_t(row()) * p.n_out + tile + in_tile(); }

    __device__ __forceinline__ Output(const GemvParams& p, uint32_t* kept_, int tile_) : kept(kept_), tile(tile_) {
        there = int(blockIdx.x) % p.splits == 0 && row() < p.rows && tile + in_tile() < p.n_out;
    }
    // Zeros are both, where there is nothing.
    __device__ __forceinline__ uint32_t ask(const void* tensor, int64_t from) const {
        if (!tensor || !there) return 0;
        return load_global(reinterpret_cast<const uint32_t*>(static_cast<const T*>(tensor) + from));
    }
    __device__ __forceinline__ void keep(uint32_t bias, uint32_t residual) const {
        store_shared(kept + threadIdx.x, bias);
        store_shared(kept + kThreads + threadIdx.x, residual);
    }

    // Adds the blocks' shares up, and does to the sum what comes after the product.
    __device__ __forceinline__ void finish(const GemvParams& p, const float* inbox) const {
        if (!there) return;
        float2 y = {0.0f, 0.0f};
        for (int s = 0; s < p.splits; ++s) {
            const float* address = inbox + s * kInbox + row() * kPitch + in_tile();
            const float2 one = load_shared(reinterpret_cast<const float2*>(address));
            y.x += one.x;
            y.y += one.y;
        }
        const float2 before = ptx::unpack2<T>(load_shared(kept + threadIdx.x));
        const float2 after = ptx::unpack2<T>(load_shared(kept + kThreads + threadIdx.x));
        y.x = activate(p.activation, y.x + before.x) + after.x;
        y.y = activate(p.activation, y.y + before.y) + after.y;
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + at(p)), ptx::pack2<T>(y.x, y.y));
    }
};

// Adds the warps' sums up, and puts them into the first block's inbox.
template <typename C>
__device__ __forceinline__ void hand_in(const float (&sums)[4][4], float* scratch, float* inbox, bool alone) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    __syncthreads();  // x has been read
#pragma unroll
    for (int m = 0; m < 4; ++m) {
        const float4 four = make_float4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        store_shared(reinterpret_cast<float4*>(scratch) + (warp * 4 + m) * kWarpSize + lane, four);
    }
    __syncthreads();
    // A half of what a lane had for an m: one column, two rows.
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float2 one = load_shared(reinterpret_cast<const float2*>(scratch) + w * kThreads + threadIdx.x);
        sum.x += one.x;
        sum.y += one.y;
    }
    const int m = int(threadIdx.x) / 64, g = int(threadIdx.x) / 8 % 8, t = int(threadIdx.x) / 2 % 4;
    float* to = inbox + 2 * t * kPitch + C::column_of(m, int(threadIdx.x) % 2, g);
    if (alone) {
        store_shared(to, sum.x);
        store_shared(to + kPitch, sum.y);
        __syncthreads();
        return;
    }
    ptx::cluster_wait();  // all blocks have begun
    ptx::store_cluster(to, 0, sum.x);
    ptx::store_cluster(to + kPitch, 0, sum.y);
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

template <typename T, bool kNormed, bool kTransposed>
__global__ void __launch_bounds__(kThreads, blocks_at_a_time(kTransposed)) gemv_kernel(GemvParams p) {
    using C = Chunk<T, kTransposed>;
    using U = Unit<kNormed>;
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    Vector<T>* factors = dynamic_shared<Vector<T>>();  // of the norm
    uint32_t* kept = reinterpret_cast<uint32_t*>(factors + (kNormed ? U::kSlab / 8 : 0));
    float* scales = reinterpret_cast<float*>(kept + 2 * kThreads);  // the norm's factor, of each thread: registers
    float* inbox = scales + (kNormed ? kThreads : 0);
    float* scratch = inbox + p.splits * kInbox;  // x, then the warps' sums
    U* x = reinterpret_cast<U*>(scratch);
    const int tile = int(blockIdx.x) / p.splits * kColumns, split = int(blockIdx.x) % p.splits;
    const int begin = begin_of(p, split), end = min(begin_of(p, split + 1), p.n_in);
    const int warp = int(threadIdx.x) / kWarpSize;
    if constexpr (kNormed) ask_factors<T>(p, factors, begin, min(begin + U::kSlab, end));
    Cursor<T, kTransposed, kStep> cursor(p, tile, begin + warp * kChunk, end);
    C now, next;
    now.load(cursor);  // the weight does not come from the launch before
    next.load(cursor);
    const Output<T> output(p, kept, tile);
    const uint32_t bias = output.ask(p.bias, tile + output.in_tile());
    if (p.splits > 1) ptx::cluster_arrive_relaxed();  // hand_in waits for it
    ptx::grid_dependency_wait();
    const uint32_t residual = output.ask(p.residual, output.at(p));
    if constexpr (kNormed) {
        if (warp < p.rows) store_shared(scales + threadIdx.x, norm_of<T>(p, warp));
        ptx::cp_async_wait<0>();
        __syncthreads();
    }
    output.keep(bias, residual);
    float sums[4][4] = {};
    for (int slab = begin; slab < end; slab += U::kSlab) {
        const int slab_end = min(slab + U::kSlab, end);
        if (slab > begin) {
            if constexpr (kNormed) {
                ask_factors<T>(p, factors, slab, slab_end);
                ptx::cp_async_wait<0>();
            }
            __syncthreads();  // the one before is still being read
        }
        fill_x<T>(p, x, slab, slab_end, factors, scales);
        __syncthreads();
        for (int k = slab + warp * kChunk; k < slab_end; k += 2 * kStep) {
            multiply<T>(p, sums, now, x, k - slab, slab_end - slab);
            __syncwarp();  // lest the compiler load earlier, into registers that there are not
            now.load(cursor);
            if (k + kStep < slab_end) multiply<T>(p, sums, next, x, k + kStep - slab, slab_end - slab);
            __syncwarp();  // likewise
            next.load(cursor);
        }
    }
    ptx::grid_dependency_launch();  // counts once; it waits for what is still to be written
    hand_in<C>(sums, scratch, inbox + split * kInbox, p.splits == 1);
    output.finish(p, inbox);
}

template <typename T, bool kNormed>
int launch_kernel(const GemvParams& p, unsigned blocks) {
    const size_t scratch = std::max(Unit<kNormed>::bytes(p.share), kSums * sizeof(float));
    const size_t kept = (2 + kNormed) * kThreads * sizeof(float) + (kNormed ? Unit<true>::kSlab * sizeof(T) : 0);
    const size_t shared = size_t(p.splits) * kInbox * sizeof(float) + kept + scratch;
    const auto kernel = p.transposed ? gemv_kernel<T, kNormed, true> : gemv_kernel<T, kNormed, false>;
    return launch(kernel, blocks, kThreads, shared, p.stream, p, unsigned(p.splits), p.dependent != Dependent::none);
}

template <typename T>
int launch_dtype(GemvParams p) {
    const int tiles = divide_up(p.n_out, kColumns), chunks = divide_up(p.n_in, kChunk);
    const auto any = gemv_kernel<T, false, false>;  // all are compiled alike
    p.splits = choose_splits(any, tiles, chunks, kWarps, blocks_at_a_time(p.transposed));
    p.share = divide_up(chunks, p.splits) * kChunk;
    const unsigned blocks = unsigned(tiles) * unsigned(p.splits);
    return p.norm_weight ? launch_kernel<T, true>(p, blocks) : launch_kernel<T, false>(p, blocks);
}

}  // namespace

int gemv(const GemvParams& p) {
    if (p.rows == 0) return cudaSuccess;
    if (p.rows < 0 || p.n_in < 8 || p.n_in % 8 != 0 || p.n_out < 8 || p.n_out % 8 != 0) {
        return cudaErrorInvalidValue;
    }
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    if (p.rows > kRows) return gemv_rows(p);
    if (p.dtype == DType::bf16) return launch_dtype<__nv_bfloat16>(p);
    if (p.dtype == DType::f16) return launch_dtype<__half>(p);
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
