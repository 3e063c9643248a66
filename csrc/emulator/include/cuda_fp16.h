// Stands for CUDA's header of the same name: float16 and its conversions, rounding to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
    // Exponent and fraction moved into place, and the exponents' bias, which is 112 larger, made good by a product: it
    // is exact, for subnormal numbers too.
    const uint32_t moved = uint32_t(x.bits & 0x7fff) << 13;
    float size;
    std::memcpy(&size, &moved, sizeof size);
    size = moved >= 0x0f800000 ? ((moved & 0x007fffff) ? NAN : INFINITY) : size * 0x1p112f;
    return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float value) {
    if (std::isnan(value)) return {0x7fff};  // as the hardware writes it
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};     // half-way above the largest number: infinity
    int exponent = -13;                                         // below 2^-14 the spacing stays at 2^-24
    if (size >= 6.103515625e-05f) std::frexp(size, &exponent);  // 2^(exponent - 1) <= size < 2^exponent
    // In units of the last place; nearbyint rounds ties to even. A carry runs over into the exponent, as it shall.
    const int units = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return {uint16_t(sign | (((exponent + 13) << 10) + units))};
}
