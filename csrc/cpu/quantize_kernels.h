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
    int64_t* work;  // (1,): boxes and candidates that pixels and cells were compared with; nullptr: not wanted
};

constexpr int kQuantizeWidth = 16;      // candidates of a block
constexpr int kQuantizeWaiting = 16;    // pixels
constexpr int kQuantizeParentBits = 3;  // the coarsest cells
constexpr int kQuantizeParent = 64;     // candidates of those at most; with more, finer lists would be long as well
constexpr int kQuantizeFew = 12;        // of a group, which float64 alone compares
constexpr int kQuantizeTogether = 4;    // pixels at most that a group is compared with at once
constexpr int kQuantizeMembers = 64;    // of a group, in a block
constexpr int kQuantizeLeafBits = 5;    // the finest cells are 1 / 32 of the colour cube's side

// Sixteen candidates, or what is left of them: then the ids are -1 and the colours infinitely far away.
struct alignas(64) QuantizeBlock {
    float c[3][kQuantizeWidth];
    int32_t id[kQuantizeWidth];
};

// Boxes about the colours of so many blocks; where there is no block any more, far away from everything.
struct alignas(64) QuantizeBoxes {
    float middle[3][kQuantizeWidth], half[3][kQuantizeWidth];
};

// The list of one of the coarsest cells, by its first block; -1: not made.
struct QuantizeNode {
    int32_t first, size;
};

// Clusters that are almost equal, and stand in the blocks as one, the first of them, with the id -2 - (index of the
// group): their ids, and, where they are many, blocks of what they differ by from the first.
struct QuantizeGroup {
    int32_t begin, count, block;
};
struct alignas(64) QuantizeMembers {
    float c[3][kQuantizeMembers], square[kQuantizeMembers];  // the sum of c^2; where there is none any more, infinite
};

// Memory on cache lines of its own.
struct alignas(64) QuantizeLanes {
    float v[kQuantizeWidth];
};

// What one thread works with; see quantize.h and quantize_search.h. The arrays belong to the driver. On a cache line of
// its own: the other threads read theirs for every pixel.
struct alignas(64) QuantizeCells {
    const float* colours;        // (k, 3), what a scan compares with
    const int32_t* tokens;       // (k,) their ids as in blocks; nullptr: 0 .. k - 1
    const QuantizeBlock* root;   // (count,): the same in blocks
    QuantizeBlock* unfilled;     // root, before it is first needed
    const QuantizeBoxes* boxes;  // of root's blocks; nullptr: the blocks are in no order
    const double* levels;        // (256,): v / 127.5 - 1
    const float* levels32;       // (256,): the same
    const QuantizeGroup* groups;
    const int32_t* ids;  // of the groups
    const QuantizeMembers* members;
    float radius;           // of the groups: the largest difference in a channel
    float wider, further;   // the nearest one is at most `wider` times the smallest distance and `further` away
    float *near, *middle;   // (padded count,) scratch
    uint64_t* blocks;       // (kQuantizeWaiting + 1, count / 64) scratch
    float* found;           // (count, 16) and (kQuantizeTogether, stride) scratch
    int32_t* visited;       // (count,) scratch
    int32_t* leaf;          // (2^15,) by the upper five bits of r, g, b: a block of lists, or kQuantizeUnknown, ..
    QuantizeNode* parents;  // (2^9,) by the upper three bits
    QuantizeBlock* lists;   // (2^(3 bits) + 2^9 kQuantizeParent / 16,)
    int64_t at[kQuantizeWaiting];  // the pixels that wait
    int32_t waiting;
    int64_t work;
    int32_t used;  // of `lists`
    int32_t count;
    int32_t k;
    int32_t stride;  // of `found`: 80 for every block of the largest group
    bool stops;      // where almost equal clusters, not in groups yet, keep most pixels waiting
    int32_t bits;    // the finest cells are 1 / 2^bits of the colour cube's side; 0: none
    float reach;     // by how much the colours of a cell stop short of its width: 1 for uint8, 0 for float32
};

constexpr int32_t kQuantizeUnknown = -1, kQuantizeCrowded = -2;

// The drivers. They throw std::bad_alloc, never from inside the parallel region.
void quantize_u8(const QuantizeParams& params);
void quantize_f32(const QuantizeParams& params);

}  // namespace igpt::cpu
