// quick_gelu, gelu_tanh and gelu_erf and their backward, the body; layouts: elementwise.h. Arithmetic and bytes bind
// about alike.
//
//   quick_gelu: z s(1.702 z); gelu_tanh: z s(2 sqrt(2/pi) (z + 0.044715 z^3)), s the logistic function, which is the
//   usual form with tanh; gelu_erf: z (1 + erf(z / sqrt(2))) / 2
// A finite z of any size gives a finite result; an infinite one gives the definition's, NaN for the negative.
#pragma once

#include "elementwise.h"
#include "lanes.h"

namespace igpt::cpu {
namespace {

// s(x), 0 below -87: an infinite z times it is NaN, as it is defined, and no large one anything but 0.
inline Vec logistic(Vec x) { return drop_below(reciprocal(set1(1.0f) + exp(zero() - x)), x, set1(-87.0f)); }

// s(x) and its derivative s (1 - s), which does not suffer where s is nearly one.
struct Logistic {
    Vec value, slope;
};
inline Logistic logistic_with_slope(Vec x) {
    const Vec e = exp(zero() - abs(x)), r = reciprocal(set1(1.0f) + e);
    return {by_sign(x, e * r, r), e * r * r};
}

// Beyond 30 every derivative is 0 or 1 to the last bit.
inline Vec near(Vec z) { return min(set1(30.0f), max(set1(-30.0f), z)); }

struct QuickGelu {
    static Vec value(Vec z) { return z * logistic(z * set1(1.702f)); }
    static Vec derivative(Vec far) {
        const Vec z = near(far);
        const Logistic s = logistic_with_slope(z * set1(1.702f));
        return fma(z * set1(1.702f), s.slope, s.value);
    }
};

struct GeluTanh {
    static constexpr float kLinear = 1.59576912f, kCubic = kLinear * 0.044715f;  // 2 sqrt(2 / pi)

    static Vec value(Vec z) { return z * logistic(z * fma(z * z, set1(kCubic), set1(kLinear))); }
    static Vec derivative(Vec far) {
        const Vec z = near(far), square = z * z;
        const Logistic s = logistic_with_slope(z * fma(square, set1(kCubic), set1(kLinear)));
        return fma(z * fma(square, set1(3.0f * kCubic), set1(kLinear)), s.slope, s.value);
    }
};

// erfc(y) = exp(-y^2) t P(t), t = 1 / (1 + 0.42 y), for y >= 0, P fitted to 4e-8.
struct GeluErf {
    // Gauss's exp(-z^2 / 2), and the share of its integral beyond |z|.
    struct Normal {
        Vec bell, tail;
    };
    static Normal normal(Vec z) {
        const Vec y = abs(z) * set1(0.707106781f), t = reciprocal(fma(y, set1(0.42f), set1(1.0f)));
        Vec p = set1(0.0760096819f);
        p = fma(p, t, set1(-0.345075231f));
        p = fma(p, t, set1(0.485002994f));
        p = fma(p, t, set1(-0.173109188f));
        p = fma(p, t, set1(0.292445122f));
        p = fma(p, t, set1(0.187096898f));
        p = fma(p, t, set1(0.240898579f));
        p = fma(p, t, set1(0.23673116f));
        const Vec bell = exp(zero() - y * y);
        return {bell, set1(0.5f) * p * t * bell};
    }
    static Vec share(Vec z, Vec tail) { return by_sign(z, tail, set1(1.0f) - tail); }

    static Vec value(Vec z) { return z * drop_below(share(z, normal(near(z)).tail), z, set1(-14.0f)); }
    static Vec derivative(Vec far) {
        const Vec z = near(far);
        const Normal n = normal(z);
        return fma(z * set1(0.398942280f), n.bell, share(z, n.tail));  // 1 / sqrt(2 pi)
    }
};

template <class F>
inline void dispatch_activation(Activation kind, F&& f) {
    switch (kind) {
        case Activation::quick_gelu:
            return f(QuickGelu{});
        case Activation::gelu_tanh:
            return f(GeluTanh{});
        case Activation::gelu_erf:
            return f(GeluErf{});
    }
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
    dispatch_format(p.format, [&](auto type) {
        dispatch_activation(p.kind, [&](auto gelu) { activate<decltype(type), decltype(gelu)>(p, begin, end); });
    });
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
    dispatch_format(p.format, [&](auto type) {
        dispatch_activation(p.kind,
                            [&](auto gelu) { activate_grad<decltype(type), decltype(gelu)>(p, begin, end, partial); });
    });
}

}  // namespace
}  // namespace igpt::cpu
