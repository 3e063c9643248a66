// The bodies that every machine has, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_bwd.h"
#include "attention_decode_prefix.h"
#include "attention_fwd.h"
#include "cross_entropy.h"
#include "norm.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step,       pack_tile<Int8::step>,   norm,  sum, split,
                                         linear, remember, attention_decode, attention_decode_prefix, expect};

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

template <class By, class S>
constexpr CausalAttentionKernels attention_kernels{
    causal_fwd<By, S>, causal_bwd<By, S>, bytes_of<FwdScratch<typename By::Element>>,
    bytes_of<BwdScratch<typename By::Element>>};

// What bf16 is multiplied as without tiles.
constexpr auto operands_of_bf16() {
    if constexpr (kPairs)
        return uint16_t{};
    else
        return float{};
}
using Bf16Blocks = ByBlocks<decltype(operands_of_bf16())>;

constexpr Ops make_ops(const char* isa) {
    return {isa,
            quantize_u8,
            quantize_f32,
            decoder_kernels,
            {attention_kernels<ByBlocks<float>, float>, attention_kernels<Bf16Blocks, uint16_t>},
            elementwise_kernels,
            {}};
}

}  // namespace
}  // namespace igpt::cpu
