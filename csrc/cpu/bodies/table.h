// The bodies that every machine has, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_decode_prefix.h"
#include "cross_entropy.h"
#include "norm.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step,       pack_tile<Int8::step>,   norm,  sum, split,
                                         linear, remember, attention_decode, attention_decode_prefix, expect};

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

constexpr Ops make_ops(const char* isa) {
    return {isa, quantize_u8, quantize_f32, decoder_kernels, {}, elementwise_kernels, {}, kPairs};
}

}  // namespace
}  // namespace igpt::cpu
