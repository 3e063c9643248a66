// The whole forward pass of a model: tokens to the last hidden state, for a batch of sequences in one call.
#pragma once

#include <atomic>
#include <memory>

#include "decoder.h"

namespace igpt::cpu {

struct ForwardParams {
    const int64_t* tokens;  // (batch, length)
    int64_t batch, length;  // both 1 or more, length at most the model's positions
    int64_t layers;         // that run, the first ones; 0: the embedding alone
    // Of the format of the weights, fp32 where these are int8, any of them null: (batch, length, embd), behind these
    // layers and the final norm; and, both or neither, (layers, batch, heads, length, head_dim).
    void *last, *keys, *values;
    // What is taken on the way: where so many layers lie behind, each more, at most `layers`; either the residual, or
    // as the norm that comes next gives it, which is the next layer's first one or the final one.
    const int64_t* taken;
    int64_t takes;
    bool normed;
    void* states;   // likewise (takes, batch, length, embd), or null
    int64_t bands;  // of so many equal parts of a sequence the means, which divide `length`; without `means`: 1
    float* means;   // (takes, batch, bands, embd), or null
};

class Forward {
  public:
    // Throws std::invalid_argument unless the weights are packed for the chosen instruction set.
    explicit Forward(std::shared_ptr<const DecoderWeights> weights);
    ~Forward();

    // One region of threads; any number of calls at once. Throws std::bad_alloc, std::invalid_argument for a size and
    // std::out_of_range for a token that is out of range.
    void run(const ForwardParams& params, int threads) const;

  private:
    struct Space;
    std::unique_ptr<Space> take(int64_t rows, int threads) const;

    const std::shared_ptr<const DecoderWeights> weights_;
    const ForwardKernels kernels_;
    mutable std::atomic<Space*> spare_{nullptr};

    friend class ForwardWorker;
};

}  // namespace igpt::cpu
