// What the attention kernels for Hopper share: tiles of 64 rows, their copies, products of a warpgroup.
//
// In shared memory a tile has kPanels panels of 64 columns, with rows of 128 bytes, swizzled as TMA writes and wgmma
// reads them. With D of 96 the second panel's other half lies outside the tensor and is zero; no product reads it.
// F describes a kernel: D, kKeys (the rows of a tile that a ring moves), kPanels, and how many bytes a panel of a
// warpgroup's own tile (kQPanel) and of the ring's (kKeyPanel) has.
#pragma once

#include "attention_common.cuh"
#include "hopper.cuh"

namespace igpt::cuda::attention {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kPanelRow = 128;      // bytes
constexpr int kMaxShared = 227 * 1024;

// Whether warpgroups that compute and one that loads find as many registers as a launch of `threads` is given: without
// them a warpgroup waits for ever.
constexpr bool registers_suffice(int threads, int groups, int registers, int loader_registers) {
    return kGroupThreads * (groups * registers + loader_registers) <= threads * (65536 / threads / 8 * 8);
}

template <typename F>
__device__ __forceinline__ void load_panels(uint32_t to, int panel, const ptx::TensorMap* map, uint32_t barrier,
                                            int row, const Block& block) {
#pragma unroll
    for (int i = 0; i < F::kPanels; ++i) {
        ptx::tma_load_4d(to + i * panel, map, barrier, 64 * i, row, block.head, block.batch);
    }
}

// The accumulators as wgmma counts them, and as the other kernels do.
template <int N>
__device__ __forceinline__ float (&flat(float (&x)[1][N][4]))[4 * N] {
    return reinterpret_cast<float (&)[4 * N]>(x);
}

// Begins s = Q K^T.
template <typename T, typename F>
__device__ __forceinline__ void begin_scores(float (&s)[1][F::kKeys / 8][4], uint32_t q, uint32_t k) {
    const uint64_t a = ptx::swizzled_operand(q, 0, 8 * kPanelRow), b = ptx::swizzled_operand(k, 0, 8 * kPanelRow);
    ptx::fence_registers(flat(s));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::D / 16; ++i) {
        ptx::wgmma_ss<T, F::kKeys>(flat(s), ptx::further(a, i / 4 * F::kQPanel + i % 4 * 32),
                                   ptx::further(b, i / 4 * F::kKeyPanel + i % 4 * 32), i > 0);
    }
    ptx::wgmma_commit();
}

// Begins out += P V.
template <typename T, typename F>
__device__ __forceinline__ void begin_out(float (&out)[1][F::D / 8][4], uint32_t (&p)[F::kKeys / 16][4], uint32_t v) {
    const uint64_t b = ptx::swizzled_operand(v, F::kKeyPanel, 8 * kPanelRow);
    ptx::fence_registers(flat(out));
#pragma unroll
    for (int i = 0; i < F::kKeys / 16; ++i) ptx::fence_registers(p[i]);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::kKeys / 16; ++i) {
        ptx::wgmma_rs<T, F::D, ptx::Major::mn>(flat(out), p[i], ptx::further(b, i * 16 * kPanelRow), true);
    }
    ptx::wgmma_commit();
}

// Columns of a tile, rounded, as the A operand.
template <typename T, int N>
__device__ __forceinline__ void round_to(uint32_t (&p)[N / 2][4], const float (&s)[1][N][4]) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
        p[i / 4][i % 4] = ptx::pack2<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
    }
}

// Says, for a warp, that it has done with a place of a ring: all its lanes have waited for their products.
__device__ __forceinline__ void leave(uint32_t empty) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(empty);
}

inline cudaError_t make_map(ptx::TensorMap* map, const AttentionTensor& tensor, const AttentionShape& shape,
                            int positions, int rows) {
    const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? 16 : 2 * stride; };
    return ptx::make_tensor_map(
        map, tensor.data,
        {{shape.head_dim, positions, shape.heads, shape.batch},
         {bytes(positions, tensor.position), bytes(shape.heads, tensor.head), bytes(shape.batch, tensor.batch)},
         {64, rows, 1, 1},
         ptx::Swizzle::bytes128});
}

}  // namespace igpt::cuda::attention
