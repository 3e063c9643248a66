// Nearest colour cluster of uint8 pixels through a table of all 2^24 colours, which is exact: it holds what quantize.cu
// would find for each of them.
//
//   x (n, 3) uint8, clusters (k <= 65536, 3) float32, table (2^24,) uint16, out (n,) int64; x, table and out 16-byte
//   aligned. Colour (r, g, b) stands in the table at entry(): 4x4x4 colours to a line of 128 bytes, 4x4 of one r to a
//   sector, so that the colours of a natural image, which are near to each other, share lines.
//
// Building.  Launch: a block of 128 threads for each cell of 8x8x8 colours, 4 neighbours in b to a thread. The nearest
//   cluster of any colour of a cell is among those whose least distance to the cell does not exceed the smallest of all
//   largest distances. The block compacts those in the order of their indices and compares them exactly, as
//   quantize.cu. Bound by arithmetic: 2^15 cells times 2 k bounds, 2^24 colours times the candidates of a cell.
// Looking up.  Launch: 128 threads, 16 pixels each; a warp has 512 pixels, 1,536 bytes, through shared memory, so that
//   loads, shared accesses and stores are of whole sectors without conflicts. Bound by memory: 11 bytes per pixel, and
//   the sectors of the table that caches do not hold (32 MiB, less than the L2 cache of an H100).
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition); csrc/cpu/bodies/quantize.h has the same
// bounds.
#include "launch.cuh"
#include "ops.h"
#include "quantize.cuh"

namespace igpt::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kCell = 8;     // colours to a side
constexpr int kCells = 32;   // to a side of the cube
constexpr int kColours = 4;  // of a thread
constexpr int kList = 512;   // candidates that shared memory holds at a time

__device__ __forceinline__ uint32_t entry(uint32_t r, uint32_t g, uint32_t b) {
    return (r >> 2) << 18 | (g >> 2) << 12 | (b >> 2) << 6 | (r & 3) << 4 | (g & 3) << 2 | (b & 3);
}

// A cell as a box of colours.
struct Box {
    float centre[3];
    float half;

    __device__ explicit Box(const int (&from)[3]) : half(0.5f * float(kCell - 1) / 127.5f) {
        for (int c = 0; c < 3; ++c) centre[c] = (float(from[c]) + 0.5f * float(kCell - 1)) / 127.5f - 1.0f;
    }
    // Squared distances of a cluster to the nearest and to the farthest point of the box.
    __device__ __forceinline__ void bounds(const float (&cluster)[3], float& nearest, float& farthest) const {
        nearest = farthest = 0.0f;
        for (int c = 0; c < 3; ++c) {
            const float d = fabsf(cluster[c] - centre[c]);
            const float inside = d - half < 0.0f ? 0.0f : d - half;  // NaN stays NaN
            nearest += inside * inside;
            farthest += (d + half) * (d + half);
        }
    }
};

__device__ __forceinline__ void load_cluster(const float* clusters, int k, float (&cluster)[3]) {
    for (int c = 0; c < 3; ++c) cluster[c] = clusters[3 * int64_t(k) + c];
}

// The smallest of the block, in every thread.
__device__ __forceinline__ float block_min(float x, float* scratch) {
#pragma unroll
    for (int lane = kWarpSize / 2; lane > 0; lane /= 2) x = fminf(x, __shfl_xor_sync(kFullMask, x, lane));
    if (threadIdx.x % kWarpSize == 0) store_shared(scratch + threadIdx.x / kWarpSize, x);
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) x = fminf(x, load_shared(scratch + w));
    return x;
}

// A thread's colours: of one r and one g.
struct Colours {
    double r, g, b[kColours];
    Nearest nearest[kColours];

    __device__ Colours(int red, int green, int blue) : r(level(red)), g(level(green)) {
        for (int i = 0; i < kColours; ++i) b[i] = level(blue + i);
    }
    __device__ __forceinline__ void offer(const float4* list, int size) {
        const float x = float(r), y = float(g);
        for (int j = 0; j < size; ++j) {
            const float4 c = load_shared(list + j);
#pragma unroll
            for (int i = 0; i < kColours; ++i) {
                if (!nearest[i].may_win(squared_distance(x, y, float(b[i]), c.x, c.y, c.z))) continue;
                nearest[i].offer(squared_distance<double>(r, g, b[i], c.x, c.y, c.z), __float_as_int(c.w));
            }
        }
    }
    __device__ __forceinline__ void store(uint16_t* to) const {
        const uint2 packed = make_uint2(unsigned(nearest[0].index) | unsigned(nearest[1].index) << 16,
                                        unsigned(nearest[2].index) | unsigned(nearest[3].index) << 16);
        store_global(reinterpret_cast<uint2*>(to), packed);
    }
};

// Appends the clusters that `candidate` threads have to the list, in the order of the threads. `counts`: one int for
// each warp, which no thread may still be reading. Returns the new size.
__device__ __forceinline__ int append(float4* list, int size, bool candidate, const float4& cluster, int* counts) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned votes = __ballot_sync(kFullMask, candidate);
    if (lane == 0) store_shared(counts + warp, __popc(votes));
    __syncthreads();
    int at = size + __popc(votes & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
        const int count = load_shared(counts + w);
        if (w < warp) at += count;
        size += count;
    }
    if (candidate) store_shared(list + at, cluster);
    return size;
}

__global__ void __launch_bounds__(kThreads) quantize_table_kernel(QuantizeTableParams p) {
    float4* list = dynamic_shared<float4>();
    float* scratch = reinterpret_cast<float*>(list + kList);
    int* counts = reinterpret_cast<int*>(scratch + kWarps);  // two sets of them
    const int cell[3] = {int(blockIdx.x) / (kCells * kCells) * kCell, int(blockIdx.x) / kCells % kCells * kCell,
                         int(blockIdx.x) % kCells * kCell};
    const Box box(cell);
    float cluster[3], nearest, farthest, limit = INFINITY;
    for (int k = threadIdx.x; k < p.k; k += kThreads) {
        load_cluster(p.clusters, k, cluster);
        box.bounds(cluster, nearest, farthest);
        limit = fminf(limit, farthest);  // passes over NaN
    }
    // Wide enough for the rounding of both bounds and of the distances.
    limit = block_min(limit, scratch) * 1.0001f + 1e-5f;

    // A warp has two lines that are neighbours in b, a thread four entries of one of them.
    const int line = threadIdx.x / 16, place = threadIdx.x % 16;
    const int red = cell[0] + (line & 4) + place / 4, green = cell[1] + (line & 2) * 2 + place % 4;
    const int blue = cell[2] + (line & 1) * 4;
    Colours colours(red, green, blue);
    int size = 0, turn = 0;
    for (int first = 0; first < p.k; first += kThreads) {
        const int k = first + threadIdx.x;
        bool candidate = false;
        if (k < p.k) {
            load_cluster(p.clusters, k, cluster);
            box.bounds(cluster, nearest, farthest);
            candidate = !(nearest > limit);
        }
        const float4 packed = make_float4(cluster[0], cluster[1], cluster[2], __int_as_float(k));
        // Two sets of counts by turns: a fast warp is at most one barrier ahead of one that still reads.
        size = append(list, size, candidate, packed, counts + turn * kWarps);
        turn ^= 1;
        if (size > kList - kThreads || first + kThreads >= p.k) {
            __syncthreads();
            colours.offer(list, size);
            size = 0;  // the next candidates are written behind append's barrier
        }
    }
    colours.store(p.table + entry(red, green, blue));
}

constexpr int kWarpPixels = 512;
constexpr int kWarpBytes = 3 * kWarpPixels;
constexpr int kSteps = kWarpPixels / (4 * kWarpSize);

// The entries of four packed pixels, which are twelve bytes in three words; two to a word.
__device__ __forceinline__ uint2 look_up(const uint16_t* table, uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t first = table[entry(a & 255, a >> 8 & 255, a >> 16 & 255)];
    const uint32_t second = table[entry(a >> 24, b & 255, b >> 8 & 255)];
    const uint32_t third = table[entry(b >> 16 & 255, b >> 24, c & 255)];
    const uint32_t fourth = table[entry(c >> 8 & 255, c >> 16 & 255, c >> 24)];
    return make_uint2(first | second << 16, third | fourth << 16);
}

struct alignas(16) TokenPair {
    int64_t first, second;
};

__global__ void __launch_bounds__(kThreads, 8) quantize_lookup_kernel(QuantizeLookupParams p) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t base = (int64_t(blockIdx.x) * kWarps + warp) * kWarpPixels;
    const uint8_t* x = p.x + 3 * base;
    int64_t* out = p.out + base;
    if (p.n - base < kWarpPixels) {  // a whole warp, which meets no barrier of the block
        for (int64_t i = lane; i < p.n - base; i += kWarpSize) {
            out[i] = p.table[entry(x[3 * i], x[3 * i + 1], x[3 * i + 2])];
        }
        return;
    }
    uint4* staged = reinterpret_cast<uint4*>(dynamic_shared<unsigned char>() + warp * kWarpBytes);
#pragma unroll
    for (int i = lane; i < kWarpBytes / 16; i += kWarpSize) {
        store_shared(staged + i, load_global(reinterpret_cast<const uint4*>(x) + i));
    }
    __syncwarp();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(staged) + 3 * lane;
    uint2 found[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s, words += 3 * kWarpSize) {
        found[s] = look_up(p.table, load_shared(words), load_shared(words + 1), load_shared(words + 2));
    }
    // Lane l has pixels 4l to 4l + 3 of every 128; it stores 2l, 2l + 1 and then 64 + 2l, 65 + 2l.
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int source = half * (kWarpSize / 2) + lane / 2;
            const uint32_t even = __shfl_sync(kFullMask, found[s].x, source);
            const uint32_t odd = __shfl_sync(kFullMask, found[s].y, source);
            const uint32_t pair = lane % 2 ? odd : even;
            TokenPair* to = reinterpret_cast<TokenPair*>(out + 4 * kWarpSize * s + 2 * kWarpSize * half) + lane;
            store_global(to, TokenPair{int64_t(pair & 0xffff), int64_t(pair >> 16)});
        }
    }
}

}  // namespace

int quantize_table(const QuantizeTableParams& p) {
    if (p.k < 1 || p.k > 65536) return cudaErrorInvalidValue;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const size_t shared = kList * sizeof(float4) + kWarps * sizeof(float) + 2 * kWarps * sizeof(int);
    return launch(quantize_table_kernel, kCells * kCells * kCells, kThreads, shared, p.stream, p);
}

int quantize_lookup(const QuantizeLookupParams& p) {
    if (p.n == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const int64_t blocks = (p.n + kWarps * kWarpPixels - 1) / (kWarps * kWarpPixels);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch(quantize_lookup_kernel, unsigned(blocks), kThreads, kWarps * kWarpBytes, p.stream, p);
}

}  // namespace igpt::cuda
