// Nearest-cluster quantization, the body that every isa/*.cpp compiles with its own flags.
//
// The colour cube is cut into cells, in levels of 2, 4, .. 2^bits to a side. The nearest cluster of any colour of a
// cell is among those whose smallest distance to the cell does not exceed the smallest of all largest distances: the
// cell's list, in rising order. Lists are made from the parent's when a colour first falls into the cell, down to the
// first level where one block of 16 holds them; there all are compared at once. Where clusters crowd, or lists cost
// more than they have saved, or their memory is full, the list of a pixel is long: then it waits in the group of a
// coarse cell, and 64 pixels at a time are compared with that cell's list, pixels in lanes. So the work
// stays near that of comparing all with all, but where float64 has to decide most of it: at most about twice.
// Nothing is allocated here.
//
// The index is the definition's, bit by bit:
//   float32: the same operations, in the same order, and the first lane that has the smallest distance.
//   uint8: float32 finds the candidates that can be nearest; where there are two, float64 decides as defined. With
//   u = 2^-24, levels below 1 in magnitude and D the squared distance, float32 is off by at most u (1 + 6 D), so the
//   nearest one is at most m (1 + 13 u) + 2.1 u, m being the smallest that float32 found: kWider and kFurther.
//   uint8 in a group: with c measured from the list's centre m, and y = x - m, the order of |x - c|^2 is that of
//   |c|^2 - 2 c.y: 3 FMA. With |c| <= R and |y| <= Y its error is at most u (8 R^2 + 12 R Y + 2 R): of the constants
//   and of three roundings, or six without FMA. The two best that are not further apart than twice that, and what
//   float64 may add (QuantizeGroup::slack), leave the pixel to float64 and the whole list.
//
// float32 pixels outside [-1, 1] or NaN, and few pixels or clusters (quantize.cpp), go to the group of all clusters:
// 8 FLOPs per pixel and cluster, bound by arithmetic. With cells a pixel costs about 25 instructions on AVX-512, and
// 4 cache lines that random colours find in L2.
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition).
#include "../ops.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kChunk = 64;     // float32 pixels
constexpr int kBuild = 20;     // scanned candidates that one costs in the making of a list; twice what was measured
constexpr int kRegisters = 2;  // of pixels in a scan
constexpr int kWidth = 16;     // candidates of a block
constexpr int kLeafBits = 5;   // of the table that finds a colour's block
constexpr float kWider = 1.0f + 1.0f / (1 << 20), kFurther = 1.0f / (1 << 22);

constexpr int kParts = kWidth / kLanes;
using Wide = Vec[kParts];

// Of a list, one at least.
inline int blocks_of(int size) { return size / kWidth + 1; }

// The parent's candidates that are near enough to `cells.kept`, and what fills up a block; returns how many.
int select(QuantizeCells& cells, float limit, const QuantizeBlock* parent, int parent_size) {
    QuantizeKept& kept = cells.kept;
    int n = 0;
    for (int i = 0; i < parent_size; i += kLanes) {
        const QuantizeBlock& block = parent[i / kWidth];
        const int at = i % kWidth, count = parent_size - i;
        uint32_t keep = at_most(load(cells.near + i), set1(limit));
        if (count < kLanes) keep &= (1u << count) - 1;
        for (int c = 0; c < 3; ++c) store_marked(kept.c[c] + n, load(block.c[c] + at), keep);
        store_marked(kept.id + n, floats(load_ints(block.id + at)), keep);
        n += __builtin_popcount(keep);
    }
    for (int i = n; i < n + kWidth; ++i) {
        for (int c = 0; c < 3; ++c) kept.c[c][i] = kInfinity;
        kept.id[i] = -1;
    }
    return n;
}

// Makes the list of the cell at `at` of a level from its parent's; false when there is no memory for it, or
// when that and all that has been done would take longer than comparing the pixels so far with every cluster, and more
// than the allowance.
bool build(QuantizeCells& cells, int level, const int (&at)[3], const QuantizeNode& from, QuantizeNode& node) {
    const QuantizeBlock* parent = from.list;
    const int parent_size = from.size;
    if (cells.capacity - cells.used < 2 * blocks_of(parent_size)) return false;
    if (kBuild * (cells.charged + parent_size) + cells.scanned > cells.allowance + cells.k * cells.seen) return false;
    const float half_pixels = 0.5f * (float(256 >> level) - cells.reach);
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
    cells.built += parent_size + n;
    // A list of half the length is worth it.
    cells.charged += 2 * n <= parent_size ? (parent_size + n) / 2 : parent_size + n;
    node = {cells.blocks + cells.used, n, -1};
    for (int i = 0; i < blocks_of(n); ++i) {
        QuantizeBlock& block = cells.blocks[cells.used++];
        for (int c = 0; c < 3; ++c) __builtin_memcpy(block.c[c], cells.kept.c[c] + i * kWidth, sizeof block.c[c]);
        __builtin_memcpy(block.id, cells.kept.id + i * kWidth, sizeof block.id);
    }
    if (level <= cells.group_bits && n > kWidth) cells.used += blocks_of(n);  // for the group's `line`
    return true;
}

// The list of a group, measured from the middle of its clusters, into `line`: -2 c, and |c|^2 in place of the ids.
void measure(QuantizeGroup& group, QuantizeBlock* line, const float (&corner)[3], float side) {
    const Vec nowhere = set1(kInfinity);
    float lane[kLanes], far = 0.0f;
    for (int c = 0; c < 3; ++c) {
        Vec low = nowhere, high = nowhere;  // the latter negated
        for (int i = 0; i < group.size; i += kLanes) {
            const Vec v = load(group.list[i / kWidth].c[c] + i % kWidth);
            low = min(v, low);
            high = min(v < nowhere ? zero() - v : nowhere, high);
        }
        store(lane, (spread_min(low) - spread_min(high)) * set1(0.5f));
        group.centre[c] = lane[0];
        const float below = lane[0] - corner[c], above = corner[c] + side - lane[0],
                    most = below > above ? below : above;
        far += most * most;
    }
    Vec largest = zero();
    for (int i = 0; i < group.size; i += kLanes) {
        const QuantizeBlock& from = group.list[i / kWidth];
        QuantizeBlock& to = line[i / kWidth];
        const auto here = load(from.c[0] + i % kWidth) < nowhere;
        Vec square = zero();
        for (int c = 0; c < 3; ++c) {
            const Vec e = load(from.c[c] + i % kWidth) - set1(group.centre[c]);
            square = fma(e, e, square);
            store(to.c[c] + i % kWidth, here ? set1(-2.0f) * e : zero());
        }
        largest = max(here ? square : zero(), largest);
        square = here ? square : nowhere;
        __builtin_memcpy(to.id + i % kWidth, &square, sizeof square);
    }
    // R Y <= R (typical + Y^2 / typical) / 2, whose second part a pixel has of its own.
    const float r = __builtin_sqrtf(reduce_max(largest)), y = __builtin_sqrtf(far), typical = 0.58f * y;
    group.slope = 0x1.05p-24f * r * 12.0f / typical;
    group.slack = 0x1.05p-24f * r * (16.0f * r + 12.0f * typical + 4.0f) + 0x1p-49f * (r + y) * (r + y);
    group.line = group.slack < 1.0f ? line : nullptr;
}

// The place of the group of a node, whose cell is the level's that has the colour (r, g, b) in it.
int32_t group_of(QuantizeCells& cells, QuantizeNode& node, int level, int r, int g, int b) {
    if (node.group >= 0) return node.group;
    node.group = cells.groups_used++;
    QuantizeGroup& group = cells.groups[node.group];
    group.list = node.list;
    group.size = node.size;
    group.count = group.ties = 0;
    if (cells.reach > 0.0f) {
        const int first = -(256 >> level);
        const float corner[3] = {cells.levels32[r & first], cells.levels32[g & first], cells.levels32[b & first]};
        QuantizeBlock* line = cells.blocks + (level ? node.list - cells.blocks + blocks_of(node.size) : 0);
        measure(group, line, corner, float(256 >> level) / 127.5f);
        cells.built += 2 * node.size;
    }
    return node.group;
}

// Forgets all lists and begins the group of the root.
void clear(QuantizeCells& cells) {
    cells.nodes[0] = {cells.root, cells.k, -1};
    cells.used = blocks_of(cells.k);  // the root's `line`
    cells.groups_used = 0;
    group_of(cells, cells.nodes[0], 0, 0, 0, 0);
    if (cells.bits == 0) return;
    for (int64_t i = 1; i <= quantize_cells(kQuantizeNodes); ++i) cells.nodes[i].list = nullptr;
    for (int64_t i = 0; i < 1 << (3 * kLeafBits); ++i) cells.leaf[i] = -1;
}

inline bool shorter(const QuantizeNode& node, int than) { return 8 * int64_t(node.size) <= 7 * int64_t(than); }

// Whether the cell of a node is worth cutting. The first ones may be too coarse to tell; a group gains from a shorter
// list; below the groups the lists have to come down to a block, if they go on as from the parent, of size `before`.
inline bool promises(const QuantizeCells& cells, const QuantizeNode& node, int level, int before) {
    if (level < 2 || level < cells.group_bits) return level < 2 || shorter(node, before);
    float last = float(node.size);
    for (int i = level; i < cells.bits; ++i) last *= float(node.size) / float(before);
    return last < kWidth;
}

// What to do with the colour (r, g, b), an entry of `leaf`, with all lists on the way to it.
__attribute__((noinline)) int32_t make_leaf(QuantizeCells& cells, int r, int g, int b) {
    QuantizeNode fine{}, *node = cells.nodes, *coarse = node;
    int level = 0, filled = 0, coarse_level = 0, before = cells.k;
    while (level < cells.bits && (level == 0 || (node->size > kWidth && promises(cells, *node, level, before)))) {
        const int next = level + 1, at[3] = {r >> (8 - next), g >> (8 - next), b >> (8 - next)};
        const int64_t place = 1 + quantize_cells(level) + ((((int64_t(at[0]) << next) | at[1]) << next) | at[2]);
        QuantizeNode* to = next <= kQuantizeNodes ? cells.nodes + place : &fine;
        if (to->list == nullptr && !build(cells, next, at, *node, *to)) {
            filled = next;
            break;
        }
        before = node->size;
        node = to;
        level = filled = next;
        if (level <= cells.group_bits && shorter(*node, coarse->size)) coarse = node, coarse_level = level;
    }
    const bool few = level > 0 && node->size <= kWidth;
    const int32_t entry =
        few ? int32_t(node->list - cells.blocks) : -2 - group_of(cells, *coarse, coarse_level, r, g, b);
    const int shift = kLeafBits - filled, side = 1 << shift;
    const int r0 = r >> (8 - filled) << shift, g0 = g >> (8 - filled) << shift, b0 = b >> (8 - filled) << shift;
    for (int i = r0; i < r0 + side; ++i)
        for (int j = g0; j < g0 + side; ++j)
            for (int l = b0; l < b0 + side; ++l) {
                int32_t& place = cells.leaf[(((i << kLeafBits) | j) << kLeafBits) | l];
                if (place == -1) place = entry;
            }
    return entry;
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

// Several candidates of one block are nearest as far as float32 can tell: the definition in float64 over those lanes.
__attribute__((noinline)) int32_t settle(const float* clusters, const QuantizeCells& cells, const QuantizeBlock& block,
                                         uint32_t lanes, int r, int g, int b) {
    double best = __builtin_inf();
    int32_t index = 0;
    for (; lanes; lanes &= lanes - 1) {
        const int32_t id = block.id[__builtin_ctz(lanes)];
        if (id < 0) break;
        const float* c = clusters + 3 * int64_t(id);
        const double dr = cells.levels[r] - double(c[0]), dg = cells.levels[g] - double(c[1]),
                     db = cells.levels[b] - double(c[2]);
        const double d = (dr * dr + dg * dg) + db * db;
        index = d < best ? id : index;
        best = d < best ? d : best;
    }
    return index;
}

// kRegisters registers of T, of pixels, against a list: the definition. `found`: places in the list, -1 for none.
template <class T, class I>
inline void scan(const QuantizeBlock* list, int size, const T* r, const T* g, const T* b, I* found) {
    typedef T Values __attribute__((vector_size(4 * kLanes)));
    typedef I Places __attribute__((vector_size(4 * kLanes)));
    Values x[3][kRegisters], best[kRegisters];
    Places index[kRegisters], at{};
    __builtin_memcpy(x[0], r, sizeof x[0]);
    __builtin_memcpy(x[1], g, sizeof x[1]);
    __builtin_memcpy(x[2], b, sizeof x[2]);
    for (int v = 0; v < kRegisters; ++v) best[v] = Values{} + T(kInfinity), index[v] = Places{} - 1;
    for (int i = 0; i < size; ++i, at += 1) {
        const QuantizeBlock& block = list[i / kWidth];
        const T c[3] = {T(block.c[0][i % kWidth]), T(block.c[1][i % kWidth]), T(block.c[2][i % kWidth])};
        for (int v = 0; v < kRegisters; ++v) {
            const Values dr = x[0][v] - c[0], dg = x[1][v] - c[1], db = x[2][v] - c[2];
            const Values d = (dr * dr + dg * dg) + db * db;
            index[v] = d < best[v] ? at : index[v];
            best[v] = d < best[v] ? d : best[v];
        }
    }
    __builtin_memcpy(found, index, sizeof index);
}

// Likewise with the group's `line`, at float32's precision; `gap`: from the best to the second one, less the
// pixel's part of the slack.
inline void scan_line(const QuantizeGroup& group, int first, int32_t* found, float* gap) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
    Vec x[3][kRegisters], best[kRegisters], second[kRegisters];
    Places index[kRegisters], at{};
    for (int v = 0; v < kRegisters; ++v) {
        for (int c = 0; c < 3; ++c) x[c][v] = load(group.x[c] + first + v * kLanes) - set1(group.centre[c]);
        best[v] = second[v] = set1(kInfinity);
        index[v] = Places{} - 1;
    }
    for (int i = 0; i < group.size; ++i, at += 1) {
        const QuantizeBlock& block = group.line[i / kWidth];
        float square;
        __builtin_memcpy(&square, block.id + i % kWidth, sizeof square);
        const Vec a = set1(square),
                  c[3] = {set1(block.c[0][i % kWidth]), set1(block.c[1][i % kWidth]), set1(block.c[2][i % kWidth])};
        for (int v = 0; v < kRegisters; ++v) {
            const Vec d = fma(x[0][v], c[0], fma(x[1][v], c[1], fma(x[2][v], c[2], a)));
            index[v] = d < best[v] ? at : index[v];
            second[v] = min(second[v], max(best[v], d));
            best[v] = min(d, best[v]);
        }
    }
    __builtin_memcpy(found, index, sizeof index);
    for (int v = 0; v < kRegisters; ++v) {
        const Vec y = fma(x[0][v], x[0][v], fma(x[1][v], x[1][v], x[2][v] * x[2][v]));
        store(gap + v * kLanes, second[v] - best[v] - set1(group.slope) * y);
    }
}

inline int32_t id_of(const QuantizeGroup& group, int64_t found) {
    return found < 0 ? 0 : group.list[found / kWidth].id[found % kWidth];
}

// float64 decides the group's ties.
__attribute__((noinline)) void untie(const QuantizeParams& p, QuantizeCells& cells, QuantizeGroup& group) {
    double x[3][kQuantizeTies];
    int64_t found[kQuantizeTies];
    constexpr int step = kRegisters * kLanes / 2;
    for (int j = 0; j < kQuantizeTies; ++j)
        for (int c = 0; c < 3; ++c)
            x[c][j] = cells.levels[static_cast<const uint8_t*>(p.x)[3 * group.tied[j < group.ties ? j : 0] + c]];
    for (int j = 0; j < group.ties; j += step) {
        scan(group.list, group.size, x[0] + j, x[1] + j, x[2] + j, found + j);
        cells.scanned += 2 * int64_t(step) * group.size;
    }
    for (int j = 0; j < group.ties; ++j) p.out[group.tied[j]] = id_of(group, found[j]);
    group.ties = 0;
}

// Compares the pixels of a group with its list.
template <bool IsU8>
__attribute__((noinline)) void flush(const QuantizeParams& p, QuantizeCells& cells, QuantizeGroup& group) {
    alignas(64) int32_t found[kQuantizeGroup];
    alignas(64) float gap[kQuantizeGroup];
    constexpr int step = kRegisters * kLanes;
    for (int j = group.count; j % step; ++j)
        for (int c = 0; c < 3; ++c) group.x[c][j] = 0.0f;
    const bool decides = !IsU8 || group.line != nullptr;
    for (int j = 0; decides && j < group.count; j += step) {
        if (IsU8)
            scan_line(group, j, found + j, gap + j);
        else
            scan(group.list, group.size, group.x[0] + j, group.x[1] + j, group.x[2] + j, found + j);
        cells.scanned += int64_t(step) * group.size;
    }
    int ties = 0;
    for (int j = 0; j < group.count; ++j) {
        if (decides && (!IsU8 || gap[j] > group.slack)) {
            p.out[group.at[j]] = id_of(group, found[j]);
            continue;
        }
        ++ties;
        group.tied[group.ties++] = group.at[j];
        if (group.ties == kQuantizeTies) untie(p, cells, group);
    }
    if (2 * ties > group.count) group.line = nullptr;  // clusters that float32 cannot tell apart: float64 at once
    group.count = 0;
}

// A pixel whose candidates are more than a block.
template <bool IsU8>
__attribute__((noinline)) void wait(const QuantizeParams& p, QuantizeCells& cells, int32_t entry, int64_t i) {
    QuantizeGroup& group = cells.groups[-2 - entry];
    for (int c = 0; c < 3; ++c)
        group.x[c][group.count] = IsU8 ? cells.levels32[static_cast<const uint8_t*>(p.x)[3 * i + c]]
                                       : static_cast<const float*>(p.x)[3 * i + c];
    group.at[group.count] = i;
    if (++group.count == kQuantizeGroup) flush<IsU8>(p, cells, group);
}

// The block of the pixel at i, of the colour (r, g, b); nullptr: the pixel waits in a group.
template <bool IsU8>
inline const QuantizeBlock* block_of(const QuantizeParams& p, QuantizeCells& cells, int r, int g, int b, int64_t i,
                                     int64_t seen) {
    constexpr int shift = 8 - kLeafBits;
    int32_t entry = cells.leaf[(((r >> shift << kLeafBits) | g >> shift) << kLeafBits) | b >> shift];
    if (__builtin_expect(entry == -1, 0)) {
        cells.seen = seen;
        entry = make_leaf(cells, r, g, b);
    }
    if (__builtin_expect(entry >= 0, 1)) return cells.blocks + entry;
    wait<IsU8>(p, cells, entry, i);
    return nullptr;
}

template <bool IsU8>
void finish(const QuantizeParams& p, QuantizeCells& cells) {
    for (int32_t i = 0; i < cells.groups_used; ++i) {
        flush<IsU8>(p, cells, cells.groups[i]);
        if (cells.groups[i].ties) untie(p, cells, cells.groups[i]);
    }
}

void quantize_u8(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* x = static_cast<const uint8_t*>(p.x);
    const float* levels = cells.levels32;
    clear(cells);
    for (int64_t i = begin; cells.bits == 0 && i < end; ++i) wait<true>(p, cells, -2, i);
    for (int64_t i = begin; cells.bits > 0 && i < end; ++i) {
        const uint8_t r = x[3 * i], g = x[3 * i + 1], b = x[3 * i + 2];
        const QuantizeBlock* block = block_of<true>(p, cells, r, g, b, i, i - begin);
        if (__builtin_expect(block == nullptr, 0)) continue;
        Wide d;
        distances(*block, set1(levels[r]), set1(levels[g]), set1(levels[b]), d);
        const uint32_t lanes = within(d, fma(spread_min(smallest(d)), set1(kWider), set1(kFurther)));
        if (__builtin_expect(lanes & (lanes - 1), 0))
            p.out[i] = settle(p.clusters, cells, *block, lanes, r, g, b);
        else
            p.out[i] = block->id[__builtin_ctz(lanes)];
    }
    finish<true>(p, cells);
}

void quantize_f32(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    const auto* all = static_cast<const float*>(p.x);
    clear(cells);
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
        for (int j = 0; outside && j < n; ++j) wait<false>(p, cells, -2, i + j);
        for (int j = 0; !outside && j < n; ++j) {
            const int32_t* at = value + 3 * j;
            const QuantizeBlock* block = block_of<false>(p, cells, at[0], at[1], at[2], i + j, i - begin);
            if (__builtin_expect(block == nullptr, 0)) continue;
            Wide d;
            distances(*block, set1(x[3 * j]), set1(x[3 * j + 1]), set1(x[3 * j + 2]), d);
            // A distance that is not finite wins nowhere.
            const uint32_t lanes = within(d, min(spread_min(smallest(d)), set1(__FLT_MAX__)));
            p.out[i + j] = __builtin_expect(lanes, 1) ? block->id[__builtin_ctz(lanes)] : 0;
        }
    }
    finish<false>(p, cells);
}

}  // namespace
}  // namespace igpt::cpu
