// Nearest-cluster quantization, the body that every isa/*.cpp compiles with its own flags.
//
// Few pixels, and those whose cell is crowded, are compared with clusters in blocks (quantize_search.h).
//
// With many pixels the colour cube is cut into cells, 8 to a side, and those into cells of 16 and 32. The nearest
// cluster of any colour of a cell is among those whose smallest distance to the cell does not exceed the smallest of
// all largest distances. When a colour first falls into a cell these are looked for; where one block holds them it
// becomes the cell's list, which its pixels are compared with at once. Where clusters crowd pixels go the way above.
// Nothing is allocated here.
//
// The index is the definition's, bit by bit:
//   float32: the same operations, in the same order, and the lowest index that has the smallest distance.
//   uint8: float32 finds the candidates that can be nearest; where there are two, float64 decides as defined. With
//   u = 2^-24, levels below 1 in magnitude and D the squared distance, float32 is off by at most u (1 + 6 D), so the
//   nearest one is at most m (1 + 13 u) + 2.1 u, m being the smallest that float32 found, and further by what groups
//   span: `wider` and `further`.
//
// Bound by arithmetic. With a list a pixel costs about 25 instructions on AVX-512, and 4 cache lines that random
// colours find in L2; without, about 100 with 512 clusters.
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition).
#include "quantize_search.h"

namespace igpt::cpu {
namespace {

// Looks for what may be nearest to a colour of the cell of a level that has (r, g, b) in it, among the `blocks` blocks
// of `from`, or among all clusters, and makes a list of it; returns how many there are. More than `most` are not
// written.
int make_list(QuantizeCells& cells, int level, int r, int g, int b, const QuantizeBlock* from, int blocks,
              QuantizeBlock* list, int most) {
    const float half_pixels = 0.5f * (float(256 >> level) - cells.reach);
    const Vec half = set1(half_pixels / 127.5f);
    const int first = -(256 >> level), corner[3] = {r & first, g & first, b & first};
    Vec centre[3], least = set1(kInfinity);
    for (int c = 0; c < 3; ++c) centre[c] = set1((float(corner[c]) + half_pixels) / 127.5f - 1.0f);
    int visited = 0;
    const auto measure = [&](int at) {
        for (int i = 0; i < kWidth; i += kLanes) {
            // Distance to the box's centre along each axis; the box reaches `half` to both sides.
            Vec near = zero(), far = zero();
            for (int c = 0; c < 3; ++c) {
                const Vec d = abs(load(from[at].c[c] + i) - centre[c]);
                const Vec n = max(d - half, zero()), f = d + half;
                near = fma(n, n, near);
                far = fma(f, f, far);
            }
            store(cells.found + visited * kWidth + i, near);
            least = min(far, least);
        }
        return least;
    };
    const auto visit = [&](int at) {
        measure(at);
        cells.visited[visited++] = at;
    };
    if (from == cells.root) {
        uint64_t* chosen = cells.blocks + kQuantizeWaiting * ((cells.count + 63) / 64);
        choose(cells, centre, half, chosen, measure);
        walk(cells, chosen, visit);
    } else {
        for (int at = 0; at < blocks; ++at) visit(at);
    }
    cells.work += visited * kWidth;
    const Vec limit = loosely(cells, least);
    float kept[3][kQuantizeParent + 2 * kWidth];
    int32_t ids[kQuantizeParent + 2 * kWidth];
    int n = 0;
    for (int i = 0; i < visited * kWidth; i += kLanes) {
        const uint32_t keep = at_most(load(cells.found + i), limit);
        if (keep == 0) continue;
        const QuantizeBlock& block = from[cells.visited[i / kWidth]];
        const int to = n < most ? n : most;
        for (int c = 0; c < 3; ++c) store_marked(kept[c] + to, load(block.c[c] + i % kWidth), keep);
        store_marked(ids + to, floats(load_ints(block.id + i % kWidth)), keep);
        n += __builtin_popcount(keep);
    }
    if (n > most) return n;
    for (int i = n; i < n + kWidth; ++i) kept[0][i] = kept[1][i] = kept[2][i] = kInfinity, ids[i] = -1;
    for (int i = 0; i == 0 || i < n; i += kWidth, ++list) {
        for (int c = 0; c < 3; ++c) __builtin_memcpy(list->c[c], kept[c] + i, sizeof list->c[c]);
        __builtin_memcpy(list->id, ids + i, sizeof list->id);
    }
    return n;
}

// The entry of `leaf` for the colour (r, g, b), with its list.
__attribute__((noinline)) int32_t make_leaf(QuantizeCells& cells, int r, int g, int b) {
    int level = kQuantizeParentBits;
    const int up = 8 - level;
    QuantizeNode& parent = cells.parents[(r >> up << level | g >> up) << level | b >> up];
    if (parent.size < 0) {
        parent = {cells.used,
                  make_list(cells, level, r, g, b, cells.root, 0, cells.lists + cells.used, kQuantizeParent)};
        if (parent.size <= kQuantizeParent) cells.used += (parent.size + kWidth - 1) / kWidth;
    }
    int32_t entry = parent.size <= kWidth ? parent.first : kQuantizeCrowded;
    const int blocks = parent.size <= kQuantizeParent ? (parent.size + kWidth - 1) / kWidth : 0;
    while (entry == kQuantizeCrowded && blocks > 0 && level < cells.bits) {
        ++level;
        const QuantizeBlock* from = cells.lists + parent.first;
        if (make_list(cells, level, r, g, b, from, blocks, cells.lists + cells.used, kWidth) <= kWidth)
            entry = cells.used++;
    }
    const int shift = 8 - level, finer = kQuantizeLeafBits - level, side = 1 << finer;
    for (int i = 0; i < side; ++i)
        for (int j = 0; j < side; ++j)
            for (int l = 0; l < side; ++l) {
                const int64_t first = ((r >> shift << finer) + i) << kQuantizeLeafBits | ((g >> shift << finer) + j);
                int32_t& place = cells.leaf[first << kQuantizeLeafBits | ((b >> shift << finer) + l)];
                if (place == kQuantizeUnknown) place = entry;
            }
    return entry;
}

// A pixel of the colour (r, g, b), by its cell.
template <bool IsU8>
inline __attribute__((always_inline)) void nearest(const QuantizeParams& p, QuantizeCells& cells, int r, int g, int b,
                                                   int64_t i) {
    constexpr int shift = 8 - kQuantizeLeafBits;
    int32_t entry = cells.leaf[((r >> shift << kQuantizeLeafBits | g >> shift) << kQuantizeLeafBits) | b >> shift];
    if (__builtin_expect(entry == kQuantizeUnknown, 0)) entry = make_leaf(cells, r, g, b);
    if (__builtin_expect(entry == kQuantizeCrowded, 0)) return wait<IsU8>(p, cells, i);
    const Colour x = colour_at<IsU8>(p, cells, i);
    Wide d;
    distances<IsU8>(cells.lists[entry], x, d);
    const uint32_t lanes = within(d, limit_of<IsU8>(cells, smallest(d)));
    p.out[i] = __builtin_expect(single<IsU8>(lanes), 1)
                   ? token_of<IsU8>(p, cells, i, cells.lists[entry].id[__builtin_ctz(lanes)])
                   : settle<IsU8>(p, cells, i, lanes, cells.lists + entry, nullptr);
}

int64_t quantize_u8(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* x = static_cast<const uint8_t*>(p.x);
    const int64_t done = cells.bits == 0 ? compare<true>(p, cells, begin, end) : end;
    for (int64_t i = cells.bits > 0 ? begin : end; i < end; ++i)
        nearest<true>(p, cells, x[3 * i], x[3 * i + 1], x[3 * i + 2], i);
    flush<true>(p, cells);
    return done;
}

int64_t quantize_f32(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const int64_t done = cells.bits == 0 ? compare<false>(p, cells, begin, end) : end;
    for (int64_t i = begin; cells.bits > 0 && i < end; i += kChunk) {
        const float* x = static_cast<const float*>(p.x) + 3 * i;
        const int n = int(end - i < kChunk ? end - i : kChunk);
        alignas(64) int32_t value[3 * kChunk];
#pragma omp simd
        for (int j = 0; j < 3 * n; ++j) {
            const float v = (x[j] + 1.0f) * 127.5f;
            value[j] = v >= 0.0f && v <= 255.0f ? int32_t(v) : -1;  // NaN is outside
        }
        for (int j = 0; j < n; ++j) {
            const int32_t* at = value + 3 * j;
            if ((at[0] | at[1] | at[2]) < 0)
                wait<false>(p, cells, i + j);
            else
                nearest<false>(p, cells, at[0], at[1], at[2], i + j);
        }
    }
    flush<false>(p, cells);
    return done;
}

}  // namespace
}  // namespace igpt::cpu
