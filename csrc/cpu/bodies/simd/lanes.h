// Rows of any length, fp32 or bf16, a register at a time: whole ones, and the part that is left over.
#pragma once

#include "registers.h"

namespace igpt::cpu {
namespace {

struct Whole {};
struct Part {
    int count;  // the first lanes, fewer than kLanes; the others are zero when read and not written
};

// Calls f(index, accumulator, Whole or Part) for n elements, for U registers at a time while there are so many:
// accumulator is 0 .. U - 1, so that sums do not wait for one another.
template <int U, class F>
inline void sweep(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + U * kLanes <= n; i += U * kLanes)
        for (int u = 0; u < U; ++u) f(i + u * kLanes, u, Whole{});
    for (; i + kLanes <= n; i += kLanes) f(i, 0, Whole{});
    if (i < n) f(i, 0, Part{int(n - i)});
}

template <int U>
inline Vec total(const Vec (&sums)[U]) {
    Vec sum = sums[0];
    for (int u = 1; u < U; ++u) sum = sum + sums[u];
    return sum;
}

#if defined(__AVX512F__)

inline __mmask16 mask(Part part) { return __mmask16((1u << part.count) - 1); }

inline Vec read(const float* p, Whole) { return load(p); }
inline Vec read(const float* p, Part part) { return _mm512_maskz_loadu_ps(mask(part), p); }
inline void write(float* p, Vec v, Whole) { store(p, v); }
inline void write(float* p, Vec v, Part part) { _mm512_mask_storeu_ps(p, mask(part), v); }

inline Vec from_bf16(__m256i v) { return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
// To nearest, ties to even.
inline __m256i as_bf16(Vec v) {
#if defined(__AVX512BF16__)
    // The instruction takes denormals for zeros.
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0x20) == 0, 1)) return __m256i(_mm512_cvtneps_pbh(v));
#endif
    const Ints u = bits(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const Ints rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);  // rounding could make a NaN infinite
    const Ints kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline Vec read(const uint16_t* p, Whole) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec read(const uint16_t* p, Part part) { return from_bf16(_mm256_maskz_loadu_epi16(mask(part), p)); }
inline void write(uint16_t* p, Vec v, Whole) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_bf16(v)); }
inline void write(uint16_t* p, Vec v, Part part) { _mm256_mask_storeu_epi16(p, mask(part), as_bf16(v)); }

inline Vec pad(Vec v, Whole, Vec) { return v; }
inline Vec pad(Vec v, Part part, Vec with) { return _mm512_mask_mov_ps(with, mask(part), v); }
// v, and zero where x is below the limit; a NaN is not below.
inline Vec drop_below(Vec v, Vec x, Vec limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}
// a where x is below zero, else b.
inline Vec by_sign(Vec x, Vec a, Vec b) { return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), a); }
// 1 / x for x of 1 to 2^126, to a unit of rounding; NaN stays. Coarse: to 2^-14.
inline Vec reciprocal_coarse(Vec x) { return _mm512_rcp14_ps(x); }
inline Vec reciprocal(Vec x) {
    const Vec r = _mm512_rcp14_ps(x);
    return fma(r, fma(zero() - x, r, set1(1.0f)), r);
}

#else

inline Vec read(const float* p, Whole) { return load(p); }
inline void write(float* p, Vec v, Whole) { store(p, v); }
inline Vec reciprocal(Vec x) { return set1(1.0f) / x; }

#if defined(__AVX2__)

inline Vec reciprocal_coarse(Vec x) {  // 12 bits, and twice as many
    const Vec r = _mm256_rcp_ps(x);
    return r * fma(zero() - x, r, set1(2.0f));
}

inline Vec read(const uint16_t* p, Whole) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline void write(uint16_t* p, Vec v, Whole) {
    const Ints u = bits(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const Ints rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const Vec nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const Vec kept = _mm256_blendv_ps(floats(rounded), floats(_mm256_set1_epi32(0x7fc00000)), nan);
    const Ints high = _mm256_srli_epi32(bits(kept), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline Vec drop_below(Vec v, Vec x, Vec limit) { return _mm256_and_ps(v, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
inline Vec by_sign(Vec x, Vec a, Vec b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_LT_OQ)); }

#else

inline Vec reciprocal_coarse(Vec x) { return reciprocal(x); }
inline Vec read(const uint16_t* p, Whole) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    Halves v;
    __builtin_memcpy(&v, p, sizeof v);
    return floats(__builtin_convertvector(v, Ints) << 16);
}
inline void write(uint16_t* p, Vec v, Whole) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    const Unsigned u = reinterpret_cast<Unsigned>(v), rounded = u + 0x7fff + (u >> 16 & 1);
    const Unsigned nan = reinterpret_cast<Unsigned>(v != v);
    const Halves high = __builtin_convertvector(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16, Halves);
    __builtin_memcpy(p, &high, sizeof high);
}
inline Vec drop_below(Vec v, Vec x, Vec limit) { return floats(bits(v) & ~(x < limit)); }
inline Vec by_sign(Vec x, Vec a, Vec b) { return pick(x < zero(), a, b); }

#endif

template <class T>
inline Vec read(const T* p, Part part) {
    T some[kLanes] = {};
    for (int i = 0; i < part.count; ++i) some[i] = p[i];
    return read(some, Whole{});
}
template <class T>
inline void write(T* p, Vec v, Part part) {
    T some[kLanes];
    write(some, v, Whole{});
    for (int i = 0; i < part.count; ++i) p[i] = some[i];
}
inline Vec pad(Vec v, Whole, Vec) { return v; }
inline Vec pad(Vec v, Part part, Vec with) {
    float some[kLanes];
    store(some, with);
    write(some, v, part);
    return load(some);
}

#endif

// The type that a format is stored in, as f(T{}).
template <class F>
inline void dispatch_format(Format format, F&& f) {
    if (format == Format::bf16) return f(uint16_t{});
    f(float{});
}

void widen(const void* x, Format format, int64_t n, float* out) {
    dispatch_format(format, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(x);
        sweep<1>(n, [&](int64_t i, int, auto part) { write(out + i, read(from + i, part), part); });
    });
}

void narrow(const float* x, Format format, int64_t n, void* out) {
    dispatch_format(format, [&](auto type) {
        auto* to = static_cast<decltype(type)*>(out);
        sweep<1>(n, [&](int64_t i, int, auto part) { write(to + i, read(x + i, part), part); });
    });
}

void add(const float* x, int64_t n, float* out) {
    sweep<4>(n, [&](int64_t i, int, auto part) { write(out + i, read(out + i, part) + read(x + i, part), part); });
}

}  // namespace
}  // namespace igpt::cpu
