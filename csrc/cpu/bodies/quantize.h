// Nearest-cluster quantization, the body that every isa/*.cpp compiles with its own flags.
//
// The clusters stand in blocks of 16, similar colours together, and each block has a box (quantize.cpp). A pixel is
// compared with the block whose box has its middle nearest, and then with those alone whose boxes are not farther away
// than the nearest cluster of that: of 512 clusters a few blocks, however they crowd; never more than all. For few
// pixels or clusters there are no boxes, and every pixel is compared with all clusters, pixels in lanes.
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
//   nearest one is at most m (1 + 13 u) + 2.1 u, m being the smallest that float32 found: kWider and kFurther.
//
// Bound by arithmetic. With a list a pixel costs about 25 instructions on AVX-512, and 4 cache lines that random
// colours find in L2; without, about 100 with 512 clusters.
//
// Source: openai/image-gpt src/utils.py color_quantize (the definition).
#include "../ops.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kRegisters = 2;  // of pixels in a scan
constexpr int kScan = kRegisters * kLanes;
constexpr int kChunk = 64;  // pixels whose cells are found at once
constexpr int kWidth = kQuantizeWidth;

constexpr int kParts = kWidth / kLanes;
using Wide = Vec[kParts];

// A colour in every lane.
struct Colour {
    Vec c[3];
};

template <bool IsU8>
inline float level_of(const QuantizeParams& p, const QuantizeCells& cells, int64_t i, int c) {
    return IsU8 ? cells.levels32[static_cast<const uint8_t*>(p.x)[3 * i + c]]
                : static_cast<const float*>(p.x)[3 * i + c];
}

template <bool IsU8>
inline Colour colour_at(const QuantizeParams& p, const QuantizeCells& cells, int64_t i) {
    Colour x;
    for (int c = 0; c < 3; ++c) x.c[c] = set1(level_of<IsU8>(p, cells, i, c));
    return x;
}

// Squared, from the differences; for float32 in the order of the definition.
template <bool IsU8>
inline Vec distance(Vec r, Vec g, Vec b) {
    return IsU8 ? fma(b, b, fma(g, g, r * r)) : (r * r + g * g) + b * b;
}

template <bool IsU8>
inline void distances(const QuantizeBlock& block, const Colour& x, Wide& d) {
    for (int i = 0; i < kWidth; i += kLanes)
        d[i / kLanes] =
            distance<IsU8>(x.c[0] - load(block.c[0] + i), x.c[1] - load(block.c[1] + i), x.c[2] - load(block.c[2] + i));
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

inline Vec further(const QuantizeCells& cells, Vec least) { return fma(least, set1(cells.wider), set1(cells.further)); }

// How far a candidate that may be nearest can be; in float32 a distance that is not finite wins nowhere.
template <bool IsU8>
inline Vec limit_of(const QuantizeCells& cells, Vec least) {
    least = spread_min(least);
    return IsU8 ? further(cells, least) : min(least, set1(__FLT_MAX__));
}

// Wide enough for the rounding of boxes and of float32 distances.
inline Vec loosely(Vec least) { return fma(spread_min(least), set1(1.0001f), set1(2e-6f)); }

// A bit for every one of up to 64 blocks from `begin` whose value is at least the limit, or at most. All at once: a
// branch for every few would be guessed wrong.
inline uint64_t marked(const float* values, int begin, int count, Vec limit, bool least) {
    const int n = count - begin < 64 ? count - begin : 64;
    uint64_t blocks = 0;
    for (int b = 0; b < n; b += kLanes) {
        const Vec v = load(values + begin + b);
        blocks |= uint64_t(least ? at_most(limit, v) : at_most(v, limit)) << b;
    }
    return blocks & (~uint64_t(0) >> (64 - n));
}

// Marks the blocks that may hold one of the candidates nearest to the box about `x`, `half` to both sides.
// bound(block): upper bounds of the distance to them.
template <class Bound>
inline void choose(QuantizeCells& cells, const Vec (&x)[3], Vec half, uint64_t* blocks, Bound&& bound) {
    Vec nearest = set1(kInfinity);
    for (int b = 0; cells.boxes && b < cells.count; b += kLanes) {
        const QuantizeBoxes& boxes = cells.boxes[b / kWidth];
        Vec near = zero(), middle = zero();
        for (int c = 0; c < 3; ++c) {
            const Vec d = abs(load(boxes.middle[c] + b % kWidth) - x[c]);
            const Vec n = max(d - (load(boxes.half[c] + b % kWidth) + half), zero());
            near = fma(n, n, near);
            middle = fma(d, d, middle);
        }
        // Finite, and so within a limit that is not.
        store(cells.near + b, min(near, set1(__FLT_MAX__)));
        store(cells.middle + b, middle);
        nearest = min(middle, nearest);
    }
    nearest = spread_min(nearest);
    uint64_t first = 0;
    int at = 0;
    for (int begin = 0; cells.boxes && first == 0 && begin < cells.count; begin += 64) {
        first = marked(cells.middle, begin, cells.count, nearest, false);
        at = first ? begin + __builtin_ctzll(first) : 0;
    }
    const Vec limit = loosely(bound(at));
    for (int begin = 0; begin < cells.count; begin += 64)
        blocks[begin / 64] = ~marked(cells.near, begin, cells.count, limit, true) &
                             (~uint64_t(0) >> (cells.count - begin < 64 ? 64 - (cells.count - begin) : 0));
    cells.work += cells.count;
}

// Calls visit(block) for those that are marked.
template <class Visit>
inline void walk(const QuantizeCells& cells, const uint64_t* blocks, Visit&& visit) {
    for (int begin = 0; begin < cells.count; begin += 64)
        for (uint64_t left = blocks[begin / 64]; left; left &= left - 1) visit(begin + __builtin_ctzll(left));
}

// Of candidates that are nearest as far as float32 can tell, the one of the definition: float64 decides, and the lowest
// index.
template <bool IsU8>
struct Nearest {
    const float* clusters;
    const QuantizeCells& cells;
    double level[3], best = __builtin_inf();
    int32_t index = 0;

    Nearest(const QuantizeParams& p, const QuantizeCells& all, int64_t i) : clusters(p.clusters), cells(all) {
        for (int c = 0; IsU8 && c < 3; ++c) level[c] = cells.levels[static_cast<const uint8_t*>(p.x)[3 * i + c]];
    }
    // One cluster. Without a branch, which would be guessed wrong.
    void compare(int32_t id) {
        double d = 0.0;
        if (IsU8) {
            const float* c = clusters + 3 * int64_t(id);
            const double dr = level[0] - double(c[0]), dg = level[1] - double(c[1]), db = level[2] - double(c[2]);
            d = (dr * dr + dg * dg) + db * db;
        }
        const int32_t better = -int32_t((d < best) | ((d == best) & (id < index)));
        index = (id & better) | (index & ~better);
        best = d < best ? d : best;
    }
    void compare(const int32_t* ids, int count) {
        for (int j = 0; j < count; ++j) compare(ids[j]);
    }
    void take(int32_t id) {
        if (id >= 0) return compare(id);
        if (IsU8 && id < -1) compare(cells.ids + cells.groups[-2 - id].begin, cells.groups[-2 - id].count);
    }
};

// The nearest of a group: with c and y = x measured from its first, the order of |y - c|^2 is that of |c|^2 - 2 c.y,
// which float32 has to 10 u R (R + 2 Y), R and Y being the largest c and y. float64, which decides the rest, has
// 2^-50 Y^2.
__attribute__((noinline)) int32_t nearest_of_group(const QuantizeParams& p, QuantizeCells& cells, int64_t i,
                                                   const QuantizeGroup& group) {
    Nearest<true> nearest(p, cells, i);
    const int32_t* ids = cells.ids + group.begin;
    if (group.count <= kQuantizeFew) {
        nearest.compare(ids, group.count);
        return nearest.index;
    }
    constexpr int parts = kQuantizeMembers / kLanes;
    Vec y[3], least[parts];
    float size = cells.radius;
    for (int v = 0; v < parts; ++v) least[v] = set1(kInfinity);
    for (int c = 0; c < 3; ++c) {
        const float from = float(nearest.level[c] - double(p.clusters[3 * int64_t(ids[0]) + c]));
        y[c] = set1(-2.0f * from);
        size += __builtin_fabsf(from);
    }
    const QuantizeMembers* members = cells.members + group.block;
    for (int at = 0; at < group.count; at += kQuantizeMembers, ++members)
        for (int v = 0; v < parts; ++v) {
            Vec e = load(members->square + v * kLanes);
            for (int c = 0; c < 3; ++c) e = fma(load(members->c[c] + v * kLanes), y[c], e);
            store(cells.found + at + v * kLanes, e);
            least[v] = min(e, least[v]);
        }
    for (int v = 1; v < parts; ++v) least[0] = min(least[v], least[0]);
    const Vec limit = spread_min(least[0]) + set1(0x1.8p-19f * cells.radius * size + 0x1p-48f * size * size);
    for (int at = 0; at < group.count; at += 64)
        for (uint64_t lanes = marked(cells.found, at, group.count, limit, false); lanes; lanes &= lanes - 1)
            nearest.compare(ids[at + __builtin_ctzll(lanes)]);
    cells.work += group.count;
    return nearest.index;
}

// The token that an id of a block stands for.
template <bool IsU8>
inline int32_t token_of(const QuantizeParams& p, QuantizeCells& cells, int64_t i, int32_t id) {
    return IsU8 && __builtin_expect(id < -1, 0) ? nearest_of_group(p, cells, i, cells.groups[-2 - id]) : id;
}

// Among marked lanes, each of the block at its own place.
template <bool IsU8>
__attribute__((noinline)) int32_t settle(const QuantizeParams& p, const QuantizeCells& cells, int64_t i, uint32_t lanes,
                                         const QuantizeBlock* blocks, const int32_t* places) {
    Nearest<IsU8> nearest(p, cells, i);
    for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        nearest.take(blocks[places ? places[lane] : 0].id[lane]);
    }
    return nearest.index;
}

// Among all blocks that were visited.
template <bool IsU8>
__attribute__((noinline)) int32_t settle_all(const QuantizeParams& p, const QuantizeCells& cells, int64_t i,
                                             int visited, Vec limit) {
    const Colour x = colour_at<IsU8>(p, cells, i);
    Nearest<IsU8> nearest(p, cells, i);
    for (int v = 0; v < visited; ++v) {
        if (at_most(load(cells.found + v * kLanes), limit) == 0) continue;
        const QuantizeBlock& block = cells.root[cells.visited[v]];
        Wide d;
        distances<IsU8>(block, x, d);
        for (uint32_t lanes = within(d, limit); lanes; lanes &= lanes - 1) nearest.take(block.id[__builtin_ctz(lanes)]);
    }
    return nearest.index;
}

// Whether one is marked; uint8 pixels always have one at least.
template <bool IsU8>
inline bool single(uint32_t lanes) {
    return (IsU8 || lanes != 0) && (lanes & (lanes - 1)) == 0;
}

// The nearest of all clusters.
template <bool IsU8>
__attribute__((noinline)) int32_t search(const QuantizeParams& p, QuantizeCells& cells, int64_t i,
                                         const uint64_t* blocks) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
    const Colour x = colour_at<IsU8>(p, cells, i);
    Wide best, second;
    Places block[kParts];
    for (int v = 0; v < kParts; ++v) best[v] = second[v] = set1(kInfinity), block[v] = Places{};
    int visited = 0;
    walk(cells, blocks, [&](int b) __attribute__((always_inline)) {
        Wide d;
        distances<IsU8>(cells.root[b], x, d);
        for (int v = 0; v < kParts; ++v) {
            block[v] = d[v] < best[v] ? Places{} + b : block[v];
            second[v] = min(second[v], max(best[v], d[v]));
            best[v] = min(d[v], best[v]);
        }
        store(cells.found + visited * kLanes, smallest(d));
        cells.visited[visited++] = b;
    });
    cells.work += visited * kWidth;
    const Vec limit = limit_of<IsU8>(cells, smallest(best));
    if (__builtin_expect(at_most(smallest(second), limit) != 0, 0))
        return settle_all<IsU8>(p, cells, i, visited, limit);
    const uint32_t lanes = within(best, limit);
    int32_t places[kWidth];
    __builtin_memcpy(places, block, sizeof places);
    if (__builtin_expect(!single<IsU8>(lanes), 0)) return settle<IsU8>(p, cells, i, lanes, cells.root, places);
    const int lane = __builtin_ctz(lanes);
    return token_of<IsU8>(p, cells, i, cells.root[places[lane]].id[lane]);
}

// One that is not finite wins nowhere: it is infinitely far away.
void fill(QuantizeCells& cells) {
    for (int i = 0; i < cells.count * kWidth; ++i) {
        QuantizeBlock& block = cells.unfilled[i / kWidth];
        const float* from = cells.colours + 3 * int64_t(i < cells.k ? i : 0);
        // What is finite has no difference from itself.
        const bool is = i < cells.k && (from[0] - from[0]) + (from[1] - from[1]) + (from[2] - from[2]) == 0.0f;
        for (int c = 0; c < 3; ++c) block.c[c][i % kWidth] = is ? from[c] : kInfinity;
        block.id[i % kWidth] = is ? i : -1;
    }
    cells.unfilled = nullptr;
}

// The pixels that wait. The blocks of all are chosen before the first is compared with its own: that takes guesses, and
// a wrong one should have nothing to wait for.
template <bool IsU8>
__attribute__((noinline)) void flush(const QuantizeParams& p, QuantizeCells& cells) {
    const int words = (cells.count + 63) / 64;
    if (cells.unfilled && cells.waiting) fill(cells);
    for (int j = 0; j < cells.waiting; ++j) {
        const Colour x = colour_at<IsU8>(p, cells, cells.at[j]);
        choose(cells, x.c, zero(), cells.blocks + j * words, [&](int b) {
            Wide d;
            distances<IsU8>(cells.root[b], x, d);
            return smallest(d);
        });
    }
    for (int j = 0; j < cells.waiting; ++j)
        p.out[cells.at[j]] = search<IsU8>(p, cells, cells.at[j], cells.blocks + j * words);
    cells.waiting = 0;
}

template <bool IsU8>
inline void wait(const QuantizeParams& p, QuantizeCells& cells, int64_t i) {
    cells.at[cells.waiting] = i;
    if (++cells.waiting == kQuantizeWaiting) flush<IsU8>(p, cells);
}

// Compares pixels, one a lane, with all clusters; returns how many it has left to `search`: those that float64 decides.
template <bool IsU8>
__attribute__((noinline)) int scan(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int n) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes)));
    float colours[3][kScan];
    for (int j = 0; j < kScan; ++j)
        for (int c = 0; c < 3; ++c) colours[c][j] = level_of<IsU8>(p, cells, begin + (j < n ? j : 0), c);
    Vec x[3][kRegisters], best[kRegisters], second[kRegisters];
    Places index[kRegisters], at{};
    __builtin_memcpy(x, colours, sizeof x);
    for (int v = 0; v < kRegisters; ++v) best[v] = second[v] = set1(kInfinity), index[v] = Places{} - 1;
    for (int i = 0; i < cells.k; ++i, at += 1) {
        const float* c = cells.colours + 3 * int64_t(i);
        const Vec r = set1(c[0]), g = set1(c[1]), b = set1(c[2]);
        for (int v = 0; v < kRegisters; ++v) {
            const Vec d = distance<IsU8>(x[0][v] - r, x[1][v] - g, x[2][v] - b);
            index[v] = d < best[v] ? at : index[v];
            if (IsU8) second[v] = min(second[v], max(d, best[v]));  // d may be NaN
            best[v] = min(d, best[v]);
        }
    }
    int32_t found[kScan];
    __builtin_memcpy(found, index, sizeof found);
    uint32_t tied = 0;
    for (int v = 0; IsU8 && v < kRegisters; ++v) tied |= at_most(second[v], further(cells, best[v])) << (v * kLanes);
    tied &= ~uint32_t(0) >> (32 - n);
    if (cells.stops && 2 * __builtin_popcount(tied) > n) return n;
    for (int j = 0; j < n; ++j) p.out[begin + j] = found[j] < 0 ? 0 : found[j];
    for (int j = 0; cells.tokens && j < n; ++j)
        if (found[j] >= 0 && (tied >> j & 1) == 0)
            p.out[begin + j] = token_of<IsU8>(p, cells, begin + j, cells.tokens[found[j]]);
    for (uint32_t lanes = tied; lanes; lanes &= lanes - 1) wait<IsU8>(p, cells, begin + __builtin_ctz(lanes));
    cells.work += int64_t(n) * cells.k;
    return __builtin_popcount(tied);
}

// Without cells: where the clusters are in no order, by `scan`, until that leaves most to `search`. Returns the end of
// what it has done.
template <bool IsU8>
int64_t compare(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int64_t end) {
    for (bool scans = cells.boxes == nullptr; scans && begin < end; begin += kScan) {
        const int n = int(end - begin < kScan ? end - begin : kScan);
        scans = 2 * scan<IsU8>(p, cells, begin, n) <= n;
        if (!scans && cells.stops) return begin;
    }
    for (; begin < end; ++begin) wait<IsU8>(p, cells, begin);
    return end;
}

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
    const Vec limit = loosely(least);
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
    for (int64_t i = begin; cells.bits > 0 && i < end; ++i)
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
