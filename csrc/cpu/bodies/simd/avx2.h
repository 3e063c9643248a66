// AVX2 and FMA: registers of 8 lanes; AVX-VNNI where the file may use it.
#pragma once

namespace igpt::cpu {
namespace {

using Vec = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;
constexpr int kMaxRows = 6;  // 2 rows x 4 registers, or 6 x 2, 16 there are
constexpr int kBlockRows = 6, kBlockRegisters = 2;

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

inline Vec reciprocal(Vec x) { return set1(1.0f) / x; }
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

inline Vec above_floor(Vec x) {
    x = max(set1(-127.0f), x);
    return x - _mm256_floor_ps(x);
}
inline Vec times_power(Vec p, Vec x) {
    const Ints n = _mm256_cvtps_epi32(_mm256_floor_ps(max(set1(-127.0f), x)));
    return drop_below(floats(add_ints(bits(p), shift_left<23>(n))), x, set1(-126.0f));
}

inline void transpose(Ints (&r)[8]) {
    Ints t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}

constexpr bool kPairs = false, kBytes = false, kWords = true, kTwoByTwo = false;
constexpr int kByteOffset = 0;

// acc + the sum of a pair of 16-bit integers times the pairs of w.
inline Ints add_words(Ints acc, const uint16_t* pair, Ints w) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(acc, _mm256_set1_epi32(both), w);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_set1_epi32(both), w));
#endif
}
inline Ints load_words(const char* bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
inline void store_words(uint16_t* to, Vec v) {
    const Ints n = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
}
inline Vec to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }

}  // namespace
}  // namespace igpt::cpu
