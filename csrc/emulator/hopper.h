// The emulator's half of csrc/cuda/hopper.cuh: the same functions on the host. What touches a kernel's memory stands
// here, so that the sanitizers see it as the calling thread's doing; the rest is in hopper.cpp.
//
// What a tile or bulk copy writes is NaN from its issue until it is delivered, which is when no thread can run without
// it; its source is read then. Accumulators are NaN from the first product until they have been waited for; a product
// is computed at the wait, from registers and shared memory as they are then. A missing fence_async_shared is seen
// behind store_shared and cp_async16, but not behind plain stores; a missing fence_registers is not.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "ptx.h"

namespace igpt::cuda::ptx {

constexpr bool kHopper = true;

struct alignas(64) TensorMap {
    const unsigned char* base;
    TensorShape shape;
};

}  // namespace igpt::cuda::ptx

namespace igpt::emulator {

using cuda::ptx::Major;
using cuda::ptx::TensorMap;

// What stands in the memory of a barrier: whoever writes there destroys it.
constexpr uint64_t kBarrierMark = 0x6d62617272696572;
uint64_t* barrier_word(const char* name, uint32_t barrier, Where where);
[[noreturn]] void fail_no_barrier(const char* name, Where where);
void init_barrier(uint32_t barrier, int arrivals, Where where);
void fence_barriers();
void arrive(uint32_t barrier, int bytes, Where where);
void wait_barrier(uint32_t barrier, int parity, Where where);
void fence_async_shared();

struct Tile {
    int at[4];
};
bool valid(const cuda::ptx::TensorShape& shape, const void* base);
// Checks it; gives the destination. The caller overwrites it and then calls issue_tile.
unsigned char* check_tile(uint32_t to, const TensorMap* map, uint32_t barrier, Where where);
void check_start(Tile tile, Where where);
void issue_tile(uint32_t to, const TensorMap* map, uint32_t barrier, Tile tile);
int64_t tile_bytes(const TensorMap& map);

struct Bulk {
    unsigned char* to;
    const unsigned char* from;
    int bytes;
};
// Checks it. The caller overwrites the destination and then calls issue_bulk.
Bulk check_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, Where where);
void issue_bulk(const Bulk& copy, uint32_t barrier);

struct WgmmaArguments {
    uint64_t a, b;
    const uint32_t* fragment;  // instead of a
    float* d;
    int n;
    bool bfloat, accumulate;
    Major major_a, major_b;
};
// Pieces of 16 bytes of shared memory that a warp's products read. They are listed for the thread sanitizer alone.
struct Pieces {
    const unsigned char* const* first;
    size_t count;
};
Pieces wgmma(const WgmmaArguments& arguments, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
Pieces wgmma_wait(int groups, Where where);

inline void check_barrier(const char* name, uint32_t barrier, Where where) {
    if (*barrier_word(name, barrier, where) != kBarrierMark) fail_no_barrier(name, where);
}

inline void touch(Pieces pieces) {
    for (size_t i = size_t(lane()); i < pieces.count; i += 32) touch(pieces.first[i], 16);
}

// Reads what a copy will read.
inline void touch([[maybe_unused]] const TensorMap& map, [[maybe_unused]] Tile tile) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const auto& shape = map.shape;
    const auto begin = [&](int i) { return max(int64_t(tile.at[i]), int64_t(0)); };
    const auto end = [&](int i) { return min(int64_t(tile.at[i]) + shape.box[i], shape.sizes[i]); };
    for (int64_t i3 = begin(3); i3 < end(3); ++i3) {
        for (int64_t i2 = begin(2); i2 < end(2); ++i2) {
            for (int64_t i1 = begin(1); i1 < end(1); ++i1) {
                const auto* row = map.base + i1 * shape.strides[0] + i2 * shape.strides[1] + i3 * shape.strides[2];
                if (begin(0) < end(0)) touch(row + 2 * begin(0), int(2 * (end(0) - begin(0))));
            }
        }
    }
#endif
}

}  // namespace igpt::emulator

namespace igpt::cuda::ptx {

inline void mbarrier_init(uint32_t barrier, int arrivals, emulator::Where where = {}) {
    *emulator::barrier_word("mbarrier_init", barrier, where) = emulator::kBarrierMark;
    emulator::init_barrier(barrier, arrivals, where);
}
inline void mbarrier_fence_init() { emulator::fence_barriers(); }
inline void mbarrier_arrive(uint32_t barrier, emulator::Where where = {}) {
    emulator::check_barrier("mbarrier_arrive", barrier, where);
    emulator::arrive(barrier, 0, where);
}
inline void mbarrier_expect_tx(uint32_t barrier, int bytes, emulator::Where where = {}) {
    emulator::check_barrier("mbarrier_expect_tx", barrier, where);
    emulator::arrive(barrier, bytes, where);
}
inline void mbarrier_wait(uint32_t barrier, int parity, emulator::Where where = {}) {
    emulator::check_barrier("mbarrier_wait", barrier, where);
    emulator::wait_barrier(barrier, parity, where);
}
inline void fence_async_shared() { emulator::fence_async_shared(); }

inline bool has_bulk_copies() { return emulator::capability() >= 90; }
inline void bulk_load(uint32_t dst, const void* src, int bytes, uint32_t barrier, emulator::Where where = {}) {
    emulator::check_barrier("bulk_load", barrier, where);
    const emulator::Bulk copy = emulator::check_bulk(dst, src, bytes, barrier, where);
    emulator::check_read(src, size_t(bytes), where);
    emulator::touch(copy.from, copy.bytes);
    emulator::poison(copy.to, copy.bytes);
    emulator::issue_bulk(copy, barrier);
}

inline cudaError_t make_tensor_map(TensorMap* map, const void* base, const TensorShape& shape) {
    if (!emulator::valid(shape, base)) return cudaErrorInvalidValue;
    *map = {static_cast<const unsigned char*>(base), shape};
    return cudaSuccess;
}
inline void tma_load_4d(uint32_t dst, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                        emulator::Where where = {}) {
    emulator::check_barrier("tma_load_4d", barrier, where);
    unsigned char* to = emulator::check_tile(dst, map, barrier, where);
    const emulator::Tile tile{{c0, c1, c2, c3}};
    emulator::check_start(tile, where);
    emulator::touch(*map, tile);
    emulator::poison(to, emulator::tile_bytes(*map));
    emulator::issue_tile(dst, map, barrier, tile);
}

inline void wgmma_fence(emulator::Where where = {}) { emulator::wgmma_fence(where); }
inline void wgmma_commit(emulator::Where where = {}) { emulator::wgmma_commit(where); }
template <int N>
void wgmma_wait(emulator::Where where = {}) {
    static_assert(N >= 0 && N < 8);
    emulator::touch(emulator::wgmma_wait(N, where));
}
template <typename R, int N>
void fence_registers(R (&)[N]) {
    static_assert(std::is_same_v<R, float> || std::is_same_v<R, uint32_t>);
}
template <int N>
void raise_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void lower_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

template <typename T, int N, Major kA = Major::k, Major kB = Major::k>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, emulator::Where where = {}) {
    static_assert(N == 64 || N == 96 || N == 128);
    emulator::touch(emulator::wgmma({a, b, nullptr, d, N, emulator::is_bfloat<T>(), accumulate, kA, kB}, where));
}
template <typename T, int N, Major kB = Major::k>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, emulator::Where where = {}) {
    static_assert(N == 64 || N == 96 || N == 128);
    emulator::touch(emulator::wgmma({0, b, a, d, N, emulator::is_bfloat<T>(), accumulate, Major::k, kB}, where));
}

}  // namespace igpt::cuda::ptx
