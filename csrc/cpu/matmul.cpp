// Products of fp32 matrices, the driver: memory, threads, and the kernels of the chosen instruction set.
#include <algorithm>
#include <atomic>

#include "arena.h"
#include "ops.h"
#include "region.h"

namespace igpt::cpu {

void matmul(const MatmulParams& p) {
    if (p.m <= 0 || p.n <= 0) return;
    const MatmulKernels& kernels = ops().matmul;
    const int threads = usable_threads(p.threads);
    const int64_t tiles = (p.n + kernels.tile - 1) / kernels.tile, tile_numbers = kMatmulDepth * kernels.tile;
    const int64_t most = threads * kMatmulRows, each = (p.m + most - 1) / most;  // strips of a thread
    const int64_t rows = (p.m + threads * each - 1) / (threads * each), strips = (p.m + rows - 1) / rows;
    float* packed = reinterpret_cast<float*>(workspace((tiles * tile_numbers + threads * kernels.scratch) * 4));
    float* scratch = packed + tiles * tile_numbers;
    for (int64_t k = 0; k < p.k; k += kMatmulDepth) {
        for_each(tiles, threads, [&](int64_t i) { kernels.pack(p, k, i * kernels.tile, packed + i * tile_numbers); });
        std::atomic<int64_t> next{0};
        const auto work = [&](int index, int) {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < strips;)
                kernels.strip(p, k, i * rows, std::min(rows, p.m - i * rows), packed,
                              scratch + index * kernels.scratch);
        };
        in_region(threads, work, false);
    }
}

}  // namespace igpt::cpu
