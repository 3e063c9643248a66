// Inline PTX for sm_80 and later as small functions; with hopper.cuh, the only file that holds any. Each has a twin in
// the emulator (../emulator/ptx.h), which is chosen under the host compiler.
//
// Lane l of a warp, with g = l / 4 and t = l % 4, holds of
//   an 8x8 matrix of 16-bit elements (ldmatrix)   elements (g, 2t) and (g, 2t + 1); transposed: (2t, g) and (2t + 1, g)
//   A, 16x16 (mma)   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8, and the next ones
//   B, 16x8 (mma)    b0, b1: rows 2t and 2t + 8, and the next ones; column g
//   C, 16x8 (mma)    d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8
// with the element of the lower index in the lower half of a register. Source: PTX ISA, "Matrix fragments".
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace igpt::cuda::ptx {

// The address in shared memory that the other functions take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Begins a copy of 16 bytes from global to shared memory past L1. Only the first `bytes` (0 to 16) are read; zeros
// take the place of the others. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "r"(bytes)
                 : "memory");
}
// The same of 4 bytes, aligned to 4.
__device__ __forceinline__ void cp_async4(uint32_t dst, const void* src) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(__cvta_generic_to_global(src)) : "memory");
}
// Makes a group of this thread's copies since the last group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but the N newest.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads four 8x8 matrices; lane 8m + i gives the address of row i of matrix m: 16 bytes, aligned to 16.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// d += A B in fp32; A and B of T, __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, to about 2 units in the last place; a subnormal argument or result counts as zero.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats as T, rounded to nearest, ties to even; `lo` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
    return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
    return bits;
}

// The other way: x is the lower half.
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t bits) {
    const __half_raw lo{static_cast<unsigned short>(bits)}, hi{static_cast<unsigned short>(bits >> 16)};
    return make_float2(__half2float(lo), __half2float(hi));
}

// A barrier of `threads` threads of the block, in whole warps; `id` is 1 to 15 (0 is __syncthreads). Whoever arrives
// does not wait, but what it did before is done for whoever syncs.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A cluster: blocks side by side in x, of a launch with clusters, that run at the same time; sm_90 and later. Every
// thread arrives at its barrier and then waits for all, which orders memory, and so by turns. A wait also comes before
// the first access to the shared memory of another block, which may not have begun.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#else
    __trap();
#endif
}
// The same for threads that have written nothing that others read: it need not wait for memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
    __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
    __trap();
#endif
}
// Writes where block `rank` of the cluster has what is at `own` in this block's shared memory.
__device__ __forceinline__ void store_cluster(float* own, unsigned rank, float value) {
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
    __trap();
#endif
}

// 16 bytes of global memory that nobody writes and no other thread reads: past L1, and L2 fetches 128 bytes at once.
template <typename V>
__device__ __forceinline__ V load_once(const V* p) {
    static_assert(sizeof(V) == 16);
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(__cvta_generic_to_global(p)));
    return *reinterpret_cast<const V*>(&words);
}

// What a launch that has ended wrote, past L1: which may hold what was there before, for a launch that has begun
// beside another one.
__device__ __forceinline__ int load_past_l1(const int* p) {
    int value;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
    return value;
}

#if __CUDA_ARCH__ >= 890
// The numbers of two codes in e4m3, the first in the low byte: sm_89 and later. e4m3.cuh has it for all others, and for
// the emulator.
__device__ __forceinline__ float2 from_e4m3x2(uint32_t codes) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
    return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}
#endif

// A hint: the line of p will be read.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// Programmatic dependent launch: waits until the launch before has ended and its memory is there; lets the next one
// start. Nothing below sm_90, where a launch begins when the one before has ended.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace igpt::cuda::ptx
#else
#include "../emulator/ptx.h"
#endif
