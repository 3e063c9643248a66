// All bodies, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_bwd.h"
#include "attention_decode_prefix.h"
#include "attention_fwd.h"
#include "cross_entropy.h"
#include "gemm.h"
#include "heads.h"
#include "norm.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step,       pack_tile<Int8::step>,   norm,  sum, split,
                                         linear, remember, attention_decode, attention_decode_prefix, expect};

#if defined(__AMX_TILE__)
constexpr CausalAttentionKernels causal_attention_kernels{causal_fwd, causal_bwd, causal_fwd_scratch,
                                                          causal_bwd_scratch};
constexpr ForwardKernels forward_kernels{
    gemm, norm_tiles, embed_row, residual_row, tiles_row, pack_heads, causal_attention_blocks};
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
