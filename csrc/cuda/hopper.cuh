// Inline PTX for sm_90a as small functions, beside ptx.cuh: barriers in shared memory, tile copies by the tensor memory
// accelerator (TMA), and matrix products of warpgroups (wgmma). Each has a twin in the emulator (../emulator/hopper.h).
// A kernel that uses them is compiled for other architectures too, where its body must be __trap(): see kHopper.
//
// A warpgroup is four warps, the first a multiple of four. d += A B of 64 x N x 16; lane l of warp w, with g = l / 4
// and t = l % 4, holds of
//   D, 64xN    d[4j + i]: row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2
//   A, 64x16   a[i]: row 16 w + g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next one: as D, packed, of two j is
// The other operands stand in shared memory, where a descriptor says, swizzled: of every 1024 bytes, which begin at a
// multiple of 1024, 16 bytes at address x are at x ^ (x / 128 % 8 * 16), as TMA writes a box of 128-byte rows.
//   Major::k    rows of 64 elements along K; row r begins 128 (r % 8) + stride (r / 8) behind the start. The next 16
//   along
//               K begin 32 bytes further on. `leading` has no meaning.
//   Major::mn   rows of 64 elements along M or N, one for each k; row k begins 128 (k % 8) + stride (k / 8) behind the
//               start; the next 64 columns begin `leading` further on.
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Tensors".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace igpt::cuda::ptx {

enum class Major { k = 0, mn = 1 };
enum class Swizzle { none, bytes128 };

// A tensor of up to four dimensions of 16-bit elements, the innermost first and contiguous, and the box of it that one
// copy moves. What lies outside the tensor is zero.
struct TensorShape {
    int64_t sizes[4];
    int64_t strides[3];  // of dimensions 1 to 3, in bytes: multiples of 16
    int box[4];          // 1 to 256 each; the innermost is a multiple of 16 bytes, with a swizzle at most 128
    Swizzle swizzle;
};

}  // namespace igpt::cuda::ptx

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <type_traits>

namespace igpt::cuda::ptx {

// Whether the code that is being compiled may use this file: `if constexpr (kHopper)` around a kernel's body, and
// `else __trap()`, so that a launch on another GPU is an error.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// ---- barriers in shared memory: 8 bytes, aligned to 8 -------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and as many bytes have been copied as were announced.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By the thread that has initialised barriers, before others, or a copy, use them.
__device__ __forceinline__ void mbarrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces copies of `bytes` bytes.
__device__ __forceinline__ void mbarrier_expect_tx(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended: the first phase has parity 0, and the one before it has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    uint32_t ended;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (ended == 0);
}

// Makes what this thread has written to shared memory visible to copies and to wgmma; a barrier may follow.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk copies --------------------------------------------------------------------------------------------

// Whether the code that is being compiled may use these and the barriers above: sm_90 has them, not sm_90a alone. It is
// known to the compiler, which drops what stands behind it elsewhere.
__device__ __forceinline__ constexpr bool has_bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return true;
#else
    return false;
#endif
}
// Begins a copy of `bytes` bytes, a multiple of 16, from global to shared memory, both aligned to 16; they count
// towards `barrier`. One thread calls it.
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- tile copies --------------------------------------------------------------------------------------------

// In a kernel's Params, which is `const __grid_constant__` then.
using TensorMap = CUtensorMap;

// The driver's function that makes one, asked for until it is found. There is none in the runtime, and linking the
// driver's library would tie the build to it.
inline cudaError_t find_encode(void** encode) {
    static std::atomic<void*> known = nullptr;
    *encode = known.load(std::memory_order_relaxed);
    if (*encode != nullptr) return cudaSuccess;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", encode, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess || *encode == nullptr) return cudaErrorNotSupported;
    known.store(*encode, std::memory_order_relaxed);
    return cudaSuccess;
}

// On the host.
inline cudaError_t make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    void* found = nullptr;
    if (const cudaError_t error = find_encode(&found)) return error;
    cuuint64_t sizes[4], strides[3];
    cuuint32_t box[4], ones[4];
    for (int i = 0; i < 4; ++i) {
        sizes[i] = cuuint64_t(shape.sizes[i]);
        box[i] = cuuint32_t(shape.box[i]);
        ones[i] = 1;
    }
    for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(shape.strides[i]);
    // Bits are copied as they are: the type matters to sums and fills alone.
    const CUresult code = reinterpret_cast<Encode>(found)(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(base), sizes, strides, box, ones,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        shape.swizzle == Swizzle::none ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Begins the copy of the box at these coordinates, c0 a multiple of 8, to shared memory (aligned to 128 bytes, with a
// swizzle to 1024); its bytes count towards `barrier`. One thread calls it.
__device__ __forceinline__ void tma_load_4d(uint32_t dst, const TensorMap* map, uint32_t barrier, int c0, int c1,
                                            int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// ---- matrix products of a warpgroup -------------------------------------------------------------------------
// In order: fence_registers of the accumulators, wgmma_fence, products, wgmma_commit, wgmma_wait, fence_registers.
// Accumulators and fragments of A belong to the products from then until they have been waited for.

// Before the first product, and again after registers that products use have been touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products since the last group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the N newest.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving what it does with these registers past this place.
template <typename R, int N>
__device__ __forceinline__ void fence_registers(R (&registers)[N]) {
    static_assert(std::is_same_v<R, float> || std::is_same_v<R, uint32_t>);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if constexpr (std::is_same_v<R, float>) {
            asm volatile("" : "+f"(registers[i])::"memory");
        } else {
            asm volatile("" : "+r"(registers[i])::"memory");
        }
    }
}

// Registers of the warpgroup's threads from one group to another: N is a multiple of 8, 24 to 256.
template <int N>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Text of assembly that would otherwise stand here twelve times.
#define IGPT_FLOATS8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define IGPT_FLOATS32 IGPT_FLOATS8(0), IGPT_FLOATS8(8), IGPT_FLOATS8(16), IGPT_FLOATS8(24)
#define IGPT_FLOATS48 IGPT_FLOATS32, IGPT_FLOATS8(32), IGPT_FLOATS8(40)
#define IGPT_FLOATS64 IGPT_FLOATS48, IGPT_FLOATS8(48), IGPT_FLOATS8(56)
#define IGPT_NAMES32                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define IGPT_NAMES48 IGPT_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define IGPT_NAMES64 IGPT_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// A product for N columns and A and B of `type`; the numbers of the operands A and B, `accumulate`, and the Majors.
#define IGPT_WGMMA(N, type, names, floats, a_b, accumulate, majors, operands)                                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32." type "." type " {" names "}, " a_b ", p, 1, 1, " majors ";\n}"                   \
                 : floats                                                                                    \
                 : operands)
#define IGPT_SHARED_A "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))
#define IGPT_OWN_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB))

// d = A B, or += where `accumulate`; A and B in shared memory by descriptor. T: __nv_bfloat16 or __half.
template <typename T, int N, Major kA = Major::k, Major kB = Major::k>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    constexpr bool kBfloat = std::is_same_v<T, __nv_bfloat16>;
    static_assert(kBfloat || std::is_same_v<T, __half>);
    static_assert(N == 64 || N == 96 || N == 128);
    if constexpr (N == 64 && kBfloat) {
        IGPT_WGMMA(64, "bf16", IGPT_NAMES32, IGPT_FLOATS32, "%32, %33", "%34", "%35, %36", IGPT_SHARED_A);
    } else if constexpr (N == 64 && !kBfloat) {
        IGPT_WGMMA(64, "f16", IGPT_NAMES32, IGPT_FLOATS32, "%32, %33", "%34", "%35, %36", IGPT_SHARED_A);
    } else if constexpr (N == 96 && kBfloat) {
        IGPT_WGMMA(96, "bf16", IGPT_NAMES48, IGPT_FLOATS48, "%48, %49", "%50", "%51, %52", IGPT_SHARED_A);
    } else if constexpr (N == 96 && !kBfloat) {
        IGPT_WGMMA(96, "f16", IGPT_NAMES48, IGPT_FLOATS48, "%48, %49", "%50", "%51, %52", IGPT_SHARED_A);
    } else if constexpr (N == 128 && kBfloat) {
        IGPT_WGMMA(128, "bf16", IGPT_NAMES64, IGPT_FLOATS64, "%64, %65", "%66", "%67, %68", IGPT_SHARED_A);
    } else if constexpr (N == 128 && !kBfloat) {
        IGPT_WGMMA(128, "f16", IGPT_NAMES64, IGPT_FLOATS64, "%64, %65", "%66", "%67, %68", IGPT_SHARED_A);
    }
}

// The same with A in registers.
template <typename T, int N, Major kB = Major::k>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    constexpr bool kBfloat = std::is_same_v<T, __nv_bfloat16>;
    static_assert(kBfloat || std::is_same_v<T, __half>);
    static_assert(N == 64 || N == 96 || N == 128);
    if constexpr (N == 64 && kBfloat) {
        IGPT_WGMMA(64, "bf16", IGPT_NAMES32, IGPT_FLOATS32, "{%32, %33, %34, %35}, %36", "%37", "%38", IGPT_OWN_A);
    } else if constexpr (N == 64 && !kBfloat) {
        IGPT_WGMMA(64, "f16", IGPT_NAMES32, IGPT_FLOATS32, "{%32, %33, %34, %35}, %36", "%37", "%38", IGPT_OWN_A);
    } else if constexpr (N == 96 && kBfloat) {
        IGPT_WGMMA(96, "bf16", IGPT_NAMES48, IGPT_FLOATS48, "{%48, %49, %50, %51}, %52", "%53", "%54", IGPT_OWN_A);
    } else if constexpr (N == 96 && !kBfloat) {
        IGPT_WGMMA(96, "f16", IGPT_NAMES48, IGPT_FLOATS48, "{%48, %49, %50, %51}, %52", "%53", "%54", IGPT_OWN_A);
    } else if constexpr (N == 128 && kBfloat) {
        IGPT_WGMMA(128, "bf16", IGPT_NAMES64, IGPT_FLOATS64, "{%64, %65, %66, %67}, %68", "%69", "%70", IGPT_OWN_A);
    } else if constexpr (N == 128 && !kBfloat) {
        IGPT_WGMMA(128, "f16", IGPT_NAMES64, IGPT_FLOATS64, "{%64, %65, %66, %67}, %68", "%69", "%70", IGPT_OWN_A);
    }
}

#undef IGPT_FLOATS8
#undef IGPT_FLOATS32
#undef IGPT_FLOATS48
#undef IGPT_FLOATS64
#undef IGPT_NAMES32
#undef IGPT_NAMES48
#undef IGPT_NAMES64
#undef IGPT_WGMMA
#undef IGPT_SHARED_A
#undef IGPT_OWN_A

}  // namespace igpt::cuda::ptx
#else
#include "../emulator/hopper.h"
#endif

namespace igpt::cuda::ptx {

// The descriptor of an operand at `address`, with strides in bytes; see the top of the file.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, int leading, int stride) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(1) << 62;
}
// The same operand so many bytes further on, a multiple of 16, in fewer instructions than from its address.
__device__ __forceinline__ uint64_t further(uint64_t operand, int bytes) { return operand + uint64_t(bytes / 16); }

}  // namespace igpt::cuda::ptx
