// NEON (AArch64): registers of 4 lanes, 32 of them; and, where there are, products of bytes (SDOT) and of bf16 pairs
// (BFDOT), and of two rows by two columns of both (SMMLA, BFMMLA).
#pragma once

#include <arm_neon.h>

#include "four.h"

namespace igpt::cpu {
namespace {

constexpr int kMaxRows = 4;  // 4 rows x 4 registers, 32 there are
constexpr int kBlockRows = 4, kBlockRegisters = 4;

inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec abs(Vec a) { return vabsq_f32(a); }
// Four bytes in the first lane of a register for vectors, past those for integers.
inline float32x2_t load_word(const void* p) {
    float word;
    __builtin_memcpy(&word, p, 4);
    return vset_lane_f32(word, float32x2_t{}, 0);
}
inline Vec load_bytes(const char* p) {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_f32(load_word(p)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline float reduce_add(Vec v) { return vaddvq_f32(v); }
inline float reduce_max(Vec v) { return vmaxvq_f32(v); }
inline Vec spread_min(Vec v) { return vdupq_n_f32(vminnmvq_f32(v)); }
inline uint32_t at_most(Vec a, Vec b) {
    const Unsigned lanes{1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcleq_f32(a, b), lanes));
}
inline Vec reciprocal_coarse(Vec x) {  // 8 bits, and twice as many
    const Vec r = vrecpeq_f32(x);
    return r * Vec(vrecpsq_f32(x, r));
}
// x - floor(x); p 2^floor(x), 0 far down; NaN stays.
inline Vec above_floor(Vec x) {
    x = max(set1(-127.0f), x);
    return x - Vec(vrndmq_f32(x));
}
inline Vec times_power(Vec p, Vec x) {
    const Ints n = vcvtmq_s32_f32(max(set1(-127.0f), x));
    return drop_below(floats(add_ints(bits(p), shift_left<23>(n))), x, set1(-126.0f));
}
inline Vec by_sign(Vec x, Vec a, Vec b) { return vbslq_f32(vcltzq_f32(x), a, b); }

inline Vec read(const uint16_t* p, Whole) { return floats(Ints(vshll_n_u16(vld1_u16(p), 16))); }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void write(uint16_t* p, Vec v, Whole) { vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32(v))); }
#else
// To nearest, ties to even; rounding could make a NaN infinite.
inline void write(uint16_t* p, Vec v, Whole) {
    const Unsigned u = reinterpret_cast<Unsigned>(v), rounded = u + 0x7fff + (u >> 16 & 1);
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, Unsigned{} + 0x7fc00000u), 16));
}
#endif

inline void transpose(Ints (&r)[4]) {
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1])),
                    b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1])),
                    c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3])),
                    d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
    r[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
    r[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
    r[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
    r[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
}
inline void interleave(Ints a, Ints b, Ints& first, Ints& second) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    first = vreinterpretq_s32_s16(vzip1q_s16(x, y));
    second = vreinterpretq_s32_s16(vzip2q_s16(x, y));
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kPairs = true;
inline Ints to_bf16(Vec first, Vec second) {
    return vreinterpretq_s32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
}
// acc + the sum of a pair of bf16 times the pairs of w.
inline Vec add_pairs(Vec acc, const uint16_t* pair, Ints w) {
    return vbfdotq_lane_f32(acc, vreinterpretq_bf16_s32(w), vreinterpret_bf16_f32(load_word(pair)), 0);
}
inline void halve_row(const float* x, int64_t n, uint16_t* half) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) write(half + i, load(x + i), Whole{});
    for (; i < n; ++i) half[i] = vget_lane_u16(vreinterpret_u16_bf16(vcvt_bf16_f32(set1(x[i]))), 0);
}
#else
constexpr bool kPairs = false;
#endif

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kBytes = true;
// acc + the sum of four signed bytes times the fours of w.
inline Ints add_bytes(Ints acc, const uint8_t* four, Ints w) {
    return vdotq_lane_s32(acc, vreinterpretq_s8_s32(w), vreinterpret_s8_f32(load_word(four)), 0);
}
inline void store_ints(void* p, Ints v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec to_floats(Ints v, Ints) { return vcvtq_f32_s32(v); }
// v, to nearest.
inline void store_bytes(uint8_t* to, Vec v, int) {
    const int16x4_t narrow = vmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    __builtin_memcpy(to, &bytes, kLanes);
}
// 128 high + low of integer sums; `high` is signed and has no offset.
inline Vec join_bytes(const float* high, const float* low, const int32_t*) {
    return fma(vcvtq_f32_s32(load_ints(high)), set1(128.0f), vcvtq_f32_s32(load_ints(low)));
}

// x as 14 bits and a sign, x = scale (128 high + low), both as signed bytes: high -127 .. 127, low 0 .. 127. Returns
// the scale, which is NaN when something in x is not finite. Every 64 bytes are `step` from those before.
template <bool Signed>
inline float split_bytes(Flag<Signed>, const float* x, int64_t n, uint8_t* high, uint8_t* low, int64_t step) {
    Vec most = zero(), poison = zero();
    const auto each = [&](auto&& f) {  // parts by way of an array
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) f(i, load(x + i), kLanes);
        float some[kLanes] = {};
        for (int64_t at = i; at < n; ++at) some[at - i] = x[at];
        if (i < n) f(i, load(some), int(n - i));
    };
    each([&](int64_t, Vec v, int) {
        most = max(most, abs(v));
        poison = fma(v, zero(), poison);
    });
    const float largest = reduce_max(most), scale = largest / 16256.0f;
    // Numbers so small that their steps have no inverse are zero.
    const Vec inverse = set1(scale > 1e-37f ? 1.0f / scale : 0.0f);
    each([&](int64_t i, Vec v, int count) {
        const Ints q = vcvtnq_s32_f32(v * inverse), parts[2] = {q >> 7, q & 127};
        uint8_t* const to[2] = {high + i / 64 * step + i % 64, low + i / 64 * step + i % 64};
        for (int part = 0; part < 2; ++part) {
            const int16x4_t narrow = vmovn_s32(parts[part]);
            const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
            __builtin_memcpy(to[part], &bytes, size_t(count));
        }
    });
    return scale + reduce_add(poison);
}
#else
constexpr bool kBytes = false;
#endif
constexpr bool kWords = false;
constexpr int kByteOffset = 0;

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kTwoByTwo = true;
// acc + two rows times two columns, 8 bytes of k each, as [row][column]: of bf16, whose pairs are added as add_pairs
// does, one after the other; of signed bytes.
inline Vec multiply_two(Vec acc, Ints rows, Ints columns) {
    return vbfmmlaq_f32(acc, vreinterpretq_bf16_s32(rows), vreinterpretq_bf16_s32(columns));
}
inline Ints multiply_two(Ints acc, Ints rows, Ints columns) {
    return vmmlaq_s32(acc, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(columns));
}
#else
constexpr bool kTwoByTwo = false;
#endif
// Words of a and b in turn; their first halves, and their second ones.
inline void interleave_words(Ints a, Ints b, Ints& first, Ints& second) {
    first = vzip1q_s32(a, b);
    second = vzip2q_s32(a, b);
}
template <class V>
inline void pair_halves(V a, V b, V& first, V& second) {
    const auto x = reinterpret_cast<int64x2_t>(a), y = reinterpret_cast<int64x2_t>(b);
    first = reinterpret_cast<V>(vzip1q_s64(x, y));
    second = reinterpret_cast<V>(vzip2q_s64(x, y));
}

}  // namespace
}  // namespace igpt::cpu
