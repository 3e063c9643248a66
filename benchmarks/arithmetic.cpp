// Multiplies as fast as the processor can, out of registers: the ceilings of arithmetic. Compiled by ceilings.py for
// the plainest processor; each kernel asks for its instructions itself and runs only where cpuid has them.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

using Kernel = void (*)(long rounds);

// A unit of the processor: operations of one round of its kernel, a multiplication and an addition being two.
struct Unit {
    bool here;
    double operations;
    Kernel kernel;
};

// Twelve independent sums: more than latency (4) times multipliers (2).
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

__attribute__((target("avx2,fma"))) void fma_256(long rounds) {
    __m256 x = _mm256_set1_ps(0.5f);
#define SUM(i) __m256 s##i = x;
    TWELVE(SUM)
#undef SUM
    for (long round = 0; round < rounds; ++round) {
#define FMA(i) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(s##i) : "x"(x));
        TWELVE(FMA)
#undef FMA
    }
}

__attribute__((target("avx512f"))) void fma_512(long rounds) {
    __m512 x = _mm512_set1_ps(0.5f);
#define SUM(i) __m512 s##i = x;
    TWELVE(SUM)
#undef SUM
    for (long round = 0; round < rounds; ++round) {
#define FMA(i) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(s##i) : "v"(x));
        TWELVE(FMA)
#undef FMA
    }
}

// Products of bf16 pairs and of fours of bytes, by their names; zeros, whose products take as long.
#define SUM(i) auto s##i = x;
#define PAIRS(i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(s##i) : "v"(x));
#define BYTES(i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(s##i) : "v"(x));
#define BYTES_VEX(i) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(s##i) : "x"(x));
#define PRODUCTS(NAME, TARGET, ZERO, MULTIPLY)               \
    __attribute__((target(TARGET))) void NAME(long rounds) { \
        auto x = ZERO();                                     \
        TWELVE(SUM)                                          \
        for (long round = 0; round < rounds; ++round) {      \
            TWELVE(MULTIPLY)                                 \
        }                                                    \
    }
PRODUCTS(pairs_512, "avx512f", _mm512_setzero_si512, PAIRS)
PRODUCTS(bytes_512, "avx512f", _mm512_setzero_si512, BYTES)
PRODUCTS(bytes_256, "avx512f,avx512vl", _mm256_setzero_si256, BYTES)
PRODUCTS(bytes_vex, "avx2", _mm256_setzero_si256, BYTES_VEX)

bool have_avx_vnni() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

struct alignas(64) Layout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Layout layout;
// 1.0 in bf16, and bytes that are not zero: zeros draw less power and clock higher.
alignas(64) uint16_t ones[512];

// Four sums of two tiles by two, as a matrix product has them.
#define TILES(NAME, MULTIPLY)                                                      \
    __attribute__((target("amx-tile,amx-bf16,amx-int8"))) void NAME(long rounds) { \
        _tile_loadconfig(&layout);                                                 \
        _tile_zero(0);                                                             \
        _tile_zero(1);                                                             \
        _tile_zero(2);                                                             \
        _tile_zero(3);                                                             \
        _tile_loadd(4, ones, 64);                                                  \
        _tile_loadd(5, ones, 64);                                                  \
        _tile_loadd(6, ones, 64);                                                  \
        _tile_loadd(7, ones, 64);                                                  \
        for (long round = 0; round < rounds; ++round) {                            \
            MULTIPLY(0, 4, 6);                                                     \
            MULTIPLY(1, 4, 7);                                                     \
            MULTIPLY(2, 5, 6);                                                     \
            MULTIPLY(3, 5, 7);                                                     \
        }                                                                          \
        _tile_release();                                                           \
    }
TILES(tiles_bf16, _tile_dpbf16ps)
TILES(tiles_int8, _tile_dpbssd)

bool have_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, osxsave = 1u << 27;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile | int8)) != (bf16 | tile | int8)) return false;
    for (uint16_t& one : ones) one = 0x3f80;
    constexpr int ask_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask_permission, tile_data) == 0;
}

Unit find(int number) {
    __builtin_cpu_init();
    switch (number) {
        case 0:
            return {bool(__builtin_cpu_supports("fma")) && __builtin_cpu_supports("avx2"), 12 * 8 * 2., fma_256};
        case 1:
            return {bool(__builtin_cpu_supports("avx512f")), 12 * 16 * 2., fma_512};
        case 2:
            return {have_tiles(), 4 * 16 * 16 * 32 * 2., tiles_bf16};
        case 3:
            return {have_tiles(), 4 * 16 * 16 * 64 * 2., tiles_int8};
        case 4:
            return {bool(__builtin_cpu_supports("avx512bf16")), 12 * 32 * 2., pairs_512};
        case 5:
            return {bool(__builtin_cpu_supports("avx512vnni")), 12 * 64 * 2., bytes_512};
        case 6:
            if (have_avx_vnni()) return {true, 12 * 32 * 2., bytes_vex};
            return {__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"), 12 * 32 * 2.,
                    bytes_256};
        default:
            return {};
    }
}

}  // namespace

// Runs `rounds` rounds of a unit (UNITS of ceilings.py, from 0) in each of
// `threads` threads. Returns the operations done, 0 where the processor has no such unit.
extern "C" double multiply(int unit, long rounds, int threads) {
    const Unit found = find(unit);
    if (!found.here) return 0;
#pragma omp parallel num_threads(threads)
    found.kernel(rounds);
    return found.operations * double(rounds) * threads;
}
#else
extern "C" double multiply(int, long, int) { return 0; }
#endif
