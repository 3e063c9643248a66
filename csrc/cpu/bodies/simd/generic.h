// Any machine, with nothing but what the compiler's own vectors of 4 lanes can do.
#pragma once

#include "four.h"

namespace igpt::cpu {
namespace {

constexpr int kMaxRows = 2;
constexpr int kBlockRows = 4, kBlockRegisters = 2;

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec pick(Ints mask, Vec a, Vec b) { return floats((mask & bits(a)) | (~mask & bits(b))); }
inline Vec abs(Vec a) { return floats(bits(a) & 0x7fffffff); }
// SSE2 has no widening of bytes: every lane masks its byte where it stands, the lower three with an offset of 128.
inline Vec load_bytes(const char* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    const auto w = int32_t(word ^ 0x00808080u);
    const Ints there = Ints{w, w, w, w} & Ints{0xff, 0xff00, 0xff0000, int32_t(0xff000000)};
    const Vec scale{1.0f, 1.0f / 256, 1.0f / 65536, 1.0f / 16777216}, offset{128.0f, 128.0f, 128.0f, 0.0f};
    return __builtin_convertvector(there, Vec) * scale - offset;
}
inline float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Vec v) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}
inline Vec spread_min(Vec v) {
    v = min(v, Vec{v[2], v[3], v[0], v[1]});
    return min(v, Vec{v[1], v[0], v[3], v[2]});
}
inline uint32_t at_most(Vec a, Vec b) {
    const Ints lanes = (a <= b) & Ints{1, 2, 4, 8};
    return uint32_t((lanes[0] | lanes[1]) | (lanes[2] | lanes[3]));
}

inline Vec reciprocal_coarse(Vec x) { return reciprocal(x); }
inline Vec read(const uint16_t* p, Whole) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    Halves v;
    __builtin_memcpy(&v, p, sizeof v);
    return floats(shift_left<16>(__builtin_convertvector(v, Ints)));
}
inline void write(uint16_t* p, Vec v, Whole) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    const Unsigned u = reinterpret_cast<Unsigned>(v), rounded = u + 0x7fff + (u >> 16 & 1);
    const Unsigned nan = reinterpret_cast<Unsigned>(v != v);
    const Halves high = __builtin_convertvector(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16, Halves);
    __builtin_memcpy(p, &high, sizeof high);
}
inline Vec by_sign(Vec x, Vec a, Vec b) { return pick(x < zero(), a, b); }

inline Vec floor_near(Vec x) {  // for |x| below 2^22
    const Vec large = set1(12582912.0f), n = (x + large) - large;
    return n - pick(n > x, set1(1.0f), zero());
}
inline Vec above_floor(Vec x) {
    x = max(set1(-127.0f), x);
    return x - floor_near(x);
}
inline Vec times_power(Vec p, Vec x) {
    const Vec near = max(set1(-127.0f), x), n = floor_near(near) + set1(12582912.0f);
    const Vec y = floats(add_ints(bits(p), shift_left<23>(bits(n))));
    return drop_below(near * zero() + y, x, set1(-126.0f));  // any NaN stays one
}

constexpr bool kPairs = false, kBytes = false, kWords = false, kTwoByTwo = false;
constexpr int kByteOffset = 0;

}  // namespace
}  // namespace igpt::cpu
