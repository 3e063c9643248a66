// c = a b + bias of fp32 matrices as they lie in tensors: what an op hands to its driver (matmul.cpp).
//
// kMatmulDepth of k at a time, b is packed once, [n / tile][kMatmulDepth][tile], and strips of rows of a by the threads
// that multiply them with all of it: 2 m n k FLOPs for m k + n k numbers that are packed. Each sum is added up in the
// order of k, whatever the strips: results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace igpt::cpu {

// Element (i, j) of a is a[i a_row + j a_column], of b likewise; one of the two strides is 1.
struct MatmulParams {
    const float* a;  // (m, k)
    int64_t a_row, a_column;
    const float* b;  // (k, n)
    int64_t b_row, b_column;
    const float* bias;  // (n,), or null
    float* c;           // (m, n), contiguous
    int64_t m, n, k;
    int32_t threads;
};

constexpr int64_t kMatmulDepth = 512, kMatmulRows = 240;  // of a strip: so much of a fits into the second cache

struct MatmulKernels {
    int64_t tile;
    // Numbers of scratch for `strip`.
    int64_t scratch;
    // Columns n .. n + tile - 1 of b, rows k .. k + kMatmulDepth - 1, to (kMatmulDepth, tile).
    void (*pack)(const MatmulParams&, int64_t k, int64_t n, float* packed);
    // Rows row .. row + rows - 1, at most kMatmulRows, of c: what this depth adds; the first one writes.
    void (*strip)(const MatmulParams&, int64_t k, int64_t row, int64_t rows, const float* packed, float* scratch);
};

// The driver. Throws std::bad_alloc.
void matmul(const MatmulParams& params);

}  // namespace igpt::cpu
