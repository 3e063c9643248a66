// The CPU's norms, activations, loss, quantize and dequantize for Python: addresses and sizes by name. No maths, no
// torch. Whoever calls it has checked every argument (igpt_fast/ops).
#include <stdexcept>
#include <string>

#include "bind.h"
#include "cpu/ops.h"
#include "params.h"

namespace {

namespace cpu = igpt::cpu;
using igpt::bind::Cpu, igpt::bind::def, igpt::bind::members;

struct Pixels : cpu::QuantizeParams {
    bool is_u8;
};
void quantize(const Pixels& p) {
    if (p.k < 1) throw std::invalid_argument("quantize: clusters has " + std::to_string(p.k) + " rows");
    (p.is_u8 ? cpu::quantize_u8 : cpu::quantize_f32)(p);
}

struct Quantize : Cpu<quantize> {
    static constexpr auto fields =
        members<P, &P::x, &P::is_u8, &P::clusters, &P::out, &P::n, &P::k, &P::threads, &P::work>;
};

struct NormFwd : Cpu<cpu::norm_fwd> {
    static constexpr auto fields =
        members<P, &P::x, &P::residual, &P::weight, &P::bias, &P::total, &P::out, &P::rows, &P::n, &P::eps, &P::centred,
                &P::format, &P::weight_format, &P::out_format, &P::threads>;
};

struct NormBwd : Cpu<cpu::norm_bwd> {
    static constexpr auto fields =
        members<P, &P::dout, &P::dsum, &P::x, &P::weight, &P::dx, &P::dweight, &P::dbias, &P::rows, &P::n, &P::eps,
                &P::centred, &P::format, &P::weight_format, &P::out_format, &P::threads>;
};

struct ActivationFwd : Cpu<cpu::activation_fwd> {
    static constexpr auto fields =
        members<P, &P::x, &P::bias, &P::out, &P::rows, &P::n, &P::activation, &P::format, &P::threads>;
};

struct ActivationBwd : Cpu<cpu::activation_bwd> {
    static constexpr auto fields = members<P, &P::dout, &P::x, &P::bias, &P::dx, &P::dbias, &P::rows, &P::n,
                                           &P::activation, &P::format, &P::threads>;
};

struct CrossEntropyFwd : Cpu<cpu::cross_entropy_fwd> {
    static constexpr auto fields = members<P, &P::logits, &P::labels, &P::losses, &P::loss, &P::count, &P::statistics,
                                           &P::rows, &P::k, &P::ignore_index, &P::mean, &P::format, &P::threads>;
};

struct CrossEntropyBwd : Cpu<cpu::cross_entropy_bwd> {
    static constexpr auto fields = members<P, &P::dloss, &P::logits, &P::labels, &P::statistics, &P::count, &P::dlogits,
                                           &P::rows, &P::k, &P::for_each, &P::ignore_index, &P::format, &P::threads>;
};

struct Dequantize : Cpu<cpu::dequantize> {
    static constexpr auto fields =
        members<P, &P::tokens, &P::token_bytes, &P::clusters, &P::out, &P::n, &P::k, &P::threads>;
};

}  // namespace

void bind_elementwise(pybind11::module_& m) {
    def<Quantize>(m, "quantize_cpu");
    def<NormFwd>(m, "norm_fwd_cpu");
    def<NormBwd>(m, "norm_bwd_cpu");
    def<ActivationFwd>(m, "activation_fwd_cpu");
    def<ActivationBwd>(m, "activation_bwd_cpu");
    def<CrossEntropyFwd>(m, "cross_entropy_fwd_cpu");
    def<CrossEntropyBwd>(m, "cross_entropy_bwd_cpu");
    def<Dequantize>(m, "dequantize_cpu");
}
