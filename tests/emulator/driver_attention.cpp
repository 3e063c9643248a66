#include "driver.h"
#include "emulator.h"

namespace {

using driver::check;
using driver::Memory;
using igpt::cuda::AttentionShape;
using igpt::cuda::AttentionTensor;
using igpt::cuda::DType;

// Forward and backward of one batch row with two heads side by side; the last row of a tensor ends its memory.
void attention(DType dtype, int32_t d, int32_t t_q, int32_t t_k, int32_t rows, bool starts, bool key_mask) {
    constexpr int32_t kHeads = 2;
    const auto memory = [&](int32_t t) { return size_t(t) * kHeads * size_t(d); };
    const Memory q(memory(t_q), 2), k(memory(t_k), 2), v(memory(t_k), 2), out(memory(t_q), 2), dout(memory(t_q), 2);
    const Memory dq(memory(t_q), 2), dk(memory(t_k), 2), dv(memory(t_k), 2);
    const Memory lse(size_t(kHeads * t_q), 4), terms(size_t(2 * kHeads * t_q), 4), first(1, 4), mask(size_t(t_k), 1);
    *first.get<int32_t>() = t_k / 3;
    for (int32_t i = 0; i < t_k; ++i) mask.get<uint8_t>()[i] = i % 3 != 1;
    const auto tensor = [&](const Memory& x) { return AttentionTensor{x.get(), 0, d, int64_t(kHeads) * d}; };
    const AttentionShape shape{driver::kHere,
                               1,
                               kHeads,
                               t_q,
                               t_k,
                               d,
                               0.125f,
                               starts ? first.get<int32_t>() : nullptr,
                               key_mask ? mask.get<uint8_t>() : nullptr,
                               0,
                               dtype};
    check(igpt::cuda::causal_attention_fwd(
        {shape, tensor(q), tensor(k), tensor(v), tensor(out), lse.get<float>(), rows}));
    check(
        igpt::cuda::causal_attention_bwd({shape, tensor(q), tensor(k), tensor(v), tensor(out), tensor(dout), tensor(dq),
                                          tensor(dk), tensor(dv), lse.get<float>(), terms.get<float>(), false}));
}

// By the kernels for Hopper; 0 rows leave the choice to the launcher.
void on_hopper(DType dtype, int32_t d, int32_t t_q, int32_t t_k, bool starts) {
    igpt::emulator::set_capability(90);
    attention(dtype, d, t_q, t_k, 0, starts, false);
    igpt::emulator::set_capability(80);
}

void all(bool brief) {
    attention(DType::bf16, 32, 65, 66, 128, true, false);
    attention(DType::f16, 64, 66, 66, 64, false, true);
    on_hopper(DType::bf16, 64, 400, 400, true);
    on_hopper(DType::f16, 128, 130, 400, true);
    if (brief) return;
    on_hopper(DType::bf16, 96, 194, 194, true);
    on_hopper(DType::bf16, 64, 1, 1, false);
    on_hopper(DType::f16, 64, 0, 3, false);
    attention(DType::bf16, 64, 1, 1, 128, false, false);
    attention(DType::f16, 96, 65, 129, 128, true, true);
    attention(DType::bf16, 128, 65, 65, 0, false, false);
    attention(DType::bf16, 64, 0, 3, 0, false, true);
}

const driver::Case added("attention", all);

}  // namespace
