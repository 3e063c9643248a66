// quick_gelu, gelu_tanh and gelu_erf and their backward, the body; layouts: elementwise_kernels.h. Arithmetic and bytes
// bind about alike.
//
//   quick_gelu: z s(1.702 z); gelu_tanh: z s(2 sqrt(2/pi) (z + 0.044715 z^3)), s the logistic function, which is the
//   usual form with tanh; gelu_erf: z (1 + erf(z / sqrt(2))) / 2
// A finite z of any size gives a finite result; an infinite one gives the definition's, NaN for the negative.
#pragma once

#include "../elementwise_kernels.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

// What the results need: all bits of fp32, or enough that those of bf16 are not the worse for it.
struct Fine {
    static Vec inverse(Vec x) { return reciprocal(x); }
    // 2^r for |r| <= 0.5, to 2e-9.
    static Vec power(Vec r) {
        Vec p = set1(0.000153458124f);
        p = fma(p, r, set1(0.00133999309f));
        p = fma(p, r, set1(0.00961848907f));
        p = fma(p, r, set1(0.0555032864f));
        p = fma(p, r, set1(0.240226462f));
        p = fma(p, r, set1(0.693147182f));
        return fma(p, r, set1(1.0f));
    }
    // erfcx(z / sqrt(2)) / (2 t) with t = 1 / (1 + 0.29698 z), for z >= 0, to 4e-8.
    static Vec tail(Vec t) {
        Vec p = set1(0.03800484095f);
        p = fma(p, t, set1(-0.1725376155f));
        p = fma(p, t, set1(0.242501497f));
        p = fma(p, t, set1(-0.086554594f));
        p = fma(p, t, set1(0.146222561f));
        p = fma(p, t, set1(0.093548449f));
        p = fma(p, t, set1(0.120449289f));
        return fma(p, t, set1(0.11836558f));
    }
};
struct Coarse {
    static Vec inverse(Vec x) { return reciprocal_coarse(x); }
    static Vec power(Vec r) {  // to 8e-5
        const Vec p = fma(set1(0.0551716685f), r, set1(0.242611125f));
        return fma(fma(p, r, set1(0.693260968f)), r, set1(0.999928057f));
    }
    static Vec tail(Vec t) {  // to 2e-4
        const Vec p = fma(set1(0.221843721f), t, set1(0.0199600701f));
        return fma(fma(p, t, set1(0.141966227f)), t, set1(0.116288554f));
    }
};
inline Fine bits_for(float) { return {}; }
inline Coarse bits_for(uint16_t) { return {}; }

// 2^x for |x| <= 126; NaN stays NaN, or what is multiplied by it has to.
template <class P>
inline Vec exp2(Vec x) {
    const Vec shifted = x + set1(12582912.0f);  // 1.5 2^23: the low bits are round(x)
    const Vec p = P::power(x - (shifted - set1(12582912.0f)));
    return floats(add_ints(bits(p), shift_left<23>(bits(shifted))));
}

// z / (1 + 2^x): z s(-x ln 2). 0 z beyond 2^125: an infinite z gives NaN, as it is defined, and a large one 0.
template <class P>
[[gnu::always_inline]] inline Vec times_logistic(Vec z, Vec x) {
    const Vec s = P::inverse(set1(1.0f) + exp2<P>(max(set1(-126.0f), x)));
    return z * drop_below(s, zero() - x, set1(-125.0f));
}

// s(x ln 2) and its derivative s (1 - s), which does not suffer where s is nearly one, for |x| <= 126.
struct Logistic {
    Vec value, slope;
};
template <class P>
inline Logistic logistic_with_slope(Vec x) {
    const Vec e = exp2<P>(zero() - abs(x)), r = P::inverse(set1(1.0f) + e), er = e * r;
    return {by_sign(x, er, r), er * r};
}

inline Vec within(Vec z, float limit) { return min(set1(limit), max(set1(-limit), z)); }

// The derivatives are 0 or 1 to the last bit beyond the limits that keep their exponents in range.
template <class P>
struct QuickGelu {
    static constexpr float kSlope = 1.702f;

    static Vec value(Vec z) { return times_logistic<P>(z, z * set1(-kSlope * kLog2e)); }
    static Vec derivative(Vec far) {
        const Vec z = within(far, 50.0f);
        const Logistic s = logistic_with_slope<P>(z * set1(kSlope * kLog2e));
        return fma(z * set1(kSlope), s.slope, s.value);
    }
};

template <class P>
struct GeluTanh {
    static constexpr float kLinear = 1.59576912f, kCubic = kLinear * 0.044715f;  // 2 sqrt(2 / pi)

    static Vec value(Vec z) {
        return times_logistic<P>(z, z * fma(z * z, set1(-kCubic * kLog2e), set1(-kLinear * kLog2e)));
    }
    static Vec derivative(Vec far) {
        const Vec z = within(far, 9.8f), square = z * z;
        const Logistic s = logistic_with_slope<P>(z * fma(square, set1(kCubic * kLog2e), set1(kLinear * kLog2e)));
        return fma(z * fma(square, set1(3.0f * kCubic), set1(kLinear)), s.slope, s.value);
    }
};

template <class P>
struct GeluErf {
    // Gauss's exp(-z^2 / 2), and the share of its integral beyond |z|, for |z| <= 13.
    struct Normal {
        Vec bell, tail;
    };
    static Normal normal(Vec z) {
        const Vec t = P::inverse(fma(abs(z), set1(0.29698485f), set1(1.0f)));
        const Vec bell = exp2<P>(z * z * set1(-0.5f * kLog2e));
        return {bell, P::tail(t) * t * bell};
    }
    // z > 0: z (1 - tail); z < 0: |z| -tail. Both are max(z, 0) - |z| tail; NaN for -inf.
    [[gnu::always_inline]] static Vec value(Vec z) {
        const Vec near = within(z, 13.0f);
        return (z - min(zero(), z)) - abs(near) * normal(near).tail;
    }
    static Vec derivative(Vec far) {
        const Vec z = within(far, 13.0f);
        const Normal n = normal(z);
        const Vec share = by_sign(z, n.tail, set1(1.0f) - n.tail);
        return fma(z * set1(0.398942280f), n.bell, share);  // 1 / sqrt(2 pi)
    }
};

// f(type of the elements, activation)
template <class F>
inline void dispatch_activation(Activation activation, Format format, F&& f) {
    dispatch_format(format, [&](auto type) {
        using P = decltype(bits_for(type));
        switch (activation) {
            case Activation::none:
                break;
            case Activation::quick_gelu:
                return f(type, QuickGelu<P>{});
            case Activation::gelu_tanh:
                return f(type, GeluTanh<P>{});
            case Activation::gelu_erf:
                return f(type, GeluErf<P>{});
        }
    });
}

template <class T, class Gelu>
void activate(const ActivationParams& p, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    const auto* bias = static_cast<const float*>(p.bias);
    if (!bias)
        return sweep<2>(end - begin, [&](int64_t i, int, auto part) {
            write(out + begin + i, Gelu::value(read(x + begin + i, part)), part);
        });
    for (int64_t first = begin * p.n; first < end * p.n; first += p.n)
        sweep<2>(p.n, [&](int64_t i, int, auto part) {
            write(out + first + i, Gelu::value(read(x + first + i, part) + read(bias + i, part)), part);
        });
}

void activation_fwd(const ActivationParams& p, int64_t begin, int64_t end) {
    dispatch_activation(p.activation, p.format,
                        [&](auto type, auto gelu) { activate<decltype(type), decltype(gelu)>(p, begin, end); });
}

template <class T, class Gelu>
void activate_grad(const ActivationGradParams& p, int64_t begin, int64_t end, float* partial) {
    const T *x = static_cast<const T*>(p.x), *dout = static_cast<const T*>(p.dout);
    T* dx = static_cast<T*>(p.dx);
    const auto* bias = static_cast<const float*>(p.bias);
    if (!bias)
        return sweep<2>(end - begin, [&](int64_t i, int, auto part) {
            const int64_t at = begin + i;
            write(dx + at, read(dout + at, part) * Gelu::derivative(read(x + at, part)), part);
        });
    for (int64_t first = begin * p.n; first < end * p.n; first += p.n)
        sweep<2>(p.n, [&](int64_t i, int, auto part) {
            const Vec z = read(x + first + i, part) + read(bias + i, part);
            const Vec d = read(dout + first + i, part) * Gelu::derivative(z);
            write(dx + first + i, d, part);
            write(partial + i, read(partial + i, part) + d, part);
        });
}

void activation_bwd(const ActivationGradParams& p, int64_t begin, int64_t end, float* partial) {
    dispatch_activation(p.activation, p.format, [&](auto type, auto gelu) {
        activate_grad<decltype(type), decltype(gelu)>(p, begin, end, partial);
    });
}

}  // namespace
}  // namespace igpt::cpu
