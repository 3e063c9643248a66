// gemv for 9 to 64 rows: the formula, the tensors and what launches may depend on are those of gemv.cu.
//
//   out = activation(r (x norm_weight) weight + bias) + residual,  r = rsqrt(mean(x^2) + eps) of each row
//
//   The norm's factor of a row comes after the product, so that a block needs no more of x than its own part; x times
//   norm_weight is rounded once, as the plain expression rounds. In float16, whose range is small, each block takes a
//   power of two out of its part of a row first, such that its mean square is about 1, and puts it back into the sums.
//
//   Launch: 4 warps for 64 columns, two such blocks a multiprocessor, in clusters of up to 8 that share n_in. A warp
//   has chunks of the weight on their way as in gemv.cu: 32 of n_in by 64 columns, used for all rows at once, 16,
//   32 or 64 of them in tiles of 8 (mma's n). A block's part of x goes to shared memory by asynchronous copies, as it
//   is: rows apart by an odd multiple of 64 bytes, so that the 16 bytes of each lane, 8 of n_in of a row, meet no
//   conflict. The warps' sums are put together in shared memory in their order; then each block of the cluster gets
//   what all have of its share of the rows, adds it up in the order of blocks, and writes it. So the order of a sum
//   does not depend on how many rows there are, but for the squares of rows too long for one slab of shared memory.
//
//   Bound by bytes: n_in * n_out elements of the weight; x is read by each tile of 64 columns, from L2.
#include <type_traits>

#include "gemv.cuh"

namespace igpt::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kStep = kWarps * kChunk;
constexpr int kTile = 8;      // rows: mma's n
constexpr int kTogether = 4;  // tiles, at most, whose sums are in shared memory at a time
constexpr int kMostRows = 64;

// Whether x times norm_weight could leave the dtype's range though the norm does not.
template <typename T>
constexpr bool kNarrow = std::is_same_v<T, __half>;

// Rows that a block of a cluster writes: an even number, so that what follows their sums is aligned to 16 bytes.
__host__ __device__ __forceinline__ int rows_of_a_block(int tiles, int splits) {
    return 2 * ((tiles * kTile / 2 + splits - 1) / splits);
}

// The block's shared memory.
template <typename T, int kTiles>
struct Shared {
    static constexpr int kRows = kTiles * kTile;
    static constexpr int kSlab = 4096 / kTiles;  // of n_in at a time: 64 KB
    static constexpr int kSumTiles = kTiles < kTogether ? kTiles : kTogether;
    static_assert(kSlab % (2 * kStep) == 0);

    T factors[kSlab];  // norm_weight
    T bias[kColumns];
    T residual[kRows][kColumns];  // of the rows that the block writes
    float squares[kRows];         // of the block's part of x: their sums
    float scales[kRows];          // powers of two that x is multiplied by
    // Behind it: what the cluster's blocks have of the block's rows, [splits][rows_of_a_block][kPitch], each row with
    // its sum of squares; then x, [kRows][pitch], and in the same place the warps' sums.
    __device__ float* inbox() { return reinterpret_cast<float*>(this + 1); }
    __device__ static T* x(float* inbox, const GemvParams& p) {
        return reinterpret_cast<T*>(inbox + p.splits * rows_of_a_block(kTiles, p.splits) * kPitch);
    }
    // Elements from a row of x to the next: 64 times n plus 32.
    __host__ __device__ static int pitch(int share) { return ((share < kSlab ? share : kSlab) + 63) / 64 * 64 + 32; }
    static size_t bytes(const GemvParams& p) {
        const size_t inbox = size_t(p.splits) * size_t(rows_of_a_block(kTiles, p.splits)) * kPitch * sizeof(float);
        const size_t x = size_t(kRows) * size_t(pitch(p.share)) * sizeof(T);
        return sizeof(Shared) + inbox + std::max(x, sizeof(float) * kWarps * kSumTiles * kTile * kColumns);
    }
};

template <typename T>
__device__ __forceinline__ void ask(T* to, const void* tensor, int64_t from, bool there = true) {
    ptx::cp_async16(ptx::shared_address(to), static_cast<const T*>(tensor) + (there ? from : 0), there ? 16 : 0);
}

// Asks for norm_weight from `begin` to `end`, a slab at most.
template <typename T>
__device__ __forceinline__ void ask_factors(const GemvParams& p, T* factors, int begin, int end) {
#pragma unroll 1
    for (int k = begin + int(threadIdx.x) * 8; k < end; k += kThreads * 8) ask(factors + k - begin, p.norm_weight, k);
}

// Asks for x from `begin` to `end`, a warp for a row, and zeros up to the end of the chunk.
template <typename T>
__device__ __forceinline__ void ask_x(const GemvParams& p, T* x, int pitch, int begin, int end) {
    const int length = (end - begin + kChunk - 1) / kChunk * kChunk;
#pragma unroll 1  // registers
    for (int row = int(threadIdx.x) / kWarpSize; row < p.rows; row += kWarps) {
#pragma unroll 1
        for (int k = int(threadIdx.x) % kWarpSize * 8; k < length; k += kWarpSize * 8) {
            ask(x + row * pitch + k, p.x, int64_t(row) * p.n_in + begin + k, begin + k < end);
        }
    }
}

// Asks for the residual of the rows that the block writes.
template <typename T, int kTiles>
__device__ __forceinline__ void ask_residual(const GemvParams& p, Shared<T, kTiles>& shared, int tile, int first) {
    const int last = min(first + rows_of_a_block(kTiles, p.splits), p.rows);
    const int column = int(threadIdx.x) % 8 * 8;
    if (tile + column >= p.n_out) return;
    for (int row = first + int(threadIdx.x) / 8; row < last; row += kThreads / 8) {
        ask(&shared.residual[row - first][column], p.residual, int64_t(row) * p.n_out + tile + column);
    }
}

// The powers of two for float16: from the squares of the block's part of each row.
template <typename T, int kTiles>
__device__ __forceinline__ void choose_scales(const GemvParams& p, Shared<T, kTiles>& shared, int begin, int end) {
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll 4  // rows on their way at once
    for (int row = warp; row < p.rows; row += kWarps) {
        float square = 0.0f;
        for (int k = begin + lane * 8; k < end; k += kWarpSize * 8) {
            const Vector<T> vector = load_vector<T>(p.x, int64_t(row) * p.n_in + k);
#pragma unroll
            for (int i = 0; i < 8; ++i) square += to_float(vector.at[i]) * to_float(vector.at[i]);
        }
        const unsigned bits = __float_as_uint(warp_sum(square) / float(end - begin));
        const int exponent = (int(bits >> 23) - 127) >> 1;  // of the root, rounded down
        if (lane == 0) store_shared(shared.scales + row, __uint_as_float(unsigned(127 - exponent) << 23));
    }
    __syncwarp();
}

// Multiplies eight of x by as many factors; the sum of their squares before.
template <typename T>
__device__ __forceinline__ float multiply_vector(Words* x, const Vector<T>& factors, float scale) {
    Words words = load_shared(x);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = ptx::unpack2<T>(words.at[i]);
        square += pair.x * pair.x;
        square += pair.y * pair.y;
        words.at[i] = ptx::pack2<T>(pair.x * scale * to_float(factors.at[2 * i]),
                                    pair.y * scale * to_float(factors.at[2 * i + 1]));
    }
    store_shared(x, words);
    return square;
}

// Multiplies the warp's rows of x by norm_weight, and adds their squares up. x has been waited for.
template <typename T, int kTiles>
__device__ __forceinline__ void apply_factors(const GemvParams& p, Shared<T, kTiles>& shared, T* x, int pitch,
                                              int length, bool first) {
    constexpr int kOwn = 2;  // rows at a time: registers
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
#pragma unroll 1
    for (int from = warp; from < p.rows; from += kOwn * kWarps) {
        float squares[kOwn] = {};
#pragma unroll 1
        for (int k = lane * 8; k < length; k += kWarpSize * 8) {
            const Vector<T> factors = load_shared(reinterpret_cast<const Vector<T>*>(shared.factors + k));
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int row = from + i * kWarps;
                if (row >= p.rows) break;
                const float scale = kNarrow<T> ? load_shared(shared.scales + row) : 1.0f;
                squares[i] += multiply_vector(reinterpret_cast<Words*>(x + row * pitch + k), factors, scale);
            }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int row = from + i * kWarps;
            if (row >= p.rows) break;
            const float sum = warp_sum(squares[i]);
            if (lane == 0) store_shared(shared.squares + row, first ? sum : load_shared(shared.squares + row) + sum);
        }
    }
}

// Puts x from `begin` to `end`, as the product takes it, into shared memory: nobody reads what was there, and `first`
// has been asked for outside.
template <typename T, int kTiles>
__device__ __forceinline__ void fill_x(const GemvParams& p, Shared<T, kTiles>& shared, T* x, int pitch, int begin,
                                       int end, bool first) {
    if (!first && p.norm_weight) ask_factors(p, shared.factors, begin, end);
    ask_x(p, x, pitch, begin, end);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (!p.norm_weight) return;
    apply_factors(p, shared, x, pitch, end - begin, first);
    __syncthreads();
}

// sums[m][r] += mma's C of 16 columns, number m, and 8 rows, number r, for one chunk; `x`: the lane's own eight of n_in
// of row lane / 4.
template <typename T, bool kTransposed, int kTiles>
__device__ __forceinline__ void multiply(float (&sums)[4][kTiles][4], const Chunk<T, kTransposed>& chunk, const T* x,
                                         int pitch, uint32_t zero) {
    constexpr int kN = kTiles < 4 ? kTiles : 4;  // tiles at a time: registers
#pragma unroll
    for (int first = 0; first < kTiles; first += kN) {
        Words own[kN];
#pragma unroll
        for (int r = 0; r < kN; ++r) {
            own[r] = load_shared(reinterpret_cast<const Words*>(x + (first + r) * kTile * pitch));
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t a[4];
            chunk.fragment(a, i % 4, i / 4);
            if constexpr (kTransposed) {
                // No plain copies: of these the assembler makes one for every product.
#pragma unroll
                for (uint32_t& word : a) word |= zero;
            }
#pragma unroll
            for (int r = 0; r < kN; ++r) {
                ptx::mma_m16n8k16<T>(sums[i % 4][first + r], a, own[r].at[i / 4 * 2], own[r].at[i / 4 * 2 + 1]);
            }
        }
    }
}

// Where a sum of this block goes: to the block that writes its row.
struct Outbox {
    float* own;  // this block's place, in any block's inbox
    int rows;    // of a block
    bool alone;

    __device__ __forceinline__ void put(int row, int column, float value) const {
        float* to = own + row % rows * kPitch + column;
        if (alone) {
            store_shared(to, value);
        } else {
            ptx::store_cluster(to, unsigned(row / rows), value);
        }
    }
};

// Adds the warps' sums up, and hands them to the blocks that write them, with the rows' sums of squares.
template <typename T, bool kTransposed, int kTiles>
__device__ __forceinline__ void hand_in(const GemvParams& p, const float (&sums)[4][kTiles][4],
                                        const Shared<T, kTiles>& shared, float* scratch, const Outbox& outbox) {
    constexpr int kN = Shared<T, kTiles>::kSumTiles, kPairs = kTile * kColumns / 2;
    const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    if (!outbox.alone) ptx::cluster_wait();  // all blocks have begun
    if (p.norm_weight && int(threadIdx.x) < p.rows) {
        outbox.put(int(threadIdx.x), kColumns, load_shared(shared.squares + threadIdx.x));
    }
#pragma unroll
    for (int first = 0; first < kTiles; first += kN) {
        __syncthreads();  // x, or the sums before, have been read
#pragma unroll
        for (int r = 0; r < kN; ++r) {
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const float (&four)[4] = sums[m][first + r];
                store_shared(reinterpret_cast<float4*>(scratch) + ((warp * kN + r) * 4 + m) * kWarpSize + lane,
                             make_float4(four[0], four[1], four[2], four[3]));
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int i = int(threadIdx.x); i < kN * kPairs; i += kThreads) {
            // A half of what a lane had for an m: one column, two rows.
            float2 sum = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 one = load_shared(reinterpret_cast<const float2*>(scratch) + w * kN * kPairs + i);
                sum.x += one.x;
                sum.y += one.y;
            }
            const int row = (first + i / kPairs) * kTile + i / 2 % 4 * 2;
            const int column = Chunk<T, kTransposed>::column_of(i / 64 % 4, i % 2, i / 8 % 8);
            if (kNarrow<T> && p.norm_weight && row < p.rows) {
                sum.x /= load_shared(shared.scales + row);
                if (row + 1 < p.rows) sum.y /= load_shared(shared.scales + row + 1);
            }
            outbox.put(row, column, sum.x);
            outbox.put(row + 1, column, sum.y);
        }
    }
    if (outbox.alone) {
        __syncthreads();
    } else {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

// Adds up what the blocks have of this one's rows, does to the sums what comes after the product, and writes them.
template <typename T, int kTiles>
__device__ __forceinline__ void finish(const GemvParams& p, Shared<T, kTiles>& shared, int tile, int first) {
    const int rows = rows_of_a_block(kTiles, p.splits), column = int(threadIdx.x) % kWarpSize * 2;
    if (tile + column >= p.n_out) return;
    const int last = min(first + rows, p.rows);
    const float2 bias =
        p.bias ? ptx::unpack2<T>(load_shared(reinterpret_cast<const uint32_t*>(shared.bias + column))) : float2{};
    for (int row = first + int(threadIdx.x) / kWarpSize; row < last; row += kWarps) {
        float2 y = {0.0f, 0.0f};
        float square = 0.0f;
        for (int s = 0; s < p.splits; ++s) {
            const float* from = shared.inbox() + (s * rows + row - first) * kPitch;
            const float2 one = load_shared(reinterpret_cast<const float2*>(from + column));
            y.x += one.x;
            y.y += one.y;
            if (p.norm_weight) square += load_shared(from + kColumns);
        }
        const float scale = p.norm_weight ? rsqrtf(square / float(p.n_in) + p.eps) : 1.0f;
        y.x = activate(p.activation, y.x * scale + bias.x);
        y.y = activate(p.activation, y.y * scale + bias.y);
        if (p.residual) {
            const auto* from = reinterpret_cast<const uint32_t*>(&shared.residual[row - first][column]);
            const float2 after = ptx::unpack2<T>(load_shared(from));
            y.x += after.x;
            y.y += after.y;
        }
        T* to = static_cast<T*>(p.out) + int64_t(row) * p.n_out + tile + column;
        store_global(reinterpret_cast<uint32_t*>(to), ptx::pack2<T>(y.x, y.y));
    }
}

template <typename T, bool kTransposed, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) gemv_rows_kernel(GemvParams p) {
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    auto& shared = *dynamic_shared<Shared<T, kTiles>>();
    const int tile = int(blockIdx.x) / p.splits * kColumns, split = int(blockIdx.x) % p.splits;
    const int begin = begin_of(p, split), end = min(begin_of(p, split + 1), p.n_in);
    const int rows = rows_of_a_block(kTiles, p.splits), warp = int(threadIdx.x) / kWarpSize;
    const int lane = int(threadIdx.x) % kWarpSize;
    constexpr int kSlab = Shared<T, kTiles>::kSlab;
    T* x = Shared<T, kTiles>::x(shared.inbox(), p);
    const int pitch = Shared<T, kTiles>::pitch(p.share);
    // What does not come from the launch before.
    Cursor<T, kTransposed, kStep> cursor(p, tile, begin + warp * kChunk, end);
    constexpr int kAhead = kTiles < 8 ? 2 : 1;  // chunks on their way: registers
    Chunk<T, kTransposed> chunks[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) chunks[a].load(cursor);
    if (p.norm_weight) ask_factors(p, shared.factors, begin, min(begin + kSlab, end));
    const int column = int(threadIdx.x) * 8;
    if (p.bias && column < min(kColumns, p.n_out - tile)) ask(shared.bias + column, p.bias, tile + column);
    if (p.splits > 1) ptx::cluster_arrive_relaxed();  // hand_in waits for it
    ptx::grid_dependency_wait();
    if (p.residual) ask_residual(p, shared, tile, split * rows);
    if (kNarrow<T> && p.norm_weight) choose_scales(p, shared, begin, end);
    const uint32_t zero = uint32_t(p.rows >> 31);  // which the compiler does not know
    float sums[4][kTiles][4] = {};
    for (int slab = begin; slab < end; slab += kSlab) {
        const int slab_end = min(slab + kSlab, end);
        if (slab > begin) __syncthreads();  // the one before is still being read
        fill_x(p, shared, x, pitch, slab, slab_end, slab == begin);
        const T* own = x + lane / 4 * pitch + lane % 4 * 8 - slab;
#pragma unroll 1
        for (int k = slab + warp * kChunk; k < slab_end; k += kAhead * kStep) {
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const int own_k = k + a * kStep;
                if (a == 0 || own_k < slab_end)
                    multiply<T, kTransposed, kTiles>(sums, chunks[a], own + own_k, pitch, zero);
                __syncwarp();  // lest the compiler load earlier, into registers that there are not
                chunks[a].load(cursor);
            }
        }
    }
    ptx::grid_dependency_launch();  // counts once; it waits for what is still to be written
    const Outbox outbox{shared.inbox() + split * rows * kPitch, rows, p.splits == 1};
    hand_in<T, kTransposed, kTiles>(p, sums, shared, reinterpret_cast<float*>(x), outbox);
    finish(p, shared, tile, split * rows);
}

template <typename T, int kTiles>
int launch_tiles(const GemvParams& p, unsigned blocks) {
    const auto kernel = p.transposed ? gemv_rows_kernel<T, true, kTiles> : gemv_rows_kernel<T, false, kTiles>;
    const size_t shared = Shared<T, kTiles>::bytes(p);
    return launch(kernel, blocks, kThreads, shared, p.stream, p, unsigned(p.splits), p.dependent != Dependent::none);
}

template <typename T>
int launch_dtype(GemvParams p) {
    const int tiles = divide_up(p.n_out, kColumns), chunks = divide_up(p.n_in, kChunk);
    const auto any = gemv_rows_kernel<T, false, 2>;  // all are compiled alike
    p.splits = choose_splits(any, tiles, chunks, kWarps, 2);
    p.share = divide_up(chunks, p.splits) * kChunk;
    const unsigned blocks = unsigned(tiles) * unsigned(p.splits);
    if (p.rows <= 16) return launch_tiles<T, 2>(p, blocks);
    return p.rows <= 32 ? launch_tiles<T, 4>(p, blocks) : launch_tiles<T, 8>(p, blocks);
}

}  // namespace

int gemv_rows(const GemvParams& p) {
    if (p.rows > kMostRows) return cudaErrorInvalidValue;
    if (p.dtype == DType::bf16) return launch_dtype<__nv_bfloat16>(p);
    if (p.dtype == DType::f16) return launch_dtype<__half>(p);
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
