// Norms, activations and the loss on the CPU: what their bodies (norm.h, activation.h, cross_entropy.h) are given, and
// the drivers (elementwise.cpp). Included by ops.h. All arrays are contiguous; `Format` is fp32 or bf16, and everything
// is computed in fp32 and rounded once.
//
// The gradient of a weight or bias is summed over blocks of kRowBlock rows, whatever the number of threads, and then
// over the blocks, always in the same order: the result does not depend on who worked on which block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decoder_kernels.h"

namespace igpt::cpu {

constexpr int64_t kRowBlock = 32;

// sum = x + residual, rounded, or x where there is none; centred: minus its mean.
// out = sum rsqrt(mean(sum^2) + eps) weight + bias
struct NormParams {
    const void* x;         // (rows, n_embd) of `x_format`
    const void* residual;  // (rows, n_embd) of `format`, or null
    const void* weight;    // (n_embd,) of `weight_format`
    const void* bias;      // likewise, or null
    void* sum;             // (rows, n_embd) of `format`; null without a residual
    void* out;             // (rows, n_embd) of `out_format`
    int64_t rows, n_embd;
    float eps;
    bool centred;
    Format format, x_format, weight_format, out_format;  // x_format: format without a residual; both bf16 where it is
    int32_t threads;
};

// The gradients of what was normalised, of the weight and, where dbias is not null, of the bias.
struct NormGradParams {
    const void* dout;       // (rows, n_embd) of `out_format`
    const void* dsum;       // (rows, n_embd) of `format`: what else is the gradient of x; or null
    const void* x;          // (rows, n_embd) of `format`: what was normalised
    const void* weight;     // (n_embd,) of `weight_format`
    void* dx;               // (rows, n_embd) of `format`
    void* dbranch;          // (rows, n_embd) of bf16: dx again, for an x that was of that beside fp32; or null
    void *dweight, *dbias;  // (n_embd,) of `weight_format`
    int64_t rows, n_embd;
    float eps;
    bool centred;
    Format format, weight_format, out_format;
    int32_t threads;
};

// out = f(x + bias)
struct ActivationParams {
    const void* x;     // (rows, n)
    const void* bias;  // (n,), or null
    void* out;         // (rows, n)
    int64_t rows, n;
    Activation activation;
    Format format;
    int32_t threads;
};

// dx = dout f'(x + bias); dbias = sum over the rows of dx, before it is rounded
struct ActivationGradParams {
    const void* dout;  // (rows, n)
    const void* x;     // (rows, n)
    const void* bias;  // (n,), or null
    void* dx;          // (rows, n)
    void* dbias;       // (n,); null without a bias
    int64_t rows, n;
    Activation activation;
    Format format;
    int32_t threads;
};

// losses[i] = log(sum_k exp(logits[i][k])) - logits[i][labels[i]]; 0 where the label is ignore_index.
struct CrossEntropyParams {
    const void* logits;     // (rows, k) of `format`
    const int64_t* labels;  // (rows,)
    float* losses;          // (rows,)
    float* statistics;      // (rows, 2): the largest logit, and 1 / sum exp(logit - largest)
    int64_t rows, k, ignore_index;
    Format format;
    int32_t threads;
    // The driver's: (1,) each, the losses' sum or, with `mean`, their mean, and how many rows count; or both null.
    float *loss, *count;
    bool mean;
};

// dlogits[i][k] = (softmax(logits[i])[k] - (k == labels[i])) dloss[i] / count
struct CrossEntropyGradParams {
    const float* dloss;       // (rows,) where `for_each`, else (1,)
    const void* logits;       // (rows, k) of `format`
    const int64_t* labels;    // (rows,)
    const float* statistics;  // (rows, 2)
    const float* count;       // (1,), or null: 1
    void* dlogits;            // (rows, k) of `format`
    int64_t rows, k, ignore_index;
    bool for_each;
    Format format;
    int32_t threads;
};

// The bodies work on the rows begin .. end - 1; where there is a `partial`, these are few and of one block.
struct ElementwiseKernels {
    // out[i] = float(x[i]), and back
    void (*widen)(const void* x, Format format, int64_t n, float* out);
    void (*narrow)(const float* x, Format format, int64_t n, void* out);
    // out[i] += x[i]
    void (*add)(const float* x, int64_t n, float* out);
    // weight and bias are fp32 for all of the following. `partial`, which is added to, has (2, n) or (1, n) fp32: the
    // block's part of dweight, if that is asked for, and of dbias.
    void (*norm_fwd)(const NormParams& params, int64_t begin, int64_t end);
    void (*norm_bwd)(const NormGradParams& params, int64_t begin, int64_t end, float* partial);
    // Without a bias, begin and end count elements, and there is no `partial`.
    void (*activation_fwd)(const ActivationParams& params, int64_t begin, int64_t end);
    void (*activation_bwd)(const ActivationGradParams& params, int64_t begin, int64_t end, float* partial);
    // Every label is a class or ignore_index.
    void (*cross_entropy_fwd)(const CrossEntropyParams& params, int64_t begin, int64_t end);
    void (*cross_entropy_bwd)(const CrossEntropyGradParams& params, int64_t begin, int64_t end);
};

// The drivers. They throw std::bad_alloc, never from inside the parallel region.
void norm_fwd(const NormParams& params);
void norm_bwd(const NormGradParams& params);
void activation_fwd(const ActivationParams& params);
void activation_bwd(const ActivationGradParams& params);
// Throws std::out_of_range where a label is neither a class nor ignore_index; nothing is written then.
void cross_entropy_fwd(const CrossEntropyParams& params);
void cross_entropy_bwd(const CrossEntropyGradParams& params);

// out[i] = palette[tokens[i]], negative tokens counting from the end.
enum class TokenType : int32_t { i64, i32, i16, u8 };  // as csrc/cuda/ops.h has it
struct DequantizeParams {
    const void* tokens;  // (n,)
    TokenType token;
    const float* clusters;  // (k, 3) in [-1, 1]; a colour is rint(127.5 (cluster + 1)) clipped to 0 .. 255
    uint8_t* out;           // (n, 3)
    int64_t n;
    int64_t k;
    int32_t threads;
};
// Throws std::out_of_range.
void dequantize(const DequantizeParams& params);

}  // namespace igpt::cpu
