#include "driver.h"
#include "emulator.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::Activation;
using igpt::cuda::DType;

// With everything if `all`, else with the product alone.
void layer(DType dtype, int32_t rows, int32_t n_in, int32_t n_out, bool transposed, bool all) {
    const size_t in = size_t(n_in), out_size = size_t(n_out);
    const Memory x(size_t(rows) * in, 2), weight(in * out_size, 2), bias(out_size, 2), norm(in, 2);
    const Memory residual(size_t(rows) * out_size, 2), out(size_t(rows) * out_size, 2);
    check(igpt::cuda::gemv(
        {driver::kHere, x.get(), weight.get(), all ? bias.get() : nullptr, all ? norm.get() : nullptr,
         all ? residual.get() : nullptr, out.get(), transposed ? n_in : n_out, rows, n_in, n_out, transposed, 1e-5f,
         all ? Activation::quick_gelu : Activation::none, dtype, igpt::cuda::Dependent::none, 0, 0}));
}

void gemv(bool brief) {
    igpt::emulator::set_capability(90);  // clusters
    for (bool transposed : {false, true}) {
        for (int32_t rows : {1, 2, 3, 7}) layer(DType::bf16, rows, 8, 24, transposed, true);
        layer(DType::f16, 8, 1544, 24, transposed, true);
        layer(DType::f16, 1, 520, 40, transposed, false);
        layer(DType::bf16, 0, 8, 8, transposed, false);
        if (!brief || !transposed) layer(DType::bf16, 2, 8232, 16, transposed, true);  // x does not fit at once
        for (int32_t rows : {9, 17, 33}) layer(DType::bf16, rows, rows == 33 ? 4104 : 264, 24, transposed, true);
        layer(DType::f16, 9, 264, 8, transposed, true);
        if (brief) continue;
        layer(DType::bf16, 3, 72, 4136, transposed, true);
    }
    igpt::emulator::set_capability(80);
}

const driver::Case added("gemv", gemv);

}  // namespace
