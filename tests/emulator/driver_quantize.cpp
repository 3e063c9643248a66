#include "driver.h"

namespace {

using driver::check;
using driver::Memory;

void quantize(bool) {
    for (int64_t n : {0, 1, 255, 257, 600}) {
        for (int32_t k : {1, 255, 257}) {
            const Memory bytes(size_t(3 * n), 1), floats(size_t(3 * n), 4), clusters(size_t(3 * k), 4);
            const Memory out(size_t(n), 8);
            check(igpt::cuda::quantize_u8({bytes.get(), clusters.get<float>(), out.get<int64_t>(), n, k, 0, nullptr}));
            check(
                igpt::cuda::quantize_f32({floats.get(), clusters.get<float>(), out.get<int64_t>(), n, k, 0, nullptr}));
        }
    }
}

const driver::Case added("quantize", quantize);

}  // namespace
