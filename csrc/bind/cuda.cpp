// The CUDA ops for Python: addresses and sizes by name, into the Params of the launchers. No maths, no torch.
// Whoever calls them has checked every argument (igpt_fast/ops).
#include <stdexcept>
#include <string>

#include "bind.h"
#include "cpu/format.h"
#include "cuda/ops.h"
#include "params.h"

namespace py = pybind11;

namespace {

namespace cuda = igpt::cuda;
using igpt::bind::def, igpt::bind::members, igpt::bind::members_of, igpt::bind::together, igpt::bind::unused;

template <auto Launcher>
struct Cuda {
    using P = decltype(igpt::bind::params_of(Launcher));
    static const char* run(const P& p) {
        const int code = Launcher(p);
        return code == 0 ? nullptr : cuda::error_string(code);
    }
};

template <class P>
constexpr auto place = together<P, &P::device, &P::stream>("place");
template <class P>
constexpr auto dtypes = members<P, &P::dtype, &P::x_dtype, &P::weight_dtype, &P::out_dtype>;

struct Pixels : cuda::QuantizeParams {
    bool is_u8;
};
int quantize(const Pixels& p) { return p.is_u8 ? cuda::quantize_u8(p) : cuda::quantize_f32(p); }

struct Quantize : Cuda<quantize> {
    static constexpr auto fields =
        members<P, &P::x, &P::is_u8, &P::clusters, &P::out, &P::n, &P::k> + unused<P>("work") + place<P>;
};

struct QuantizeTable : Cuda<cuda::quantize_table> {
    static constexpr auto fields = members<P, &P::clusters, &P::table, &P::k> + place<P>;
};

struct QuantizeLookup : Cuda<cuda::quantize_lookup> {
    static constexpr auto fields = members<P, &P::x, &P::table, &P::out, &P::n> + place<P>;
};

struct Dequantize : Cuda<cuda::dequantize> {
    static constexpr auto fields = members<P, &P::tokens, &P::token, &P::clusters, &P::out, &P::n, &P::k> + place<P>;
};

struct Sample : Cuda<cuda::sample> {
    static constexpr auto fields =
        members<P, &P::dtype, &P::uniform, &P::settings, &P::seed, &P::streams, &P::temperature, &P::top_k, &P::top_p,
                &P::min_score, &P::rows, &P::k, &P::dependent> +
        together<P, &P::logits, &P::row_stride>("logits") +
        together<P, &P::tokens, &P::logprobs, &P::columns>("tokens") +
        together<P, &P::position, &P::position_stride, &P::advance>("position") +
        together<P, &P::embedding, &P::wte, &P::wpe, &P::embed_dtype, &P::n_embd, &P::n_positions>("embedding") +
        place<P>;
};

struct NormFwd : Cuda<cuda::norm_fwd> {
    static constexpr auto fields = members<P, &P::x, &P::residual, &P::weight, &P::bias, &P::sum, &P::out, &P::rows,
                                           &P::n_embd, &P::eps, &P::centred> +
                                   dtypes<P> + place<P>;
};

struct NormBwd : Cuda<cuda::norm_bwd> {
    static constexpr auto fields =
        members<P, &P::dout, &P::dsum, &P::x, &P::weight, &P::dx, &P::dbranch, &P::dweight, &P::dbias, &P::partial,
                &P::rows, &P::n_embd, &P::parts, &P::eps, &P::centred> +
        dtypes<P> + place<P>;
};

struct ActivationFwd : Cuda<cuda::activation_fwd> {
    static constexpr auto fields =
        members<P, &P::x, &P::bias, &P::out, &P::rows, &P::n, &P::activation, &P::dtype> + place<P>;
};

struct ActivationBwd : Cuda<cuda::activation_bwd> {
    static constexpr auto fields = members<P, &P::dout, &P::x, &P::bias, &P::dx, &P::dbias, &P::partial, &P::rows,
                                           &P::n, &P::parts, &P::activation, &P::dtype> +
                                   place<P>;
};

struct CrossEntropyFwd : Cuda<cuda::cross_entropy_fwd> {
    static constexpr auto fields =
        members<P, &P::logits, &P::labels, &P::losses, &P::loss, &P::count, &P::statistics, &P::partial, &P::rows,
                &P::k, &P::parts, &P::ignore_index, &P::mean, &P::dtype> +
        place<P>;
};

struct CrossEntropyBwd : Cuda<cuda::cross_entropy_bwd> {
    static constexpr auto fields = members<P, &P::dloss, &P::logits, &P::labels, &P::statistics, &P::count, &P::dlogits,
                                           &P::rows, &P::k, &P::for_each, &P::ignore_index, &P::dtype> +
                                   place<P>;
};

template <class P>
constexpr auto shape =
    members_of<P, &P::shape, &cuda::AttentionShape::batch, &cuda::AttentionShape::heads, &cuda::AttentionShape::t_q,
               &cuda::AttentionShape::t_k, &cuda::AttentionShape::head_dim, &cuda::AttentionShape::scale,
               &cuda::AttentionShape::starts, &cuda::AttentionShape::key_mask, &cuda::AttentionShape::key_mask_stride,
               &cuda::AttentionShape::dtype, &cuda::AttentionShape::device, &cuda::AttentionShape::stream>;

struct CausalAttentionFwd : Cuda<cuda::causal_attention_fwd> {
    static constexpr auto fields = members<P, &P::q, &P::k, &P::v, &P::out, &P::lse, &P::rows> + shape<P>;
};

struct CausalAttentionBwd : Cuda<cuda::causal_attention_bwd> {
    static constexpr auto fields =
        members<P, &P::q, &P::k, &P::v, &P::out, &P::dout, &P::dq, &P::dk, &P::dv, &P::lse, &P::terms, &P::portable> +
        shape<P>;
};

struct AttentionDecode : Cuda<cuda::attention_decode> {
    static constexpr auto fields =
        members<P, &P::starts, &P::out, &P::scale, &P::dtype, &P::dependent, &P::ring, &P::cluster> +
        together<P, &P::q, &P::q_row, &P::q_head>("q") + together<P, &P::k, &P::k_row, &P::k_head>("k") +
        together<P, &P::v, &P::v_row, &P::v_head>("v") + together<P, &P::k_cache, &P::k_scale>("k_cache") +
        together<P, &P::v_cache, &P::v_scale>("v_cache") + together<P, &P::position, &P::position_step>("position") +
        together<P, &P::prefix, &P::group, &P::prefix_k, &P::prefix_v, &P::prefix_row, &P::prefix_head>("prefix") +
        together<P, &P::partial, &P::splits, &P::prefix_splits>("partial") +
        together<P, &P::rows, &P::heads, &P::positions, &P::dim>("shape") + place<P>;
};

struct Gemv : Cuda<cuda::gemv> {
    static constexpr auto fields =
        members<P, &P::x, &P::bias, &P::norm_weight, &P::residual, &P::out, &P::rows, &P::n_in, &P::n_out,
                &P::transposed, &P::eps, &P::activation, &P::dtype, &P::dependent> +
        together<P, &P::weight, &P::ld>("weight") + place<P>;
};

uintptr_t make_stream(int device) {
    void* stream = nullptr;
    const int code = cuda::make_stream(device, &stream);
    if (code != 0) throw std::runtime_error(std::string("make_stream: ") + cuda::error_string(code));
    return uintptr_t(stream);
}

}  // namespace

void bind_cuda(py::module_& m) {
    static_assert(int(cuda::Activation::none) == int(igpt::cpu::Activation::none) &&
                  int(cuda::Activation::quick_gelu) == int(igpt::cpu::Activation::quick_gelu) &&
                  int(cuda::Activation::gelu_tanh) == int(igpt::cpu::Activation::gelu_tanh) &&
                  int(cuda::Activation::gelu_erf) == int(igpt::cpu::Activation::gelu_erf));
    def<Quantize>(m, "quantize_cuda");
    def<QuantizeTable>(m, "quantize_table_cuda");
    def<QuantizeLookup>(m, "quantize_lookup_cuda");
    def<Dequantize>(m, "dequantize_cuda");
    def<Sample>(m, "sample_cuda");
    def<NormFwd>(m, "norm_fwd_cuda");
    def<NormBwd>(m, "norm_bwd_cuda");
    def<ActivationFwd>(m, "activation_fwd_cuda");
    def<ActivationBwd>(m, "activation_bwd_cuda");
    def<CrossEntropyFwd>(m, "cross_entropy_fwd_cuda");
    def<CrossEntropyBwd>(m, "cross_entropy_bwd_cuda");
    def<CausalAttentionFwd>(m, "causal_attention_fwd_cuda");
    def<CausalAttentionBwd>(m, "causal_attention_bwd_cuda");
    def<AttentionDecode>(m, "attention_decode_cuda");
    def<Gemv>(m, "gemv_cuda");
    m.def("make_stream", &make_stream, "The address of a new stream, which nobody else has and nothing destroys.");
    // How many rows `partial` should have for the GPU to be full.
    m.def("norm_bwd_parts", &cuda::norm_bwd_parts);
    m.def("activation_bwd_parts", &cuda::activation_bwd_parts);
    m.def("cross_entropy_parts", &cuda::cross_entropy_parts);
    m.def("attention_decode_splits", &cuda::attention_decode_splits, py::arg("blocks"), py::arg("keys"),
          py::arg("device") = 0, py::arg("ring") = false, py::arg("cluster") = false,
          "Into how many parts to split a number of keys when there are so many blocks without.");
}
