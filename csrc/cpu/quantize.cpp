// Nearest-cluster quantization, the driver: memory, the order of the clusters, threads, and the table of the chosen
// instruction set.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "ops.h"

namespace igpt::cpu {
namespace {

using Body = void (*)(const QuantizeParams&, QuantizeCells&, int64_t, int64_t);

constexpr int64_t kParallel = 4096;           // pixels from which a second thread pays
constexpr int64_t kShare = 64;                // a thread's pixels start at a multiple: whole chunks
constexpr int64_t kOrdered = 512;             // pixels from which putting the clusters in order pays
constexpr int64_t kFewClusters = 320;         // that are not put in order
constexpr int64_t kCells[] = {8192, 131072};  // pixels of a thread from which cells of 16 and 32 to a side pay
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Levels {
    double exact[256];
    float rounded[256];
    Levels() {
        for (int v = 0; v < 256; ++v) rounded[v] = float(exact[v] = v / 127.5 - 1.0);
    }
};

// The clusters in blocks, and their boxes.
struct Palette {
    std::unique_ptr<QuantizeBlock[]> blocks;
    std::unique_ptr<QuantizeBoxes[]> boxes;
    int32_t count;
};

// The memory of one thread. What no pixel needs stays untouched.
struct Scratch {
    std::unique_ptr<QuantizeLanes[]> lanes;
    std::unique_ptr<uint64_t[]> blocks;
    std::unique_ptr<int32_t[]> ints;
    std::unique_ptr<QuantizeBlock[]> lists;
    std::vector<QuantizeNode> parents;
};

QuantizeCells make_cells(const Palette& palette, int bits, Scratch& s) {
    const size_t count = palette.count, leaves = bits ? size_t(1) << (3 * kQuantizeLeafBits) : 0;
    QuantizeCells cells{};
    cells.root = palette.blocks.get();
    cells.boxes = palette.boxes.get();
    cells.count = palette.count;
    cells.bits = bits;
    const size_t boxes = count / kQuantizeWidth + 1;
    s.lanes.reset(new QuantizeLanes[2 * boxes + count]());
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

struct Cluster {
    float c[3];
    int32_t id;
};

// The next block: up to 16 clusters and their box, which is wide enough for its own rounding and that of distances.
void put(Palette& palette, const Cluster* from, int64_t n) {
    const int64_t at = palette.count++;
    QuantizeBlock& block = palette.blocks[at];
    for (int64_t i = 0, lane = 0; lane < kQuantizeWidth; ++lane, ++i) {
        // Equal ones side by side count once.
        while (i > 0 && i < n && std::equal(from[i].c, from[i].c + 3, from[i - 1].c)) ++i;
        for (int c = 0; c < 3; ++c) block.c[c][lane] = i < n ? from[i].c[c] : kInfinity;
        block.id[lane] = i < n ? from[i].id : -1;
    }
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
    const int64_t blocks = (n + kQuantizeWidth - 1) / kQuantizeWidth;
    if (blocks <= 1) return put(palette, from, n);
    float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};
    for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < 3; ++c) low[c] = std::min(low[c], from[i].c[c]), high[c] = std::max(high[c], from[i].c[c]);
    int axis = 0;
    for (int c = 1; c < 3; ++c)
        if (0.5f * high[c] - 0.5f * low[c] > 0.5f * high[axis] - 0.5f * low[axis]) axis = c;
    if (low[axis] == high[axis]) return put(palette, from, 1);  // all are equal
    constexpr int kBins = 128;
    int32_t starts[kBins] = {};
    const double scale = (kBins - 0.5) / (double(high[axis]) - low[axis]);
    const auto bin = [&](const Cluster& each) { return int((double(each.c[axis]) - low[axis]) * scale); };
    for (int64_t i = 0; i < n; ++i) ++starts[bin(from[i])];
    int32_t sum = 0;
    for (int32_t& each : starts) sum += std::exchange(each, sum);
    for (int64_t i = 0; i < n; ++i) scratch[starts[bin(from[i])]++] = from[i];
    std::copy(scratch, scratch + n, from);
    const int64_t part = (blocks + 3) / 4 * kQuantizeWidth;
    for (int64_t i = 0; i < n; i += part) cut(palette, from + i, std::min(part, n - i), scratch);
}

// The clusters as they come. One that is not finite wins nowhere: it is infinitely far away.
void fill(Palette& palette, const QuantizeParams& p) {
    palette.count = int32_t((p.k + int64_t(kQuantizeWidth) - 1) / kQuantizeWidth);
    for (int64_t i = 0; i < int64_t(palette.count) * kQuantizeWidth; ++i) {
        QuantizeBlock& block = palette.blocks[i / kQuantizeWidth];
        const float* from = p.clusters + 3 * std::min(i, int64_t(p.k) - 1);
        const bool counts = i < p.k && finite(from);
        for (int c = 0; c < 3; ++c) block.c[c][i % kQuantizeWidth] = counts ? from[c] : kInfinity;
        block.id[i % kQuantizeWidth] = i < p.k ? int32_t(i) : -1;
    }
}

// In order, with boxes, where that pays.
Palette make_palette(const QuantizeParams& p) {
    const int64_t most = p.k / kQuantizeWidth + 1;
    Palette palette{};
    palette.blocks.reset(new QuantizeBlock[most]);
    if (p.n < kOrdered || p.k <= kFewClusters) {
        fill(palette, p);
        return palette;
    }
    palette.boxes.reset(new QuantizeBoxes[most / kQuantizeWidth + 1]);
    const std::unique_ptr<Cluster[]> all(new Cluster[2 * int64_t(p.k)]);
    int64_t n = 0;
    for (int64_t i = 0; i < p.k; ++i) {
        const float* from = p.clusters + 3 * i;
        if (finite(from)) all[n++] = {{from[0], from[1], from[2]}, int32_t(i)};
    }
    cut(palette, all.get(), n, all.get() + p.k);
    for (int64_t i = palette.count; i % kQuantizeWidth; ++i)
        for (int c = 0; c < 3; ++c) {
            palette.boxes[i / kQuantizeWidth].middle[c][i % kQuantizeWidth] = kInfinity;
            palette.boxes[i / kQuantizeWidth].half[c][i % kQuantizeWidth] = 0.0f;
        }
    return palette;
}

void run(const QuantizeParams& p, Body body, bool is_u8) {
    if (p.work) *p.work = 0;
    if (p.n <= 0) return;
    const int64_t shares = (p.n + kShare - 1) / kShare;
    const int threads = p.n < kParallel ? 1 : int(std::min<int64_t>(usable_threads(p.threads), shares));
    static const Levels levels;
    const Palette palette = make_palette(p);
    const int64_t share = palette.count > 1 ? p.n / threads : 0;
    const int bits = share < kCells[0] ? 0 : share < kCells[1] ? 4 : 5;
    std::vector<Scratch> scratch(threads);
    std::vector<QuantizeCells> cells(threads);
    for (int t = 0; t < threads; ++t) {
        cells[t] = make_cells(palette, bits, scratch[t]);
        cells[t].levels = levels.exact;
        cells[t].levels32 = levels.rounded;
        cells[t].reach = is_u8 ? 1.0f : 0.0f;
    }

    // Nothing in the region throws: an exception that leaves it ends the process.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t)
        body(p, cells[t], shares * t / threads * kShare, std::min(p.n, shares * (t + 1) / threads * kShare));
    for (const QuantizeCells& each : cells)
        if (p.work) *p.work += each.work;
}

}  // namespace

void quantize_u8(const QuantizeParams& p) { run(p, ops().quantize_u8, true); }
void quantize_f32(const QuantizeParams& p) { run(p, ops().quantize_f32, false); }

}  // namespace igpt::cpu
