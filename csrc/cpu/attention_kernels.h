// Causal attention over whole sequences, fp32 and bf16, forward and backward: what an op hands to its driver.
//
//   S = scale q k^T, minus infinity for a hidden key;  out = softmax(S) v;  lse = log(sum of exp(S)), which is minus
//   infinity, and out zero, for a query that is shown no key. Query i is position i + t_k - t_q and is shown the keys
//   up to its own, not those before `starts` nor those where `key_mask` is 0.
//
// Of bf16, products take bf16 where the instruction set multiplies pairs of them, or tiles; else fp32 takes their
// place. A head is the unit of work: the results of a head do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace igpt::cpu {

// (B, H, T, D): element (b, h, t, i) is data[b batch + h head + t row + i].
struct AttentionTensor {
    void* data;
    int64_t batch, head, row;
};

struct CausalAttentionParams {
    AttentionTensor q, k, v, out;
    float* lse;               // (B, H, T_q)
    const int32_t* starts;    // (B,), or null: the first key that may be seen
    const uint8_t* key_mask;  // (B, T_k) with rows `key_mask_stride` apart, or null
    int64_t key_mask_stride;
    int64_t batch, heads, t_q, t_k;
    int64_t head_dim;  // a multiple of 32, at most kMaxWidth
    float scale;       // greater than 0
    Format format;     // of all tensors: fp32 or bf16
    int32_t threads;
};

struct CausalAttentionGradParams {
    CausalAttentionParams of;
    AttentionTensor dout, dq, dk, dv;
};

constexpr int64_t kMaxWidth = 128;

// One thread's work on head `head` of B H, with `scratch` on a line of the cache.
struct CausalAttentionKernels {
    // The queries first .. end - 1; `first` is a multiple of 32.
    void (*fwd)(const CausalAttentionParams&, int64_t head, int64_t first, int64_t end, char* scratch);
    void (*bwd)(const CausalAttentionGradParams&, int64_t head, char* scratch);
    // Bytes of scratch.
    int64_t (*fwd_scratch)(const CausalAttentionParams&);
    int64_t (*bwd_scratch)(const CausalAttentionParams&);
};

// The drivers. They throw std::bad_alloc, and std::invalid_argument for another format.
void causal_attention_fwd(const CausalAttentionParams& params);
void causal_attention_bwd(const CausalAttentionGradParams& params);

}  // namespace igpt::cpu
