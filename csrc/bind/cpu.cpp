// The CPU ops for Python: addresses, strides and sizes by name. No maths, no torch. Whoever calls them has checked
// every argument (igpt_fast/ops). As those of cuda.cpp, but for what is of no use here.
#include <stdexcept>
#include <string>

#include "bind.h"
#include "cpu/checksums.h"
#include "cpu/ops.h"
#include "cpu/sample.h"
#include "params.h"

namespace {

namespace cpu = igpt::cpu;
using igpt::bind::Cpu, igpt::bind::def, igpt::bind::members, igpt::bind::members_of, igpt::bind::named,
    igpt::bind::together, igpt::bind::unused;

template <class P>
constexpr auto place = named<P, &P::threads>("place");
template <class P>
constexpr auto dtype_and_place = named<P, &P::format>("dtype") + place<P>;
template <class P>
constexpr auto formats = named<P, &P::weight_format>("weight_dtype") + named<P, &P::out_format>("out_dtype");
template <class P>
constexpr auto gpu_sums = unused<P>("partial") + unused<P>("parts");

struct Pixels : cpu::QuantizeParams {
    bool is_u8;
};
void quantize(const Pixels& p) {
    if (p.k < 1) throw std::invalid_argument("quantize: clusters has " + std::to_string(p.k) + " rows");
    (p.is_u8 ? cpu::quantize_u8 : cpu::quantize_f32)(p);
}

struct Quantize : Cpu<quantize> {
    static constexpr auto fields =
        members<P, &P::x, &P::is_u8, &P::clusters, &P::out, &P::n, &P::k, &P::work> + place<P>;
};

struct NormFwd : Cpu<cpu::norm_fwd> {
    static constexpr auto fields = members<P, &P::x, &P::residual, &P::weight, &P::bias, &P::sum, &P::out, &P::rows,
                                           &P::n_embd, &P::eps, &P::centred> +
                                   named<P, &P::x_format>("x_dtype") + formats<P> + dtype_and_place<P>;
};

struct NormBwd : Cpu<cpu::norm_bwd> {
    static constexpr auto fields = members<P, &P::dout, &P::dsum, &P::x, &P::weight, &P::dx, &P::dbranch, &P::dweight,
                                           &P::dbias, &P::rows, &P::n_embd, &P::eps, &P::centred> +
                                   unused<P>("x_dtype") + formats<P> + gpu_sums<P> + dtype_and_place<P>;
};

struct ActivationFwd : Cpu<cpu::activation_fwd> {
    static constexpr auto fields =
        members<P, &P::x, &P::bias, &P::out, &P::rows, &P::n, &P::activation> + dtype_and_place<P>;
};

struct ActivationBwd : Cpu<cpu::activation_bwd> {
    static constexpr auto fields =
        members<P, &P::dout, &P::x, &P::bias, &P::dx, &P::dbias, &P::rows, &P::n, &P::activation> + gpu_sums<P> +
        dtype_and_place<P>;
};

struct CrossEntropyFwd : Cpu<cpu::cross_entropy_fwd> {
    static constexpr auto fields = members<P, &P::logits, &P::labels, &P::losses, &P::loss, &P::count, &P::statistics,
                                           &P::rows, &P::k, &P::ignore_index, &P::mean> +
                                   gpu_sums<P> + dtype_and_place<P>;
};

struct CrossEntropyBwd : Cpu<cpu::cross_entropy_bwd> {
    static constexpr auto fields = members<P, &P::dloss, &P::logits, &P::labels, &P::statistics, &P::count, &P::dlogits,
                                           &P::rows, &P::k, &P::for_each, &P::ignore_index> +
                                   dtype_and_place<P>;
};

struct Dequantize : Cpu<cpu::dequantize> {
    static constexpr auto fields = members<P, &P::tokens, &P::token, &P::clusters, &P::out, &P::n, &P::k> + place<P>;
};

using Of = cpu::CausalAttentionParams;

struct CausalAttentionFwd : Cpu<cpu::causal_attention_fwd> {
    static constexpr auto fields =
        members<P, &P::q, &P::k, &P::v, &P::out, &P::lse, &P::starts, &P::key_mask, &P::key_mask_stride, &P::batch,
                &P::heads, &P::t_q, &P::t_k, &P::head_dim, &P::scale> +
        dtype_and_place<P>;
};

struct CausalAttentionBwd : Cpu<cpu::causal_attention_bwd> {
    static constexpr auto fields =
        members<P, &P::dout, &P::dq, &P::dk, &P::dv> +
        members_of<P, &P::of, &Of::q, &Of::k, &Of::v, &Of::out, &Of::lse, &Of::starts, &Of::key_mask,
                   &Of::key_mask_stride, &Of::batch, &Of::heads, &Of::t_q, &Of::t_k, &Of::head_dim, &Of::scale> +
        named<P, &P::of, &Of::format>("dtype") + named<P, &P::of, &Of::threads>("place");
};

struct Sample : Cpu<cpu::sample> {
    static constexpr auto fields = together<P, &P::logits, &P::stride>("logits") +
                                   members<P, &P::uniform, &P::known, &P::temperature, &P::top_k, &P::top_p,
                                           &P::min_score, &P::tokens, &P::logprobs, &P::cumulative, &P::rows, &P::k> +
                                   place<P>;
};

struct Matmul : Cpu<cpu::matmul> {
    static constexpr auto fields = members<P, &P::a, &P::a_row, &P::a_column, &P::b, &P::b_row, &P::b_column, &P::bias,
                                           &P::c, &P::m, &P::n, &P::k> +
                                   place<P>;
};

}  // namespace

void bind_cpu(pybind11::module_& m) {
    def<Quantize>(m, "quantize_cpu");
    def<NormFwd>(m, "norm_fwd_cpu");
    def<NormBwd>(m, "norm_bwd_cpu");
    def<ActivationFwd>(m, "activation_fwd_cpu");
    def<ActivationBwd>(m, "activation_bwd_cpu");
    def<CrossEntropyFwd>(m, "cross_entropy_fwd_cpu");
    def<CrossEntropyBwd>(m, "cross_entropy_bwd_cpu");
    def<Dequantize>(m, "dequantize_cpu");
    def<CausalAttentionFwd>(m, "causal_attention_fwd_cpu");
    def<CausalAttentionBwd>(m, "causal_attention_bwd_cpu");
    def<Matmul>(m, "matmul_cpu");
    def<Sample>(m, "sample_cpu");
    m.def(
        "crc32c",
        [](uintptr_t address, size_t bytes, uint32_t before) {
            return cpu::crc32c(reinterpret_cast<const void*>(address), bytes, before);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
}
