// Stands for CUDA's header of the same name: bfloat16 and its conversions, rounding to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN, as the hardware writes it
    return {uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
