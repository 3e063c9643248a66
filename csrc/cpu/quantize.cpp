// Nearest-cluster quantization, the driver: memory, threads, and the table of the chosen instruction set.
#include <algorithm>
#include <memory>
#include <vector>

#include "ops.h"

namespace igpt::cpu {
namespace {

using Body = void (*)(const QuantizeParams&, QuantizeCells&, int64_t, int64_t);

constexpr int64_t kParallel = 4096;         // pixels from which a second thread pays
constexpr int64_t kShare = 64;              // a thread's pixels start at a multiple: whole blocks
constexpr int64_t kFewPixels = 4096;        // below, walking all clusters is as fast as making lists
constexpr int64_t kFewClusters = 24;        // likewise
constexpr int64_t kListCapacity = 1 << 18;  // list entries; 1 MB

// The memory of one thread's cells.
struct Scratch {
    std::vector<int64_t> first;
    std::vector<int32_t> size;
    std::vector<float> near;
    std::unique_ptr<int32_t[]> list;  // not a vector: megabytes that mostly stay untouched
};

// Levels of cells: finer ones shorten the lists, but each has to be made by some pixel. 0: no cells at all, which is
// for float32 alone; float64 has half the lanes, and uint8 images repeat their colours more.
int cell_bits(int64_t n, int64_t k, bool is_u8) {
    if (!is_u8 && (k <= kFewClusters || n < kFewPixels)) return 0;
    if (n < 8192) return 3;
    return k > 4096 && n > (int64_t(1) << 18) ? 5 : 4;
}

void run(const QuantizeParams& p, Body body, bool is_u8) {
    if (p.n <= 0) return;
    const int64_t k = p.k, shares = (p.n + kShare - 1) / kShare;
    const int threads = p.n < kParallel ? 1 : int(std::min<int64_t>(usable_threads(p.threads), shares));
    const int bits = cell_bits(p.n, k, is_u8);

    std::vector<double> wide(p.clusters, p.clusters + 3 * k), levels(256);
    for (int v = 0; v < 256; ++v) levels[v] = v / 127.5 - 1.0;
    std::vector<float> axes(3 * k);
    for (int64_t i = 0; i < k; ++i)
        for (int c = 0; c < 3; ++c) axes[c * k + i] = (p.clusters[3 * i + c] + 1.0f) * 127.5f;

    const int64_t capacity = k * (bits + 8) + std::min(kListCapacity, p.n * std::min<int64_t>(k, 64));
    std::vector<Scratch> scratch(threads);
    std::vector<QuantizeCells> cells(threads);
    for (int t = 0; t < threads; ++t) {
        Scratch& s = scratch[t];
        s.first.assign(quantize_cells(bits), -1);
        s.size.resize(quantize_cells(bits));
        s.list.reset(new int32_t[capacity]);
        for (int64_t i = 0; i < k; ++i) s.list[i] = int32_t(i);
        s.near.resize(k);
        cells[t] = {axes.data(),
                    wide.data(),
                    levels.data(),
                    s.first.data(),
                    s.size.data(),
                    s.list.get(),
                    s.near.data(),
                    capacity,
                    k,
                    p.k,
                    bits};
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
