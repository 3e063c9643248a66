// The emulator's half of csrc/cuda/ptx.cuh: the same functions on the host, in fp32. What touches a kernel's memory
// stands here, so that the sanitizers see it as the calling thread's doing; the rest is in ptx.cpp.
//
// The destination of an asynchronous copy is NaN from the issue until its thread waits for it. The source is looked at
// when the copy is issued, and read as late as at the wait: one that has changed meanwhile shows. A thread may not end
// before it has waited for its copies. A launch begins when the one before has ended; what a dependent one may not do
// before grid_dependency_wait is an error all the same (accesses.cpp).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "memory.h"

namespace igpt::emulator {

uint32_t shared_address(const void* p, Where where);
void grid_dependency_wait();
void grid_dependency_launch();

struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;  // the rest of `size` is zero
    int size;   // 4 or 16
};
// Checks and notes it; the caller does it.
AsyncCopy issue_copy(uint32_t to, const void* from, int bytes, int size, Where where);
void commit_copies();
// Gives, one by one, the copies that a wait for all but `groups` groups is for.
bool take_copy(int groups, AsyncCopy& copy);

// A row of 8 elements of a matrix in shared memory.
struct alignas(16) MatrixRow {
    uint16_t at[8];
};
const MatrixRow* matrix_row(const char* name, uint32_t address, Where where);
void ldmatrix(const char* name, uint32_t* r, bool transposed, const MatrixRow& row, uint32_t address, Where where);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat, Where where);

void named_barrier(bool waits, int id, int threads, Where where);

// `orders`: what the thread has done happens before what others do behind the wait.
void cluster_arrive(bool orders, Where where);
void cluster_wait(Where where);
// Where block `rank` of the cluster has what is at `own` here.
unsigned char* cluster_shared(const void* own, size_t bytes, unsigned rank, Where where);

template <typename T>
constexpr bool is_bfloat() {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "no such instruction");
    return std::is_same_v<T, __nv_bfloat16>;
}

inline void load_matrices(const char* name, uint32_t* r, bool transposed, uint32_t address, Where where) {
    const MatrixRow row = *matrix_row(name, address, where);
    ldmatrix(name, r, transposed, row, address, where);
}

// The lower half of `bits`.
inline float wide(uint32_t bits, bool bfloat) {
    return bfloat ? __bfloat162float({uint16_t(bits)}) : __half2float({uint16_t(bits)});
}

// The thread sanitizer remembers four accesses to 8 bytes: they go by words where they can.
using Word = uint64_t __attribute__((may_alias));

// Reads and drops `bytes` bytes from a multiple of 2.
inline void touch(const unsigned char* from, int bytes) {
    int i = 0;
    if (reinterpret_cast<uint64_t>(from) % 8 == 0) {
        for (; i + 8 <= bytes; i += 8) static_cast<void>(*reinterpret_cast<const volatile Word*>(from + i));
    }
    for (; i < bytes; ++i) static_cast<void>(*static_cast<const volatile unsigned char*>(from + i));
}
using Half = uint32_t __attribute__((may_alias));
// Poisons `bytes` bytes, 4 or a multiple of 8, at a multiple of 4 or 8.
inline void poison(unsigned char* to, int64_t bytes) {
    if (bytes == 4) *reinterpret_cast<Half*>(to) = ~0u;
    for (int64_t i = 0; i + 8 <= bytes; i += 8) *reinterpret_cast<Word*>(to + i) = ~uint64_t(0);
}
// The first `bytes` of `size` bytes, and zeros.
inline void deliver(const AsyncCopy& copy) {
    if (copy.size == 4) {
        *reinterpret_cast<Half*>(copy.to) = *reinterpret_cast<const Half*>(copy.from);
        return;
    }
    auto* to = reinterpret_cast<Word*>(copy.to);
    for (int half = 0; half < 2; ++half) {
        uint64_t word = 0;
        const unsigned char* from = copy.from + 8 * half;
        if (copy.bytes >= 8 * half + 8) {
            word = *reinterpret_cast<const Word*>(from);
        } else {
            for (int i = 0; i < copy.bytes - 8 * half; ++i) word |= uint64_t(from[i]) << 8 * i;
        }
        to[half] = word;
    }
}

inline float without_subnormal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

}  // namespace igpt::emulator

namespace igpt::cuda::ptx {

inline uint32_t shared_address(const void* p, emulator::Where where = {}) { return emulator::shared_address(p, where); }

inline void cp_async16(uint32_t dst, const void* src, int bytes = 16, emulator::Where where = {}) {
    const emulator::AsyncCopy copy = emulator::issue_copy(dst, src, bytes, 16, where);
    emulator::touch(copy.from, copy.bytes);
    emulator::poison(copy.to, 16);
}
inline void cp_async4(uint32_t dst, const void* src, emulator::Where where = {}) {
    const emulator::AsyncCopy copy = emulator::issue_copy(dst, src, 4, 4, where);
    emulator::touch(copy.from, 4);
    emulator::poison(copy.to, 4);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
void cp_async_wait() {
    static_assert(N >= 0);
    emulator::AsyncCopy copy;
    while (emulator::take_copy(N, copy)) emulator::deliver(copy);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, emulator::Where where = {}) {
    emulator::load_matrices("ldmatrix.x4", r, false, address, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, emulator::Where where = {}) {
    emulator::load_matrices("ldmatrix.x4.trans", r, true, address, where);
}
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Where where = {}) {
    emulator::mma(d, a, b0, b1, emulator::is_bfloat<T>(), where);
}

inline float exp2_approx(float x) { return emulator::without_subnormal(std::exp2(emulator::without_subnormal(x))); }

template <typename T>
uint32_t pack2(float lo, float hi) {
    if constexpr (emulator::is_bfloat<T>()) {
        return __float2bfloat16_rn(lo).bits | uint32_t(__float2bfloat16_rn(hi).bits) << 16;
    } else {
        return __float2half_rn(lo).bits | uint32_t(__float2half_rn(hi).bits) << 16;
    }
}
template <typename T>
float2 unpack2(uint32_t bits) {
    return {emulator::wide(bits, emulator::is_bfloat<T>()), emulator::wide(bits >> 16, emulator::is_bfloat<T>())};
}

inline void named_barrier_sync(int id, int threads, emulator::Where where = {}) {
    emulator::named_barrier(true, id, threads, where);
}
inline void named_barrier_arrive(int id, int threads, emulator::Where where = {}) {
    emulator::named_barrier(false, id, threads, where);
}

inline void cluster_arrive(emulator::Where where = {}) { emulator::cluster_arrive(true, where); }
inline void cluster_arrive_relaxed(emulator::Where where = {}) { emulator::cluster_arrive(false, where); }
inline void cluster_wait(emulator::Where where = {}) { emulator::cluster_wait(where); }
inline void store_cluster(float* own, unsigned rank, float value, emulator::Where where = {}) {
    emulator::note(emulator::Access::shared, own, sizeof value);
    *reinterpret_cast<float*>(emulator::cluster_shared(own, sizeof value, rank, where)) = value;
}

template <typename V>
V load_once(const V* p, emulator::Where where = {}) {
    static_assert(sizeof(V) == 16);
    return load_global(p, where);
}

inline int load_past_l1(const int* p, emulator::Where where = {}) { return load_global(p, where); }

inline void prefetch_l2(const void*) {}

inline void grid_dependency_wait() { emulator::grid_dependency_wait(); }
inline void grid_dependency_launch() { emulator::grid_dependency_launch(); }

}  // namespace igpt::cuda::ptx
