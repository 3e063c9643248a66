// Before the avx_vnni table's file, for tests: AVX-VNNI's product by AVX-512's encoding of the same instruction.
#pragma once

#include <immintrin.h>

inline __m256i dpwssd_by_avx512(__m256i sum, __m256i a, __m256i b) {
    asm("%{evex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}
#define _mm256_dpwssd_avx_epi32 dpwssd_by_avx512
