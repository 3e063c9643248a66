// Small kernels, right and wrong, that try what the emulator makes of ptx.cuh. The right ones that every wrapper has
// are in conformance.cu, which is linked with this.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "bind_emulator.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

namespace py = pybind11;
using namespace igpt::cuda;

extern "C" int igpt_conformance(const char* name, const void* a, const void* b, const void* c, void* out, unsigned n);

namespace {

using bf16 = __nv_bfloat16;

struct Probe {
    float* in;   // 256 values
    float* out;  // 256 values
};

uint32_t shared(unsigned bytes = 0) { return ptx::shared_address(dynamic_shared<unsigned char>()) + bytes; }
uint32_t own_place() { return shared(16 * threadIdx.x); }
void copy_own(Probe p) { ptx::cp_async16(own_place(), p.in + 4 * threadIdx.x); }
void show_own(Probe p) {
    for (unsigned i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = dynamic_shared<float>()[4 * threadIdx.x + i];
}
void finish() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}

// ---- copies ----
void copy(Probe p) {
    copy_own(p);
    finish();
    show_own(p);
}
void copy_without_wait(Probe p) {
    copy_own(p);
    ptx::cp_async_commit();
    show_own(p);
    ptx::cp_async_wait<0>();
}
void copy_without_commit(Probe p) {
    copy_own(p);
    ptx::cp_async_wait<0>();
    show_own(p);
    finish();
}
void copy_waits_for_too_few(Probe p) {
    copy_own(p);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    show_own(p);
    ptx::cp_async_wait<0>();
}
void copy_with_an_empty_group(Probe p) {
    copy_own(p);
    ptx::cp_async_commit();
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    show_own(p);
}
void copy_of_a_source_that_changes(Probe p) {
    copy_own(p);
    for (unsigned i = 0; i < 4; ++i) p.in[4 * threadIdx.x + i] = -1.0f;
    finish();
    show_own(p);
}
void copy_without_a_barrier(Probe p) {
    copy_own(p);
    finish();
    p.out[threadIdx.x] = dynamic_shared<float>()[(threadIdx.x + 128) % 256];
}
void copy_never_waited_for(Probe p) {
    copy_own(p);
    ptx::cp_async_commit();
}
void copy_never_committed(Probe p) { copy_own(p); }
void copy_to_a_misaligned_place(Probe p) { ptx::cp_async16(own_place() + 4, p.in); }
void copy_from_a_misaligned_place(Probe p) { ptx::cp_async16(own_place(), p.in + 1); }
void copy_past_the_end(Probe p) { ptx::cp_async16(shared(1024), p.in); }
void copy_to_address_zero(Probe p) { ptx::cp_async16(0, p.in); }
void copy_of_17_bytes(Probe p) { ptx::cp_async16(own_place(), p.in, 17); }
void address_of_global_memory(Probe p) { p.out[0] = float(ptx::shared_address(p.out)); }

// ---- operations of a warp ----
// 64 rows of 128 bytes; four matrices of 8 rows side by side.
template <bool kSwizzled>
void tile_of_matrices(Probe p) {
    const unsigned row = threadIdx.x % 8, piece = threadIdx.x / 8;
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared(128 * row + 16 * (kSwizzled ? piece ^ row : piece)));
    if (r[0] != 0xffffffffu) p.out[0] = 1.0f;
}
// 32 lanes copy 4 rows of 128 bytes each to where the swizzle, or nothing, has them.
template <bool kSwizzled>
void tile_of_copies(Probe p) {
    const unsigned column = threadIdx.x / 8, row = threadIdx.x % 8;
    ptx::cp_async16(shared(128 * row + 16 * (kSwizzled ? column ^ row : column)), p.in + 4 * threadIdx.x);
    finish();
}
void matrices_past_the_end(Probe p) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared(1024 - 512 + 16 + 16 * (threadIdx.x % 32)));
    p.out[0] = float(r[0]);
}
void matrices_misaligned(Probe p) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, shared(8));
    p.out[0] = float(r[0]);
}
void matrices_with_missing_lanes(Probe) {
    uint32_t r[4];
    if (threadIdx.x % 32 != 5) ptx::ldmatrix_x4(r, shared());
}
void matrices_two_ways(Probe) {
    uint32_t r[4];
    threadIdx.x % 2 ? ptx::ldmatrix_x4(r, shared()) : ptx::ldmatrix_x4_trans(r, shared());
}
void mma_with_missing_lanes(Probe) {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x % 32 < 16) ptx::mma_m16n8k16<bf16>(d, a, 0u, 0u);
}
void mma_of_two_types(Probe) {
    float d[4] = {};
    const uint32_t a[4] = {};
    threadIdx.x % 2 ? ptx::mma_m16n8k16<bf16>(d, a, 0u, 0u) : ptx::mma_m16n8k16<__half>(d, a, 0u, 0u);
}
void mma_of_poison(Probe p) {
    float d[4] = {};
    const uint32_t a[4] = {0xffffffffu, 0, 0, 0};
    ptx::mma_m16n8k16<bf16>(d, a, 0u, 0u);
    for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + unsigned(i)] = d[i];
}

// ---- named barriers ----
void barrier_zero(Probe) { ptx::named_barrier_sync(0, 64); }
void barrier_sixteen(Probe) { ptx::named_barrier_arrive(16, 64); }
void barrier_of_part_of_a_warp(Probe) { ptx::named_barrier_sync(1, 48); }
void barrier_of_too_many(Probe) { ptx::named_barrier_sync(1, 96); }
void barrier_of_two_counts(Probe) { ptx::named_barrier_sync(1, threadIdx.x < 32 ? 64 : 96); }
void barrier_by_lane(Probe) { ptx::named_barrier_sync(1 + int(threadIdx.x % 2), 64); }
void barrier_in_half_a_warp(Probe) {
    if (threadIdx.x % 32 < 16) ptx::named_barrier_sync(1, 64);
}
void barrier_that_one_warp_misses(Probe) {
    if (threadIdx.x < 32) ptx::named_barrier_sync(3, 64);
}
void barriers_crossed(Probe) { ptx::named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64); }
template <bool kBarrier>
void exchange(Probe p) {
    float* values = dynamic_shared<float>();
    values[threadIdx.x] = float(threadIdx.x);
    if (kBarrier) ptx::named_barrier_sync(1, 64);
    p.out[threadIdx.x] = values[63 - threadIdx.x];
}

// ---- all of it: C = A B with 64 threads, A [32, 128], B [128, 32] of bf16 behind `in`, C [32, 32] floats ----
constexpr int kSize = 32, kDepth = 128, kStep = 32, kSteps = kDepth / kStep;
enum Bug { none, no_wait, no_commit, wait_for_one_less, no_barrier_before_use, no_barrier_after_use };

// Where 16 bytes of a tile with rows of 64 bytes are: two rows share 128 bytes, pieces are swizzled among the eight.
uint32_t place(unsigned row, unsigned piece) { return 128 * (row / 2) + 16 * ((row % 2 * 4 + piece) ^ (row / 2 % 8)); }

void load_step(const bf16* a, const bf16* b, uint32_t buffer, int step) {
    for (unsigned i = threadIdx.x; i < kSize * kStep / 8; i += 64) {
        const unsigned row = i / 4, piece = i % 4;
        ptx::cp_async16(buffer + place(row, piece), a + int(row) * kDepth + step * kStep + int(piece) * 8);
        ptx::cp_async16(buffer + 2048 + place(row, piece), b + (step * kStep + int(row)) * kSize + int(piece) * 8);
    }
}

// A warp has 16 rows of C.
void multiply_step(float (&c)[4][4], uint32_t buffer) {
    const unsigned warp = threadIdx.x / 32, l = threadIdx.x % 32;
    for (unsigned k = 0; k < kStep / 16; ++k) {
        uint32_t fa[4], fb[4];
        ptx::ldmatrix_x4(fa, buffer + place(warp * 16 + l % 16, 2 * k + l / 16));
        for (unsigned n = 0; n < 2; ++n) {
            ptx::ldmatrix_x4_trans(fb, buffer + 2048 + place(k * 16 + l % 16, 2 * n + l / 16));
            ptx::mma_m16n8k16<bf16>(c[2 * n], fa, fb[0], fb[1]);
            ptx::mma_m16n8k16<bf16>(c[2 * n + 1], fa, fb[2], fb[3]);
        }
    }
}

template <Bug kBug>
void matmul(Probe p) {
    const bf16 *a = reinterpret_cast<const bf16*>(p.in), *b = a + kSize * kDepth;
    float c[4][4] = {};
    load_step(a, b, shared(), 0);
    ptx::cp_async_commit();
    for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) load_step(a, b, shared(4096 * unsigned((step + 1) % 2)), step + 1);
        if (kBug != no_commit) ptx::cp_async_commit();
        if (kBug == wait_for_one_less) {
            ptx::cp_async_wait<2>();
        } else if (kBug != no_wait) {
            ptx::cp_async_wait<1>();
        }
        if (kBug != no_barrier_before_use) __syncthreads();
        multiply_step(c, shared(4096 * unsigned(step % 2)));
        if (kBug != no_barrier_after_use) __syncthreads();
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    const unsigned warp = threadIdx.x / 32, l = threadIdx.x % 32;
    for (unsigned n = 0; n < 4; ++n) {
        for (unsigned i = 0; i < 4; ++i) {
            p.out[(warp * 16 + l / 4 + 8 * (i / 2)) * kSize + 8 * n + 2 * (l % 4) + i % 2] = c[n][i];
        }
    }
}

void marks_its_block(Probe p) { p.out[(gridDim.x * uint64_t(blockIdx.y) + blockIdx.x) % 256] = 1.0f; }

const std::map<std::string, void (*)(Probe)> kProbes{
    {"copy", copy},
    {"copy_without_wait", copy_without_wait},
    {"copy_without_commit", copy_without_commit},
    {"copy_waits_for_too_few", copy_waits_for_too_few},
    {"copy_with_an_empty_group", copy_with_an_empty_group},
    {"copy_of_a_source_that_changes", copy_of_a_source_that_changes},
    {"copy_without_a_barrier", copy_without_a_barrier},
    {"copy_never_waited_for", copy_never_waited_for},
    {"copy_never_committed", copy_never_committed},
    {"copy_to_a_misaligned_place", copy_to_a_misaligned_place},
    {"copy_from_a_misaligned_place", copy_from_a_misaligned_place},
    {"copy_past_the_end", copy_past_the_end},
    {"copy_to_address_zero", copy_to_address_zero},
    {"copy_of_17_bytes", copy_of_17_bytes},
    {"address_of_global_memory", address_of_global_memory},
    {"tile_of_matrices_swizzled", tile_of_matrices<true>},
    {"tile_of_matrices_plain", tile_of_matrices<false>},
    {"tile_of_copies_swizzled", tile_of_copies<true>},
    {"tile_of_copies_plain", tile_of_copies<false>},
    {"matrices_past_the_end", matrices_past_the_end},
    {"matrices_misaligned", matrices_misaligned},
    {"matrices_with_missing_lanes", matrices_with_missing_lanes},
    {"matrices_two_ways", matrices_two_ways},
    {"mma_with_missing_lanes", mma_with_missing_lanes},
    {"mma_of_two_types", mma_of_two_types},
    {"mma_of_poison", mma_of_poison},
    {"barrier_zero", barrier_zero},
    {"barrier_sixteen", barrier_sixteen},
    {"barrier_of_part_of_a_warp", barrier_of_part_of_a_warp},
    {"barrier_of_too_many", barrier_of_too_many},
    {"barrier_of_two_counts", barrier_of_two_counts},
    {"barrier_by_lane", barrier_by_lane},
    {"barrier_in_half_a_warp", barrier_in_half_a_warp},
    {"barrier_that_one_warp_misses", barrier_that_one_warp_misses},
    {"barriers_crossed", barriers_crossed},
    {"exchange", exchange<true>},
    {"exchange_without_a_barrier", exchange<false>},
    {"matmul", matmul<none>},
    {"matmul_no_wait", matmul<no_wait>},
    {"matmul_no_commit", matmul<no_commit>},
    {"matmul_wait_for_one_less", matmul<wait_for_one_less>},
    {"matmul_no_barrier_before_use", matmul<no_barrier_before_use>},
    {"matmul_no_barrier_after_use", matmul<no_barrier_after_use>},
    {"marks_its_block", marks_its_block},
};

void run(const std::string& name, uintptr_t in, uintptr_t out, unsigned threads, size_t shared_bytes, unsigned grid_x,
         unsigned grid_y) {
    launch(kProbes.at(name), {grid_x, grid_y}, threads, shared_bytes, nullptr,
           Probe{reinterpret_cast<float*>(in), reinterpret_cast<float*>(out)});
}

int conformance(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out, unsigned n) {
    const auto pointer = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
    return igpt_conformance(name.c_str(), pointer(a), pointer(b), pointer(c), reinterpret_cast<void*>(out), n);
}

}  // namespace

PYBIND11_MODULE(_probes_ptx, m) {
    m.def("run", &run);
    m.def("conformance", &conformance);
    igpt::emulator::bind_emulator(m);
}
