// Nearest colour cluster by trying all: out[i] = argmin_k sum_c (x[i][c] - clusters[k][c])^2, the lowest k on ties.
//
//   x (n, 3) uint8 | float32, 16-byte aligned, clusters (k, 3) float32, out (n,) int64, all contiguous.
//   Launch: 128 threads, 4 pixels each (one where there are few), no loop over pixels. The pixels reach their threads
//   through shared memory; the clusters pass through it in tiles of 512, padded to 16 bytes, which a warp reads as one
//   broadcast for all of its pixels.
//   Bound by issue: 8 operations per pixel and cluster, none of them fused since the definition rounds each, and about
//   1.6 more: the minimum, and a share of the broadcast and of the bookkeeping; against 11 (uint8) or 20 (float32)
//   bytes per pixel. quantize_table.cu serves many uint8 pixels.
//
// The index costs little: only the least distance of each group of 8 clusters is compared with the best so far, and the
// group that had it is looked through again at the end of its tile. float32 input is compared in float32, in the order
// of reference.py; the file is compiled without contraction to FMA, so the indices agree bit for bit. uint8 input is
// exact: float32 only sorts out the groups that cannot win, the few others are compared in float64.
//
// Source: openai/image-gpt src/utils.py color_quantize.
#include "launch.cuh"
#include "ops.h"
#include "quantize.cuh"

namespace igpt::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 512;
constexpr int kGroup = 8;
constexpr int64_t kManyPixels = int64_t(1) << 17;  // from here on a GPU is full with 4 pixels a thread

struct FloatPixel {
    float x[3] = {0.0f, 0.0f, 0.0f};
    float best = INFINITY;
    int group = -1;  // of this tile, the one that has `best`
    int index = 0;

    __device__ __forceinline__ void load(const float* from) {
        for (int c = 0; c < 3; ++c) x[c] = load_shared(from + c);
    }
    __device__ __forceinline__ float distance(const float4& c) const {
        return squared_distance(x[0], x[1], x[2], c.x, c.y, c.z);
    }
    __device__ __forceinline__ void offer(float least, const float4*, int at, int) {
        if (least < best) {
            best = least;
            group = at;
        }
    }
    // Looks for the first cluster of the group at the best distance, before the tile is overwritten.
    __device__ __forceinline__ void settle(const float4* tile, int first) {
        if (group < 0) return;
        int i = 0;
        while (i < kGroup - 1 && distance(load_shared(tile + group + i)) != best) ++i;
        index = first + group + i;
        group = -1;
    }
};

struct BytePixel {
    float x[3] = {0.0f, 0.0f, 0.0f};
    double exact[3] = {0.0, 0.0, 0.0};
    Nearest nearest;
    int index = 0;

    __device__ __forceinline__ void load(const uint8_t* from) {
        for (int c = 0; c < 3; ++c) {
            exact[c] = level(load_shared(from + c));
            x[c] = float(exact[c]);
        }
    }
    __device__ __forceinline__ float distance(const float4& c) const {
        return squared_distance(x[0], x[1], x[2], c.x, c.y, c.z);
    }
    __device__ __forceinline__ void offer(float least, const float4* tile, int at, int first) {
        if (!nearest.may_win(least)) return;
        for (int i = 0; i < kGroup; ++i) {
            const float4 c = load_shared(tile + at + i);
            nearest.offer(squared_distance<double>(exact[0], exact[1], exact[2], c.x, c.y, c.z), first + at + i);
        }
    }
    __device__ __forceinline__ void settle(const float4*, int) { index = nearest.index; }
};

// Copies the block's pixels to shared memory in whole sectors.
template <typename T>
__device__ __forceinline__ void stage_pixels(const T* from, int count, T* to) {
    constexpr int kSize = Vector<T>::kSize;
    const int vectors = count / kSize;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        store_shared(reinterpret_cast<Vector<T>*>(to) + i, load_global(reinterpret_cast<const Vector<T>*>(from) + i));
    }
    for (int i = vectors * kSize + threadIdx.x; i < count; i += kThreads) store_shared(to + i, load_global(from + i));
}

// Copies `count` clusters to shared memory, 16 bytes apart, and fills the last group with NaN, which never wins.
__device__ __forceinline__ void stage_clusters(const float* from, int count, float4* to) {
    for (int i = threadIdx.x; i < 3 * count; i += kThreads) {
        store_shared(reinterpret_cast<float*>(to + i / 3) + i % 3, load_global(from + i));
    }
    const int whole = (count + kGroup - 1) / kGroup * kGroup;
    for (int i = count + threadIdx.x; i < whole; i += kThreads) store_shared(to + i, make_float4(NAN, NAN, NAN, NAN));
}

template <typename Pixel, typename T, int kPixels>
__global__ void __launch_bounds__(kThreads, kPixels == 1 ? 8 : 4) quantize_kernel(QuantizeParams p) {
    constexpr int kBlock = kThreads * kPixels;
    float4* tile = dynamic_shared<float4>();
    T* staged = reinterpret_cast<T*>(tile + kTile);
    const int64_t base = int64_t(blockIdx.x) * kBlock;
    const int here = int(min(int64_t(kBlock), p.n - base));
    stage_pixels(static_cast<const T*>(p.x) + 3 * base, 3 * here, staged);
    __syncthreads();
    // Neighbouring threads have neighbouring pixels: their stores make whole sectors.
    Pixel pixels[kPixels];
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        const int i = threadIdx.x + j * kThreads;
        if (i < here) pixels[j].load(staged + 3 * i);
    }
    for (int first = 0; first < p.k; first += kTile) {
        const int count = min(kTile, p.k - first);
        if (first > 0) __syncthreads();  // until all have read the tile before
        stage_clusters(p.clusters + 3 * int64_t(first), count, tile);
        __syncthreads();
        for (int at = 0; at < count; at += kGroup) {
            float least[kPixels];
#pragma unroll
            for (int j = 0; j < kPixels; ++j) least[j] = INFINITY;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                const float4 cluster = load_shared(tile + at + i);
#pragma unroll
                for (int j = 0; j < kPixels; ++j) least[j] = fminf(least[j], pixels[j].distance(cluster));
            }
#pragma unroll
            for (int j = 0; j < kPixels; ++j) pixels[j].offer(least[j], tile, at, first);
        }
#pragma unroll
        for (int j = 0; j < kPixels; ++j) pixels[j].settle(tile, first);
    }
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
        const int i = threadIdx.x + j * kThreads;
        if (i < here) store_global(p.out + base + i, int64_t(pixels[j].index));
    }
}

template <typename Pixel, typename T, int kPixels>
int launch_pixels(const QuantizeParams& p) {
    constexpr int kBlock = kThreads * kPixels;
    const int64_t blocks = (p.n + kBlock - 1) / kBlock;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const size_t shared = kTile * sizeof(float4) + 3 * kBlock * sizeof(T);
    return launch(quantize_kernel<Pixel, T, kPixels>, unsigned(blocks), kThreads, shared, p.stream, p);
}

template <typename Pixel, typename T>
int quantize(const QuantizeParams& p) {
    if (p.n == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    return p.n < kManyPixels ? launch_pixels<Pixel, T, 1>(p) : launch_pixels<Pixel, T, 4>(p);
}

}  // namespace

int quantize_u8(const QuantizeParams& p) { return quantize<BytePixel, uint8_t>(p); }
int quantize_f32(const QuantizeParams& p) { return quantize<FloatPixel, float>(p); }

}  // namespace igpt::cuda
