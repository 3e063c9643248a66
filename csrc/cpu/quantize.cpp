// Nearest-cluster quantization, the driver: memory, threads, and the table of the chosen instruction set.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "ops.h"

namespace igpt::cpu {
namespace {

using Body = void (*)(const QuantizeParams&, QuantizeCells&, int64_t, int64_t);

constexpr int64_t kParallel = 4096;   // pixels from which a second thread pays
constexpr int64_t kShare = 64;        // a thread's pixels start at a multiple: whole blocks
constexpr int64_t kFewPixels = 4096;  // below, walking all clusters is as fast as making lists
constexpr int64_t kFewClusters = 24;  // likewise
constexpr int64_t kBlocks = 1 << 14;  // of a thread's lists; 4 MB, and the palette's own size

// The memory of one thread's cells. No vectors: what no pixel needs stays untouched.
struct Scratch {
    std::unique_ptr<QuantizeNode[]> nodes;
    std::unique_ptr<int32_t[]> leaf, list;
    std::unique_ptr<float[]> near;
    std::unique_ptr<QuantizeBlock[]> blocks;
};

// Levels of cells: finer ones shorten the lists, but each has to be made by some pixel. 0: no cells at all, which is
// for float32 alone; float64 has half the lanes, and uint8 images repeat their colours more.
int cell_bits(int64_t n, int64_t k, bool is_u8) {
    if (!is_u8 && (k <= kFewClusters || n < kFewPixels)) return 0;
    if (n < 8192) return 3;
    return n < 65536 ? 4 : 5;
}

QuantizeCells make_cells(const QuantizeParams& p, int bits, Scratch& s) {
    const int64_t k = p.k, least = (k / 16 + 1) * bits;
    QuantizeCells cells{};
    cells.k = p.k;
    cells.bits = bits;
    cells.capacity = least + std::min(kBlocks + k / 4, 16 * p.n);
    s.nodes.reset(new QuantizeNode[quantize_cells(kQuantizeNodes)]);
    s.leaf.reset(new int32_t[1 << 15]);
    s.list.reset(new int32_t[k + 16]);
    s.near.reset(new float[k + 16]);
    s.blocks.reset(new QuantizeBlock[cells.capacity]);
    cells.nodes = s.nodes.get();
    cells.leaf = s.leaf.get();
    cells.list = s.list.get();
    cells.near = s.near.get();
    cells.blocks = s.blocks.get();
    return cells;
}

void fill_root(const QuantizeParams& p, QuantizeBlock* root) {
    for (int64_t i = 0; i < (p.k + int64_t(15)) / 16 * 16; ++i) {
        const float* from = p.clusters + 3 * i;
        const bool here = i < p.k;
        const bool finite = here && std::isfinite(from[0]) && std::isfinite(from[1]) && std::isfinite(from[2]);
        for (int c = 0; c < 3; ++c)
            root[i / 16].c[c][i % 16] = finite ? from[c] : std::numeric_limits<float>::infinity();
        root[i / 16].id[i % 16] = here ? int32_t(i) : -1;
    }
}

void run(const QuantizeParams& p, Body body, bool is_u8) {
    if (p.n <= 0) return;
    const int64_t shares = (p.n + kShare - 1) / kShare;
    const int threads = p.n < kParallel ? 1 : int(std::min<int64_t>(usable_threads(p.threads), shares));
    const int bits = cell_bits(p.n, p.k, is_u8);

    double levels[256];
    float levels32[256];
    for (int v = 0; v < 256; ++v) levels32[v] = float(levels[v] = v / 127.5 - 1.0);
    std::unique_ptr<QuantizeBlock[]> root;
    std::vector<Scratch> scratch(threads);
    std::vector<QuantizeCells> cells(threads);
    if (bits > 0) {
        root.reset(new QuantizeBlock[(p.k + int64_t(15)) / 16]);
        for (int t = 0; t < threads; ++t) {
            cells[t] = make_cells(p, bits, scratch[t]);
            cells[t].root = root.get();
            cells[t].levels = levels;
            cells[t].levels32 = levels32;
        }
        fill_root(p, root.get());
    }

    // Nothing in the region throws: an exception that leaves it ends the process.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t)
        body(p, cells[t], shares * t / threads * kShare, std::min(p.n, shares * (t + 1) / threads * kShare));
}

}  // namespace

void quantize_u8(const QuantizeParams& p) { run(p, ops().quantize_u8, true); }
void quantize_f32(const QuantizeParams& p) { run(p, ops().quantize_f32, false); }

}  // namespace igpt::cpu
