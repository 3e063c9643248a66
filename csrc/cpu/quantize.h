// Nearest-cluster quantization, the body that every isa_*.cpp compiles with its own flags.
//
// The colour cube is cut into cells, in levels of 2, 4, .. 2^bits to a side. The nearest cluster of any colour of a
// cell is among those whose smallest distance to the cell does not exceed the smallest of all largest distances. A
// cell's list of those is made when a colour first falls into it, from its parent's list, so it costs little more
// than one pixel; the comparison within a list is the definition itself, so the result is the definition's. When the
// lists outgrow their memory they are thrown away and made anew: memory is bounded and nothing is allocated here.
//
// float32 pixels outside [-1, 1] or NaN, few pixels and few clusters go the plain way: blocks of 64 pixels, one
// cluster after the other, 8 FLOPs per pixel and cluster, bound by arithmetic. Everything else is bound by the
// instructions of the comparisons of a list. No intermediate grows with n.
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition).
#include "ops.h"

namespace igpt::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kBlock = 64;

inline float magnitude(float x) { return x < 0.0f ? -x : x; }

// Makes the list of the cell at (r, g, b) of a level from the `parent_size` candidates of its parent.
// `reach`: by how much the colours of a cell stop short of its width; 1 for whole pixel values.
void build(QuantizeCells& cells, int64_t cell, int level, const int (&at)[3], float reach, const int32_t* parent,
           int parent_size) {
    const float half = 0.5f * (float(256 >> level) - reach);
    float centre[3];
    for (int c = 0; c < 3; ++c) centre[c] = float(at[c] * (256 >> level)) + half;
    const float *c0 = cells.axes, *c1 = c0 + cells.k, *c2 = c1 + cells.k;
    float* near = cells.near;
    float limit = kInfinity;
#pragma omp simd reduction(min : limit)
    for (int i = 0; i < parent_size; ++i) {
        const int32_t j = parent[i];
        // Distance to the box's centre along each axis; the box reaches `half` to both sides.
        const float d0 = magnitude(c0[j] - centre[0]), d1 = magnitude(c1[j] - centre[1]),
                    d2 = magnitude(c2[j] - centre[2]);
        const float n0 = d0 > half ? d0 - half : 0.0f, n1 = d1 > half ? d1 - half : 0.0f,
                    n2 = d2 > half ? d2 - half : 0.0f;
        const float f0 = d0 + half, f1 = d1 + half, f2 = d2 + half;
        near[i] = n0 * n0 + n1 * n1 + n2 * n2;
        const float far = f0 * f0 + f1 * f1 + f2 * f2;
        limit = far < limit ? far : limit;
    }
    // Wide enough for the rounding of both bounds and of float32 distances, in units of squared pixel values.
    limit = limit * 1.0001f + 0.01f;
    int32_t* list = cells.list + cells.used;
    int n = 0;
    for (int i = 0; i < parent_size; ++i) {
        list[n] = parent[i];
        n += !(near[i] > limit);
    }
    cells.first[cell] = cells.used;
    cells.size[cell] = n;
    cells.used += n;
}

inline int64_t cell_index(int level, int r, int g, int b) {
    return quantize_cells(level - 1) + ((((int64_t(r) << level) | g) << level) | b);
}

// Makes the lists of all levels down to the finest that are missing at pixel (r, g, b).
__attribute__((noinline)) void build_path(QuantizeCells& cells, int r, int g, int b, float reach) {
    if (cells.capacity - cells.used < int64_t(cells.k) * cells.bits) {
        cells.used = cells.k;
        for (int64_t i = 0, n = quantize_cells(cells.bits); i < n; ++i) cells.first[i] = -1;
    }
    const int32_t* parent = cells.list;
    int parent_size = cells.k;
    for (int level = 1; level <= cells.bits; ++level) {
        const int at[3] = {r >> (8 - level), g >> (8 - level), b >> (8 - level)};
        const int64_t cell = cell_index(level, at[0], at[1], at[2]);
        if (cells.first[cell] < 0) build(cells, cell, level, at, reach, parent, parent_size);
        parent = cells.list + cells.first[cell];
        parent_size = cells.size[cell];
    }
}

// The candidates of the finest cell around (r, g, b) in 0..255, in rising order; `n` of them.
inline const int32_t* candidates(QuantizeCells& cells, int r, int g, int b, float reach, int& n) {
    const int shift = 8 - cells.bits;
    const int64_t cell = cell_index(cells.bits, r >> shift, g >> shift, b >> shift);
    if (cells.first[cell] < 0) build_path(cells, r, g, b, reach);
    n = cells.size[cell];
    return cells.list + cells.first[cell];
}

// The definition over a list, in T.
template <typename T>
inline int32_t nearest(const T* clusters, const int32_t* list, int n, T r, T g, T b) {
    T best = kInfinity;
    int32_t index = 0;
    for (int j = 0; j < n; ++j) {
        const T* c = clusters + 3 * int64_t(list[j]);
        const T dr = r - c[0], dg = g - c[1], db = b - c[2];
        const T d = (dr * dr + dg * dg) + db * db;
        const bool nearer = d < best;
        best = nearer ? d : best;
        index = nearer ? list[j] : index;
    }
    return index;
}

void quantize_u8(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* x = static_cast<const uint8_t*>(p.x);
    const double* levels = cells.levels;
    for (int64_t i = begin; i < end; ++i) {
        const uint8_t r = x[3 * i], g = x[3 * i + 1], b = x[3 * i + 2];
        int n;
        const int32_t* list = candidates(cells, r, g, b, 1.0f, n);
        p.out[i] = nearest(cells.wide, list, n, levels[r], levels[g], levels[b]);
    }
}

void quantize_plain(const float* x, const float* clusters, int k, int n, int64_t* out) {
    alignas(64) float r[kBlock], g[kBlock], b[kBlock], best[kBlock];
    alignas(64) int32_t index[kBlock];
    for (int j = 0; j < kBlock; ++j) {
        const int from = j < n ? j : 0;
        r[j] = x[3 * from];
        g[j] = x[3 * from + 1];
        b[j] = x[3 * from + 2];
        best[j] = kInfinity;
        index[j] = 0;
    }
    for (int i = 0; i < k; ++i) {
        const float c0 = clusters[3 * int64_t(i)], c1 = clusters[3 * int64_t(i) + 1], c2 = clusters[3 * int64_t(i) + 2];
#pragma omp simd
        for (int j = 0; j < kBlock; ++j) {
            const float dr = r[j] - c0, dg = g[j] - c1, db = b[j] - c2;
            const float d = (dr * dr + dg * dg) + db * db;
            const bool nearer = d < best[j];
            best[j] = nearer ? d : best[j];
            index[j] = nearer ? i : index[j];
        }
    }
    for (int j = 0; j < n; ++j) out[j] = index[j];
}

void quantize_f32(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* all = static_cast<const float*>(p.x);
    for (int64_t i = begin; i < end; i += kBlock) {
        const float* x = all + 3 * i;
        const int n = int(end - i < kBlock ? end - i : kBlock);
        alignas(64) int32_t value[3 * kBlock];
        int outside = cells.bits == 0;
#pragma omp simd reduction(| : outside)
        for (int j = 0; j < 3 * n; ++j) {
            const float v = (x[j] + 1.0f) * 127.5f;
            const bool inside = v >= 0.0f && v <= 255.0f;  // false for NaN
            outside |= !inside;
            value[j] = inside ? int32_t(v) : 0;
        }
        if (outside) {
            quantize_plain(x, p.clusters, p.k, n, p.out + i);
            continue;
        }
        for (int j = 0; j < n; ++j) {
            int size;
            const int32_t* list = candidates(cells, value[3 * j], value[3 * j + 1], value[3 * j + 2], 0.0f, size);
            p.out[i + j] = nearest(p.clusters, list, size, x[3 * j], x[3 * j + 1], x[3 * j + 2]);
        }
    }
}

}  // namespace
}  // namespace igpt::cpu
