// Nearest-cluster quantization, the body that every isa/*.cpp compiles with its own flags.
//
// The colour cube is cut into cells, in levels of 2, 4, .. 2^bits to a side. The nearest cluster of any colour of a
// cell is among those whose smallest distance to the cell does not exceed the smallest of all largest distances: the
// cell's list, in rising order. Lists are made from the parent's when a colour first falls into the cell, down to the
// first level where one block of 16 holds them; there all are compared at once. When the blocks outgrow their memory
// they are thrown away and made anew: memory is bounded and nothing is allocated here.
//
// The index is the definition's, bit by bit:
//   float32: the same operations, in the same order, and the first lane that has the smallest distance.
//   uint8: float32 finds the candidates that can be nearest; where there are two, float64 decides as defined. With
//   u = 2^-24, levels below 1 in magnitude and D the squared distance, float32 is off by at most u (1 + 6 D), so the
//   nearest one is at most m (1 + 13 u) + 2.1 u, m being the smallest that float32 found: kWider and kFurther.
//
// Cells always serve uint8. float32 pixels outside [-1, 1] or NaN, and few pixels or clusters (quantize.cpp), go the
// plain way: chunks of 64 pixels, one cluster after the other, 8 FLOPs per pixel and cluster, bound by arithmetic.
// With cells a pixel costs about 25 instructions on AVX-512, and 4 cache lines that random colours find in L2.
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition).
#include "../ops.h"
#include "simd/registers.h"

namespace igpt::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kChunk = 64;    // float32 pixels
constexpr int kWidth = 16;    // candidates of a block
constexpr int kLeafBits = 5;  // of the table that finds a colour's block
constexpr float kWider = 1.0f + 1.0f / (1 << 20), kFurther = 1.0f / (1 << 22);

constexpr int kParts = kWidth / kLanes;
using Wide = Vec[kParts];

// A list ends with the first block that is not full.
inline int blocks_of(int size) { return size / kWidth + 1; }

// The ids of the parent's candidates that are near enough to `cells.list`; returns how many.
int select(QuantizeCells& cells, float limit, const QuantizeBlock* parent, int parent_size) {
    int n = 0;
#if defined(__AVX512F__)
    for (int i = 0; i < parent_size; i += kWidth) {
        const __m512i ids = _mm512_load_si512(parent[i / kWidth].id);
        __mmask16 keep = _mm512_cmp_ps_mask(load(cells.near + i), set1(limit), _CMP_LE_OQ);
        keep = _mm512_mask_cmpge_epi32_mask(keep, ids, _mm512_setzero_si512());
        _mm512_storeu_si512(cells.list + n, _mm512_maskz_compress_epi32(keep, ids));
        n += __builtin_popcount(keep);
    }
#else
    for (int i = 0; i < parent_size; ++i) {
        cells.list[n] = parent[i / kWidth].id[i % kWidth];
        n += cells.near[i] <= limit;
    }
#endif
    return n;
}

// The block of the candidates i .. i + 15 of the `n` in `cells.list`.
inline void fill(QuantizeBlock& block, const QuantizeCells& cells, int i, int n) {
#if defined(__AVX512F__)
    const __mmask16 here = n - i < kWidth ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    const __m512i ids = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), here, cells.list + i);
    _mm512_store_si512(block.id, ids);
    // Four rows of 16 to a block.
    const __m512i high = _mm512_slli_epi32(_mm512_srai_epi32(ids, 4), 6);
    const __m512i place = _mm512_or_si512(high, _mm512_and_si512(ids, _mm512_set1_epi32(15)));
    for (int c = 0; c < 3; ++c)
        _mm512_store_ps(block.c[c], _mm512_mask_i32gather_ps(set1(kInfinity), here, place, cells.root->c[c], 4));
#else
    for (int j = 0; j < kWidth; ++j) {
        const bool here = i + j < n;
        const int32_t id = here ? cells.list[i + j] : 0;
        const QuantizeBlock& all = cells.root[id / kWidth];
        block.id[j] = here ? id : -1;
        for (int c = 0; c < 3; ++c) block.c[c][j] = here ? all.c[c][id % kWidth] : kInfinity;
    }
#endif
}

// Makes the list of the cell at `at` of a level from its parent's. `reach`: by how much the colours of a cell stop
// short of its width; 1 for whole pixel values.
QuantizeNode build(QuantizeCells& cells, int level, const int (&at)[3], float reach, const QuantizeBlock* parent,
                   int parent_size) {
    const float half_pixels = 0.5f * (float(256 >> level) - reach);
    const Vec half = set1(half_pixels / 127.5f);
    Vec centre[3];
    for (int c = 0; c < 3; ++c) centre[c] = set1((float(at[c] * (256 >> level)) + half_pixels) / 127.5f - 1.0f);
    Vec least = set1(kInfinity);
    for (int i = 0; i < parent_size; i += kWidth)
        for (int j = 0; j < kWidth; j += kLanes) {
            // Distance to the box's centre along each axis; the box reaches `half` to both sides.
            Vec near = zero(), far = zero();
            for (int c = 0; c < 3; ++c) {
                const Vec d = abs(load(parent[i / kWidth].c[c] + j) - centre[c]);
                const Vec n = max(d - half, zero()), f = d + half;
                near = fma(n, n, near);
                far = fma(f, f, far);
            }
            store(cells.near + i + j, near);
            least = min(far, least);
        }
    // Wide enough for the rounding of both bounds and of float32 distances.
    float limit[kLanes];
    store(limit, fma(spread_min(least), set1(1.0001f), set1(2e-6f)));
    const int n = select(cells, limit[0], parent, parent_size);
    const QuantizeNode node{int32_t(cells.used), n};
    for (int i = 0; i < blocks_of(n); ++i) fill(cells.blocks[cells.used++], cells, i * kWidth, n);
    return node;
}

// Forgets all lists.
void clear(QuantizeCells& cells) {
    cells.used = 0;
    for (int64_t i = 0; i < quantize_cells(kQuantizeNodes); ++i) cells.nodes[i].first = -1;
    for (int64_t i = 0; i < 1 << (3 * kLeafBits); ++i) cells.leaf[i] = -1;
}

// The entry of `leaf` for the colour (r, g, b), with all lists on the way to it.
__attribute__((noinline)) int32_t make_leaf(QuantizeCells& cells, int r, int g, int b, float reach) {
    if (cells.capacity - cells.used < int64_t(blocks_of(cells.k)) * cells.bits) clear(cells);
    const QuantizeBlock* parent = cells.root;
    QuantizeNode node{0, cells.k};
    int level = 0;
    do {
        ++level;
        const int at[3] = {r >> (8 - level), g >> (8 - level), b >> (8 - level)};
        const int64_t place = quantize_cells(level - 1) + ((((int64_t(at[0]) << level) | at[1]) << level) | at[2]);
        const bool kept = level <= kQuantizeNodes;
        const QuantizeNode known = kept ? cells.nodes[place] : QuantizeNode{-1, 0};
        node = known.first < 0 ? build(cells, level, at, reach, parent, node.size) : known;
        if (kept) cells.nodes[place] = node;
        parent = cells.blocks + node.first;
    } while (level < cells.bits && node.size > kWidth);
    const int32_t entry = node.size <= kWidth ? node.first : -2 - node.first;
    const int shift = kLeafBits - level, side = 1 << shift;
    const int r0 = r >> (8 - level) << shift, g0 = g >> (8 - level) << shift, b0 = b >> (8 - level) << shift;
    for (int i = r0; i < r0 + side; ++i)
        for (int j = g0; j < g0 + side; ++j)
            for (int l = b0; l < b0 + side; ++l) cells.leaf[(((i << kLeafBits) | j) << kLeafBits) | l] = entry;
    return entry;
}

inline int32_t leaf(const QuantizeCells& cells, int r, int g, int b) {
    constexpr int shift = 8 - kLeafBits;
    return cells.leaf[(((r >> shift << kLeafBits) | g >> shift) << kLeafBits) | b >> shift];
}

// Squared distances to the candidates of a block, in the order of the definition.
inline void distances(const QuantizeBlock& block, Vec r, Vec g, Vec b, Wide& d) {
    for (int i = 0; i < kParts; ++i) {
        const Vec dr = r - load(block.c[0] + i * kLanes), dg = g - load(block.c[1] + i * kLanes),
                  db = b - load(block.c[2] + i * kLanes);
        d[i] = (dr * dr + dg * dg) + db * db;
    }
}

inline Vec smallest(const Wide& d) {
    Vec least = d[0];
    for (int i = 1; i < kParts; ++i) least = min(least, d[i]);
    return least;
}

// A bit for every candidate within the limit.
inline uint32_t within(const Wide& d, Vec limit) {
    uint32_t lanes = 0;
    for (int i = 0; i < kParts; ++i) lanes |= at_most(d[i], limit) << (i * kLanes);
    return lanes;
}

// The definition in float64, over the given lanes of a block after what came before.
struct Nearest {
    const float* clusters;
    double r, g, b;
    double best = __builtin_inf();
    int32_t index = 0;

    void take(const QuantizeBlock& block, uint32_t lanes) {
        for (; lanes; lanes &= lanes - 1) {
            const int32_t id = block.id[__builtin_ctz(lanes)];
            if (id < 0) break;
            const float* c = clusters + 3 * int64_t(id);
            const double dr = r - double(c[0]), dg = g - double(c[1]), db = b - double(c[2]);
            const double d = (dr * dr + dg * dg) + db * db;
            if (d < best) {
                best = d;
                index = id;
            }
        }
    }
};

inline Vec limit_u8(Vec least) { return fma(least, set1(kWider), set1(kFurther)); }
// Finite: a distance that is not wins nowhere.
inline Vec limit_f32(Vec least) { return min(least, set1(__FLT_MAX__)); }

// Calls use(block, lanes within the limit) for the blocks of a list until it returns true.
template <class Limit, class Use>
inline void search(const QuantizeBlock* list, Vec r, Vec g, Vec b, Limit&& limit, Use&& use) {
    Wide d;
    Vec least = set1(kInfinity);
    const QuantizeBlock* block = list;
    do {
        distances(*block, r, g, b, d);
        least = min(smallest(d), least);
    } while ((block++)->id[kWidth - 1] >= 0);
    const Vec most = limit(spread_min(least));
    for (const QuantizeBlock* end = block; list < end; ++list) {
        distances(*list, r, g, b, d);
        const uint32_t lanes = within(d, most);
        if (lanes && use(*list, lanes)) return;
    }
}

// A uint8 pixel whose candidates are more than a block.
__attribute__((noinline)) int32_t search_u8(const float* clusters, const QuantizeCells& cells,
                                            const QuantizeBlock* list, int r, int g, int b) {
    Nearest nearest{clusters, cells.levels[r], cells.levels[g], cells.levels[b]};
    search(list, set1(cells.levels32[r]), set1(cells.levels32[g]), set1(cells.levels32[b]), limit_u8,
           [&](const QuantizeBlock& block, uint32_t lanes) {
               nearest.take(block, lanes);
               return false;
           });
    return nearest.index;
}

// Several candidates of one block are nearest as far as float32 can tell.
__attribute__((noinline)) int32_t settle(const float* clusters, const QuantizeCells& cells, const QuantizeBlock& block,
                                         uint32_t lanes, int r, int g, int b) {
    Nearest nearest{clusters, cells.levels[r], cells.levels[g], cells.levels[b]};
    nearest.take(block, lanes);
    return nearest.index;
}

void quantize_u8(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* x = static_cast<const uint8_t*>(p.x);
    const float* levels = cells.levels32;
    clear(cells);
    for (int64_t i = begin; i < end; ++i) {
        const uint8_t r = x[3 * i], g = x[3 * i + 1], b = x[3 * i + 2];
        int32_t entry = leaf(cells, r, g, b);
        if (__builtin_expect(entry == -1, 0)) entry = make_leaf(cells, r, g, b, 1.0f);
        if (__builtin_expect(entry < 0, 0)) {
            p.out[i] = search_u8(p.clusters, cells, cells.blocks + (-2 - entry), r, g, b);
            continue;
        }
        const QuantizeBlock& block = cells.blocks[entry];
        Wide d;
        distances(block, set1(levels[r]), set1(levels[g]), set1(levels[b]), d);
        const uint32_t lanes = within(d, limit_u8(spread_min(smallest(d))));
        if (__builtin_expect(lanes & (lanes - 1), 0))
            p.out[i] = settle(p.clusters, cells, block, lanes, r, g, b);
        else
            p.out[i] = block.id[__builtin_ctz(lanes)];
    }
}

void quantize_plain(const float* x, const float* clusters, int k, int n, int64_t* out) {
    alignas(64) float r[kChunk], g[kChunk], b[kChunk], best[kChunk];
    alignas(64) int32_t index[kChunk];
    for (int j = 0; j < kChunk; ++j) {
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
        for (int j = 0; j < kChunk; ++j) {
            const float dr = r[j] - c0, dg = g[j] - c1, db = b[j] - c2;
            const float d = (dr * dr + dg * dg) + db * db;
            const bool nearer = d < best[j];
            best[j] = nearer ? d : best[j];
            index[j] = nearer ? i : index[j];
        }
    }
    for (int j = 0; j < n; ++j) out[j] = index[j];
}

// A float32 pixel inside [-1, 1] whose pixel value is at (r, g, b).
inline int32_t nearest_f32(QuantizeCells& cells, const float* x, const int32_t* at) {
    const Vec r = set1(x[0]), g = set1(x[1]), b = set1(x[2]);
    int32_t entry = leaf(cells, at[0], at[1], at[2]);
    if (__builtin_expect(entry == -1, 0)) entry = make_leaf(cells, at[0], at[1], at[2], 0.0f);
    int32_t index = 0;
    if (__builtin_expect(entry < 0, 0)) {
        search(cells.blocks + (-2 - entry), r, g, b, limit_f32, [&](const QuantizeBlock& block, uint32_t lanes) {
            index = block.id[__builtin_ctz(lanes)];
            return true;
        });
        return index;
    }
    const QuantizeBlock& block = cells.blocks[entry];
    Wide d;
    distances(block, r, g, b, d);
    const uint32_t lanes = within(d, limit_f32(spread_min(smallest(d))));
    return __builtin_expect(lanes, 1) ? block.id[__builtin_ctz(lanes)] : 0;
}

void quantize_f32(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* all = static_cast<const float*>(p.x);
    if (cells.bits > 0) clear(cells);
    for (int64_t i = begin; i < end; i += kChunk) {
        const float* x = all + 3 * i;
        const int n = int(end - i < kChunk ? end - i : kChunk);
        alignas(64) int32_t value[3 * kChunk];
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
        for (int j = 0; j < n; ++j) p.out[i + j] = nearest_f32(cells, x + 3 * j, value + 3 * j);
    }
}

}  // namespace
}  // namespace igpt::cpu
