// rms_norm, layer_norm and their backward, the body; formulas and layouts: elementwise_kernels.h. A row is read from
// memory once, and then from the cache; bound by those bytes.
//
// Backward, with y = total (centred) s, s = rsqrt(...), g = dout weight:
//   dx = s (g - y mean(g y)), centred: minus mean(g) inside as well;  dweight = sum of dout y;  dbias = sum of dout
#pragma once

#include "../elementwise_kernels.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

// Mean (0 unless centred) and rsqrt(variance + eps) of a row.
struct Moments {
    float mean, scale;
};

template <class T>
inline Moments moments(const T* x, int64_t n, float eps, bool centred) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    float mean = 0.0f;
    if (centred) {
        sweep<4>(n, [&](int64_t i, int u, auto part) { sums[u] = sums[u] + read(x + i, part); });
        mean = reduce_add(total(sums)) / float(n);
        for (Vec& sum : sums) sum = zero();
    }
    sweep<4>(n, [&](int64_t i, int u, auto part) {
        const Vec v = pad(read(x + i, part) - set1(mean), part, zero());
        sums[u] = fma(v, v, sums[u]);
    });
    return {mean, 1.0f / __builtin_sqrtf(reduce_add(total(sums)) / float(n) + eps)};
}

template <class T, class Out>
void norm_rows(const NormParams& p, int64_t begin, int64_t end) {
    const auto* weight = static_cast<const float*>(p.weight);
    const auto* bias = static_cast<const float*>(p.bias);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.n_embd;
        if (p.residual) {
            const T* residual = static_cast<const T*>(p.residual) + row * p.n_embd;
            T* sum = static_cast<T*>(p.sum) + row * p.n_embd;
            const auto add = [&](const auto* branch) {
                sweep<2>(p.n_embd, [&](int64_t i, int, auto part) {
                    write(sum + i, read(branch + i, part) + read(residual + i, part), part);
                });
            };
            if (p.x_format == Format::bf16)
                add(static_cast<const uint16_t*>(p.x) + row * p.n_embd);
            else
                add(x);
            x = sum;
        }
        const Moments m = moments(x, p.n_embd, p.eps, p.centred);
        const Vec mean = set1(m.mean), scale = set1(m.scale);
        Out* out = static_cast<Out*>(p.out) + row * p.n_embd;
        if (bias)
            sweep<2>(p.n_embd, [&](int64_t i, int, auto part) {
                const Vec y = (read(x + i, part) - mean) * scale;
                write(out + i, fma(y, read(weight + i, part), read(bias + i, part)), part);
            });
        else
            sweep<2>(p.n_embd, [&](int64_t i, int, auto part) {
                write(out + i, (read(x + i, part) - mean) * scale * read(weight + i, part), part);
            });
    }
}

void norm_fwd(const NormParams& p, int64_t begin, int64_t end) {
    if (p.format == Format::bf16) return norm_rows<uint16_t, uint16_t>(p, begin, end);
    if (p.out_format == Format::bf16) return norm_rows<float, uint16_t>(p, begin, end);
    norm_rows<float, float>(p, begin, end);
}

template <class T, class Out>
void norm_grad_rows(const NormGradParams& p, int64_t begin, int64_t end, float* partial) {
    const auto* weight = static_cast<const float*>(p.weight);
    float *dweight = partial, *dbias = p.dbias ? partial + p.n_embd : nullptr;
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.n_embd;
        const Out* dout = static_cast<const Out*>(p.dout) + row * p.n_embd;
        const Moments m = moments(x, p.n_embd, p.eps, p.centred);
        const Vec mean = set1(m.mean), scale = set1(m.scale);
        Vec along[2] = {zero(), zero()}, level[2] = {zero(), zero()};  // sums of g y and of g
        sweep<2>(p.n_embd, [&](int64_t i, int u, auto part) {
            const Vec y = (read(x + i, part) - mean) * scale, d = read(dout + i, part);
            const Vec g = d * read(weight + i, part);
            along[u] = fma(g, y, along[u]);
            level[u] = level[u] + g;
            write(dweight + i, fma(d, y, read(dweight + i, part)), part);
            if (dbias) write(dbias + i, d + read(dbias + i, part), part);
        });
        const Vec by_y = set1(reduce_add(total(along)) / float(p.n_embd));
        const Vec by_one = set1(p.centred ? reduce_add(total(level)) / float(p.n_embd) : 0.0f);
        T* dx = static_cast<T*>(p.dx) + row * p.n_embd;
        const auto gradient = [&](int64_t i, auto part) {
            const Vec y = (read(x + i, part) - mean) * scale;
            const Vec g = read(dout + i, part) * read(weight + i, part);
            return scale * (g - by_one - y * by_y);
        };
        if (p.dsum) {
            const T* dsum = static_cast<const T*>(p.dsum) + row * p.n_embd;
            sweep<2>(p.n_embd,
                     [&](int64_t i, int, auto part) { write(dx + i, gradient(i, part) + read(dsum + i, part), part); });
        } else {
            sweep<2>(p.n_embd, [&](int64_t i, int, auto part) { write(dx + i, gradient(i, part), part); });
        }
        if (p.dbranch) {
            uint16_t* dbranch = static_cast<uint16_t*>(p.dbranch) + row * p.n_embd;
            sweep<2>(p.n_embd, [&](int64_t i, int, auto part) { write(dbranch + i, read(dx + i, part), part); });
        }
    }
}

void norm_bwd(const NormGradParams& p, int64_t begin, int64_t end, float* partial) {
    if (p.format == Format::bf16) return norm_grad_rows<uint16_t, uint16_t>(p, begin, end, partial);
    if (p.out_format == Format::bf16) return norm_grad_rows<float, uint16_t>(p, begin, end, partial);
    norm_grad_rows<float, float>(p, begin, end, partial);
}

}  // namespace
}  // namespace igpt::cpu
