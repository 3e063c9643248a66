// Registers of the instruction set that a file is compiled for: kLanes floats or 32-bit integers. Everything has
// internal linkage; see ops.h.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 finds its own header's undefined registers uninitialized.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace igpt::cpu {
namespace {

#if defined(__AVX512F__)

using Vec = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
constexpr int kMaxRows = 4;  // rows that a product has in registers: 4 rows x 4 registers, 32 there are

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand's NaN passes.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
// The smallest lane, in every lane; a bit for every lane that is not above the other's.
inline Vec spread_min(Vec v) {
    v = min(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = min(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = min(v, _mm512_permute_ps(v, 0x4e));
    return min(v, _mm512_permute_ps(v, 0xb1));
}
inline uint32_t at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Ints bits(Vec v) { return _mm512_castps_si512(v); }
inline Vec floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int N>
inline Ints shift_left(Ints v) {
    return _mm512_slli_epi32(v, N);
}
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Vec bf16_even(Ints v) { return floats(shift_left<16>(v)); }
inline Vec bf16_odd(Ints v) { return floats(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000)))); }
inline Vec load_bytes(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif defined(__AVX2__)

using Vec = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;
constexpr int kMaxRows = 2;  // 2 rows x 4 registers, 16 there are

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Ints bits(Vec v) { return _mm256_castps_si256(v); }
inline Vec floats(Ints v) { return _mm256_castsi256_ps(v); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
template <int N>
inline Ints shift_left(Ints v) {
    return _mm256_slli_epi32(v, N);
}
inline Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Vec bf16_even(Ints v) { return floats(shift_left<16>(v)); }
inline Vec bf16_odd(Ints v) { return floats(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000)))); }
inline Vec load_bytes(const char* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline float reduce_add(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec spread_min(Vec v) {
    v = min(v, _mm256_permute2f128_ps(v, v, 1));
    v = min(v, _mm256_permute_ps(v, 0x4e));
    return min(v, _mm256_permute_ps(v, 0xb1));
}
inline uint32_t at_most(Vec a, Vec b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ))); }

#else

// The compiler's own vectors: SSE2 on x86-64, NEON on AArch64.
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kMaxRows = 2;

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return Vec{}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Ints bits(Vec v) { return reinterpret_cast<Ints>(v); }
inline Vec floats(Ints v) { return reinterpret_cast<Vec>(v); }
inline Vec pick(Ints mask, Vec a, Vec b) { return floats((mask & bits(a)) | (~mask & bits(b))); }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec abs(Vec a) { return floats(bits(a) & 0x7fffffff); }
inline Ints add_ints(Ints a, Ints b) { return a + b; }
template <int N>
inline Ints shift_left(Ints v) {
    return v << N;
}
inline Ints load_ints(const void* p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Vec bf16_even(Ints v) { return floats(v << 16); }
inline Vec bf16_odd(Ints v) { return floats(v & int32_t(0xffff0000)); }
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

#endif

constexpr int kTile = 4 * kLanes;

inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// e^x, relative error below 2e-7, for x clamped to what float32 holds; NaN stays.
inline Vec exp(Vec x) {
    x = min(set1(88.0f), max(set1(-87.0f), x));
    const Vec shifted = fma(x, set1(1.44269504f), set1(12582912.0f));  // 1.5 2^23: the low bits are round(x / ln 2)
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

}  // namespace
}  // namespace igpt::cpu
