// races PROBE: one kernel with, or without, a fault in its memory accesses, for the sanitizers to find or not to.
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace igpt::cuda;

namespace {

struct Probe {
    float* in;   // 256 values
    float* out;  // 256 values
};

uint32_t own_place() { return ptx::shared_address(dynamic_shared<float>() + 4 * threadIdx.x); }

// 64 threads use what others have copied.
template <bool kBarrier>
void copy(Probe p) {
    ptx::cp_async16(own_place(), p.in + 4 * threadIdx.x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    if (kBarrier) __syncthreads();
    p.out[threadIdx.x] = dynamic_shared<float>()[255 - 4 * threadIdx.x];
}
// The next copy overwrites what others may still read.
template <bool kBarrier>
void copy_again(Probe p) {
    copy<true>(p);
    if (kBarrier) __syncthreads();
    ptx::cp_async16(own_place(), p.in + 4 * threadIdx.x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
// The last thread's source ends after 8 bytes.
template <int kBytes>
void copy_past_the_source(Probe p) {
    ptx::cp_async16(own_place(), p.in + 4 * (threadIdx.x + 1), threadIdx.x == 63 ? kBytes : 16);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
template <bool kBarrier>
void matrices(Probe p) {
    dynamic_shared<float>()[threadIdx.x] = 1.0f;
    if (kBarrier) __syncthreads();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, ptx::shared_address(dynamic_shared<float>() + 4 * (threadIdx.x % 16)));
    p.out[threadIdx.x] = float(r[0]);
}
template <bool kBarrier>
void named_barrier(Probe p) {
    float* values = dynamic_shared<float>();
    values[threadIdx.x] = 1.0f;
    if (threadIdx.x >= 32) {
        ptx::named_barrier_arrive(1, 64);
    } else {
        if (kBarrier) ptx::named_barrier_sync(1, 64);
        p.out[threadIdx.x] = values[63 - threadIdx.x];
    }
    if (!kBarrier && threadIdx.x < 32) ptx::named_barrier_sync(1, 64);
}
// Whoever arrives does not wait: that it saw anything of the others would be luck.
void named_barrier_arrival(Probe p) {
    float* values = dynamic_shared<float>();
    values[threadIdx.x] = 1.0f;
    if (threadIdx.x >= 32) {
        ptx::named_barrier_arrive(1, 64);
        p.out[threadIdx.x] = values[63 - threadIdx.x];
    } else {
        ptx::named_barrier_sync(1, 64);
    }
}

const std::map<std::string, void (*)(Probe)> kKernels{
    {"copy", copy<true>},
    {"copy_without_barrier", copy<false>},
    {"copy_again", copy_again<true>},
    {"copy_again_without_barrier", copy_again<false>},
    {"source", copy_past_the_source<0>},
    {"source_past_the_end", copy_past_the_source<4>},
    {"matrices", matrices<true>},
    {"matrices_without_barrier", matrices<false>},
    {"named_barrier", named_barrier<true>},
    {"named_barrier_too_late", named_barrier<false>},
    {"named_barrier_arrival", named_barrier_arrival},
};

}  // namespace

int main(int, char** argv) {
    std::vector<float> in(256, 1.0f), out(256);
    try {
        launch(kKernels.at(argv[1]), 1, 64, 1024, nullptr, Probe{in.data(), out.data()});
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::puts("done");
    return 0;
}
