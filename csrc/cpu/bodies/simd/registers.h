// Registers of the instruction set that a file is compiled for: kLanes floats or 32-bit integers, kMaxRows rows of a
// product, reads and writes of whole ones and parts, and whether there are products of bf16 pairs (kPairs), of bytes
// (kBytes), of pairs of 16-bit integers (kWords), and of two rows by two columns of pairs and bytes (kTwoByTwo). A
// machine is one header. Everything has internal linkage; see ops.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace igpt::cpu {
namespace {

struct Whole {};
struct Part {
    int count;  // the first lanes, fewer than kLanes; the others are zero when read and not written
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <bool Value>
struct Flag {
    static constexpr bool value = Value;
};

// N, as what a function is called with: a tile's number has to be a constant, and so has that of a register in an
// array.
template <int N>
struct Number {
    constexpr operator int() const { return N; }
};

// Calls f(Number) for 0 .. N - 1.
template <int N, class F>
[[gnu::always_inline]] inline void each(F&& f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(Number<N - 1>());
    }
}

}  // namespace
}  // namespace igpt::cpu

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 finds its own header's undefined registers uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(IGPT_NEON)
#include "neon.h"
#else
#include "generic.h"
#endif

namespace igpt::cpu {
namespace {

constexpr int kTile = 4 * kLanes;
constexpr float kLog2e = 1.44269504f;

inline Vec read(const float* p, Whole) { return load(p); }
inline void write(float* p, Vec v, Whole) { store(p, v); }
inline Vec bf16_even(Ints v) { return floats(shift_left<16>(v)); }

inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// e^x, relative error below 2e-7, for x clamped to what float32 holds; NaN stays.
inline Vec exp(Vec x) {
    x = min(set1(88.0f), max(set1(-87.0f), x));
    const Vec shifted = fma(x, set1(kLog2e), set1(12582912.0f));  // 1.5 2^23: the low bits are round(x / ln 2)
    const Vec n = shifted - set1(12582912.0f);
    const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));  // x - n ln 2, ln 2 in two parts
    Vec p = set1(1.0f / 5040);                                                   // Taylor's, |r| <= 0.347
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return floats(add_ints(bits(p), shift_left<23>(bits(shifted))));
}

// 2^x and e^x, 0 far down, where x is minus infinity too; NaN stays. Relative errors below 3e-6 and 2e-7.
inline Vec exp2(Vec x) {
    const Vec f = above_floor(x);
    Vec p = fma(f, set1(0.013534161f), set1(0.052011475f));
    p = fma(p, f, set1(0.241442749f));
    p = fma(p, f, set1(0.693003836f));
    return times_power(fma(p, f, set1(1.000002593f)), x);
}
inline Vec exp_down(Vec x) {
    x = max(set1(-110.0f), x);
    const Vec above = fma(x, set1(kLog2e), set1(0.5f)), n = above - above_floor(above);
    const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));  // |r| <= 0.347
    Vec p = fma(r, set1(0.00138144556f), set1(0.00836878549f));
    p = fma(p, r, set1(0.0416683964f));
    p = fma(p, r, set1(0.166665196f));
    p = fma(p, r, set1(0.499999940f));
    p = fma(p, r, set1(1.0f));
    return times_power(fma(p, r, set1(1.0f)), n);
}

// By way of arrays, where the machine has nothing better: that is no template and goes before this one.
// kLanes x kLanes of 32 bits, in place.
template <class I>
inline void transpose(I (&r)[kLanes]) {
    int32_t from[kLanes][kLanes], to[kLanes][kLanes];
    __builtin_memcpy(from, r, sizeof from);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) to[j][i] = from[i][j];
    __builtin_memcpy(r, to, sizeof to);
}
// Two registers, one after the other; in bf16 a denormal may become zero.
template <class T, class V>
inline void write_two(T* p, V a, V b) {
    write(p, a, Whole{});
    write(p + kLanes, b, Whole{});
}

}  // namespace
}  // namespace igpt::cpu
