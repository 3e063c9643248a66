// Stands for the CUDA runtime's header where the host compiler builds csrc/cuda for the emulator: the words of the
// language, the built-in variables and functions that the kernels use, and a runtime with one device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now; the scheduler sets them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid argument";
}

namespace igpt::emulator {

// Where in a kernel something was called.
struct Where {
    const char* file;
    int line;
};

void barrier(Where where);
// Waits for the lanes of `mask`. `orders`: whether memory is ordered among them, as by __syncwarp.
void sync_warp(unsigned mask, Where where);
// What lane `source` of the warp brings as `bits`, once all lanes of `mask` have called.
uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source, Where where);
// The lanes of `mask` that call with `predicate`.
unsigned ballot(const char* name, unsigned mask, bool predicate, Where where);
int lane();

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(name, mask, bits, source, where);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace igpt::emulator

// The last two arguments say where the call stands. A lane outside its segment of `width` keeps its own value.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    igpt::emulator::barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    igpt::emulator::sync_warp(mask, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
    const int own = igpt::emulator::lane();
    return igpt::emulator::shuffle("__shfl_sync", mask, value, (own & -width) | (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
    const int own = igpt::emulator::lane(), source = own ^ flip;
    const bool inside = source < (own & -width) + width;
    return igpt::emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : own, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
    const int own = igpt::emulator::lane(), source = own + int(delta);
    const bool inside = source < (own & -width) + width;
    return igpt::emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : own, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
    const int own = igpt::emulator::lane(), source = own - int(delta);
    return igpt::emulator::shuffle("__shfl_up_sync", mask, value, source >= (own & -width) ? source : own,
                                   {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    return igpt::emulator::ballot("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return igpt::emulator::ballot("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return igpt::emulator::ballot("__all_sync", mask, predicate != 0, {file, line}) == mask;
}
