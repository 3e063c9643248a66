// All bodies, and the table of them that every isa_*.cpp defines under its name.
#pragma once

#include "attend_shared.h"
#include "ops.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step, pack_tile<Int8::step>, norm,  sum, split,
                                         linear, remember, attend,     attend_shared,         expect};

constexpr Ops make_ops(const char* isa) { return {isa, quantize_u8, quantize_f32, decoder_kernels}; }

}  // namespace
}  // namespace igpt::cpu
