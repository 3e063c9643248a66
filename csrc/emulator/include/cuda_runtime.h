// Stands for the CUDA runtime's header where the host compiler builds csrc/cuda for the emulator: the words of the
// language, the built-in variables and functions that the kernels use, and a runtime with one device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The approximate functions are exact here.
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
// Byte i of the result is number selector / 16^i % 16 of y's and x's, x's first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

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
namespace igpt::emulator {
int capability();
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int capability = igpt::emulator::capability();
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
    return cudaSuccess;
}
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
// Ends the launch with an error.
[[noreturn]] void trap(Where where);
// Waits for the lanes of `mask`. `orders`: whether memory is ordered among them, as by __syncwarp.
void sync_warp(unsigned mask, Where where);
// What lane `source` of the warp brings as `bits`, once all lanes of `mask` have called.
uint64_t shuffle(const char* name, unsigned mask, uint64_t bits, int source, Where where);
// The lanes of `mask` that call with `predicate`.
unsigned ballot(const char* name, unsigned mask, bool predicate, Where where);
int lane();
// Orders the thread's memory behind that of every thread which has called it before.
void thread_fence();

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
[[noreturn]] inline void __trap(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    igpt::emulator::trap({file, line});
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

template <typename T>
T __ldg(const T* address) {
    return *address;
}

// Atomics order no other memory: that takes a fence before the write of a flag and one behind its reading.
inline void __threadfence() { igpt::emulator::thread_fence(); }
inline void __threadfence_block() { igpt::emulator::thread_fence(); }

namespace igpt::emulator {
template <typename T>
constexpr bool is_atomic_integer() {
    return std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
}
// *address becomes f(*address); gives what it was.
template <typename T, typename F>
T atomic_update(T* address, F f) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    do {
        after = f(before);
    } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}
}  // namespace igpt::emulator

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    static_assert(igpt::emulator::is_atomic_integer<T>() || std::is_same_v<T, float>, "unsupported in the emulator");
    return igpt::emulator::atomic_update(address, [&](T x) {
        if constexpr (std::is_same_v<T, int>) return int(unsigned(x) + unsigned(value));  // it wraps
        return T(x + value);
    });
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
    static_assert(igpt::emulator::is_atomic_integer<T>(), "unsupported in the emulator");
    return igpt::emulator::atomic_update(address, [&](T x) { return std::max(x, value); });
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
    static_assert(igpt::emulator::is_atomic_integer<T>(), "unsupported in the emulator");
    return igpt::emulator::atomic_update(address, [&](T x) { return std::min(x, value); });
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
    static_assert(igpt::emulator::is_atomic_integer<T>() || std::is_same_v<T, float>, "unsupported in the emulator");
    return igpt::emulator::atomic_update(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    static_assert(igpt::emulator::is_atomic_integer<T>(), "unsupported in the emulator");
    return igpt::emulator::atomic_update(address, [&](T x) { return x == expected ? value : x; });
}
