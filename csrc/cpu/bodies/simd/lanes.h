// Rows of any length, fp32 or bf16, a register at a time: whole ones, and the part that is left over.
#pragma once

#include "registers.h"

namespace igpt::cpu {
namespace {

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

// A part by way of an array, where the machine has nothing better: those are no templates and go before these.
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
template <class V>
inline V pad(V v, Part part, V with) {
    float some[kLanes];
    store(some, with);
    write(some, v, part);
    return load(some);
}
inline Vec pad(Vec v, Whole, Vec) { return v; }

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
