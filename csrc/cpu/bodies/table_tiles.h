// The table of a machine with tiles (AMX): theirs, and all else as the others have it.
#pragma once

#include "attention_bwd.h"
#include "attention_decode_prefix_tiles.h"
#include "attention_fwd.h"
#include "gemm_tiles.h"
#include "heads.h"
#include "table.h"

namespace igpt::cpu {
namespace {

constexpr Ops make_ops_with_tiles(const char* isa) {
    Ops ops = make_ops(isa);
    ops.decoder.split = split_by_tiles;
    ops.decoder.linear = linear_by_tiles;
    ops.decoder.attention_decode_prefix = attention_decode_prefix_by_tiles;
    ops.causal_attention = {causal_fwd, causal_bwd, bytes_of<FwdScratch>, bytes_of<BwdScratch>};
    ops.forward[int(Format::bf16)] = {Format::bf16,
                                      gemm_by_tiles,
                                      norm_tiles<uint16_t>,
                                      embed_row,
                                      residual_row<uint16_t>,
                                      tiles_row<uint16_t, uint16_t>,
                                      mean_residual,
                                      mean_tiles<uint16_t>,
                                      pack_heads,
                                      causal_attention_blocks};
    return ops;
}

}  // namespace
}  // namespace igpt::cpu
