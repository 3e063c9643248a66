// The bodies that every machine has, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_bwd.h"
#include "attention_decode_prefix.h"
#include "attention_fwd.h"
#include "checksum.h"
#include "cross_entropy.h"
#include "gemm.h"
#include "heads.h"
#include "matmul.h"
#include "norm.h"
#include "quantize.h"

namespace igpt::cpu {
namespace {

constexpr DecoderKernels decoder_kernels{kLanes, kTile,    Int8::step,       pack_tile<Int8::step>,   norm,  sum, split,
                                         linear, remember, attention_decode, attention_decode_prefix, expect};

constexpr ElementwiseKernels elementwise_kernels = {
    widen, narrow, add, norm_fwd, norm_bwd, activation_fwd, activation_bwd, cross_entropy_fwd, cross_entropy_bwd};

// Of tensors of S.
template <class By, class S>
constexpr CausalAttentionKernels attention_kernels{causal_fwd<By, S>, causal_bwd<By, S>,
                                                   bytes_of<FwdScratch<typename By::Element>>,
                                                   bytes_of<BwdScratch<typename By::Element>>};

using Bf16Blocks = ByBlocks<KindOfBf16::Input>;

template <class E>
constexpr Format format_of = sizeof(E) == 4 ? Format::fp32 : Format::bf16;

// The forward pass, of which states are W.
template <class By, class W>
constexpr ForwardKernels forward_kernels(void (*gemm)(const GemmParams&), int64_t rounded = 0,
                                         void (*round)(const RoundRows&) = nullptr) {
    using E = typename By::Element;
    return {format_of<E>,
            format_of<W>,
            rounded,
            round,
            gemm,
            norm_tiles<E>,
            embed_row,
            residual_row<W>,
            tiles_row<E, W>,
            mean_residual,
            mean_tiles<E>,
            pack_heads<E>,
            causal_attention_blocks<By>};
}

constexpr Ops make_ops(const char* isa) {
    return {isa,
            quantize_u8,
            quantize_f32,
            decoder_kernels,
            {attention_kernels<ByBlocks<float>, float>, attention_kernels<Bf16Blocks, uint16_t>},
            elementwise_kernels,
            {forward_kernels<ByBlocks<float>, float>(gemm<Single, float>),
             forward_kernels<Bf16Blocks, uint16_t>(gemm<KindOfBf16, Bf16Blocks::Element>),
             forward_kernels<Bf16Blocks, float>(gemm<KindOfInt8, Bf16Blocks::Element>, sizeof(KindOfInt8::Input),
                                                round_rows<KindOfInt8, Bf16Blocks::Element>)},
            checksum,
            {kTile, kMatmulRows * (kTile + kMatmulDepth), matmul_pack, matmul_strip},
            kPairs};
}

}  // namespace
}  // namespace igpt::cpu
