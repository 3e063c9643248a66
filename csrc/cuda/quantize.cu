// Nearest colour cluster: out[i] = argmin_k sum_c (x[i][c] - clusters[k][c])^2, the lowest k on ties.
//
//   x (n, 3) uint8 | float32, clusters (k, 3) float32, out (n,) int64, all contiguous.
//   Launch: 256 threads, one pixel each, grid-stride; clusters pass through shared memory in tiles of 256.
//   Bound by arithmetic: 8 FLOPs per pixel and cluster against 11 (uint8) or 20 (float32) bytes per pixel.
//
// float32 input is compared in float32, in the order of reference.py; the file is compiled without contraction to
// FMA, so the indices agree bit for bit. uint8 input is exact: float32 only sorts out the clusters that cannot
// win, the few others are compared in float64.
//
// Source: openai/image-gpt src/utils.py color_quantize.
#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"

namespace igpt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 256;

// Squared distance in T, without FMA.
template <typename T>
__device__ T distance(const T (&x)[3], const float* c) {
    const T dr = x[0] - T(c[0]), dg = x[1] - T(c[1]), db = x[2] - T(c[2]);
    return (dr * dr + dg * dg) + db * db;
}

struct FloatPixel {
    float x[3] = {0.0f, 0.0f, 0.0f};
    float best = INFINITY;
    int index = 0;

    __device__ void load(const float* p) {
        for (int c = 0; c < 3; ++c) x[c] = p[c];
    }
    __device__ void offer(const float* cluster, int k) {
        const float d = distance(x, cluster);
        if (d < best) {
            best = d;
            index = k;
        }
    }
};

struct BytePixel {
    float x[3] = {0.0f, 0.0f, 0.0f};
    double exact[3] = {0.0, 0.0, 0.0};
    double best = INFINITY;
    float limit = INFINITY;  // above `best` by more than a float32 distance can be off
    int index = 0;

    __device__ void load(const uint8_t* p) {
        for (int c = 0; c < 3; ++c) {
            exact[c] = p[c] / 127.5 - 1.0;
            x[c] = float(exact[c]);
        }
    }
    __device__ void offer(const float* cluster, int k) {
        if (distance(x, cluster) > limit) return;
        const double d = distance(exact, cluster);
        if (d < best) {
            best = d;
            limit = float(d) * 1.001f + 1e-5f;
            index = k;
        }
    }
};

template <typename Pixel, typename T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeParams p) {
    float* tile = dynamic_shared<float>();
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    // Every thread of the block takes part in loading the tiles, also where it has no pixel.
    for (int64_t base = int64_t(blockIdx.x) * kThreads; base < p.n; base += stride) {
        const int64_t i = base + threadIdx.x;
        Pixel pixel;
        if (i < p.n) pixel.load(static_cast<const T*>(p.x) + 3 * i);
        for (int first = 0; first < p.k; first += kTile) {
            const int count = min(kTile, p.k - first);
            __syncthreads();
            for (int j = threadIdx.x; j < 3 * count; j += kThreads) {
                store_shared(tile + j, load_global(p.clusters + 3 * int64_t(first) + j));
            }
            __syncthreads();
            for (int j = 0; j < count; ++j) pixel.offer(tile + 3 * j, first + j);
        }
        if (i < p.n) store_global(p.out + i, int64_t(pixel.index));
    }
}

template <typename Pixel, typename T>
int quantize(const QuantizeParams& p) {
    if (p.n == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    const int64_t blocks = (p.n + kThreads - 1) / kThreads;
    const unsigned grid = unsigned(blocks < 65535 ? blocks : 65535);
    return launch(quantize_kernel<Pixel, T>, grid, kThreads, 3 * kTile * sizeof(float), p.stream, p);
}

}  // namespace

int quantize_u8(const QuantizeParams& p) { return quantize<BytePixel, uint8_t>(p); }
int quantize_f32(const QuantizeParams& p) { return quantize<FloatPixel, float>(p); }
const char* error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace igpt::cuda
