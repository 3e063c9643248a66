#include "driver.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::DType;

void rms_norm(DType dtype, int64_t rows, int32_t n, int32_t parts, bool fused) {
    const size_t size = dtype == DType::f32 ? 4 : 2, count = size_t(rows * n);
    const Memory x(count, size), residual(count, size), weight(size_t(n), size), sum(count, size), out(count, size);
    check(igpt::cuda::rms_norm_fwd({x.get(), fused ? residual.get() : nullptr, weight.get(),
                                    fused ? sum.get() : nullptr, out.get(), rows, n, 1e-5f, dtype, 0, nullptr}));
    const Memory dx(count, size), dweight(size_t(n), size), partial(size_t(parts) * size_t(n), 4);
    check(igpt::cuda::rms_norm_bwd({out.get(), fused ? residual.get() : nullptr, x.get(), weight.get(), dx.get(),
                                    dweight.get(), partial.get<float>(), rows, n, parts, 1e-5f, dtype, 0, nullptr}));
}

void norm(bool brief) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) rms_norm(dtype, 5, 72, 1, false);
    for (int32_t n : {8, 520, 1032, 2056}) rms_norm(DType::bf16, 7, n, 2, true);
    rms_norm(DType::bf16, 0, 64, 0, true);
    if (brief) return;
    rms_norm(DType::bf16, 2, 8192, 2, true);
    rms_norm(DType::f32, 2, 8192, 1, true);
}

const driver::Case added("norm", norm);

}  // namespace
