// All bodies, and the table of them that every isa_*.cpp defines under its name.
#pragma once

#include "activation.h"
#include "attend.h"
#include "attention_bwd.h"
#include "attention_fwd.h"
#include "cross_entropy.h"
#include "gemm.h"
#include "heads.h"
#include "norm.h"
#include "ops.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

#if defined(__AMX_TILE__)
constexpr CausalAttentionKernels causal_attention_kernels{causal_fwd, causal_bwd, causal_fwd_scratch,
                                                          causal_bwd_scratch};
constexpr ForwardKernels forward_kernels{gemm,      norm_tiles, embed_row,    residual_row,
                                         tiles_row, pack_heads, attend_blocks};
#else
constexpr CausalAttentionKernels causal_attention_kernels{};
constexpr ForwardKernels forward_kernels{};
#endif

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

constexpr Ops make_ops(const char* isa) {
    return {isa,
            quantize_u8,
            quantize_f32,
            decoder_kernels,
            causal_attention_kernels,
            elementwise_kernels,
            forward_kernels};
}

}  // namespace
}  // namespace igpt::cpu
