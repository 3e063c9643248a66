// Nearest-cluster quantization on the CPU: what its body (quantize.h) is given, and the driver (quantize.cpp). Included
// by ops.h.
#pragma once

#include <cstdint>

namespace igpt::cpu {

// Nearest colour cluster: out[i] = argmin_k sum_c (x[i][c] - clusters[k][c])^2, the lowest k on ties.
//   uint8 input stands for v / 127.5 - 1 and is evaluated in float64: exact but for true ties.
//   float input is evaluated in float32, in the order (dr^2 + dg^2) + db^2: the indices of reference.py, bit by bit.
//   A distance that is NaN or infinite wins nowhere; where all are, the index is 0.
struct QuantizeParams {
    const void* x;          // (n, 3) uint8 or float32
    const float* clusters;  // (k, 3), k >= 1
    int64_t* out;           // (n,)
    int64_t n;
    int32_t k;
    int32_t threads;
};

// Sixteen candidates of a cell, or what is left of them: then the ids are -1 and the colours infinitely far away.
struct alignas(64) QuantizeBlock {
    float c[3][16];
    int32_t id[16];
};

// Where the list of a cell starts, in blocks, and how many candidates it has; first = -1: not made yet.
struct QuantizeNode {
    int32_t first;
    int32_t size;
};

// The lists of one thread; see quantize.h. The arrays belong to the driver. On a cache line of its own: making a list
// writes here, and the other threads read theirs for every pixel.
struct alignas(64) QuantizeCells {
    const QuantizeBlock* root;  // all clusters, id = place; those that win nowhere infinitely far away
    const double* levels;       // (256,): v / 127.5 - 1
    const float* levels32;      // (256,): the same
    QuantizeNode* nodes;        // the cells of the levels 1 .. kQuantizeNodes
    int32_t* leaf;          // (2^15,) by the upper five bits of r, g, b: a block; -2 - the first of several; -1: none
    QuantizeBlock* blocks;  // the lists
    int32_t* list;          // (k + 16,) scratch
    float* near;            // (k + 16,) scratch
    int64_t capacity;       // of `blocks`, at least bits (k / 16 + 1)
    int64_t used;           // of `blocks`
    int32_t k;
    int32_t bits;  // the finest cells are 1 / 2^bits of the colour cube's side, 5 at most; 0: none
};

constexpr int kQuantizeNodes = 4;

// Cells of the levels 1 .. level.
constexpr int64_t quantize_cells(int level) { return ((int64_t(1) << (3 * (level + 1))) - 8) / 7; }

// The drivers. They throw std::bad_alloc, never from inside the parallel region.
void quantize_u8(const QuantizeParams& params);
void quantize_f32(const QuantizeParams& params);

}  // namespace igpt::cpu
