// Nearest-cluster quantization without cells: a pixel is compared with all clusters, or with the blocks of similar ones
// that its place asks for. Part of quantize.h, which has the whole.
//
// The clusters stand in blocks of 16, similar colours together, and each block has a box (quantize.cpp). A pixel is
// compared with the block whose box has its middle nearest, and then with those alone whose boxes are not farther away
// than the nearest cluster of that: of 512 clusters a few blocks, however they crowd; never more than all. For few
// pixels or clusters there are no boxes, and every pixel is compared with all clusters, pixels in lanes.
//
// uint8: clusters that float32 could not tell apart stand as one, with the differences from it in a group of their own,
// and a pixel is compared with these alone, which float32 has almost all digits of. A few pixels make no groups before
// most of the first ask for them (QuantizeCells::stops).
#pragma once

#include "../ops.h"
#include "simd/lanes.h"

namespace igpt::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kRegisters = 2;  // of pixels in a scan
constexpr int kScan = kRegisters * kLanes;
constexpr int kTogether = kLanes == 16 ? kQuantizeTogether : 2;
constexpr int kChunk = 64;  // pixels whose cells are found at once
constexpr int kWidth = kQuantizeWidth, kMembers = kQuantizeMembers;

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
inline Vec loosely(const QuantizeCells& cells, Vec least) {
    return fma(spread_min(least), set1(cells.wider + 1e-4f), set1(cells.further + 2e-6f));
}

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
    const Vec limit = loosely(cells, bound(at));
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
    // One cluster; Rising: its index is above all before. Without a branch, which would be guessed wrong.
    template <bool Rising = false>
    void compare(int32_t id) {
        double d = 0.0;
        if (IsU8) {
            const float* c = clusters + 3 * int64_t(id);
            const double dr = level[0] - double(c[0]), dg = level[1] - double(c[1]), db = level[2] - double(c[2]);
            d = (dr * dr + dg * dg) + db * db;
        }
        const int32_t better = -int32_t((d < best) | (!Rising && (d == best) & (id < index)));
        index = (id & better) | (index & ~better);
        best = d < best ? d : best;
    }
    void take(int32_t id) {
        if (id >= 0) return compare(id);
        if (!IsU8 || id == -1) return;
        const QuantizeGroup& group = cells.groups[-2 - id];
        for (int j = 0; j < group.count; ++j) compare(cells.ids[group.begin + j]);
    }
};

// The nearest of a group, for N pixels: with c and y = x measured from its first, the order of |y - c|^2 is that of
// |c|^2 - 2 c.y, which float32 has to 11 u R (3 R + 2 Y), R being the largest in a channel of c and Y the sum of y's.
// float64, which decides the rest, has 2^-50 (R + Y)^2.
template <int N>
__attribute__((noinline)) void find_in_group(const QuantizeParams& p, QuantizeCells& cells, const int64_t (&at)[N],
                                             const QuantizeGroup& group) {
    const int32_t *ids = cells.ids + group.begin, count = group.count, stride = cells.stride;
    const int blocks = (count + kMembers - 1) / kMembers;
    Vec y[N][3], least[N];
    float size[N], *found = cells.found, *lowest = found + blocks * kMembers;  // of a block
    for (int j = 0; j < N; ++j) {
        const Nearest<true> pixel(p, cells, at[j]);
        size[j] = 2.0f * cells.radius;
        least[j] = set1(kInfinity);
        for (int c = 0; c < 3; ++c) {
            const float from = float(pixel.level[c] - double(p.clusters[3 * int64_t(ids[0]) + c]));
            y[j][c] = set1(-2.0f * from);
            size[j] += __builtin_fabsf(from);
        }
    }
    for (int b = 0; b < blocks; ++b) {
        const QuantizeMembers& block = cells.members[group.block + b];
        Vec low[N];
        for (int j = 0; j < N; ++j) low[j] = set1(kInfinity);
        for (int l = 0; l < kMembers; l += kLanes) {
            const Vec square = load(block.square + l),
                      c[3] = {load(block.c[0] + l), load(block.c[1] + l), load(block.c[2] + l)};
            for (int j = 0; j < N; ++j) {
                const Vec e = fma(c[2], y[j][2], fma(c[1], y[j][1], fma(c[0], y[j][0], square)));
                store(found + j * stride + b * kMembers + l, e);
                low[j] = min(e, low[j]);
            }
        }
        for (int j = 0; j < N; ++j) {
            store(lowest + j * stride + b * kLanes, low[j]);
            least[j] = min(low[j], least[j]);
        }
    }
    for (int j = 0; j < N; ++j) {
        const float slack = 0x1.8p-19f * cells.radius * size[j] + 0x1p-48f * size[j] * size[j];
        const Vec limit = spread_min(least[j]) + set1(slack);
        int hits = 0, hit = 0;  // where that is would be guessed wrong
        for (int b = 0; b < blocks; ++b) {
            const int is = at_most(load(lowest + j * stride + b * kLanes), limit) != 0;
            hits += is;
            hit = is ? b : hit;
        }
        const uint64_t lanes = marked(found + j * stride, hit * kMembers, count, limit, false);
        p.out[at[j]] = ids[hit * kMembers + __builtin_ctzll(lanes)];
        if (__builtin_expect(hits == 1 && (lanes & (lanes - 1)) == 0, 1)) continue;
        Nearest<true> nearest(p, cells, at[j]);
        for (int i = 0; i < count; i += kMembers)
            for (uint64_t left = marked(found + j * stride, i, count, limit, false); left; left &= left - 1)
                nearest.compare(ids[i + __builtin_ctzll(left)]);
        p.out[at[j]] = nearest.index;
    }
    cells.work += N * count;
}

// Likewise of few.
inline bool found_in_few(const QuantizeParams& p, QuantizeCells& cells, int64_t i, const QuantizeGroup& group) {
    if (group.count > kQuantizeFew) return false;
    Nearest<true> nearest(p, cells, i);
    for (int j = 0; j < group.count; ++j) nearest.compare<true>(cells.ids[group.begin + j]);
    p.out[i] = nearest.index;
    return true;
}

// The token that an id of a block stands for.
template <bool IsU8>
inline int32_t token_of(const QuantizeParams& p, QuantizeCells& cells, int64_t i, int32_t id) {
    if (!IsU8 || __builtin_expect(id >= -1, 1)) return id;
    const QuantizeGroup& group = cells.groups[-2 - id];
    if (!found_in_few(p, cells, i, group)) find_in_group<1>(p, cells, {i}, group);
    return int32_t(p.out[i]);
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

// The tokens of what a scan has found for pixels that are not done; those of a group together.
template <bool IsU8>
void look_up(const QuantizeParams& p, QuantizeCells& cells, int64_t begin, int n, const int32_t* found, uint32_t done) {
    for (int j = 0; j < n; ++j) {
        if (done >> j & 1) continue;
        const int32_t id = found[j] < 0 ? 0 : cells.tokens[found[j]];
        if (id >= 0) p.out[begin + j] = id;
        if (!IsU8 || id >= 0 || found_in_few(p, cells, begin + j, cells.groups[-2 - id])) continue;
        int64_t at[kTogether] = {begin + j};
        int count = 1;
        for (int l = j + 1; l < n && count < kTogether; ++l)
            if (found[l] == found[j] && (done >> l & 1) == 0) {
                done |= uint32_t(1) << l;
                at[count++] = begin + l;
            }
        for (int l = count; l < kTogether; ++l) at[l] = at[0];
        if (count == 1)
            find_in_group<1>(p, cells, {at[0]}, cells.groups[-2 - id]);
        else
            find_in_group<kTogether>(p, cells, at, cells.groups[-2 - id]);
    }
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
    if (cells.tokens) look_up<IsU8>(p, cells, begin, n, found, tied);
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

}  // namespace
}  // namespace igpt::cpu
