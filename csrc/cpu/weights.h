// A model's weights, from a checkpoint's matrices to packed ones.
#pragma once

#include <vector>

#include "arena.h"
#include "ops.h"

namespace igpt::cpu {

struct DecoderShape {
    int64_t layers, embd, heads, inner, positions, vocab;  // vocab: tokens, SOS included; the head has one fewer
    float eps;
    Then activation;
    Format format;

    int64_t head_dim() const { return embd / heads; }
};

// A matrix as a checkpoint has it: element (k, n) at data[k stride_k + n stride_n].
struct Source {
    const void* data;
    bool is_bf16;  // else fp32
    int64_t stride_k, stride_n;
};

struct LayerSource {
    const float *norm_1, *norm_2;   // (embd,)
    Source qkv, proj, fc, fc_proj;  // (embd, 3 embd), (embd, embd), (embd, inner), (inner, embd)
    const float *qkv_bias, *proj_bias, *fc_bias, *fc_proj_bias;  // fp32
    float scale;                                                 // of the scores
};

// The weights of a model, packed for the instruction set that is chosen when it is made. Immutable once filled, and
// shared by decoders.
class DecoderWeights {
  public:
    // Throws std::bad_alloc, or std::invalid_argument for a shape that the kernels do not take.
    explicit DecoderWeights(const DecoderShape& shape);

    void set_tables(const float* wte, const float* wpe, const float* norm, const Source& head, int threads);
    void set_layer(int64_t layer, const LayerSource& source, int threads);

    // The outputs of qkv are packed head by head (q, k, v of a head), so that a thread can own whole heads.
    struct Layer {
        float *norm_1, *norm_2;
        Matrix qkv, proj, fc, fc_proj;
        float scale;
    };

    const DecoderShape shape;
    const DecoderKernels kernels;
    const Layer& layer(int64_t i) const { return layers_[size_t(i)]; }
    const Matrix& head() const { return head_; }
    const float* wte() const { return wte_; }
    const float* wpe() const { return wpe_; }
    const float* norm() const { return norm_; }

  private:
    size_t matrix_bytes(int64_t n, int64_t k) const;
    Matrix take(int64_t n, int64_t k);

    Arena arena_;
    std::vector<Layer> layers_;
    Matrix head_{};
    float *wte_ = nullptr, *wpe_ = nullptr, *norm_ = nullptr;
};

}  // namespace igpt::cpu
