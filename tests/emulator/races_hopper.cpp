// races_hopper PROBE: as races.cpp, for hopper.cuh.
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace igpt::cuda;

namespace {

// `in`: [64, 64] of 16 bits.
struct Probe {
    ptx::TensorMap map;
    const void* in;
    float* out;  // 128 values
};

unsigned char* aligned_shared() {
    auto* shared = dynamic_shared<unsigned char>();
    return shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
}

// Two loads to one place; all threads read what the first has brought before the second begins, or not.
enum TileBug { tile_right, tile_over_one_in_use, tile_before_barriers_are_there };
template <TileBug kBug>
void tile(Probe p) {
    unsigned char* tile = aligned_shared();
    const uint32_t to = ptx::shared_address(tile), barrier = to + 8192;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_fence_init();
    }
    if (kBug != tile_before_barriers_are_there) __syncthreads();
    for (int turn = 0; turn < 2; ++turn) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_expect_tx(barrier, 8192);
            ptx::tma_load_4d(to, &p.map, barrier, 0, 0, 0, 0);
        }
        ptx::mbarrier_wait(barrier, turn);
        p.out[threadIdx.x] = float(tile[64 * threadIdx.x]);
        if (kBug != tile_over_one_in_use) __syncthreads();
    }
}

// The same by bulk copies.
enum BulkBug { bulk_right, bulk_over_one_in_use };
template <BulkBug kBug>
void bulk(Probe p) {
    unsigned char* tile = aligned_shared();
    const uint32_t to = ptx::shared_address(tile), barrier = to + 8192;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::mbarrier_fence_init();
    }
    __syncthreads();
    for (int turn = 0; turn < 2; ++turn) {
        if (threadIdx.x == 0) {
            ptx::mbarrier_expect_tx(barrier, 8192);
            ptx::bulk_load(to, p.in, 8192, barrier);
        }
        ptx::mbarrier_wait(barrier, turn);
        p.out[threadIdx.x] = float(tile[64 * threadIdx.x]);
        if (kBug != bulk_over_one_in_use) __syncthreads();
    }
}

// All threads write the operands of one product.
enum ProductBug { product_right, product_without_barrier, product_overwritten };
template <ProductBug kBug>
void product(Probe p) {
    unsigned char* tile = aligned_shared();
    auto* own = reinterpret_cast<uint4*>(tile + 64 * threadIdx.x);
    for (unsigned i = 0; i < 4; ++i) own[i] = {};
    ptx::fence_async_shared();
    if (kBug != product_without_barrier) __syncthreads();
    float d[32];
    ptx::wgmma_fence();
    const uint64_t both = ptx::swizzled_operand(ptx::shared_address(tile), 0, 1024);
    ptx::wgmma_ss<__nv_bfloat16, 64>(d, both, both, false);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (kBug != product_overwritten) __syncthreads();
    for (unsigned i = 0; i < 4; ++i) own[i] = {1, 1, 1, 1};
    p.out[threadIdx.x] = d[0];
}

const std::map<std::string, void (*)(Probe)> kKernels{
    {"tile", tile<tile_right>},
    {"tile_past_the_end", tile<tile_right>},
    {"tile_over_one_in_use", tile<tile_over_one_in_use>},
    {"tile_before_barriers_are_there", tile<tile_before_barriers_are_there>},
    {"bulk", bulk<bulk_right>},
    {"bulk_past_the_end", bulk<bulk_right>},
    {"bulk_over_one_in_use", bulk<bulk_over_one_in_use>},
    {"product", product<product_right>},
    {"product_without_barrier", product<product_without_barrier>},
    {"product_overwritten", product<product_overwritten>},
};

}  // namespace

int main(int, char** argv) {
    const std::string name = argv[1];
    // posix_memalign, not a vector: the sanitizers know its end, and TMA needs 16 bytes of alignment.
    const size_t bytes = 64 * 128 - (name == "tile_past_the_end" || name == "bulk_past_the_end" ? 16 : 0);
    void* in = nullptr;
    if (posix_memalign(&in, 128, bytes) != 0) return 1;
    for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(in)[i] = 1;
    std::vector<float> out(128);
    Probe p{{}, in, out.data()};
    const int error =
        ptx::make_tensor_map(&p.map, in, {{64, 64, 1, 1}, {128, 8192, 8192}, {64, 64, 1, 1}, ptx::Swizzle::bytes128});
    try {
        if (error == cudaSuccess) launch(kKernels.at(name), 1, 128, 1024 + 8192 + 8, nullptr, p);
    } catch (const std::exception& problem) {
        std::fprintf(stderr, "%s\n", problem.what());
        return 1;
    }
    std::free(in);
    std::puts("done");
    return error;
}
