// The bodies that every machine has, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_decode_prefix.h"
#include "cross_entropy.h"
#include "gemm.h"
#include "heads_plain.h"
#include "norm.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step,       pack_tile<Int8::step>,   norm,  sum, split,
                                         linear, remember, attention_decode, attention_decode_prefix, expect};

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

// The forward pass, of weights of W.
template <class Kind, class W, class E = typename Kind::Input>
constexpr ForwardKernels forward_kernels{sizeof(E) == 4 ? Format::fp32 : Format::bf16,
                                         gemm<Kind>,
                                         norm_tiles<E>,
                                         embed_row,
                                         residual_row<W>,
                                         tiles_row<E, W>,
                                         mean_residual,
                                         mean_tiles<E>,
                                         pack_heads_plain<E>,
                                         causal_attention_plain<E>};

constexpr Ops make_ops(const char* isa) {
    return {isa,
            quantize_u8,
            quantize_f32,
            decoder_kernels,
            {},
            elementwise_kernels,
            {forward_kernels<Single, float>, forward_kernels<KindOfBf16, uint16_t>}};
}

}  // namespace
}  // namespace igpt::cpu
