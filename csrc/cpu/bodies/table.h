// The bodies that every machine has, and the table of them that every isa/*.cpp defines under its name.
#pragma once

#include "../ops.h"
#include "activation.h"
#include "attention_bwd.h"
#include "attention_decode_prefix.h"
#include "attention_fwd.h"
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

// The forward pass, of weights of W.
template <class By, class W>
constexpr ForwardKernels forward_kernels(void (*gemm)(const GemmParams&)) {
    using E = typename By::Element;
    return {sizeof(E) == 4 ? Format::fp32 : Format::bf16,
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
            {forward_kernels<ByBlocks<float>, float>(gemm<Single>),
             forward_kernels<Bf16Blocks, uint16_t>(gemm<KindOfBf16>)},
            {kTile, kMatmulRows * (kTile + kMatmulDepth), matmul_pack, matmul_strip},
            kPairs};
}

}  // namespace
}  // namespace igpt::cpu
