// As conformance.cu, for hopper.cuh: for the emulator and for sm_90a.
#include <cstring>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace igpt::cuda;
using ptx::Major;

namespace {

struct Case {
    const void *a, *b, *c;
    void* out;
};

// The first multiple of 1024 in shared memory.
__device__ unsigned char* aligned_shared() {
    auto* shared = dynamic_shared<unsigned char>();
    return shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
}

// a: [n, 8, 32] floats; out the same, each row backwards. One warp hands eight rows to another through two places.
__global__ void mbarriers(Case p) {
    auto* barriers = dynamic_shared<uint64_t>();
    auto* values = reinterpret_cast<float*>(barriers + 4);
    const auto full = [&](int i) { return ptx::shared_address(barriers + i); };
    const auto empty = [&](int i) { return ptx::shared_address(barriers + 2 + i); };
    const int warp = int(threadIdx.x) / 32, l = int(threadIdx.x) % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(full(i), 32);
            ptx::mbarrier_init(empty(i), 32);
        }
        ptx::mbarrier_fence_init();
    }
    __syncthreads();
    for (int row = 0; row < 8; ++row) {
        const int i = row % 2, parity = row / 2 % 2;
        const int at = (int(blockIdx.x) * 8 + row) * 32;
        if (warp == 0) {
            ptx::mbarrier_wait(empty(i), parity ^ 1);
            values[i * 32 + l] = static_cast<const float*>(p.a)[at + l];
            ptx::mbarrier_arrive(full(i));
        } else {
            ptx::mbarrier_wait(full(i), parity);
            static_cast<float*>(p.out)[at + l] = values[i * 32 + 31 - l];
            ptx::mbarrier_arrive(empty(i));
        }
    }
}

// a: [3, 7, 5, 72] of 16 bits, b: [n, 4] coordinates, innermost first; out: [n, 6, 2, 64], a box as it is in shared
// memory.
constexpr int kBoxElements = 64 * 2 * 6;
struct TileCase {
    ptx::TensorMap map;
    const int* coordinates;
    uint4* out;
};
__global__ void tma_load(const __grid_constant__ TileCase p) {
    unsigned char* tile = aligned_shared();
    const uint32_t to = ptx::shared_address(tile), barrier = to + kBoxElements * 2;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_fence_init();
        ptx::mbarrier_expect_tx(barrier, kBoxElements * 2);
        const int* at = p.coordinates + blockIdx.x * 4;
        ptx::tma_load_4d(to, &p.map, barrier, at[0], at[1], at[2], at[3]);
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    for (unsigned i = threadIdx.x; i < kBoxElements / 8; i += 32) {
        p.out[blockIdx.x * (kBoxElements / 8) + i] = reinterpret_cast<const uint4*>(tile)[i];
    }
}

// a: [n, 64] rows of 16 bytes, b: [n, 2] a first row and how many; out: [n, 65], these rows in their places among
// zeros, and behind them the first of all, which a second copy brings.
__global__ void bulk_load(Case p) {
    auto* rows = dynamic_shared<uint4>();
    const auto* a = static_cast<const uint4*>(p.a) + blockIdx.x * 64;
    const int* span = static_cast<const int*>(p.b) + blockIdx.x * 2;
    const uint32_t barrier = ptx::shared_address(rows + 65);
    for (unsigned i = threadIdx.x; i < 65; i += 32) rows[i] = uint4{0, 0, 0, 0};
    ptx::fence_async_shared();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_expect_tx(barrier, 16 * span[1] + 16);
        ptx::bulk_load(ptx::shared_address(rows + span[0]), a + span[0], 16 * span[1], barrier);
        ptx::bulk_load(ptx::shared_address(rows + 64), a, 16, barrier);
    }
    ptx::mbarrier_wait(barrier, 0);
    for (unsigned i = threadIdx.x; i < 65; i += 32) static_cast<uint4*>(p.out)[blockIdx.x * 65 + i] = rows[i];
}

// 16-bit elements [outer, inner] from global memory to tiles of 64 columns, each with rows of 128 bytes, swizzled.
__device__ void store_tiles(const unsigned short* from, int outer, int inner, unsigned char* to) {
    for (int i = int(threadIdx.x); i < outer * inner; i += 128) {
        const int row = i / inner, column = i % inner;
        const uint32_t at = uint32_t(column / 64 * outer * 128 + row * 128 + column % 64 * 2);
        *reinterpret_cast<unsigned short*>(to + (at ^ (at / 128 % 8 * 16))) = from[i];
    }
}

// out = c + A B, or A B where c is null: 64 x N x 64, in four steps. a: [n, 64, 64], A or for Major::mn its transpose;
// b: [n, N, 64], or for Major::mn [n, 64, N]; c, out: [n, 64, N] floats.
template <typename T, int N, bool kRegisters, Major kA, Major kB>
__global__ void __launch_bounds__(128) wgmma(Case p) {
    unsigned char* shared = aligned_shared();
    const int l = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * 16 + l / 4, column = 2 * (l % 4);
    const auto* a = static_cast<const unsigned short*>(p.a) + blockIdx.x * 64 * 64;
    store_tiles(a, 64, 64, shared);
    store_tiles(static_cast<const unsigned short*>(p.b) + blockIdx.x * 64 * N, kB == Major::k ? N : 64,
                kB == Major::k ? 64 : N, shared + 8192);
    ptx::fence_async_shared();
    __syncthreads();
    const auto* c = static_cast<const float*>(p.c) + size_t(blockIdx.x) * 64 * N;
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) {
        d[i] = p.c ? c[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] : 1.0f;
    }
    uint32_t f[4][4];
    for (int i = 0; i < 16; ++i) {
        const auto* at = a + (row + i % 2 * 8) * 64 + i / 4 * 16 + i / 2 % 2 * 8 + column;
        f[i / 4][i % 4] = at[0] | unsigned(at[1]) << 16;
    }
    const uint32_t sa = ptx::shared_address(shared), sb = sa + 8192;
    ptx::fence_registers(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint64_t da = ptx::swizzled_operand(sa + uint32_t(k) * (kA == Major::k ? 32 : 2048), 0, 1024);
        const uint64_t db = ptx::further(ptx::swizzled_operand(sb, 8192, 1024), k * (kB == Major::k ? 32 : 2048));
        const bool accumulate = k > 0 || p.c != nullptr;
        if constexpr (kRegisters) {
            ptx::wgmma_rs<T, N, kB>(d, f[k], db, accumulate);
        } else {
            ptx::wgmma_ss<T, N, kA, kB>(d, da, db, accumulate);
        }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(d);
    auto* out = static_cast<float*>(p.out) + size_t(blockIdx.x) * 64 * N;
    for (int i = 0; i < N / 2; ++i) out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

constexpr size_t kWgmmaShared = 1024 + 8192 + 16384;

template <typename T, int N>
int launch_wgmma(const std::string& form, unsigned n, const Case& p) {
    const auto run = [&](void (*kernel)(Case)) { return launch(kernel, n, 128, kWgmmaShared, nullptr, p); };
    if (form == "ss_k_k") return run(wgmma<T, N, false, Major::k, Major::k>);
    if (form == "ss_k_mn") return run(wgmma<T, N, false, Major::k, Major::mn>);
    if (form == "ss_mn_k") return run(wgmma<T, N, false, Major::mn, Major::k>);
    if (form == "ss_mn_mn") return run(wgmma<T, N, false, Major::mn, Major::mn>);
    if (form == "rs_k_k") return run(wgmma<T, N, true, Major::k, Major::k>);
    if (form == "rs_k_mn") return run(wgmma<T, N, true, Major::k, Major::mn>);
    return -1;
}

template <typename T>
int launch_wgmma(const std::string& form, int size, unsigned n, const Case& p) {
    if (size == 64) return launch_wgmma<T, 64>(form, n, p);
    if (size == 96) return launch_wgmma<T, 96>(form, n, p);
    if (size == 128) return launch_wgmma<T, 128>(form, n, p);
    return -1;
}

int launch_tma(bool swizzled, unsigned n, const Case& p) {
    const ptx::Swizzle swizzle = swizzled ? ptx::Swizzle::bytes128 : ptx::Swizzle::none;
    TileCase tiles{{}, static_cast<const int*>(p.b), static_cast<uint4*>(p.out)};
    const int error =
        ptx::make_tensor_map(&tiles.map, p.a, {{72, 5, 7, 3}, {144, 144 * 5, 144 * 35}, {64, 2, 6, 1}, swizzle});
    return error == cudaSuccess ? launch(tma_load, n, 32, 1024 + kBoxElements * 2 + 8, nullptr, tiles) : error;
}

int run(const std::string& name, int size, unsigned n, const Case& p) {
    if (name == "mbarriers") return launch(mbarriers, n, 64, 4 * 8 + 64 * 4, nullptr, p);
    if (name == "bulk_load") return launch(bulk_load, n, 32, 65 * 16 + 8, nullptr, p);
    if (name == "tma_load" || name == "tma_load_swizzled") return launch_tma(name != "tma_load", n, p);
    if (name.rfind("bf16_", 0) == 0) return launch_wgmma<__nv_bfloat16>(name.substr(5), size, n, p);
    if (name.rfind("f16_", 0) == 0) return launch_wgmma<__half>(name.substr(4), size, n, p);
    return -1;
}

}  // namespace

// As igpt_conformance; `size` is N of wgmma.
extern "C" __attribute__((visibility("default"))) int igpt_conformance_hopper(const char* name, int size, const void* a,
                                                                              const void* b, const void* c, void* out,
                                                                              unsigned n) {
    const int error = run(name, size, n, Case{a, b, c, out});
#ifdef __CUDACC__
    return error == cudaSuccess ? cudaDeviceSynchronize() : error;
#else
    return error;
#endif
}
