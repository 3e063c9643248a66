// c = a b + bias of fp32 matrices, the body. Layouts: matmul_kernels.h.
//
// kSumOf of k at a time are added up by themselves, so that little is rounded away, of a strip's rows and one tile of
// b, which stay in the nearer caches meanwhile. Bound by multiply-adds (block.h).
#pragma once

#include "../matmul_kernels.h"
#include "block.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

// The fewer lanes, the fewer products a number of b enters, and the nearer it has to be: 4 to 64 KB of b.
constexpr int64_t kSumOf = 4 * kTile;
// Blocks of 4 or 6 rows; what lies behind the last row, and the last column up to 32, enters sums that nobody reads.
constexpr int kRowsTogether = 12;
static_assert(kMatmulRows % kRowsTogether == 0);

// `count` numbers or a register of them, zeros behind.
inline Vec some(const float* x, int64_t count) { return count >= kLanes ? load(x) : read(x, Part{int(count)}); }

// (rows, columns), with zeros to whole registers, to `out`, whose rows are `ld` apart.
inline void copy_matrix(const float* x, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out,
                        int64_t ld) {
    if (column == 1) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; j += kLanes) store(out + i * ld + j, some(x + i * row + j, columns - j));
        return;
    }
    for (int64_t j = 0; j < columns; j += kLanes)
        for (int64_t i = 0; i < rows; i += kLanes) {
            Ints r[kLanes];
            for (int64_t n = 0; n < kLanes; ++n)
                r[n] = bits(j + n < columns ? some(x + i + (j + n) * column, rows - i) : zero());
            transpose(r);
            for (int64_t n = 0; n < kLanes; ++n) store(out + (i + n) * ld + j, floats(r[n]));
        }
}

void matmul_pack(const MatmulParams& p, int64_t k, int64_t n, float* packed) {
    copy_matrix(p.b + k * p.b_row + n * p.b_column, p.b_row, p.b_column, least(kMatmulDepth, p.k - k),
                least(kTile, p.n - n), packed, kTile);
}

void matmul_strip(const MatmulParams& p, int64_t k, int64_t row, int64_t rows, const float* packed, float* scratch) {
    const int64_t depth = least(kMatmulDepth, p.k - k);
    float *sums = scratch, *a = scratch + kMatmulRows * kTile;
    for (int64_t from = 0; from < depth; from += kSumOf)
        copy_matrix(p.a + row * p.a_row + (k + from) * p.a_column, p.a_row, p.a_column, rows,
                    least(kSumOf, depth - from), a + from * kMatmulRows, kSumOf);
    for (int64_t n = 0; n < p.n; n += kTile, packed += kMatmulDepth * kTile) {
        const int64_t columns = least(kTile, p.n - n);
        for (int64_t from = 0; from < depth; from += kSumOf)
            for (int64_t i = 0; i < rows; i += kRowsTogether)
                run_blocks<Single, kRowsTogether>(
                    {reinterpret_cast<const char*>(a + from * kMatmulRows + i * kSumOf), kSumOf * 4, kLineBytes,
                     reinterpret_cast<const char*>(packed + from * kTile), least(kSumOf, depth - from),
                     sums + i * kTile, kTile, from == 0},
                    (columns + 31) / 32 * 32 / kLanes);
        for (int64_t i = 0; i < rows; ++i) {
            float* c = p.c + (row + i) * p.n + n;
            sweep<1>(columns, [&](int64_t j, int, auto part) {
                const Vec before = k > 0 ? read(c + j, part) : p.bias ? read(p.bias + n + j, part) : zero();
                write(c + j, load(sums + i * kTile + j) + before, part);
            });
        }
    }
}

}  // namespace
}  // namespace igpt::cpu
