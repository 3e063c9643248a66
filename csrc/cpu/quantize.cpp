// Nearest-cluster quantization, the driver: memory, the order of the clusters, threads, and the table of the chosen
// instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "ops.h"
#include "region.h"

namespace igpt::cpu {
namespace {

using Body = int64_t (*)(const QuantizeParams&, QuantizeCells&, int64_t, int64_t);

constexpr int64_t kParallel = 4096;           // pixels from which a second thread pays
constexpr int64_t kShare = 64;                // a thread's pixels start at a multiple: whole chunks
constexpr int64_t kOrdered = 512;             // pixels from which looking for almost equal clusters, and an order, pay
constexpr int64_t kFewClusters = 320;         // that are not put in order
constexpr int64_t kCells[] = {8192, 131072};  // pixels of a thread from which cells of 16 and 32 to a side pay
constexpr float kAlmost = 0x1p-11f, kLeast = 0x1p-23f;  // differences of clusters that are almost equal
constexpr float kTight = 0x1p-12f;                      // the extent of a palette of which boxes know little
constexpr float kFar = 16.0f;  // where float32 knows no smaller difference, unless in one channel
constexpr int kScanned = 2;    // blocks that a scan compares with as fast as a list is found
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Levels {
    double exact[256];
    float rounded[256];
    Levels() {
        for (int v = 0; v < 256; ++v) rounded[v] = float(exact[v] = v / 127.5 - 1.0);
    }
};

struct Cluster {
    float c[3];
    int32_t id;
};

// The clusters in blocks, and their boxes; those that are almost equal as one.
struct Palette {
    std::unique_ptr<QuantizeBlock[]> blocks;
    std::unique_ptr<QuantizeBoxes[]> boxes;
    std::vector<float> colours;  // of the blocks, where there are no boxes
    std::vector<int32_t> tokens;
    std::vector<QuantizeGroup> groups;
    std::vector<int32_t> ids;
    std::vector<QuantizeMembers> members;
    float radius;
    int32_t count, k, stride;  // as in QuantizeCells
    bool gathered, tight;
};

// The memory of one thread. What no pixel needs stays untouched.
struct Scratch {
    std::unique_ptr<QuantizeLanes[]> lanes;
    std::unique_ptr<uint64_t[]> blocks;
    std::unique_ptr<int32_t[]> ints;
    std::unique_ptr<QuantizeBlock[]> lists;
    std::vector<QuantizeNode> parents;
};

QuantizeCells make_cells(const QuantizeParams& p, const Palette& palette, int bits, Scratch& s) {
    const size_t count = palette.count, leaves = bits ? size_t(1) << (3 * kQuantizeLeafBits) : 0;
    QuantizeCells cells{};
    cells.root = palette.blocks.get();
    cells.unfilled = palette.gathered ? nullptr : palette.blocks.get();
    cells.colours = palette.tokens.empty() ? p.clusters : palette.colours.data();
    cells.tokens = palette.tokens.empty() ? nullptr : palette.tokens.data();
    cells.boxes = palette.boxes.get();
    cells.count = palette.count;
    cells.k = palette.k;
    cells.groups = palette.groups.data();
    cells.ids = palette.ids.data();
    cells.members = palette.members.data();
    // Of a group that has the nearest one the first is at most r further away than that, and so than d, d^2 being the
    // smallest distance: (d + r)^2 <= d^2 (1 + 4 r) + r / 4 + r^2.
    const float r = 1.7321f * palette.radius;
    cells.radius = palette.radius;
    cells.wider = 1.0f + 1.0f / (1 << 20) + 4.1f * r;
    cells.further = 1.0f / (1 << 22) + 0.26f * r;
    cells.bits = bits;
    const size_t boxes = count / kQuantizeWidth + 1;
    cells.stride = palette.stride;
    s.lanes.reset(new QuantizeLanes[2 * boxes + count + kQuantizeTogether * cells.stride / kQuantizeWidth]());
    cells.near = s.lanes[0].v;
    cells.middle = s.lanes[boxes].v;
    cells.found = s.lanes[2 * boxes].v;
    s.blocks.reset(new uint64_t[(kQuantizeWaiting + 1) * (count / 64 + 1)]);
    cells.blocks = s.blocks.get();
    s.ints.reset(new int32_t[count + leaves]);
    cells.visited = s.ints.get();
    cells.leaf = cells.visited + count;
    constexpr size_t parents = size_t(1) << (3 * kQuantizeParentBits);
    s.lists.reset(new QuantizeBlock[bits ? (size_t(1) << (3 * bits)) + parents * kQuantizeParent / kQuantizeWidth : 0]);
    cells.lists = s.lists.get();
    s.parents.assign(bits ? parents : 0, {0, -1});
    cells.parents = s.parents.data();
    std::fill_n(cells.leaf, leaves, kQuantizeUnknown);
    return cells;
}

// A difference that is not zero is NaN; one branch, not three.
bool finite(const float* c) { return (c[0] - c[0]) + (c[1] - c[1]) + (c[2] - c[2]) == 0.0f; }

int32_t blocks_of(int64_t n) { return int32_t((n + kQuantizeWidth - 1) / kQuantizeWidth); }

// Along the axis where they differ most.
float difference(const Cluster& a, const Cluster& b) {
    float most = 0.0f;
    for (int c = 0; c < 3; ++c) most = std::max(most, std::fabs(a.c[c] - b.c[c]));
    return most;
}

// Up to 16 clusters.
void fill(QuantizeBlock& block, const Cluster* from, int64_t n) {
    for (int64_t i = 0; i < kQuantizeWidth; ++i) {
        for (int c = 0; c < 3; ++c) block.c[c][i] = i < n ? from[i].c[c] : kInfinity;
        block.id[i] = i < n ? from[i].id : -1;
    }
}

// The next block: up to 16 clusters and their box, which is wide enough for its own rounding and that of distances.
void put(Palette& palette, const Cluster* from, int64_t n) {
    const int64_t at = palette.count++;
    fill(palette.blocks[at], from, n);
    for (int c = 0; c < 3; ++c) {
        float low = kInfinity, high = -kInfinity;
        for (int64_t i = 0; i < n; ++i) low = std::min(low, from[i].c[c]), high = std::max(high, from[i].c[c]);
        QuantizeBoxes& boxes = palette.boxes[at / kQuantizeWidth];
        const float middle = boxes.middle[c][at % kQuantizeWidth] = 0.5f * low + 0.5f * high;
        boxes.half[c][at % kQuantizeWidth] = (0.5f * high - 0.5f * low) * 1.000001f + 1e-6f * std::fabs(middle);
    }
}

// Cuts the clusters across their longest side into four, again and again, down to blocks. `scratch`: (n,).
void cut(Palette& palette, Cluster* from, int64_t n, Cluster* scratch) {
    const int64_t blocks = blocks_of(n);
    if (blocks <= 1) return put(palette, from, n);
    float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};
    for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < 3; ++c) low[c] = std::min(low[c], from[i].c[c]), high[c] = std::max(high[c], from[i].c[c]);
    int axis = 0;
    for (int c = 1; c < 3; ++c)
        if (0.5f * high[c] - 0.5f * low[c] > 0.5f * high[axis] - 0.5f * low[axis]) axis = c;
    constexpr int kBins = 128;
    int32_t starts[kBins] = {};
    const double side = double(high[axis]) - low[axis], scale = side > 0.0 ? (kBins - 0.5) / side : 0.0;
    const auto bin = [&](const Cluster& each) { return int((double(each.c[axis]) - low[axis]) * scale); };
    for (int64_t i = 0; i < n; ++i) ++starts[bin(from[i])];
    int32_t sum = 0;
    for (int32_t& each : starts) sum += std::exchange(each, sum);
    for (int64_t i = 0; i < n; ++i) scratch[starts[bin(from[i])]++] = from[i];
    std::copy(scratch, scratch + n, from);
    const int64_t part = (blocks + 3) / 4 * kQuantizeWidth;
    for (int64_t i = 0; i < n; i += part) cut(palette, from + i, std::min(part, n - i), scratch);
}

bool far(const Cluster& of) { return std::max({std::fabs(of.c[0]), std::fabs(of.c[1]), std::fabs(of.c[2])}) >= kFar; }

// A place for the colour, by its place in one of two grids of cells of four times `almost`.
uint32_t hash(const Cluster& of, int grid, float almost) {
    constexpr uint32_t factors[3] = {0x9e3779b1u, 0x85ebca77u, 0xc2b2ae3du};
    uint32_t sum = grid;
    for (int c = 0; c < 3; ++c) {
        const float rounded = of.c[c] + float(grid) * 2.0f * almost + 0x1.8p25f * almost;
        uint32_t bits;
        std::memcpy(&bits, &rounded, sizeof bits);
        sum += bits * factors[c];
    }
    return sum * 0x27d4eb2fu >> 8;
}

// Clusters by the first that they differ from by no more than `almost`; one that equals it or its last is left out.
struct Kin {
    std::vector<int32_t> firsts, next;  // next: of the same first; -1 for none
    float radius;                       // the largest difference from a first
};

// Two that lie across the borders of both grids may be missed.
Kin kin(const Cluster* all, int32_t n, float almost) {
    uint32_t size = 1024;
    while (size < 8 * uint32_t(std::min(n, 1 << 20))) size *= 2;
    std::vector<int32_t> table(size, -1), last(n, -1);
    Kin to{{}, std::vector<int32_t>(n, -1), 0.0f};
    to.firsts.reserve(n);
    for (int32_t i = 0; i < n; ++i) {
        const Cluster& each = all[i];
        int32_t* places[2];
        int32_t first = -1;
        for (int grid = 0; grid < 2; ++grid) {
            places[grid] = &table[hash(each, grid, almost) & (size - 1)];
            const int32_t at = *places[grid];
            if (at >= 0 && difference(all[at], each) <= (far(each) ? 0.0f : almost)) first = at;
        }
        if (first < 0) {
            to.firsts.push_back(*places[0] = *places[1] = last[i] = i);
        } else if (difference(all[first], each) > 0.0f && difference(all[last[first]], each) > 0.0f) {
            last[first] = to.next[last[first]] = i;
            to.radius = std::max(to.radius, difference(all[first], each));
        }
    }
    return to;
}

// The group of `first` and those that follow it by `next`.
void group(Palette& palette, Cluster& first, const Cluster* all, const int32_t* next, int32_t from) {
    QuantizeGroup group{int32_t(palette.ids.size()), 0, int32_t(palette.members.size())};
    for (int32_t i = from; i >= 0; i = next[i], ++group.count) palette.ids.push_back(all[i].id);
    for (int32_t i = from, j = 0; group.count > kQuantizeFew && i >= 0; i = next[i], ++j) {
        const int32_t lane = j % kQuantizeMembers;
        if (lane == 0) {
            palette.members.push_back({});
            std::fill_n(palette.members.back().square, kQuantizeMembers, kInfinity);
        }
        QuantizeMembers& to = palette.members.back();
        float d[3];
        for (int c = 0; c < 3; ++c) d[c] = to.c[c][lane] = all[i].c[c] - first.c[c];
        to.square[lane] = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
    }
    first.id = -2 - int32_t(palette.groups.size());
    palette.groups.push_back(group);
    const int32_t blocks = (group.count + kQuantizeMembers - 1) / kQuantizeMembers;
    palette.stride = std::max(palette.stride, blocks * (kQuantizeMembers + kQuantizeWidth));
}

// Puts those of `all` that are almost equal in groups, and leaves out equal ones; returns how many are left. Almost
// equal are those of a group that others are farther from than eight times what it spans, for a pixel between two
// groups has to be compared with both in float64.
int32_t gather(Palette& palette, Cluster* all, int32_t n, bool groups) {
    float almost = groups ? kAlmost : 0.0f;
    Kin found = kin(all, n, almost);
    while (found.radius > 0.125f * almost && found.firsts.size() > 1) {
        almost = almost > kLeast ? 0.125f * almost : 0.0f;
        found = kin(all, n, almost);
    }
    palette.radius = found.radius;
    const int32_t count = int32_t(found.firsts.size());
    for (int32_t i = 0; i < count; ++i) {
        const int32_t at = found.firsts[i];
        Cluster first = all[at];
        if (found.next[at] >= 0) group(palette, first, all, found.next.data(), at);
        all[i] = first;  // its others, and those of later ones, stand behind it
    }
    return count;
}

// Along the longest side.
float extent(const Cluster* all, int64_t n) {
    Cluster low{}, high{};
    if (n > 0) low = high = all[0];
    for (int64_t i = 1; i < n; ++i)
        for (int c = 0; c < 3; ++c) {
            low.c[c] = std::min(low.c[c], all[i].c[c]);
            high.c[c] = std::max(high.c[c], all[i].c[c]);
        }
    return difference(low, high);
}

// In order, with boxes, where that pays. One that is not finite wins nowhere, and is left out.
Palette make_palette(const QuantizeParams& p, bool gathers, bool groups) {
    const int64_t most = blocks_of(p.k) + 1;
    Palette palette{};
    palette.k = p.k;
    palette.gathered = gathers;
    palette.blocks.reset(new QuantizeBlock[most]);
    palette.count = blocks_of(p.k);
    if (!gathers) return palette;
    const std::unique_ptr<Cluster[]> all(new Cluster[2 * int64_t(p.k)]);
    int64_t n = 0;
    for (int64_t i = 0; i < p.k; ++i) {
        const float* from = p.clusters + 3 * i;
        if (finite(from)) all[n++] = {{from[0], from[1], from[2]}, int32_t(i)};
    }
    n = gather(palette, all.get(), int32_t(n), groups);
    palette.tight = extent(all.get(), n) <= kTight;
    if (p.n < kOrdered || n <= kFewClusters || palette.tight) {
        palette.k = int32_t(n);
        palette.count = std::max(blocks_of(n), 1);
        for (int64_t i = 0; i < palette.count; ++i)
            fill(palette.blocks[i], all.get() + i * kQuantizeWidth, n - i * kQuantizeWidth);
        if (n == p.k && palette.groups.empty()) return palette;  // as they came
        palette.colours.resize(3 * n);
        palette.tokens.resize(n);
        for (int64_t i = 0; i < n; ++i) {
            std::copy(all[i].c, all[i].c + 3, &palette.colours[3 * i]);
            palette.tokens[i] = all[i].id;
        }
        return palette;
    }
    palette.count = 0;
    palette.boxes.reset(new QuantizeBoxes[most / kQuantizeWidth + 1]);
    cut(palette, all.get(), n, all.get() + p.k);
    for (int64_t i = palette.count; i % kQuantizeWidth; ++i)
        for (int c = 0; c < 3; ++c) {
            palette.boxes[i / kQuantizeWidth].middle[c][i % kQuantizeWidth] = kInfinity;
            palette.boxes[i / kQuantizeWidth].half[c][i % kQuantizeWidth] = 0.0f;
        }
    return palette;
}

// The pixels from `begin` on; returns the end of those that are done.
int64_t run(const QuantizeParams& p, Body body, bool is_u8, int64_t begin, bool gathers) {
    const int64_t shares = (p.n + kShare - 1) / kShare;
    const int threads = p.n < kParallel ? 1 : int(std::min<int64_t>(usable_threads(p.threads), shares));
    static const Levels levels;
    const Palette palette = make_palette(p, gathers, is_u8);
    const int64_t share = palette.count > kScanned && !palette.tight ? p.n / threads : 0;
    const int bits = share < kCells[0] ? 0 : share < kCells[1] ? 4 : 5;
    std::vector<Scratch> scratch(threads);
    std::vector<QuantizeCells> cells(threads);
    for (int t = 0; t < threads; ++t) {
        cells[t] = make_cells(p, palette, bits, scratch[t]);
        cells[t].levels = levels.exact;
        cells[t].levels32 = levels.rounded;
        cells[t].reach = is_u8 ? 1.0f : 0.0f;
        cells[t].stops = !gathers;
    }

    std::vector<int64_t> ends(threads);
    for_each(threads, threads, [&](int64_t t) {
        const int64_t from = std::max(begin, shares * t / threads * kShare);
        ends[t] = body(p, cells[t], from, std::min(p.n, shares * (t + 1) / threads * kShare));
    });
    for (const QuantizeCells& each : cells)
        if (p.work) *p.work += each.work;
    return gathers ? p.n : std::min(p.n, *std::min_element(ends.begin(), ends.end()));
}

// Few pixels are compared with the clusters as they come, while those differ.
void quantize(const QuantizeParams& p, Body body, bool is_u8) {
    if (p.work) *p.work = 0;
    const int64_t done = p.n < kOrdered ? run(p, body, is_u8, 0, false) : 0;
    if (done < p.n) run(p, body, is_u8, done, true);
}

}  // namespace

void quantize_u8(const QuantizeParams& p) { quantize(p, ops().quantize_u8, true); }
void quantize_f32(const QuantizeParams& p) { quantize(p, ops().quantize_f32, false); }

}  // namespace igpt::cpu
