// The whole forward pass of a model by tiles: tokens to the last hidden state, for a batch of sequences in one call.
#pragma once

#include <atomic>
#include <memory>

#include "decoder.h"

namespace igpt::cpu {

struct ForwardParams {
    const int64_t* tokens;  // (batch, length)
    int64_t batch, length;  // both 1 or more, length at most the model's positions
    // bf16, any of them null: (batch, length, embd); (layers, batch, length, embd), before each layer; and, both or
    // neither, (layers, batch, heads, length, head_dim).
    uint16_t *last, *hidden, *keys, *values;
};

class Forward {
  public:
    // Throws std::invalid_argument unless the weights are bf16 and packed for an instruction set with tiles.
    explicit Forward(std::shared_ptr<const DecoderWeights> weights);
    ~Forward();

    // One OpenMP region; any number of calls at once. Throws std::bad_alloc, std::invalid_argument for a size and
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
