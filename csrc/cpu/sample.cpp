// Drawing tokens: a row is a matter of microseconds, whatever the instruction set, so this is compiled once. Weights
// are fp32 and their sums fp64, in the order of the ids, as in the definition: a token is another than the definition's
// only where its number falls into the rounding of an exponential.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kShare = 1 << 12;  // logits that pay for a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What a thread needs for a row: (k,) each.
struct Scratch {
    float *scores, *ordered;
    double *weights, *cumulative;
    int64_t* order;
};

// The largest logit; NaN where one is, and `at` the first that it is found at.
float largest_of(const float* x, int64_t k, int64_t& at) {
    at = 0;
    for (int64_t i = 0; i < k; ++i) {
        if (std::isnan(x[i])) return at = i, x[i];
        if (x[i] > x[at]) at = i;
    }
    return x[at];
}

// Minus infinity for the scores below the k-th largest.
void keep_most(int64_t top_k, int64_t k, const Scratch& s) {
    std::copy_n(s.scores, k, s.ordered);
    std::nth_element(s.ordered, s.ordered + top_k - 1, s.ordered + k, std::greater<>());
    const float least = s.ordered[top_k - 1];
    for (int64_t i = 0; i < k; ++i)
        if (s.scores[i] < least) s.scores[i] = -kInfinity;
}

// Zero for the weights behind those, from the largest down, that reach `top_p` of all.
void keep_nucleus(double top_p, int64_t k, const Scratch& s) {
    std::iota(s.order, s.order + k, int64_t{0});
    std::sort(s.order, s.order + k, [&](int64_t a, int64_t b) {
        return s.weights[a] > s.weights[b] || (s.weights[a] == s.weights[b] && a < b);
    });
    const double enough = top_p * std::accumulate(s.weights, s.weights + k, 0.0);
    double sum = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        double& weight = s.weights[s.order[i]];
        const double before = sum;
        sum += weight;
        if (before >= enough) weight = 0.0;
    }
}

int64_t draw(const SampleParams& p, const float* x, float largest, float number, const Scratch& s) {
    for (int64_t i = 0; i < p.k; ++i) s.scores[i] = (x[i] - largest) / p.temperature;
    if (p.top_k > 0 && p.top_k < p.k) keep_most(p.top_k, p.k, s);
    for (int64_t i = 0; i < p.k; ++i) s.weights[i] = double(std::exp(s.scores[i]));
    if (p.top_p < 1.0) keep_nucleus(p.top_p, p.k, s);
    if (p.min_score > -kInfinity)
        for (int64_t i = 0; i < p.k; ++i)
            if (s.scores[i] < p.min_score) s.weights[i] = 0.0;
    std::partial_sum(s.weights, s.weights + p.k, s.cumulative);
    const double target = double(number) * s.cumulative[p.k - 1];
    const int64_t drawn = std::upper_bound(s.cumulative, s.cumulative + p.k, target) - s.cumulative;
    return std::min(drawn, p.k - 1);
}

void sample_row(const SampleParams& p, int64_t row, Scratch s) {
    const float* x = p.logits + row * p.stride;
    int64_t at;
    const float largest = largest_of(x, p.k, at);
    const bool finite = std::isfinite(largest);
    if (p.cumulative) s.cumulative = p.cumulative + row * p.k;
    int64_t token = 0;
    if (p.temperature == 0.0f)
        token = at;
    else if (finite)
        token = draw(p, x, largest, p.uniform[row], s);
    else
        std::fill_n(s.cumulative, p.k, std::numeric_limits<double>::quiet_NaN());
    if (p.known && p.known[row] >= 0) token = p.known[row];
    p.tokens[row] = token;
    if (!p.logprobs) return;
    double sum = 0.0;
    for (int64_t i = 0; finite && i < p.k; ++i) sum += double(std::exp(x[i] - largest));
    p.logprobs[row] = finite ? float(double(x[token] - largest) - std::log(sum)) : std::nanf("");
}

}  // namespace

void sample(const SampleParams& p) {
    for (int64_t row = 0; p.known && row < p.rows; ++row)
        if (p.known[row] >= p.k)
            throw std::out_of_range("sample: known token " + std::to_string(p.known[row]) +
                                    " is out of bounds; want at most " + std::to_string(p.k - 1));
    const int64_t shares = std::max<int64_t>(1, p.rows * p.k / kShare);
    const int threads = int(std::min({int64_t(usable_threads(p.threads)), shares, std::max<int64_t>(1, p.rows)}));
    const std::unique_ptr<float[]> singles(new float[2 * p.k * threads]);
    const std::unique_ptr<double[]> doubles(new double[2 * p.k * threads]);
    const std::unique_ptr<int64_t[]> orders(new int64_t[p.k * threads]);
    in_region(
        threads,
        [&](int index, int count) {
            const Scratch s{singles.get() + 2 * p.k * index, singles.get() + (2 * index + 1) * p.k,
                            doubles.get() + 2 * p.k * index, doubles.get() + (2 * index + 1) * p.k,
                            orders.get() + p.k * index};
            const Range rows = part(p.rows, index, count);
            for (int64_t row = rows.begin; row < rows.end; ++row) sample_row(p, row, s);
        },
        false);
}

}  // namespace igpt::cpu
