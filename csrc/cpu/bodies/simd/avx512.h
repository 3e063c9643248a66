// AVX-512: registers of 16 lanes, parts by masks; and, where there are, products of bf16 pairs and of bytes (VNNI).
#pragma once

namespace igpt::cpu {
namespace {

using Vec = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
constexpr int kMaxRows = 4;  // rows that a product has in registers: 4 rows x 4 registers, 32 there are
constexpr int kBlockRows = 6, kBlockRegisters = 4;  // and one of many rows (block.h)
constexpr bool kTwoByTwo = false;

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
inline Vec bf16_odd(Ints v) { return floats(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000)))); }
inline Vec load_bytes(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// x - floor(x), 0 for an infinity; p 2^floor(x), 0 far down.
inline Vec above_floor(Vec x) { return _mm512_reduce_ps(x, 1); }
inline Vec times_power(Vec p, Vec x) { return _mm512_scalef_ps(p, x); }

inline void transpose(Ints (&r)[16]) {
    Ints t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
inline void interleave(Ints a, Ints b, Ints& first, Ints& second) {
    const Ints low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                      36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    first = _mm512_permutex2var_epi16(a, low, b);
    second = _mm512_permutex2var_epi16(a, _mm512_add_epi16(low, _mm512_set1_epi16(16)), b);
}

inline __mmask16 mask(Part part) { return __mmask16((1u << part.count) - 1); }

inline Vec read(const float* p, Part part) { return _mm512_maskz_loadu_ps(mask(part), p); }
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

inline Vec pad(Vec v, Part part, Vec with) { return _mm512_mask_mov_ps(with, mask(part), v); }
inline void store_marked(void* to, Vec v, uint32_t lanes) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(lanes), v));
}
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

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
// acc + the sum of a pair of bf16 times the pairs of w.
inline Vec add_pairs(Vec acc, const uint16_t* pair, Ints w) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)w);
}
inline Ints to_bf16(Vec first, Vec second) { return Ints(_mm512_cvtne2ps_pbh(second, first)); }
inline void write_two(uint16_t* p, Vec a, Vec b) { _mm512_storeu_si512(p, to_bf16(a, b)); }
inline void halve_row(const float* x, int64_t n, uint16_t* half) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = n - i < kLanes ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
        const auto v = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i));
        _mm256_mask_storeu_epi16(half + i, mask, v);
    }
}
#else
constexpr bool kPairs = false;
#endif

#if defined(__AVX512VNNI__)
constexpr bool kBytes = true, kWords = false;
// acc + the sum of four unsigned bytes times the fours of w.
inline Ints add_bytes(Ints acc, const uint8_t* four, Ints w) {
    int32_t word;
    __builtin_memcpy(&word, four, 4);
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(word), w);
}
inline void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, v); }
// What stands beside weights is unsigned: numbers have this offset, whose products `to_floats` takes off.
constexpr int kByteOffset = 128;
inline Vec to_floats(Ints v, Ints of_offset) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(v, of_offset)); }
// v, to nearest, and an offset.
inline void store_bytes(uint8_t* to, Vec v, int offset) {
    const Ints n = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(offset));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(n));
}
// 128 (high - 128 sums) + low of integer sums; `sums` null where high has no offset.
inline Vec join_bytes(const float* high, const float* low, const int32_t* sums) {
    Ints h = load_ints(high);
    if (sums) h = _mm512_sub_epi32(h, _mm512_slli_epi32(load_ints(sums), 7));
    return fma(_mm512_cvtepi32_ps(h), set1(128.0f), _mm512_cvtepi32_ps(load_ints(low)));
}

// x as 15 bits: signed with an offset of 128 in `high`, or, for what is not negative, unsigned; returns the scale,
// which is NaN when something in x is not finite. Every 64 bytes are `step` from those before.
template <bool Signed>
inline float split_bytes(Flag<Signed>, const float* x, int64_t n, uint8_t* high, uint8_t* low, int64_t step) {
    Vec most = zero(), poison = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = n - i < kLanes ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
        const Vec v = _mm512_maskz_loadu_ps(mask, x + i);
        most = max(most, abs(v));
        poison = fma(v, zero(), poison);
    }
    constexpr float steps = Signed ? 16256.0f : 32767.0f;
    const float largest = reduce_max(most), scale = largest / steps;
    // Numbers so small that their steps have no inverse are zero.
    const Vec inverse = set1(scale > 1e-37f ? 1.0f / scale : 0.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = n - i < kLanes ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
        const Ints q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        const Ints h = _mm512_srai_epi32(q, 7), offset = _mm512_set1_epi32(Signed ? 128 : 0);
        const int64_t at = i / 64 * step + i % 64;
        _mm512_mask_cvtepi32_storeu_epi8(high + at, mask, _mm512_add_epi32(h, offset));
        _mm512_mask_cvtepi32_storeu_epi8(low + at, mask, _mm512_and_si512(q, _mm512_set1_epi32(127)));
    }
    return scale + reduce_add(poison);
}
#else
constexpr bool kBytes = false, kWords = true;
constexpr int kByteOffset = 0;
// acc + the sum of a pair of 16-bit integers times the pairs of w.
inline Ints add_words(Ints acc, const uint16_t* pair, Ints w) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_set1_epi32(both), w));
}
inline Ints load_words(const char* bytes) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}
inline void store_words(uint16_t* to, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
inline Vec to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
#endif

}  // namespace
}  // namespace igpt::cpu
