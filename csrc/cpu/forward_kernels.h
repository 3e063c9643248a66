// The forward pass's kernels: what the driver (forward.cpp) asks of an instruction set. Included by ops.h; layouts
// stand here.
//
// There is a table for each format of the weights. Its activations (normed rows, q, k and v, and what a product reads)
// are bf16 where bf16 weights are multiplied in pairs or tiles, else fp32, and the same beside int8 weights. What those
// are multiplied by is rounded before: each row, in fc_proj of a slice, to whole numbers of -127 to 127 with a scale of
// its own. The residual is fp32; the states that a pass gives have the format of the weights, or fp32 beside int8 ones.
// A word is 4 bytes: a number of fp32, two of bf16, or as many rounded ones, that follow each other.
//
// Rows are positions of sequences, each padded to a multiple of kRows; k and n are inputs and outputs of a product.
//   tiles     (rows, k): [rows / 16][k / 16 words][16][16 words], what a product reads and the next one's input is
//   residual  (rows, n): [rows / 32][n / 32][32][32]
//   weights   (n, k):    [n / tile][k / step][tile][step], the decoder's (decoder_kernels.h)
// k and n are rounded up to 32; what is beyond is zero in tiles, so that it adds nothing.
// Of a head, D rounded up to 32, tiles of 1 KB:
//   queries   (t, d):    [t / 16][d / 16 words][16][16 words]
//   keys      (t, d):    [t / 16][d / 16 words][16 words of d][16 positions]
//   values    (t, d):    [t / 16 words][d / 16][16 words of positions][16 of d]
#pragma once

#include <cstdint>

#include "decoder_kernels.h"

namespace igpt::cpu {

constexpr int64_t kRows = 32;  // of a block: two tiles

// y = then(x W + bias) of `rows` rows, a multiple of kRows, for the outputs begin .. end - 1, multiples of 32, and the
// inputs from .. from + depth - 1: x has these. `from` is a multiple of 32, and the bias comes with the first.
struct GemmParams {
    const Matrix* matrix;
    const void* x;       // tiles
    const float* scale;  // of each row, where x is rounded
    int64_t rows;
    int64_t first, positions;  // the first row's number; rows of a sequence: what decides the order of sums
    int64_t begin, end;
    int64_t from, depth;
    Then then;
    // Where y goes: Then::add adds it to `residual`; Then::store writes `plain`; activations write `tiles`.
    float* residual;
    void* plain;  // (rows, width)
    void* tiles;  // of the outputs from `first_output` on
    int64_t first_output;
    int64_t width;     // of y, or of these, rounded up to 32
    float* scratch;    // (rows, 64)
    const char* next;  // weights that this thread reads afterwards
};

// Rows first .. first + count - 1 of a residual of n columns, `width` rounded up; multiples of kRows.
struct NormTiles {
    const float* residual;
    const float* weight;
    int64_t n, width;
    float eps;
    int64_t first, count;
    void* tiles;  // of the same rows as `residual`
};

// Rows first .. first + count - 1 of tiles, n columns, as what a product with int8 weights reads. A scale is NaN when
// something in its row is not finite.
struct RoundRows {
    const void* from;
    int64_t n, first, count;
    void* tiles;  // of the same rows; what is beyond n in a last line is not written
    float* scale;
};

struct MeanParams {
    int64_t n, width, first, count, column;
    float* out;  // column 0's
};

// kRows positions of a sequence, from row-major q, k, v of each head, one after the other, to what attention reads.
struct HeadsParams {
    const void* qkv;  // (kRows, ld)
    int64_t ld, head_dim, heads;
    void *q, *k, *v;      // where head 0's of these positions go
    int64_t head_stride;  // from head to head, of q, k and v; numbers
    // Of each position and 32 of D: where a value is not finite. Such a value is zero in v, as 0 times it is not, and
    // would reach positions before it; `flaw` says that these positions have one.
    uint32_t* flaws;      // (heads, ..): head 0's
    int64_t flaw_stride;  // from head to head
    uint8_t* flawed;
    int64_t flawed_stride;
    // Copies of k and v as a cache has them, rows of D; null: none are asked for. `seen` of the positions are there.
    void *keys, *values;
    Format cache;  // theirs: fp32 or bf16
    int64_t cache_stride, seen;
};

// The queries of the blocks begin .. end - 1, kRows each, of one head, to tiles.
struct AttentionBlocksParams {
    const void *q, *k, *v;
    const uint32_t* flaws;
    const uint8_t* flawed;
    int64_t head_dim;
    float scale;  // greater than 0
    int64_t begin, end;
    void* tiles;            // the sequence's first row
    int64_t column, width;  // the head's first column; of all heads, rounded up to 32
    int64_t columns;        // of all heads: what lies behind is zeroed
};

struct ForwardKernels {
    Format activations, states;
    int64_t rounded;                  // bytes of a rounded number; 0: products read activations as they are
    void (*round)(const RoundRows&);  // or null
    void (*gemm)(const GemmParams&);
    void (*norm)(const NormTiles&);
    // residual = a + b in row `row`, n columns; a null: zero.
    void (*embed)(const float* a, const float* b, int64_t n, int64_t width, int64_t row, float* residual);
    // Row `row` of a residual, and of tiles, as n numbers of the format of the weights.
    void (*residual_row)(const float* residual, int64_t n, int64_t width, int64_t row, void* out);
    void (*tiles_row)(const void* tiles, int64_t n, int64_t width, int64_t row, void* out);
    // The mean of rows first .. first + count - 1 of a residual, and of tiles, for the columns column .. column + 31 of
    // n; summed row by row.
    void (*mean_residual)(const float* residual, const MeanParams&);
    void (*mean_tiles)(const void* tiles, const MeanParams&);
    void (*pack_heads)(const HeadsParams&);
    void (*causal_attention)(const AttentionBlocksParams&);
};

}  // namespace igpt::cpu
