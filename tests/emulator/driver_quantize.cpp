#include "driver.h"
#include "emulator.h"

namespace {

using driver::check;
using driver::Memory;
namespace cuda = igpt::cuda;

void brute_force(int64_t n, int32_t k) {
    const Memory bytes(size_t(3 * n), 1), floats(size_t(3 * n), 4), clusters(size_t(3 * k), 4), out(size_t(n), 8);
    check(cuda::quantize_u8({driver::kHere, bytes.get(), clusters.get<float>(), out.get<int64_t>(), n, k}));
    check(cuda::quantize_f32({driver::kHere, floats.get(), clusters.get<float>(), out.get<int64_t>(), n, k}));
}

// The first and the last cells of a table, whose candidates, all clusters, are more than shared memory holds.
void table(const Memory& entries, int32_t k) {
    const Memory clusters(size_t(3 * k), 4);
    for (uint64_t cell : {0, 32766}) {
        igpt::emulator::set_blocks(cell, 2);
        check(cuda::quantize_table({driver::kHere, clusters.get<float>(), entries.get<uint16_t>(), k}));
    }
    igpt::emulator::set_blocks(0, igpt::emulator::kAllBlocks);
}

void lookup(const Memory& entries, int64_t n) {
    const Memory x(size_t(3 * n), 1), out(size_t(n), 8);
    check(cuda::quantize_lookup({driver::kHere, x.get<uint8_t>(), entries.get<uint16_t>(), out.get<int64_t>(), n}));
}

void quantize(bool brief) {
    for (int64_t n : {0, 1, 130}) {
        for (int32_t k : {1, 513}) brute_force(n, k);
    }
    // Few entries are touched, so the others need no memory.
    const Memory entries(size_t(1) << 24, 2, driver::Fill::none);
    for (int32_t k : {1, 900}) table(entries, k);
    for (int64_t n : {0, 1, 513, 2048 + 512}) lookup(entries, n);
    if (brief) return;
    // Four pixels a thread; the last blocks of them.
    igpt::emulator::set_blocks(255, 2);
    brute_force((1 << 17) + 3, 9);
    igpt::emulator::set_blocks(0, igpt::emulator::kAllBlocks);
}

const driver::Case added("quantize", quantize);

}  // namespace
