// attention_decode's parts: into how many a cache is split, and the kernel that puts them together, where no cluster
// does.
#include <algorithm>

#include "attention_decode.cuh"
#include "launch.cuh"

namespace igpt::cuda {
namespace {

using namespace decode;

// One block for a (row, head), one thread for an element: adds its parts up in their order.
template <typename T>
__global__ void __launch_bounds__(128) attention_decode_merge_kernel(AttentionDecodeParams p) {
    const unsigned row_head = blockIdx.x, row = row_head / unsigned(p.heads);
    if (p.dependent == Dependent::early) ptx::grid_dependency_launch();
    ptx::grid_dependency_wait();
    const Own own(p, row);
    Stats all = {-INFINITY, 0.0f};
    float sum = 0.0f;
    if (own.valid) {
        const Slots slots(p, row, row_head % unsigned(p.heads));
        const int count = p.prefix_splits + own.parts;
#pragma unroll 4  // parts on their way at once
        for (int slot = 0; slot < count; ++slot) all.m = fmaxf(all.m, load_global(slots.stats + slot).m);
#pragma unroll 4  // parts on their way at once
        for (int slot = 0; slot < count; ++slot) {
            const Stats one = load_global(slots.stats + slot);
            const float weight = weight_of(one.m, all.m);
            all.l += weight * one.l;
            sum += weight * load_global(slots.at(slot) + threadIdx.x);
        }
    }
    if (p.dependent == Dependent::late) ptx::grid_dependency_launch();
    store_out<T>(p, row_head, int(threadIdx.x), own.valid, sum, all.l);
}

}  // namespace

int decode::launch_merge(const AttentionDecodeParams& p) {
    return dispatch_dtype(p.dtype, [&](auto t) -> int {
        return launch(attention_decode_merge_kernel<decltype(t)>, unsigned(p.rows * p.heads), unsigned(p.dim), 0,
                      p.stream, p, 1, p.dependent != Dependent::none);
    });
}

// All kernels are compiled alike.
bool decode::has_ring() { return has_clusters(attention_decode_merge_kernel<float>); }

int32_t attention_decode_splits(int64_t blocks, int64_t keys, int device, bool ring, bool cluster) {
    const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t most = keys < kKeys ? 1 : divide_up(keys, kKeys);
    const int64_t wanted = blocks >= 256 || blocks < 1 ? 1 : divide_up(264, blocks);
    if (!ring) return int32_t(std::min(wanted, most));
    const DeviceGuard guard(device);
    if (guard.error != cudaSuccess || !has_ring()) return int32_t(std::min(wanted, most));
    int count = 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) count = 1;
    const int64_t wide = cluster ? kMostClusters : 2 * int64_t(count);
    int64_t best = 1;
    double fullest = 0.0;  // how much of the multiprocessors' time they have work, in spans of kKeys
    // Of a cluster, a power of two: a group of multiprocessors, 16 or 18, is filled by those.
    for (int64_t splits = 1; splits <= std::min(most, wide) && fullest < 0.9; splits += cluster ? splits : 1) {
        const int64_t spans = divide_up(most, splits), parts = divide_up(most, spans);
        const int64_t time = divide_up(std::max<int64_t>(blocks, 1) * parts, count) * spans;
        const double full = double(std::max<int64_t>(blocks, 1) * most) / double(time * count);
        if (full <= fullest) continue;
        best = cluster ? splits : parts;
        fullest = full;
    }
    return int32_t(best);
}

}  // namespace igpt::cuda
