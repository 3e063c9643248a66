// Nearest-cluster quantization, the driver: memory, threads, and the table of the chosen instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "ops.h"

namespace igpt::cpu {
namespace {

using Body = void (*)(const QuantizeParams&, QuantizeCells&, int64_t, int64_t);

constexpr int64_t kParallel = 4096;     // pixels from which a second thread pays
constexpr int64_t kShare = 64;          // a thread's pixels start at a multiple: whole blocks
constexpr int64_t kFewPixels = 8192;    // below, walking all clusters is as fast as making lists
constexpr int64_t kFewClusters = 24;    // likewise
constexpr int64_t kGroupPixels = 2048;  // of a thread, for every group of the next coarser level
constexpr int64_t kBlocks = 1 << 16;    // of a thread's lists; 16 MB, 80 for dense palettes; 512 random clusters use 2
constexpr int64_t kAllowance =
    20;  // one in so many parts of what comparing all with all takes may be lost by making lists

// The memory of one thread's cells. No vectors: what no pixel needs stays untouched.
struct Scratch {
    std::unique_ptr<QuantizeNode[]> nodes;
    std::unique_ptr<int32_t[]> leaf, id;
    std::unique_ptr<float[]> near, c[3];
    std::unique_ptr<QuantizeBlock[]> blocks;
    std::unique_ptr<QuantizeGroup[]> groups;
};

// Levels of cells: finer ones shorten the lists, but each has to be made by some pixel. 0: no cells at all.
int cell_bits(int64_t n, int64_t k, bool is_u8) {
    if (n < kFewPixels || (!is_u8 && k <= kFewClusters)) return 0;
    return n < 65536 || k > 16384 ? 4 : 5;
}

// `share`: pixels of the thread.
QuantizeCells make_cells(const QuantizeParams& p, int bits, int64_t share, bool is_u8, Scratch& s) {
    const int64_t k = p.k;
    QuantizeCells cells{};
    cells.k = p.k;
    cells.bits = bits;
    cells.reach = is_u8 ? 1.0f : 0.0f;
    while (cells.group_bits < std::min(bits, 3) && share >> (3 * cells.group_bits) >= kGroupPixels) ++cells.group_bits;
    cells.allowance = share * k / kAllowance;
    cells.capacity = k / 16 + 1 + (bits ? std::min(kBlocks + std::min(2 * k, 4 * kBlocks), 16 * p.n) : 0);
    s.nodes.reset(new QuantizeNode[bits ? 1 + quantize_cells(kQuantizeNodes) : 1]);
    s.groups.reset(new QuantizeGroup[1 + quantize_cells(cells.group_bits)]);
    s.blocks.reset(new QuantizeBlock[cells.capacity]);
    if (bits) {
        s.leaf.reset(new int32_t[1 << 15]);
        s.id.reset(new int32_t[k + 32]);
        for (auto& each : s.c) each.reset(new float[k + 32]);
        s.near.reset(new float[k + 16]);
    }
    cells.nodes = s.nodes.get();
    cells.groups = s.groups.get();
    cells.leaf = s.leaf.get();
    cells.kept = {{s.c[0].get(), s.c[1].get(), s.c[2].get()}, s.id.get()};
    cells.near = s.near.get();
    cells.blocks = s.blocks.get();
    return cells;
}

// The clusters in blocks. One that is not finite wins nowhere, and neither does one that has been there before: they
// are put infinitely far away. `seen`: a hash table of places, a power of two above k, or none; -1: empty.
void fill_root(const QuantizeParams& p, std::vector<int32_t>& seen, QuantizeBlock* root) {
    const uint64_t mask = seen.size() - 1;
    for (int64_t i = 0; i < (p.k + int64_t(15)) / 16 * 16; ++i) {
        const float* from = p.clusters + 3 * i;
        bool counts = i < p.k && std::isfinite(from[0]) && std::isfinite(from[1]) && std::isfinite(from[2]);
        uint64_t at = 0;
        for (int c = 0; counts && c < 3; ++c) {
            const float value = from[c] + 0.0f;  // -0 is 0
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            at = (at ^ bits) * 0x9e3779b97f4a7c15u;
            at ^= at >> 32;
        }
        for (; counts && !seen.empty() && seen[at & mask] >= 0; ++at) {
            const float* before = p.clusters + 3 * int64_t(seen[at & mask]);
            counts = before[0] != from[0] || before[1] != from[1] || before[2] != from[2];
        }
        if (counts && !seen.empty()) seen[at & mask] = int32_t(i);
        for (int c = 0; c < 3; ++c)
            root[i / 16].c[c][i % 16] = counts ? from[c] : std::numeric_limits<float>::infinity();
        root[i / 16].id[i % 16] = i < p.k ? int32_t(i) : -1;
    }
}

void run(const QuantizeParams& p, Body body, bool is_u8) {
    if (p.work) *p.work = 0;
    if (p.n <= 0) return;
    const int64_t shares = (p.n + kShare - 1) / kShare;
    const int threads = p.n < kParallel ? 1 : int(std::min<int64_t>(usable_threads(p.threads), shares));
    const int bits = cell_bits(p.n, p.k, is_u8);

    double levels[256];
    float levels32[256];
    for (int v = 0; v < 256; ++v) levels32[v] = float(levels[v] = v / 127.5 - 1.0);
    std::unique_ptr<QuantizeBlock[]> root(new QuantizeBlock[(p.k + int64_t(15)) / 16]);
    std::vector<Scratch> scratch(threads);
    std::vector<QuantizeCells> cells(threads);
    for (int t = 0; t < threads; ++t) {
        cells[t] = make_cells(p, bits, p.n / threads, is_u8, scratch[t]);
        cells[t].root = root.get();
        cells[t].levels = levels;
        cells[t].levels32 = levels32;
    }
    size_t places = 32;
    while (places < 2 * size_t(p.k)) places *= 2;
    // Without cells, comparing float32 with doubles takes less than finding them.
    std::vector<int32_t> seen(bits || is_u8 ? places : 0, -1);
    fill_root(p, seen, root.get());

    // Nothing in the region throws: an exception that leaves it ends the process.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t)
        body(p, cells[t], shares * t / threads * kShare, std::min(p.n, shares * (t + 1) / threads * kShare));
    for (const QuantizeCells& each : cells)
        if (p.work) *p.work += each.built + each.scanned;
}

}  // namespace

void quantize_u8(const QuantizeParams& p) { run(p, ops().quantize_u8, true); }
void quantize_f32(const QuantizeParams& p) { run(p, ops().quantize_f32, false); }

}  // namespace igpt::cpu
