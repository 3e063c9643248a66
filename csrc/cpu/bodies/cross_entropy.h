// Cross-entropy of rows of logits and its backward, the body; formulas and layouts: elementwise_kernels.h. A row is
// read from memory once, and then from the cache.
#pragma once

#include "../elementwise_kernels.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

// e^x for x <= 0, and 0 for what is ruled out by -inf, or as good as. A NaN of any bits stays.
inline Vec share(Vec x) {
    const Vec near = max(set1(-87.0f), x);
    return drop_below(fma(near, zero(), exp(near)), x, set1(-87.0f));
}

template <class T>
void loss_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.logits) + row * p.k;
        const Vec least = set1(-__builtin_inff());
        Vec most[4] = {least, least, least, least}, sums[4] = {zero(), zero(), zero(), zero()};
        sweep<4>(p.k,
                 [&](int64_t i, int u, auto part) { most[u] = max(most[u], pad(read(x + i, part), part, least)); });
        const float largest = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
        sweep<4>(p.k, [&](int64_t i, int u, auto part) {
            sums[u] = sums[u] + pad(share(read(x + i, part) - set1(largest)), part, zero());
        });
        const float sum = reduce_add(total(sums));
        p.statistics[2 * row] = largest;
        p.statistics[2 * row + 1] = 1.0f / sum;
        const int64_t label = p.labels[row];
        float found = 0.0f;
        if (label != p.ignore_index) {
            float logit[kLanes];
            store(logit, read(x + label, Part{1}));
            found = __builtin_logf(sum) + (largest - logit[0]);
        }
        p.losses[row] = found;
    }
}

void cross_entropy_fwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
    dispatch_format(p.format, [&](auto type) { loss_rows<decltype(type)>(p, begin, end); });
}

template <class T>
void loss_grad_rows(const CrossEntropyGradParams& p, int64_t begin, int64_t end) {
    const float divisor = p.count ? *p.count : 1.0f;
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.logits) + row * p.k;
        T* dx = static_cast<T*>(p.dlogits) + row * p.k;
        const int64_t label = p.labels[row];
        if (label == p.ignore_index) {
            sweep<1>(p.k, [&](int64_t i, int, auto part) { write(dx + i, zero(), part); });
            continue;
        }
        const float factor = p.dloss[p.for_each ? row : 0] / divisor, inverse = p.statistics[2 * row + 1];
        const Vec largest = set1(p.statistics[2 * row]), scale = set1(factor * inverse);
        sweep<2>(p.k,
                 [&](int64_t i, int, auto part) { write(dx + i, share(read(x + i, part) - largest) * scale, part); });
        const Vec chosen = share(read(x + label, Part{1}) - largest) * set1(inverse) - set1(1.0f);
        write(dx + label, chosen * set1(factor), Part{1});
    }
}

void cross_entropy_bwd(const CrossEntropyGradParams& p, int64_t begin, int64_t end) {
    dispatch_format(p.format, [&](auto type) { loss_grad_rows<decltype(type)>(p, begin, end); });
}

}  // namespace
}  // namespace igpt::cpu
