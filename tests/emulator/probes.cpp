// Small kernels, right and wrong, that try the emulator itself.
#include <pybind11/pybind11.h>

#include <functional>
#include <map>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace py = pybind11;
using namespace igpt::cuda;

namespace {

struct Probe {
    float* out;  // 64 values
};

void barrier_in_a_branch(Probe) {
    if (threadIdx.x < 32) __syncthreads();
}
void barriers_at_two_places(Probe) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
void lanes_that_are_missing(Probe) {
    if (threadIdx.x != 3) __syncwarp();
}
void lane_outside_its_mask(Probe) { __syncwarp(1u); }
void lanes_that_disagree(Probe p) {
    p.out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, 1.0f, 1) : __shfl_sync(0xffffffffu, 1.0f, 1);
}
void reads_a_lane_that_is_not_there(Probe p) {
    if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}
void misaligned(Probe p) { load_global(reinterpret_cast<double*>(p.out + 1)); }
void poison(Probe p) { p.out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }
void shuffles(Probe p) {
    const int x = int(threadIdx.x) % 32;
    int ok = __shfl_sync(0xffffffffu, x, 5) == 5 && __shfl_sync(0xffffffffu, x, 9, 8) == x / 8 * 8 + 1;
    ok &= __shfl_xor_sync(0xffffffffu, x, 16) == (x ^ 16);
    ok &= __shfl_xor_sync(0xffffffffu, x, 8, 8) == (x & 8 ? x - 8 : x);  // a lower segment may be read, a higher not
    ok &= __shfl_up_sync(0xffffffffu, double(x), 3u) == (x > 2 ? x - 3 : x);
    ok &= __ballot_sync(0xffffffffu, x < 4) == 15u;
    p.out[threadIdx.x] = float(ok);
}
// A warp that waits gives way to others, in every schedule; only the barrier says that both have written.
void exchange(Probe p) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = float(threadIdx.x);
    __syncthreads();
    p.out[threadIdx.x] = shared[63 - threadIdx.x];
}
// Wrong: without the barrier the result depends on who is first.
void exchange_without_a_barrier(Probe p) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = float(threadIdx.x);
    __syncwarp();
    p.out[threadIdx.x] = shared[63 - threadIdx.x];
}
void same_bank(Probe) { store_shared(dynamic_shared<float>() + 32 * (threadIdx.x % 32), 0.0f); }
void every_bank(Probe) { store_shared(dynamic_shared<float>() + threadIdx.x, 0.0f); }
void every_other_float(Probe p) {
    if (threadIdx.x < 32) store_global(p.out + 2 * threadIdx.x, 1.0f);
}

// Of a dependent launch, or the one before.
void stores(Probe p) { store_global(p.out + threadIdx.x, 1.0f); }
void stores_late(Probe p) {
    ptx::grid_dependency_wait();
    store_global(p.out + threadIdx.x, 1.0f);
}
void loads(Probe p) {
    load_global(p.out + threadIdx.x);
    ptx::grid_dependency_wait();
}
void waits(Probe) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    ptx::grid_dependency_launch();
}
void hurries(Probe) {
    ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
}
void one_block_hurries(Probe) {
    if (blockIdx.x == 0) ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
}
void one_thread_waits(Probe p) {
    if (threadIdx.x == 7) ptx::grid_dependency_wait();
    store_global(p.out + threadIdx.x, 1.0f);
}
void one_thread_waits_for_all(Probe p) {
    if (threadIdx.x == 7) ptx::grid_dependency_wait();
    __syncthreads();
    store_global(p.out + threadIdx.x, 1.0f);
}
void one_block_waits(Probe) {
    if (blockIdx.x == 0) ptx::grid_dependency_wait();
}

// Two blocks of 32 threads.
void run_dependent(const std::string& name, uintptr_t out, bool dependent) {
    const std::map<std::string, void (*)(Probe)> all{
        {"stores", stores},
        {"stores_late", stores_late},
        {"loads", loads},
        {"waits", waits},
        {"hurries", hurries},
        {"one_block_hurries", one_block_hurries},
        {"one_block_waits", one_block_waits},
        {"one_thread_waits", one_thread_waits},
        {"one_thread_waits_for_all", one_thread_waits_for_all},
    };
    launch(all.at(name), 2, 32, 0, nullptr, Probe{reinterpret_cast<float*>(out)}, 1, dependent);
}

void run(const std::string& name, uintptr_t out, unsigned threads, size_t shared_bytes) {
    const std::map<std::string, void (*)(Probe)> all{
        {"barrier_in_a_branch", barrier_in_a_branch},
        {"barriers_at_two_places", barriers_at_two_places},
        {"lanes_that_are_missing", lanes_that_are_missing},
        {"lane_outside_its_mask", lane_outside_its_mask},
        {"lanes_that_disagree", lanes_that_disagree},
        {"reads_a_lane_that_is_not_there", reads_a_lane_that_is_not_there},
        {"misaligned", misaligned},
        {"poison", poison},
        {"shuffles", shuffles},
        {"exchange", exchange},
        {"exchange_without_a_barrier", exchange_without_a_barrier},
        {"same_bank", same_bank},
        {"every_bank", every_bank},
        {"every_other_float", every_other_float},
    };
    launch(all.at(name), 1, threads, shared_bytes, nullptr, Probe{reinterpret_cast<float*>(out)});
}

void set_schedule(const std::string& order, uint64_t seed) {
    using igpt::emulator::Order;
    igpt::emulator::set_schedule({order == "fifo"     ? Order::fifo
                                  : order == "random" ? Order::random
                                                      : Order::skewed,
                                  seed});
}

// in and out have n elements each.
void to_half(uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        reinterpret_cast<__half*>(out)[i] = __float2half_rn(reinterpret_cast<float*>(in)[i]);
}
void to_bfloat(uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        reinterpret_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16_rn(reinterpret_cast<float*>(in)[i]);
    }
}
void from_half(uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(out)[i] = __half2float(reinterpret_cast<__half*>(in)[i]);
}
void from_bfloat(uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        reinterpret_cast<float*>(out)[i] = __bfloat162float(reinterpret_cast<__nv_bfloat16*>(in)[i]);
    }
}

}  // namespace

PYBIND11_MODULE(_probes, m) {
    m.def("run_dependent", &run_dependent);
    m.def("synchronize", &igpt::emulator::synchronize);
    m.def("run", &run);
    m.def("set_schedule", &set_schedule);
    m.def("set_capability", &igpt::emulator::set_capability, pybind11::arg("ten_times") = 80);
    m.def("to_float16", &to_half);
    m.def("to_bfloat16", &to_bfloat);
    m.def("from_float16", &from_half);
    m.def("from_bfloat16", &from_bfloat);
    m.def("reset_counters", &igpt::emulator::reset_counters);
    m.def("counters", [] {
        const igpt::emulator::Counters c = igpt::emulator::counters();
        py::dict d;
        d["shared_conflicts"] = c.shared_conflicts;
        d["store_sectors"] = c.store_sectors;
        d["store_bytes"] = c.store_bytes;
        return d;
    });
}
