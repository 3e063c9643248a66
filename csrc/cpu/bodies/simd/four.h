// Registers of 4 lanes as the compiler's own vectors, SSE2 on x86-64, NEON on AArch64: the words that it makes one or
// two instructions of by itself. generic.h and neon.h have the others.
#pragma once

namespace igpt::cpu {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Unsigned __attribute__((vector_size(16)));  // whose sums and shifts may overflow
constexpr int kLanes = 4;

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return Vec{}; }
inline Ints bits(Vec v) { return reinterpret_cast<Ints>(v); }
inline Vec floats(Ints v) { return reinterpret_cast<Vec>(v); }
// The second operand's NaN passes.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Ints add_ints(Ints a, Ints b) { return Ints(Unsigned(a) + Unsigned(b)); }
template <int N>
inline Ints shift_left(Ints v) {
    return Ints(Unsigned(v) << N);
}
inline Ints load_ints(const void* p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Vec bf16_odd(Ints v) { return floats(v & int32_t(0xffff0000)); }
inline Vec reciprocal(Vec x) { return set1(1.0f) / x; }
inline Vec drop_below(Vec v, Vec x, Vec limit) { return floats(bits(v) & ~(x < limit)); }

}  // namespace
}  // namespace igpt::cpu
