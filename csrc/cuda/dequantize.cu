// Colours of tokens: out[i] = rint(127.5 (clusters[tokens[i]] + 1)) clipped to 0..255.
//
//   tokens (n,) int64 | int32 | int16 | uint8, clusters (k <= 8192, 3) float32, out (n, 3) uint8, all contiguous;
//   tokens and out 16-byte aligned. Tokens -k to -1 count from the end, as in torch's indexing; any other outside
//   0..k-1 traps, as torch's kernels do. Launch: 128 threads; a warp has 512 tokens at a time, grid-stride. Each block
//   rounds the palette once, into shared memory, 4 bytes a colour. Loads and stores are of whole sectors: a lane makes
//   three words of four colours, and the warp's 1,536 bytes pass through shared memory. Bound by memory: 11 bytes a
//   token (int64).
//
// Source: openai/image-gpt src/run.py.
#include "launch.cuh"
#include "memory.cuh"
#include "ops.h"
#include "primitives.cuh"

namespace igpt::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpTokens = 512;
constexpr int kWarpBytes = 3 * kWarpTokens;
constexpr int kStepTokens = 4 * kWarpSize;
constexpr unsigned kMaxBlocks = 1024;  // fill a GPU; more would round more palettes

__device__ __forceinline__ uint32_t rounded(float x) {
    return uint32_t(fminf(fmaxf(rintf(127.5f * (x + 1.0f)), 0.0f), 255.0f));
}

// The palette in shared memory, red in the lowest byte.
struct Palette {
    const uint32_t* colours;
    int k;

    __device__ __forceinline__ uint32_t operator()(int64_t token) const {
        if (token < 0) token += k;
        if (token < 0 || token >= k) __trap();
        return load_shared(colours + token);
    }
};

__device__ __forceinline__ void stage_palette(const float* clusters, int k, uint32_t* colours) {
    for (int i = threadIdx.x; i < k; i += kThreads) {
        const float* c = clusters + 3 * i;
        store_shared(colours + i, rounded(c[0]) | rounded(c[1]) << 8 | rounded(c[2]) << 16);
    }
}

// Four colours that follow each other, and the number of the four among those of a step.
struct Four {
    uint32_t colours[4];
    int number;
};

// The warp's step of 128 tokens: the lane's four of them.
template <typename T>
__device__ __forceinline__ Four load_four(const T* tokens, int lane, const Palette& palette) {
    struct alignas(4 * sizeof(T)) Tokens {
        T at[4];
    };
    const Tokens t = load_global(reinterpret_cast<const Tokens*>(tokens) + lane);
    return {{palette(t.at[0]), palette(t.at[1]), palette(t.at[2]), palette(t.at[3])}, lane};
}
// Two loads of two tokens a lane. Then neighbours exchange: the even lane of two has four of the first load, the odd
// one four of the second.
template <>
__device__ __forceinline__ Four load_four<int64_t>(const int64_t* tokens, int lane, const Palette& palette) {
    struct alignas(16) Tokens {
        int64_t at[2];
    };
    const Tokens* from = reinterpret_cast<const Tokens*>(tokens) + lane;
    const Tokens a = load_global(from), b = load_global(from + kWarpSize);
    const uint32_t a0 = palette(a.at[0]), a1 = palette(a.at[1]), b0 = palette(b.at[0]), b1 = palette(b.at[1]);
    const bool odd = lane % 2;
    const uint32_t other0 = __shfl_xor_sync(kFullMask, odd ? a0 : b0, 1);
    const uint32_t other1 = __shfl_xor_sync(kFullMask, odd ? a1 : b1, 1);
    if (odd) return {{other0, other1, b0, b1}, kWarpSize / 2 + lane / 2};
    return {{a0, a1, other0, other1}, lane / 2};
}

template <typename T>
__device__ __forceinline__ void dequantize_warp(const T* tokens, uint8_t* out, uint32_t* staged,
                                                const Palette& palette) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int step = 0; step < kWarpTokens; step += kStepTokens) {
        const Four four = load_four(tokens + step, lane, palette);
        const uint32_t (&c)[4] = four.colours;
        uint32_t* words = staged + step / 4 * 3 + 3 * four.number;
        store_shared(words, c[0] | c[1] << 24);
        store_shared(words + 1, c[1] >> 8 | c[2] << 16);
        store_shared(words + 2, c[2] >> 16 | c[3] << 8);
    }
    __syncwarp();
    for (int i = lane; i < kWarpBytes / 16; i += kWarpSize) {
        store_global(reinterpret_cast<uint4*>(out) + i, load_shared(reinterpret_cast<const uint4*>(staged) + i));
    }
    __syncwarp();  // before the next turn overwrites them
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 8) dequantize_kernel(DequantizeParams p) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    uint32_t* staged = dynamic_shared<uint32_t>() + warp * (kWarpBytes / 4);
    uint32_t* colours = dynamic_shared<uint32_t>() + kWarps * (kWarpBytes / 4);
    stage_palette(p.clusters, p.k, colours);
    __syncthreads();
    const Palette palette{colours, p.k};
    const int64_t stride = int64_t(gridDim.x) * kWarps * kWarpTokens;
    for (int64_t base = (int64_t(blockIdx.x) * kWarps + warp) * kWarpTokens; base < p.n; base += stride) {
        const T* tokens = static_cast<const T*>(p.tokens) + base;
        uint8_t* out = p.out + 3 * base;
        if (p.n - base >= kWarpTokens) {
            dequantize_warp(tokens, out, staged, palette);
            continue;
        }
        for (int64_t i = lane; i < p.n - base; i += kWarpSize) {
            const uint32_t colour = palette(tokens[i]);
            for (int c = 0; c < 3; ++c) out[3 * i + c] = uint8_t(colour >> 8 * c);
        }
    }
}

template <typename T>
int launch_tokens(const DequantizeParams& p) {
    const int64_t blocks = (p.n + kWarps * kWarpTokens - 1) / (kWarps * kWarpTokens);
    const unsigned grid = unsigned(blocks < int64_t(kMaxBlocks) ? blocks : int64_t(kMaxBlocks));
    return launch(dequantize_kernel<T>, grid, kThreads, size_t(kWarps * kWarpBytes + 4 * p.k), p.stream, p);
}

}  // namespace

int dequantize(const DequantizeParams& p) {
    if (p.k < 0 || p.k > 8192) return cudaErrorInvalidValue;
    if (p.n == 0) return cudaSuccess;
    const DeviceGuard device(p.device);
    if (device.error != cudaSuccess) return device.error;
    switch (p.token) {
        case TokenType::i64:
            return launch_tokens<int64_t>(p);
        case TokenType::i32:
            return launch_tokens<int32_t>(p);
        case TokenType::i16:
            return launch_tokens<int16_t>(p);
        case TokenType::u8:
            return launch_tokens<uint8_t>(p);
    }
    return cudaErrorInvalidValue;
}

}  // namespace igpt::cuda
