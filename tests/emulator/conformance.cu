// One small kernel for each function of ptx.cuh. test_ptx.py runs them on random input on the emulator and, where there
// is one, on a GPU, compares both with what the PTX manual says, and the GPU with the emulator.
//
// It stands with the tests because no build but theirs needs it: g++ compiles it for the emulator, nvcc to a shared
// library with one C function. Every kernel has one block for each of n cases; inputs and outputs are contiguous.
#include <cstring>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace igpt::cuda;

namespace {

struct Case {
    const void *a, *b, *c;
    void* out;
};

// a: [n, 16, 16], b: [n, 16, 8] of T, c: [n, 16, 8] floats; out = a b + c.
template <typename T>
__global__ void mma(Case p) {
    const int l = int(threadIdx.x), g = l / 4, t = l % 4;
    const auto* a = static_cast<const unsigned short*>(p.a) + blockIdx.x * 256;
    const auto* b = static_cast<const unsigned short*>(p.b) + blockIdx.x * 128;
    const auto* c = static_cast<const float*>(p.c) + blockIdx.x * 128;
    auto* out = static_cast<float*>(p.out) + blockIdx.x * 128;
    const auto two = [](unsigned lo, unsigned hi) { return lo | hi << 16; };
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) {
        const auto* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        fa[i] = two(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) {
        const auto* at = b + (2 * t + 8 * i) * 8 + g;
        fb[i] = two(at[0], at[8]);
    }
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    ptx::mma_m16n8k16<T>(d, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// a: [n, 32, 8] of 16 bits, rows in an order of their own in shared memory; out: [n, 32, 4] registers by lane.
template <bool kTrans>
__global__ void ldmatrix(Case p) {
    const unsigned l = threadIdx.x;
    auto* rows = dynamic_shared<uint4>();
    rows[(5 * l + 3) % 32] = static_cast<const uint4*>(p.a)[blockIdx.x * 32 + l];
    __syncthreads();
    const uint32_t address = ptx::shared_address(rows + (5 * l + 3) % 32);
    uint32_t r[4];
    kTrans ? ptx::ldmatrix_x4_trans(r, address) : ptx::ldmatrix_x4(r, address);
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(p.out)[(blockIdx.x * 32 + l) * 4 + i] = r[i];
}

// a: [n, 3, 64, 16] bytes, b: [n, 3, 64] how many of them to copy; out: [n, 3, 64, 16]. Three groups, of which the
// oldest is used while the others are under way, by threads that did not copy it.
__global__ void cp_async(Case p) {
    auto* shared = dynamic_shared<uint4>();
    const auto* a = static_cast<const uint4*>(p.a) + blockIdx.x * 192;
    const auto* bytes = static_cast<const int*>(p.b) + blockIdx.x * 192;
    auto* out = static_cast<uint4*>(p.out) + blockIdx.x * 192;
    const int i = int(threadIdx.x);
    for (int group = 0; group < 3; ++group) {
        const int at = group * 64 + i;
        ptx::cp_async16(ptx::shared_address(shared + at), a + at, bytes[at]);
        ptx::cp_async_commit();
    }
    ptx::cp_async_wait<2>();
    __syncthreads();
    out[63 - i] = shared[63 - i];
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int group = 1; group < 3; ++group) out[group * 64 + 63 - i] = shared[group * 64 + 63 - i];
}

// a, out: [n, 64] of 4 bytes; the other way round.
__global__ void cp_async4(Case p) {
    auto* shared = dynamic_shared<uint32_t>();
    const unsigned i = threadIdx.x, first = blockIdx.x * 64;
    ptx::cp_async4(ptx::shared_address(shared + 63 - i), static_cast<const uint32_t*>(p.a) + first + i);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    static_cast<uint32_t*>(p.out)[first + i] = shared[i];
}

// a: [n, 64] floats.
__global__ void exp2_approx(Case p) {
    const size_t i = blockIdx.x * 64 + threadIdx.x;
    static_cast<float*>(p.out)[i] = ptx::exp2_approx(static_cast<const float*>(p.a)[i]);
}
// a: [n, 64, 2] floats; out: [n, 64] words.
template <typename T>
__global__ void pack2(Case p) {
    const size_t i = blockIdx.x * 64 + threadIdx.x;
    const auto* a = static_cast<const float*>(p.a);
    static_cast<uint32_t*>(p.out)[i] = ptx::pack2<T>(a[2 * i], a[2 * i + 1]);
}
template <typename T>
__global__ void unpack2(Case p) {
    const size_t i = blockIdx.x * 64 + threadIdx.x;
    static_cast<float2*>(p.out)[i] = ptx::unpack2<T>(static_cast<const uint32_t*>(p.a)[i]);
}

// a: [n, 64] floats; out: the same, backwards. The first warp of three writes, the second reads and gives the place
// back, twice; the third does not take part.
__global__ void named_barriers(Case p) {
    auto* shared = dynamic_shared<float>();
    const unsigned warp = threadIdx.x / 32, l = threadIdx.x % 32;
    const auto* a = static_cast<const float*>(p.a) + blockIdx.x * 64;
    auto* out = static_cast<float*>(p.out) + blockIdx.x * 64;
    for (unsigned turn = 0; turn < 2; ++turn) {
        if (warp == 0) {
            if (turn > 0) ptx::named_barrier_sync(2, 64);
            shared[l] = a[turn * 32 + l];
            ptx::named_barrier_arrive(1, 64);
        } else if (warp == 1) {
            ptx::named_barrier_sync(1, 64);
            out[63 - turn * 32 - l] = shared[l];
            out[63 - turn * 32 - (31 - l)] = shared[31 - l];
            if (turn == 0) ptx::named_barrier_arrive(2, 64);
        }
    }
}

// a: [n, 64] floats; out the same. What has no result must not change one.
__global__ void hints(Case p) {
    const size_t i = blockIdx.x * 64 + threadIdx.x;
    ptx::prefetch_l2(static_cast<const float*>(p.a) + i);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    static_cast<float*>(p.out)[i] = static_cast<const float*>(p.a)[i];
}

struct Kernel {
    const char* name;
    void (*kernel)(Case);
    unsigned threads;
    size_t shared_bytes;
};
const Kernel kKernels[] = {
    {"mma_bf16", mma<__nv_bfloat16>, 32, 0},
    {"mma_f16", mma<__half>, 32, 0},
    {"ldmatrix_x4", ldmatrix<false>, 32, 512},
    {"ldmatrix_x4_trans", ldmatrix<true>, 32, 512},
    {"cp_async", cp_async, 64, 3072},
    {"cp_async4", cp_async4, 64, 256},
    {"exp2_approx", exp2_approx, 64, 0},
    {"pack2_bf16", pack2<__nv_bfloat16>, 64, 0},
    {"pack2_f16", pack2<__half>, 64, 0},
    {"unpack2_bf16", unpack2<__nv_bfloat16>, 64, 0},
    {"unpack2_f16", unpack2<__half>, 64, 0},
    {"named_barriers", named_barriers, 96, 128},
    {"hints", hints, 64, 0},
};

}  // namespace

// Runs a kernel on n cases and waits for it; gives a cudaError_t, or -1 where there is none of the name.
extern "C" __attribute__((visibility("default"))) int igpt_conformance(const char* name, const void* a, const void* b,
                                                                       const void* c, void* out, unsigned n) {
    for (const Kernel& k : kKernels) {
        if (std::strcmp(k.name, name) != 0) continue;
        const int error = launch(k.kernel, n, k.threads, k.shared_bytes, nullptr, Case{a, b, c, out});
#ifdef __CUDACC__
        return error == cudaSuccess ? cudaDeviceSynchronize() : error;
#else
        return error;
#endif
    }
    return -1;
}
