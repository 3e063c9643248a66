// The table of a machine with tiles (AMX): theirs, and all else as the others have it.
#pragma once

#include "attention_decode_prefix_tiles.h"
#include "gemm_tiles.h"
#include "table.h"

namespace igpt::cpu {
namespace {

constexpr Ops make_ops_with_tiles(const char* isa) {
    Ops ops = make_ops(isa);
    ops.decoder.split = split_by_tiles;
    ops.decoder.linear = linear_by_tiles;
    ops.decoder.attention_decode_prefix = attention_decode_prefix_by_tiles;
    ops.causal_attention[int(Format::bf16)] = attention_kernels<ByTiles, uint16_t>;
    ops.forward[int(Format::bf16)] = forward_kernels<ByTiles, uint16_t>(gemm_by_tiles<Pairs>);
    ops.forward[int(Format::int8)] =
        forward_kernels<ByTiles, float>(gemm_by_tiles<TileBytes>, 1, round_rows<TileBytes, uint16_t>);
    return ops;
}

}  // namespace
}  // namespace igpt::cpu
