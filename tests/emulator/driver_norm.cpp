#include "driver.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::DType;

void run(bool centred, DType dtype, int64_t rows, int32_t n, int32_t parts, bool fused) {
    const size_t size = dtype == DType::f32 ? 4 : 2, count = size_t(rows * n), sums = centred ? 2 : 1;
    const Memory x(count, size), residual(count, size), weight(size_t(n), size), sum(count, size), out(count, size);
    const igpt::cuda::NormFwdParams forward{driver::kHere,
                                            x.get(),
                                            fused ? residual.get() : nullptr,
                                            weight.get(),
                                            centred ? weight.get() : nullptr,
                                            fused ? sum.get() : nullptr,
                                            out.get(),
                                            rows,
                                            n,
                                            1e-5f,
                                            dtype,
                                            dtype,
                                            dtype,
                                            dtype,
                                            centred};
    check(igpt::cuda::norm_fwd(forward));
    const Memory dx(count, size), dweight(size_t(n), size), dbias(size_t(n), size);
    const Memory partial(sums * size_t(parts) * size_t(n), 4);
    const igpt::cuda::NormBwdParams backward{driver::kHere,
                                             out.get(),
                                             fused ? residual.get() : nullptr,
                                             x.get(),
                                             weight.get(),
                                             dx.get(),
                                             nullptr,
                                             dweight.get(),
                                             centred ? dbias.get() : nullptr,
                                             partial.get<float>(),
                                             rows,
                                             n,
                                             parts,
                                             1e-5f,
                                             dtype,
                                             dtype,
                                             dtype,
                                             dtype,
                                             centred};
    check(igpt::cuda::norm_bwd(backward));
}

// A stream of float32, `narrow` the branch, the norm and their gradients.
void run_mixed(DType narrow, int64_t rows, int32_t n, int32_t parts) {
    const DType wide = DType::f32;
    const size_t count = size_t(rows * n);
    const Memory x(count, 2), residual(count, 4), weight(size_t(n), 4), sum(count, 4), out(count, 2);
    check(igpt::cuda::norm_fwd({driver::kHere, x.get(), residual.get(), weight.get(), nullptr, sum.get(), out.get(),
                                rows, n, 1e-5f, wide, narrow, wide, narrow, false}));
    const Memory dx(count, 4), dbranch(count, 2), dweight(size_t(n), 4), partial(size_t(parts) * size_t(n), 4);
    check(igpt::cuda::norm_bwd({driver::kHere, out.get(), residual.get(), sum.get(), weight.get(), dx.get(),
                                dbranch.get(), dweight.get(), nullptr, partial.get<float>(), rows, n, parts, 1e-5f,
                                wide, narrow, wide, narrow, false}));
}

void norm(bool brief) {
    for (bool centred : {false, true}) {
        for (DType dtype : {DType::f32, DType::bf16, DType::f16}) run(centred, dtype, 5, 72, 1, false);
        for (int32_t n : {8, 520, 1032, 2056}) run(centred, DType::bf16, 7, n, 2, true);
        run(centred, DType::bf16, 0, 64, 0, true);
        if (!centred) run_mixed(DType::bf16, 5, 520, 2);
        if (brief) continue;
        if (!centred) run_mixed(DType::f16, 7, 72, 2);
        run(centred, DType::bf16, 2, 8192, 2, true);
        run(centred, DType::f32, 2, 8192, 1, true);
    }
}

const driver::Case added("norm", norm);

}  // namespace
