// All bodies, and the table of them that every isa_*.cpp defines under its name.
#pragma once

#include "activation.h"
#include "attend.h"
#include "cross_entropy.h"
#include "norm.h"
#include "ops.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

constexpr Ops make_ops(const char* isa) {
    return {isa, quantize_u8, quantize_f32, decoder_kernels, elementwise_kernels};
}

}  // namespace
}  // namespace igpt::cpu
