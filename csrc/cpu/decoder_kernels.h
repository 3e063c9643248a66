// The decoder's kernels: what a decode step asks of an instruction set. Included by ops.h; layouts stand here.
//
// A weight is 4 bytes (fp32), 2 (bf16) or 1 (int8); `step` of them that follow each other along k lie side by side:
// 1 in fp32, 2 in bf16, `int8_step` in int8, so that a register of 32-bit lanes (or, int8_step = 1, of bytes) meets
// one broadcast group of inputs.
//   matrix  (n, k):   [n / tile][k / step][tile][step], n padded to whole tiles with zeros
//   keys    (t, d):   the same with t as n
//   values  (t, d):   [t / step][d_padded][step]: the same with d as n, in one tile of d_padded
// So the three products of a step, x W, q K^T and p V, are one kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace igpt::cpu {

// What happens to x W + bias: an Activation (store: none), or it is added to y.
enum class Then : int32_t { store = -1, quick_gelu = 0, gelu_tanh = 1, gelu_erf = 2, add = 3 };

// A packed matrix. The vectors have as many entries as the padded n.
struct Matrix {
    const char* data;
    const float* bias;    // or null
    const float* scale;   // int8: of each output, else null
    const int32_t* sums;  // int8: of each output's weights, else null
    int64_t n;            // padded to whole tiles
    int64_t k;            // a multiple of 8
    Format format;
};

// The inputs of a product, one row for a sequence. Where the instruction set multiplies bytes, int8 weights meet
// each row as 15 bits: x = scale (128 (high - 128) + low), NEON's as 14 and a sign: x = scale (128 high + low), high
// signed; where it multiplies 16-bit integers, x = scale half.
struct Rows {
    const float* x;
    int64_t ld;  // from row to row, of all four
    int64_t count;
    uint8_t* high;
    uint8_t* low;
    uint16_t* half;  // bf16, where the instruction set multiplies them; int8 weights: 16-bit integers, the same
    float* scale;    // (count,)
    // Several rows, where there are tiles: groups of 64 bytes along k, [k / 32][row][32] of bf16 and
    // [k / 64][row][2][64] of high and low halves.
    char* tiles;
};

// What `tiles` takes; a tile has 16 rows whether they are there or not.
constexpr int64_t tiles_bytes(int64_t rows, int64_t k) { return (k + 63) / 64 * rows * 128 + 16 * 64; }
// Rows that `scratch` of a product has room for.
constexpr int64_t sums_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

// One tile of a matrix from a checkpoint's, whose element (k, n) is at source[k stride_k + n stride_n].
struct PackParams {
    const void* source;
    bool is_bf16;  // else fp32
    int64_t stride_k, stride_n;
    const int64_t* order;  // (count,): the source's column for each output of the tile
    int64_t count;         // at most `tile`
    int64_t k;
    Format format;
    char* out;
    float* scale;   // int8: (tile,)
    int32_t* sums;  // int8: (tile,)
};

struct LinearParams {
    const Matrix* matrix;
    const Rows* rows;
    float* y;
    int64_t ld;
    Then then;
    int64_t begin, end;  // outputs; multiples of `lanes`
    float* scratch;      // (sums_rows(rows), 2, tile)
    const char* next;    // what this thread reads afterwards
};

// One head of one sequence. `position` is the newest key's.
struct AttentionDecodeParams {
    const float *q, *k, *v;  // (d,)
    float* out;              // (d,)
    char *keys, *values;
    float *key_scale, *value_scale;  // int8: of each position, else null
    int32_t* key_sums;               // int8: of each position's key
    int64_t position;
    int64_t head_dim;  // a multiple of 8, at most max_head_dim
    float scale;
    Format format;
    const char* next;
    float* state;  // (2,) or null: takes the largest score and the sum of e^(score - largest)
};

constexpr int64_t max_head_dim = 256;
constexpr int64_t shared_rows = 8;  // sequences that attend to their primer together, at most
// Positions of `values` are allocated in multiples of it, and zero before they are written.
constexpr int64_t value_rows = 4;

struct DecoderKernels {
    int64_t lanes;      // of a register
    int64_t tile;       // outputs of a packed tile
    int64_t int8_step;  // 4: int8 weights are multiplied as bytes; 2: as 16-bit integers; 1: they become fp32
    void (*pack)(const PackParams& params);
    // out[i] = x[i] weight[i] / sqrt(mean(x^2) + eps)
    void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
    // out[i] = a[i] + b[i]
    void (*sum)(const float* a, const float* b, int64_t n, float* out);
    // Fills what of high, low, scale and half a product of rows of k takes.
    void (*split)(const Rows& rows, int64_t k, Format format);
    void (*linear)(const LinearParams& params);
    // Writes k and v into the cache; the positions before have been written already.
    void (*remember)(const AttentionDecodeParams& params);
    // out = softmax(scale q K^T) V over the positions 0 .. position.
    void (*attention_decode)(const AttentionDecodeParams& params);
    // The same for `count` sequences, shared_rows at most, over all of a primer's positions and each sequence's own
    // 0 .. position after them. The primer's q, k, v and out are not used.
    void (*attention_decode_prefix)(const AttentionDecodeParams& primer, const AttentionDecodeParams* sequences,
                                    int64_t count);
    // Prefetches what `remember` will write, and what `attention_decode` would have to wait for at its beginning.
    void (*expect)(const AttentionDecodeParams& params);
};

}  // namespace igpt::cpu
