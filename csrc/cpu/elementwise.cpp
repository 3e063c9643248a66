// Norms, activations, the loss and dequantize, the drivers: memory, threads, and the order in which sums are made.
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise_kernels.h"
#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

constexpr int64_t kShare = 1 << 14;  // elements that pay for a thread
constexpr int64_t kSpan = 1 << 12;   // elements that one turn takes where there are no rows

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

int threads_for(int64_t elements, int64_t blocks, int32_t wanted) {
    if (elements < 2 * kShare || blocks < 2) return 1;
    return int(std::min({int64_t(usable_threads(wanted)), blocks, elements / kShare}));
}

// Calls body(block, begin, end) for blocks of `size` of `count`; `width` elements each of these. No body throws: an
// exception that leaves the region ends the process.
template <class F>
void in_blocks(int64_t count, int64_t size, int64_t width, int32_t wanted, F body) {
    const int64_t blocks = blocks_of(count, size);
    const int threads = threads_for(count * width, blocks, wanted);
    for_each(blocks, threads, [&](int64_t i) { body(i, i * size, std::min(count, (i + 1) * size)); });
}

// A vector in fp32; empty for null.
std::vector<float> wide(const void* x, Format format, int64_t n) {
    std::vector<float> out(x ? n : 0);
    if (x) ops().elementwise.widen(x, format, n, out.data());
    return out;
}

// What the blocks have summed up, `width` numbers each, and as many behind these for a few of a block's rows.
class Partial {
  public:
    Partial(int64_t blocks, int64_t width)
        : blocks_(std::max<int64_t>(blocks, 1)), width_(width), sums_(new float[2 * blocks_ * width]) {
        std::fill(of(0), of(0) + width, 0.0f);
    }
    // body(begin, end, sums) for a few of a block's rows at a time: many in one sum, each rounded to the whole of it,
    // err more than torch's.
    template <class F>
    void sum(int64_t block, int64_t begin, int64_t end, F body) {
        float *whole = of(block), *few = whole + width_;
        for (int64_t i = begin; i < end; i += kFewRows) {
            float* sums = i == begin ? whole : few;
            std::fill(sums, sums + width_, 0.0f);
            body(i, std::min(end, i + kFewRows), sums);
            if (sums == few) ops().elementwise.add(few, width_, whole);
        }
    }
    // Neighbours first, then pairs of pairs: few roundings, and always the same.
    const float* total() {
        for (int64_t step = 1; step < blocks_; step *= 2)
            for (int64_t i = 0; i + step < blocks_; i += 2 * step) ops().elementwise.add(of(i + step), width_, of(i));
        return of(0);
    }

  private:
    static constexpr int64_t kFewRows = 8;

    float* of(int64_t block) { return sums_.get() + 2 * block * width_; }

    int64_t blocks_, width_;
    std::unique_ptr<float[]> sums_;
};

}  // namespace

void norm_fwd(const NormParams& params) {
    NormParams p = params;
    const auto body = ops().elementwise.norm_fwd;
    const std::vector<float> weight = wide(p.weight, p.weight_format, p.n_embd),
                             bias = wide(p.bias, p.weight_format, p.n_embd);
    p.weight = weight.data();
    p.bias = p.bias ? bias.data() : nullptr;
    in_blocks(p.rows, kRowBlock, p.n_embd, p.threads,
              [&](int64_t, int64_t begin, int64_t end) { body(p, begin, end); });
}

void norm_bwd(const NormGradParams& params) {
    NormGradParams p = params;
    const auto& kernels = ops().elementwise;
    const std::vector<float> weight = wide(p.weight, p.weight_format, p.n_embd);
    p.weight = weight.data();
    Partial partial(blocks_of(p.rows, kRowBlock), p.dbias ? 2 * p.n_embd : p.n_embd);
    in_blocks(p.rows, kRowBlock, p.n_embd, p.threads, [&](int64_t block, int64_t begin, int64_t end) {
        partial.sum(block, begin, end, [&](auto... rows) { kernels.norm_bwd(p, rows...); });
    });
    const float* total = partial.total();
    kernels.narrow(total, p.weight_format, p.n_embd, p.dweight);
    if (p.dbias) kernels.narrow(total + p.n_embd, p.weight_format, p.n_embd, p.dbias);
}

void activation_fwd(const ActivationParams& params) {
    ActivationParams p = params;
    const auto body = ops().elementwise.activation_fwd;
    const std::vector<float> bias = wide(p.bias, p.format, p.n);
    const auto run = [&](int64_t, int64_t begin, int64_t end) { body(p, begin, end); };
    if (!p.bias) return in_blocks(p.rows * p.n, kSpan, 1, p.threads, run);
    p.bias = bias.data();
    in_blocks(p.rows, kRowBlock, p.n, p.threads, run);
}

void activation_bwd(const ActivationGradParams& params) {
    ActivationGradParams p = params;
    const auto& kernels = ops().elementwise;
    if (!p.bias) {
        in_blocks(p.rows * p.n, kSpan, 1, p.threads,
                  [&](int64_t, int64_t begin, int64_t end) { kernels.activation_bwd(p, begin, end, nullptr); });
        return;
    }
    const std::vector<float> bias = wide(p.bias, p.format, p.n);
    p.bias = bias.data();
    Partial partial(blocks_of(p.rows, kRowBlock), p.n);
    in_blocks(p.rows, kRowBlock, p.n, p.threads, [&](int64_t block, int64_t begin, int64_t end) {
        partial.sum(block, begin, end, [&](auto... rows) { kernels.activation_bwd(p, rows...); });
    });
    kernels.narrow(partial.total(), p.format, p.n, p.dbias);
}

namespace {

// Throws std::out_of_range for a label that is none; the number of rows that count.
template <class Params>
int64_t check_labels(const Params& p) {
    int64_t counted = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t label = p.labels[i];
        if (label == p.ignore_index) continue;
        if (label < 0 || label >= p.k)
            throw std::out_of_range("cross_entropy: label " + std::to_string(label) + " is out of bounds; want 0 to " +
                                    std::to_string(p.k - 1) + ", or ignore_index");
        ++counted;
    }
    return counted;
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyParams& p) {
    const int64_t counted = check_labels(p);
    const auto body = ops().elementwise.cross_entropy_fwd;
    in_blocks(p.rows, kRowBlock, p.k, p.threads, [&](int64_t, int64_t begin, int64_t end) { body(p, begin, end); });
    if (!p.loss) return;
    double sum = 0.0;
    for (int64_t i = 0; i < p.rows; ++i) sum += p.losses[i];
    *p.loss = float(p.mean ? sum / double(counted) : sum);
    *p.count = float(counted);
}

void cross_entropy_bwd(const CrossEntropyGradParams& p) {
    check_labels(p);  // again: they may be others by now
    const auto body = ops().elementwise.cross_entropy_bwd;
    in_blocks(p.rows, kRowBlock, p.k, p.threads, [&](int64_t, int64_t begin, int64_t end) { body(p, begin, end); });
}

namespace {

template <class T>
void look_up(const DequantizeParams& p, const std::vector<uint8_t>& palette) {
    const T* tokens = static_cast<const T*>(p.tokens);
    for (int64_t i = 0; i < p.n; ++i)
        if (int64_t(tokens[i]) < -p.k || int64_t(tokens[i]) >= p.k)
            throw std::out_of_range("dequantize: token " + std::to_string(tokens[i]) + " is out of bounds; want " +
                                    std::to_string(-p.k) + " to " + std::to_string(p.k - 1));
    in_blocks(p.n, kSpan, 1, p.threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = int64_t(tokens[i]) + (tokens[i] < 0 ? p.k : 0);
            std::copy_n(palette.data() + 3 * token, 3, p.out + 3 * i);
        }
    });
}

}  // namespace

void dequantize(const DequantizeParams& p) {
    std::vector<uint8_t> palette(3 * p.k);
    for (size_t i = 0; i < palette.size(); ++i) {
        const float value = std::nearbyint(127.5f * (p.clusters[i] + 1.0f));
        palette[i] = uint8_t(value > 0.0f ? std::min(value, 255.0f) : 0.0f);  // 0 for a NaN, too
    }
    if (p.token == TokenType::i64) return look_up<int64_t>(p, palette);
    if (p.token == TokenType::i32) return look_up<int32_t>(p, palette);
    if (p.token == TokenType::i16) return look_up<int16_t>(p, palette);
    look_up<uint8_t>(p, palette);
}

}  // namespace igpt::cpu
