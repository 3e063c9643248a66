// Stands for CUDA's header of the same name: float16 and its conversions, rounding to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float size;
    if (exponent == 31) {
        size = fraction ? NAN : INFINITY;
    } else {
        size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    }
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
