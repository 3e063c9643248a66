#include "driver.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::DType;

enum class Labels { good, ignored, bad };

void run(DType dtype, int64_t rows, int32_t k, int32_t parts, bool each) {
    const size_t size = dtype == DType::f32 ? 4 : 2, count = size_t(rows) * size_t(k);
    const Memory logits(count, size), labels(size_t(rows), 8), losses(size_t(rows), 4), statistics(2 * size_t(rows), 4);
    const Memory loss(1, 4), counted(1, 4), partial(2 * size_t(parts), 4), dloss(each ? size_t(rows) : 1, 4);
    const Memory dlogits(count, size);
    for (int64_t i = 0; i < rows; ++i) {
        const Labels kind = i % 4 == 1 ? Labels::ignored : i % 4 == 3 ? Labels::bad : Labels::good;
        labels.get<int64_t>()[i] = kind == Labels::ignored ? -100
                                   : kind == Labels::bad   ? k + (int64_t(1) << 40)
                                                           : k - 1;
    }
    check(igpt::cuda::cross_entropy_fwd({driver::kHere, logits.get(), labels.get<int64_t>(),
                                         each ? losses.get<float>() : nullptr, each ? nullptr : loss.get<float>(),
                                         each ? nullptr : counted.get<float>(), statistics.get<float>(),
                                         partial.get<float>(), rows, k, parts, -100, !each, dtype}));
    check(igpt::cuda::cross_entropy_bwd({driver::kHere, dloss.get<float>(), logits.get(), labels.get<int64_t>(),
                                         statistics.get<float>(), each ? nullptr : counted.get<float>(), dlogits.get(),
                                         rows, k, each, -100, dtype}));
}

void cross_entropy(bool brief) {
    for (bool each : {false, true}) {
        for (int32_t k : {8, 13, 512, 1032}) run(DType::bf16, 6, k, 2, each);
        run(DType::f32, 5, 520, 1, each);
        run(DType::f16, 0, 8, 0, each);
        if (brief) continue;
        for (int32_t k : {1, 504, 1024, 4100}) run(DType::f32, 9, k, 3, each);
    }
}

const driver::Case added("cross_entropy", cross_entropy);

}  // namespace
