// Causal attention on the CPU for Python: raw addresses, strides and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/ops/causal_attention.py).
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "bind.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

namespace cpu = igpt::cpu;

using Tensor = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides of B, H, T
using Sizes = std::array<int64_t, 5>;                             // B, H, T_q, T_k, D
using Hidden = std::tuple<uintptr_t, uintptr_t, int64_t>;         // starts, key_mask, its stride of B

cpu::AttentionTensor heads(const Tensor& t) {
    return {reinterpret_cast<uint16_t*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

cpu::CausalAttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, uintptr_t lse,
                                  const Sizes& sizes, const Hidden& hidden, float scale, int32_t threads) {
    return {heads(q),
            heads(k),
            heads(v),
            heads(out),
            reinterpret_cast<float*>(lse),
            reinterpret_cast<const int32_t*>(std::get<0>(hidden)),
            reinterpret_cast<const uint8_t*>(std::get<1>(hidden)),
            std::get<2>(hidden),
            sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            scale,
            threads};
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, uintptr_t lse, const Sizes& sizes,
             const Hidden& hidden, float scale, int32_t threads) {
    cpu::causal_attention_fwd(params(q, k, v, out, lse, sizes, hidden, scale, threads));
}

void backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& dout,
              const Tensor& dq, const Tensor& dk, const Tensor& dv, uintptr_t lse, const Sizes& sizes,
              const Hidden& hidden, float scale, int32_t threads) {
    cpu::causal_attention_bwd(
        {params(q, k, v, out, lse, sizes, hidden, scale, threads), heads(dout), heads(dq), heads(dk), heads(dv)});
}

}  // namespace

void bind_attention(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("causal_attention_fwd_cpu", &forward, unlocked);
    m.def("causal_attention_bwd_cpu", &backward, unlocked);
}
