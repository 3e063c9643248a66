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
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

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

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The approximate functions are exact here.
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __expf(float x) { return std::exp(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
// Byte i of the result is number selector / 16^i % 16 of y's and x's, x's first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

namespace igpt::emulator {
template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace igpt::emulator
inline unsigned __float_as_uint(float x) { return igpt::emulator::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return igpt::emulator::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return igpt::emulator::same_bits<float>(x); }
inline float __int_as_float(int x) { return igpt::emulator::same_bits<float>(x); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new char;  // an address that no other has
    return cudaSuccess;
}
namespace igpt::emulator {
int capability();
int multiprocessors();
}  // namespace igpt::emulator
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int capability = igpt::emulator::capability();
    *value = attribute == cudaDevAttrMultiProcessorCount      ? igpt::emulator::multiprocessors()
             : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                              : capability % 10;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid argument";
}

namespace igpt::emulator {

// Where in a kernel something was called: where a function stands in the source that has one as its last argument.
struct Where {
    const char* file;
    int line;
    constexpr Where(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) : file(file_), line(line_) {}
};

void barrier(Where where);
// Ends the launch with an error.
[[noreturn]] void trap(Where where);
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

// A lane outside its segment of `width` keeps its own value.
inline void __syncthreads(igpt::emulator::Where where = {}) { igpt::emulator::barrier(where); }
[[noreturn]] inline void __trap(igpt::emulator::Where where = {}) { igpt::emulator::trap(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, igpt::emulator::Where where = {}) {
    igpt::emulator::sync_warp(mask, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, igpt::emulator::Where where = {}) {
    const int own = igpt::emulator::lane();
    return igpt::emulator::shuffle("__shfl_sync", mask, value, (own & -width) | (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, igpt::emulator::Where where = {}) {
    const int own = igpt::emulator::lane(), source = own ^ flip;
    const bool inside = source < (own & -width) + width;
    return igpt::emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : own, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, igpt::emulator::Where where = {}) {
    const int own = igpt::emulator::lane(), source = own - int(delta);
    return igpt::emulator::shuffle("__shfl_up_sync", mask, value, source >= (own & -width) ? source : own, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, igpt::emulator::Where where = {}) {
    return igpt::emulator::ballot("__ballot_sync", mask, predicate != 0, where);
}
