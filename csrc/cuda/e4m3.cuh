// Numbers of 8 bits, sixteen as a vector: sign, 4 bits of exponent with bias 7, 3 of fraction. No infinity; all bits
// but the sign set is NaN; 448 is the largest. By integers, so on every architecture, but where an instruction reads
// them.
//
// Source: OCP 8-bit Floating Point Specification, E4M3; torch.float8_e4m3fn.
#pragma once

#include <cmath>
#include <cstdint>

#include "primitives.cuh"

namespace igpt::cuda {

struct E4M3 {
    uint8_t bits;
};
constexpr float kLargestE4M3 = 448.0f;
constexpr unsigned kNaNE4M3 = 0x7f;

template <>
struct alignas(16) Vector<E4M3> {
    static constexpr int kSize = 16;
    uint32_t words[4];
};

// The code of a number: to nearest, ties to even, the largest beyond it.
__device__ __forceinline__ unsigned to_e4m3(float x) {
    const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return kNaNE4M3;
    unsigned code;
    if (size < 0x3c800000u) {
        // Below 2^-6 the spacing stays at 2^-9, which is that of the floats from 2^14 on: an addition rounds.
        code = __float_as_uint(__uint_as_float(size) + 16384.0f) - __float_as_uint(16384.0f);
    } else {
        // A carry runs over into the exponent, as it shall; 120 is by how much the exponents' bias differs.
        code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
    }
    return (code < kNaNE4M3 ? code : kNaNE4M3 - 1) | (bits >> 24 & 0x80u);
}

// Exact: moved into place as a half, whose exponent's bias is 8 larger.
__device__ __forceinline__ float from_e4m3(unsigned code) {
    const unsigned size = code & 0x7fu;
    const float moved = __half2float(__ushort_as_half(static_cast<unsigned short>((code & 0x80u) << 8 | size << 7)));
    return size == kNaNE4M3 ? NAN : moved * 256.0f;
}

// The numbers of two codes, the first in the low byte.
__device__ __forceinline__ float2 from_e4m3x2(unsigned codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return ptx::from_e4m3x2(codes & 0xffffu);
#else
    return make_float2(from_e4m3(codes), from_e4m3(codes >> 8));
#endif
}

}  // namespace igpt::cuda
