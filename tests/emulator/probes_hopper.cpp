// Small kernels, right and wrong, that try what the emulator makes of hopper.cuh. The right ones that every wrapper has
// are in conformance_hopper.cu, which is linked with this.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "bind_emulator.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

using namespace igpt::cuda;
using ptx::Major;

extern "C" int igpt_conformance_hopper(const char* name, int size, const void* a, const void* b, const void* c,
                                       void* out, unsigned n);

namespace {

using bf16 = __nv_bfloat16;

// C [64, 64] floats = A [64, 256] B [256, 64] of bf16; tiles of 64 x 64.
struct Probe {
    ptx::TensorMap a, b;
    float* out;
};

constexpr uint32_t kTile = 8192;
constexpr int kSteps = 4;

enum Bug {
    none,
    no_wait_for_tile,
    wrong_parity,
    tile_over_one_in_use,
    no_wgmma_wait,
    no_wgmma_fence,
    no_fence_of_second_group,
    no_commit,
    announces_too_few,
    announces_too_many,
    no_fence_of_barriers,
    no_barrier_behind_them,
    three_warps,
    lanes_disagree,
    warps_disagree,
    wrong_step,
    wrong_stride,
    wrong_major,
    no_swizzle,
    base_offset,
    unaligned_tile,
    unaligned_coordinate,
    unaligned_operand,
    operand_past_the_end,
    tile_past_the_end,
    writes_accumulators,
    barrier_overwritten,
    barrier_never_initialised,
    never_waited_for_tile,
    too_many_arrivals,
    fence_of_stores,
    no_fence_of_stores,
    no_fence_of_async_copies,
};

struct Ring {
    uint32_t tiles;     // two stages of A and B
    uint32_t barriers;  // one for each stage
};

Ring ring() {
    const uint32_t begin = ptx::shared_address(dynamic_shared<unsigned char>());
    const uint32_t tiles = (begin + 1023) / 1024 * 1024;
    return {tiles, tiles + 4 * kTile};
}

template <Bug kBug>
void load_step(const Probe& p, Ring r, int step) {
    const uint32_t barrier = r.barriers + 8 * uint32_t(step % 2);
    uint32_t to = r.tiles + 2 * kTile * uint32_t(step % 2);
    if (kBug == unaligned_tile) to += 128;
    if (kBug == tile_past_the_end) to += 4 * kTile;
    int bytes = int(2 * kTile);
    if (kBug == announces_too_few) bytes -= 2;
    if (kBug == announces_too_many) bytes += 2;
    ptx::mbarrier_expect_tx(barrier, bytes);
    if (kBug == too_many_arrivals) ptx::mbarrier_arrive(barrier);
    ptx::tma_load_4d(to, &p.a, barrier, step * 64 + (kBug == unaligned_coordinate ? 4 : 0), 0, 0, 0);
    ptx::tma_load_4d(to + kTile, &p.b, barrier, 0, step * 64, 0, 0);
}

template <Bug kBug>
uint64_t operand(uint32_t address, int leading) {
    if (kBug == unaligned_operand) address += 16;
    if (kBug == operand_past_the_end) address += 5 * kTile;
    uint64_t bits = ptx::swizzled_operand(address, leading, kBug == wrong_stride ? 512 : 1024);
    if (kBug == no_swizzle) bits &= ~(uint64_t(3) << 62);
    if (kBug == base_offset) bits |= uint64_t(1) << 49;
    return bits;
}

template <Bug kBug>
void multiply_step(float (&d)[32], uint32_t tiles, bool first) {
    const unsigned warp = threadIdx.x / 32;
    if (kBug != no_wgmma_fence) ptx::wgmma_fence();
    for (uint32_t k = 0; k < 4; ++k) {
        uint32_t step = kBug == wrong_step ? 64 * k % 128 : 32 * k;
        if (kBug == lanes_disagree && threadIdx.x % 2) step = 0;
        if (kBug == warps_disagree && warp == 2) step = 0;
        if (kBug == no_fence_of_second_group && k == 2) ptx::wgmma_commit();
        const uint64_t a = operand<kBug>(tiles + step, 0), b = operand<none>(tiles + kTile + 2048 * k, 8192);
        if (kBug == wrong_major) {
            ptx::wgmma_ss<bf16, 64, Major::k, Major::k>(d, a, operand<none>(tiles + kTile + 32 * k, 0), !first || k);
        } else {
            ptx::wgmma_ss<bf16, 64, Major::k, Major::mn>(d, a, b, !first || k);
        }
    }
    if (kBug == writes_accumulators) d[3] = 0.0f;
    if (kBug != no_commit) ptx::wgmma_commit();
    if (kBug != no_wgmma_wait) ptx::wgmma_wait<0>();
}

// One thread writes over a piece of the tile what stands there already.
template <Bug kBug>
void write_again(const Probe& p, uint32_t tiles, int step) {
    unsigned char* tile = dynamic_shared<unsigned char>() + (tiles - ptx::shared_address(dynamic_shared<char>()));
    if ((kBug == fence_of_stores || kBug == no_fence_of_stores) && threadIdx.x == 3) {
        store_shared(reinterpret_cast<uint4*>(tile), load_shared(reinterpret_cast<uint4*>(tile)));
    }
    if (kBug == no_fence_of_async_copies && threadIdx.x == 7) {
        ptx::cp_async16(tiles, p.a.base + 128 * step);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
    }
    if (kBug == fence_of_stores) ptx::fence_async_shared();
    __syncthreads();
}

template <Bug kBug>
void prepare(Ring r) {
    if (kBug == barrier_never_initialised) return;
    for (uint32_t i = 0; i < 2; ++i) ptx::mbarrier_init(r.barriers + 8 * i, 1);
    if (kBug != no_fence_of_barriers) ptx::mbarrier_fence_init();
}

template <Bug kBug>
void matmul(Probe p) {
    const Ring r = ring();
    if (threadIdx.x == 0) prepare<kBug>(r);
    if (kBug != no_barrier_behind_them) __syncthreads();
    if (threadIdx.x == 0) load_step<kBug>(p, r, 0);
    if (kBug == never_waited_for_tile) return;
    float d[32];
    for (int step = 0; step < kSteps; ++step) {
        if (threadIdx.x == 0 && step + 1 < kSteps) load_step<kBug>(p, r, step + 1);
        const int parity = step / 2 % 2;
        if (kBug == barrier_overwritten && threadIdx.x == 5) {
            dynamic_shared<unsigned char>()[r.barriers - ptx::shared_address(dynamic_shared<unsigned char>())] = 1;
        }
        if (kBug != no_wait_for_tile) {
            ptx::mbarrier_wait(r.barriers + 8 * uint32_t(step % 2), kBug == wrong_parity ? parity ^ 1 : parity);
        }
        write_again<kBug>(p, r.tiles + 2 * kTile * uint32_t(step % 2), step);
        const bool takes_part = kBug != three_warps || threadIdx.x < 96;
        if (takes_part) multiply_step<kBug>(d, r.tiles + 2 * kTile * uint32_t(step % 2), step == 0);
        if (kBug != tile_over_one_in_use) __syncthreads();
    }
    const unsigned row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
    for (unsigned i = 0; i < 32; ++i) p.out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
    if (kBug == no_commit) ptx::wgmma_commit();
    if (kBug == no_commit) ptx::wgmma_wait<0>();
    if (kBug == no_wgmma_wait) ptx::wgmma_wait<0>();
}

const std::map<std::string, void (*)(Probe)> kProbes{
    {"matmul", matmul<none>},
    {"no_wait_for_tile", matmul<no_wait_for_tile>},
    {"wrong_parity", matmul<wrong_parity>},
    {"tile_over_one_in_use", matmul<tile_over_one_in_use>},
    {"no_wgmma_wait", matmul<no_wgmma_wait>},
    {"no_wgmma_fence", matmul<no_wgmma_fence>},
    {"no_fence_of_second_group", matmul<no_fence_of_second_group>},
    {"no_commit", matmul<no_commit>},
    {"announces_too_few", matmul<announces_too_few>},
    {"announces_too_many", matmul<announces_too_many>},
    {"no_fence_of_barriers", matmul<no_fence_of_barriers>},
    {"no_barrier_behind_them", matmul<no_barrier_behind_them>},
    {"three_warps", matmul<three_warps>},
    {"lanes_disagree", matmul<lanes_disagree>},
    {"warps_disagree", matmul<warps_disagree>},
    {"wrong_step", matmul<wrong_step>},
    {"wrong_stride", matmul<wrong_stride>},
    {"wrong_major", matmul<wrong_major>},
    {"no_swizzle", matmul<no_swizzle>},
    {"base_offset", matmul<base_offset>},
    {"unaligned_tile", matmul<unaligned_tile>},
    {"unaligned_coordinate", matmul<unaligned_coordinate>},
    {"unaligned_operand", matmul<unaligned_operand>},
    {"operand_past_the_end", matmul<operand_past_the_end>},
    {"tile_past_the_end", matmul<tile_past_the_end>},
    {"writes_accumulators", matmul<writes_accumulators>},
    {"barrier_overwritten", matmul<barrier_overwritten>},
    {"barrier_never_initialised", matmul<barrier_never_initialised>},
    {"never_waited_for_tile", matmul<never_waited_for_tile>},
    {"too_many_arrivals", matmul<too_many_arrivals>},
    {"fence_of_stores", matmul<fence_of_stores>},
    {"no_fence_of_stores", matmul<no_fence_of_stores>},
    {"no_fence_of_async_copies", matmul<no_fence_of_async_copies>},
};

// 128 bytes, read by one warp.
struct BulkProbe {
    const unsigned char* a;
    float* out;
};
enum BulkBug {
    bulk_right,
    unaligned_source,
    ragged_size,
    of_nothing,
    unaligned_place,
    place_past_the_end,
    unfenced_barrier,
    more_than_announced,
    less_than_announced,
    bulk_never_waited_for,
    bulk_read_at_once,
};

template <BulkBug kBug>
void bulk(BulkProbe p) {
    float* values = dynamic_shared<float>();
    const uint32_t to = ptx::shared_address(values), barrier = to + 128;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        if (kBug != unfenced_barrier) ptx::mbarrier_fence_init();
        const int bytes = kBug == ragged_size ? 24 : kBug == of_nothing ? 0 : 128;
        ptx::mbarrier_expect_tx(barrier, 128 + (kBug == less_than_announced   ? 16
                                                : kBug == more_than_announced ? -16
                                                                              : 0));
        const uint32_t place = to + (kBug == unaligned_place ? 8 : kBug == place_past_the_end ? 32 : 0);
        ptx::bulk_load(place, p.a + (kBug == unaligned_source ? 8 : 0), bytes, barrier);
    }
    __syncthreads();
    if (kBug == bulk_never_waited_for) return;
    if (kBug == bulk_read_at_once) p.out[threadIdx.x] = values[threadIdx.x];
    ptx::mbarrier_wait(barrier, 0);
    if (kBug != bulk_read_at_once) p.out[threadIdx.x] = values[threadIdx.x];
}

const std::map<std::string, void (*)(BulkProbe)> kBulkProbes{
    {"bulk", bulk<bulk_right>},
    {"unaligned_source", bulk<unaligned_source>},
    {"ragged_size", bulk<ragged_size>},
    {"of_nothing", bulk<of_nothing>},
    {"unaligned_place", bulk<unaligned_place>},
    {"place_past_the_end", bulk<place_past_the_end>},
    {"unfenced_barrier", bulk<unfenced_barrier>},
    {"more_than_announced", bulk<more_than_announced>},
    {"less_than_announced", bulk<less_than_announced>},
    {"bulk_never_waited_for", bulk<bulk_never_waited_for>},
    {"bulk_read_at_once", bulk<bulk_read_at_once>},
};

void run_bulk(const std::string& name, uintptr_t a, uintptr_t out) {
    const BulkProbe p{reinterpret_cast<const unsigned char*>(a), reinterpret_cast<float*>(out)};
    launch(kBulkProbes.at(name), 1, 32, 128 + 8, nullptr, p);
}

void run(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out) {
    Probe p{{}, {}, reinterpret_cast<float*>(out)};
    const auto swizzle = ptx::Swizzle::bytes128;
    // One matrix: the outer dimensions have one element, and strides of no meaning.
    int error = ptx::make_tensor_map(&p.a, reinterpret_cast<const void*>(a),
                                     {{256, 64, 1, 1}, {512, 512 * 64, 512 * 64}, {64, 64, 1, 1}, swizzle});
    error |= ptx::make_tensor_map(&p.b, reinterpret_cast<const void*>(b),
                                  {{64, 256, 1, 1}, {128, 128 * 256, 128 * 256}, {64, 64, 1, 1}, swizzle});
    if (error != cudaSuccess) throw std::runtime_error("make_tensor_map");
    launch(kProbes.at(name), 1, 128, 1024 + 4 * kTile + 16, nullptr, p);
}

bool tensor_map(uintptr_t base, std::array<int64_t, 4> sizes, std::array<int64_t, 3> strides, std::array<int, 4> box,
                bool swizzled) {
    ptx::TensorMap map;
    const auto swizzle = swizzled ? ptx::Swizzle::bytes128 : ptx::Swizzle::none;
    return ptx::make_tensor_map(&map, reinterpret_cast<const void*>(base),
                                {{sizes[0], sizes[1], sizes[2], sizes[3]},
                                 {strides[0], strides[1], strides[2]},
                                 {box[0], box[1], box[2], box[3]},
                                 swizzle}) == cudaSuccess;
}

int conformance(const std::string& name, int size, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t out, unsigned n) {
    const auto pointer = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
    return igpt_conformance_hopper(name.c_str(), size, pointer(a), pointer(b), pointer(c), reinterpret_cast<void*>(out),
                                   n);
}

}  // namespace

PYBIND11_MODULE(_probes_hopper, m) {
    m.def("run", &run);
    m.def("run_bulk", &run_bulk);
    m.def("conformance", &conformance);
    m.def("tensor_map", &tensor_map);
    igpt::emulator::bind_emulator(m);
}
