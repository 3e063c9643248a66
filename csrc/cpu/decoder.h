// The CPU decoder: a whole decode step, embedding to logits, for a batch of sequences in one call.
#pragma once

#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "arena.h"
#include "kv_cache.h"
#include "weights.h"

namespace igpt::cpu {

// The state of `batch` sequences, all at the same position. A step is one region of threads.
//
// A fork makes `copies` sequences of each. They share the positions before it, the primer, which are stored once and
// stay as they are; what follows is in caches of their own. Sequence j of primer i is sequence i copies + j.
class Decoder {
  public:
    // Throws std::bad_alloc or std::invalid_argument.
    Decoder(std::shared_ptr<const DecoderWeights> weights, int64_t batch, int64_t capacity);

    // Reads tokens (batch,) and writes the logits of the next position, (batch, vocab - 1).
    // Throws std::invalid_argument for a token out of range, std::out_of_range when the cache is full, and
    // std::logic_error while another thread is inside.
    void step(const int64_t* tokens, float* logits, int threads);

    // Reads `count` tokens of the only sequence, one position after the other, and writes the logits that follow each,
    // (count, vocab - 1). A position attends to those before it and itself. Throws as `step`, and std::logic_error of
    // several sequences.
    void step_rows(const int64_t* tokens, int64_t count, float* logits, int threads);

    // Takes keys and values (batch, heads, count, head_dim) of a layer's positions 0 .. count - 1, which something
    // else has computed; `advance` then moves all layers on.
    void load(int64_t layer, const float* keys, const float* values, int64_t count, int threads);
    void advance(int64_t count);

    // Goes on with `copies` sequences for each. Throws std::bad_alloc, and then nothing has changed, or
    // std::logic_error for what cannot be forked.
    void fork(int64_t copies, int threads);

    // Forgets the positions from `position` on; those of a primer stay.
    void rewind(int64_t position);

    int64_t position() const { return position_; }

    // Whether a row has the same bits whatever the rows beside it: sums in one order, or of integers.
    bool rows_are_steps() const {
        const Format format = weights_->shape.format;
        return format == Format::fp32 || (format == Format::int8 && weights_->kernels.int8_step > 1);
    }

    // (batch, heads, head_dim, colours): what `step` and `load` read and write.
    std::tuple<int64_t, int64_t, int64_t, int64_t> sizes() const {
        const DecoderShape& s = weights_->shape;
        return {batch_, s.heads, s.head_dim(), s.vocab - 1};
    }
    size_t bytes() const { return primer_.bytes() + own_.bytes() + rows_.size() + scratch_block_.size(); }

  private:
    friend class Worker;

    // A thread's own copy of the normed inputs, and what the kernels need.
    struct Scratch {
        float* normed;
        uint8_t *high, *low;
        uint16_t* half;
        float *scale, *sums;
        char* tiles;
    };

    // Unit: a head of a sequence, or of a primer; the sequences of a head follow each other.
    AttentionDecodeParams head_of(int64_t layer, int64_t unit) const;
    AttentionDecodeParams primer_of(int64_t layer, int64_t unit) const;
    AttentionDecodeParams unit_of(const KvCache& cache, int64_t layer, int64_t units, int64_t unit) const;
    KvCache make_cache(int64_t sequences, int64_t capacity) const;
    void make_rows(int64_t rows);
    void run(const int64_t* tokens, float* logits, int threads);
    void reserve(int threads);
    void check_free(int64_t count) const;
    void check_tokens(const int64_t* tokens, int64_t count) const;

    const std::shared_ptr<const DecoderWeights> weights_;
    const int64_t primers_, capacity_;
    int64_t copies_ = 1, batch_;  // batch_ = primers_ copies_
    int64_t shared_ = 0;          // positions that are in `primer_`
    int64_t position_ = 0;
    int64_t width_;  // n_embd, padded to whole tiles
    bool forked_ = false;
    KvCache primer_, own_;
    Arena rows_, scratch_block_;
    int64_t room_ = 0;  // rows that there is memory for
    int64_t count_ =
        1;  // rows of this step: a position of each sequence or, behind each other, several of the only one
    float *x_, *qkv_, *mixed_, *inner_, *logits_;  // (room, width), shared by the threads
    std::vector<Scratch> scratch_;
    std::atomic<bool> busy_{false};
};

}  // namespace igpt::cpu
