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
    int64_t* work;  // (1,): candidates that lists were made of and pixels compared with; nullptr: not wanted
};

// Sixteen candidates of a cell, or what is left of them: then the ids are -1 and the colours infinitely far away.
struct alignas(64) QuantizeBlock {
    float c[3][16];
    int32_t id[16];
};

// The list of a cell, nullptr: not made, how many candidates it has, and the place of its group, -1: none.
struct QuantizeNode {
    const QuantizeBlock* list;
    int32_t size;
    int32_t group;
};

constexpr int kQuantizeNodes = 4, kQuantizeGroup = 64, kQuantizeTies = 16;

// Pixels of a cell whose list is long: they wait until so many can be compared with all of it at once.
struct alignas(64) QuantizeGroup {
    float x[3][kQuantizeGroup];
    int64_t at[kQuantizeGroup];   // their places
    int64_t tied[kQuantizeTies];  // the places of those that float64 has to decide
    const QuantizeBlock* list;
    const QuantizeBlock* line;      // for uint8; nullptr: float64 decides all
    float centre[3], slack, slope;  // of `line`; see quantize.h
    int32_t size, count, ties;
};

// Candidates on their way into blocks: scratch, each (k + 32,).
struct QuantizeKept {
    float* c[3];
    int32_t* id;
};

// The lists of one thread; see quantize.h. The arrays belong to the driver. On a cache line of its own: making a list
// writes here, and the other threads read theirs for every pixel.
struct alignas(64) QuantizeCells {
    const QuantizeBlock* root;  // all clusters, id = place; those that win nowhere infinitely far away
    const double* levels;       // (256,): v / 127.5 - 1
    const float* levels32;      // (256,): the same
    QuantizeNode* nodes;        // the root and the cells of the levels 1 .. kQuantizeNodes
    int32_t* leaf;              // (2^15,) by the upper five bits of r, g, b: a block; -1: none; -2 - group
    QuantizeBlock* blocks;      // the lists
    QuantizeGroup* groups;      // (1 + quantize_cells(group_bits),); the first is the root's
    QuantizeKept kept;
    float* near;        // (k + 16,) scratch
    int64_t capacity;   // of `blocks`, at least k / 16 + 1
    int64_t used;       // of `blocks`
    int64_t built;      // candidates that were looked at to make lists
    int64_t charged;    // likewise, less where that made lists much shorter
    int64_t scanned;    // those that groups were compared with, times pixels, twice in float64
    int64_t seen;       // pixels before the last list was made
    int64_t allowance;  // of `scanned`'s units, for lists that have saved nothing yet
    int32_t groups_used;
    float reach;  // by how much the colours of a cell stop short of its width: 1 for uint8, 0 for float32
    int32_t k;
    int32_t bits;        // the finest cells are 1 / 2^bits of the colour cube's side, 5 at most; 0: none
    int32_t group_bits;  // the finest that have groups, 3 at most
};

// Cells of the levels 1 .. level.
constexpr int64_t quantize_cells(int level) { return ((int64_t(1) << (3 * (level + 1))) - 8) / 7; }

// The drivers. They throw std::bad_alloc, never from inside the parallel region.
void quantize_u8(const QuantizeParams& params);
void quantize_f32(const QuantizeParams& params);

}  // namespace igpt::cpu
