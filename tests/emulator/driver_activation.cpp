#include "driver.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::Activation;
using igpt::cuda::DType;

void run(Activation kind, DType dtype, int64_t rows, int32_t n, int32_t parts, bool biased) {
    const size_t size = dtype == DType::f32 ? 4 : 2, count = size_t(rows * n);
    const Memory x(count, size), bias(size_t(n), size), out(count, size), dx(count, size), dbias(size_t(n), size);
    const Memory partial(size_t(parts) * size_t(n), 4);
    check(igpt::cuda::activation_fwd(
        {driver::kHere, x.get(), biased ? bias.get() : nullptr, out.get(), rows, n, kind, dtype}));
    check(igpt::cuda::activation_bwd({driver::kHere, out.get(), x.get(), biased ? bias.get() : nullptr, dx.get(),
                                      biased ? dbias.get() : nullptr, biased ? partial.get<float>() : nullptr, rows, n,
                                      parts, kind, dtype}));
}

void activation(bool brief) {
    for (bool biased : {false, true}) {
        for (Activation kind : {Activation::quick_gelu, Activation::gelu_tanh, Activation::gelu_erf}) {
            run(kind, DType::bf16, 9, 72, 2, biased);
        }
        run(Activation::quick_gelu, DType::f32, 5, 264, 1, biased);
        run(Activation::quick_gelu, DType::f16, 0, 8, 0, biased);
        if (brief) continue;
        for (int64_t rows : {1, 33, 67}) run(Activation::quick_gelu, DType::f16, rows, 1032, 3, biased);
    }
}

const driver::Case added("activation", activation);

}  // namespace
