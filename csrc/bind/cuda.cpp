// The CUDA ops for Python: raw addresses and sizes in, Params out to the launchers. No maths, no torch.
// Whoever calls them has checked every argument (igpt_fast/ops).
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bind.h"
#include "cuda/ops.h"

namespace py = pybind11;

namespace {

namespace cuda = igpt::cuda;

template <typename T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(const char* op, int code) {
    if (code != 0) throw std::runtime_error(std::string(op) + ": CUDA error: " + cuda::error_string(code));
}

void quantize(uintptr_t x, bool is_u8, uintptr_t clusters, uintptr_t out, int64_t n, int64_t k, int32_t device,
              uintptr_t stream) {
    if (k < 1 || k > INT32_MAX) throw std::invalid_argument("quantize: clusters has " + std::to_string(k) + " rows");
    const cuda::QuantizeParams params{pointer(x), pointer<float>(clusters), pointer<int64_t>(out), n, int32_t(k),
                                      device,     pointer(stream)};
    check("quantize", is_u8 ? cuda::quantize_u8(params) : cuda::quantize_f32(params));
}

void quantize_table(uintptr_t clusters, uintptr_t table, int64_t k, int32_t device, uintptr_t stream) {
    check("quantize", cuda::quantize_table(
                          {pointer<float>(clusters), pointer<uint16_t>(table), int32_t(k), device, pointer(stream)}));
}

void quantize_lookup(uintptr_t x, uintptr_t table, uintptr_t out, int64_t n, int32_t device, uintptr_t stream) {
    check("quantize", cuda::quantize_lookup({pointer<uint8_t>(x), pointer<uint16_t>(table), pointer<int64_t>(out), n,
                                             device, pointer(stream)}));
}

void dequantize(uintptr_t tokens, int32_t token_type, uintptr_t clusters, uintptr_t out, int64_t n, int64_t k,
                int32_t device, uintptr_t stream) {
    check("dequantize", cuda::dequantize({pointer(tokens), pointer<float>(clusters), pointer<uint8_t>(out), n,
                                          int32_t(k), cuda::TokenType(token_type), device, pointer(stream)}));
}

// With `uniform`, or with (seed, streams, position); what is not there is 0.
void sample(uintptr_t logits, int64_t row_stride, int32_t dtype, uintptr_t uniform, uint64_t seed, uintptr_t streams,
            uintptr_t position, int32_t position_stride, float temperature, int32_t top_k, double top_p,
            float min_score, uintptr_t tokens, uintptr_t wte, uintptr_t wpe, uintptr_t embedding, int32_t embed_dtype,
            int32_t n_embd, int32_t n_positions, int64_t rows, int32_t k, int32_t device, uintptr_t stream) {
    check("sample", cuda::sample({pointer(logits),
                                  pointer<float>(uniform),
                                  pointer<int64_t>(streams),
                                  pointer<int32_t>(position),
                                  pointer(wte),
                                  pointer(wpe),
                                  pointer<int64_t>(tokens),
                                  pointer(embedding),
                                  seed,
                                  row_stride,
                                  rows,
                                  top_p,
                                  temperature,
                                  min_score,
                                  top_k,
                                  k,
                                  position_stride,
                                  n_embd,
                                  n_positions,
                                  cuda::DType(dtype),
                                  cuda::DType(embed_dtype),
                                  device,
                                  pointer(stream)}));
}

void rms_norm_fwd(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t sum, uintptr_t out, int64_t rows,
                  int32_t n_embd, float eps, int32_t dtype, int32_t device, uintptr_t stream) {
    check("rms_norm",
          cuda::rms_norm_fwd({pointer(x), pointer(residual), pointer(weight), nullptr, pointer(sum), pointer(out), rows,
                              n_embd, eps, cuda::DType(dtype), device, pointer(stream)}));
}

void rms_norm_bwd(uintptr_t dout, uintptr_t dsum, uintptr_t x, uintptr_t weight, uintptr_t dx, uintptr_t dweight,
                  uintptr_t partial, int64_t rows, int32_t n_embd, int32_t parts, float eps, int32_t dtype,
                  int32_t device, uintptr_t stream) {
    check("rms_norm", cuda::rms_norm_bwd({pointer(dout), pointer(dsum), pointer(x), pointer(weight), pointer(dx),
                                          pointer(dweight), nullptr, pointer<float>(partial), rows, n_embd, parts, eps,
                                          cuda::DType(dtype), device, pointer(stream)}));
}

// Address, and strides in elements of batch, head and position.
using Tensor = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// Batch, heads, T_q, T_k, head_dim.
using Sizes = std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t>;
// Addresses of starts and key_mask, or 0, and from a batch row of the latter to the next.
using Hidden = std::tuple<uintptr_t, uintptr_t, int64_t>;

cuda::AttentionTensor attention_tensor(const Tensor& tensor) {
    const auto& [address, batch, head, position] = tensor;
    return {pointer(address), batch, head, position};
}

cuda::AttentionShape attention_shape(const Sizes& sizes, const Hidden& hidden, float scale, int32_t dtype,
                                     int32_t device, uintptr_t stream) {
    const auto& [batch, heads, t_q, t_k, head_dim] = sizes;
    const auto& [starts, key_mask, key_mask_stride] = hidden;
    return {batch,
            heads,
            t_q,
            t_k,
            head_dim,
            scale,
            pointer<int32_t>(starts),
            pointer<uint8_t>(key_mask),
            key_mask_stride,
            cuda::DType(dtype),
            device,
            pointer(stream)};
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, uintptr_t lse,
                   const Sizes& sizes, const Hidden& hidden, float scale, int32_t rows, int32_t dtype, int32_t device,
                   uintptr_t stream) {
    check("causal_attention", cuda::causal_attention_fwd({attention_shape(sizes, hidden, scale, dtype, device, stream),
                                                          attention_tensor(q), attention_tensor(k), attention_tensor(v),
                                                          attention_tensor(out), pointer<float>(lse), rows}));
}

void attention_bwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& dout,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, uintptr_t lse, uintptr_t terms,
                   const Sizes& sizes, const Hidden& hidden, float scale, int32_t dtype, int32_t device,
                   uintptr_t stream) {
    check("causal_attention",
          cuda::causal_attention_bwd({attention_shape(sizes, hidden, scale, dtype, device, stream), attention_tensor(q),
                                      attention_tensor(k), attention_tensor(v), attention_tensor(out),
                                      attention_tensor(dout), attention_tensor(dq), attention_tensor(dk),
                                      attention_tensor(dv), pointer<float>(lse), pointer<float>(terms)}));
}

void layer_norm_fwd(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t sum, uintptr_t out,
                    int64_t rows, int32_t n_embd, float eps, int32_t dtype, int32_t device, uintptr_t stream) {
    check("layer_norm",
          cuda::layer_norm_fwd({pointer(x), pointer(residual), pointer(weight), pointer(bias), pointer(sum),
                                pointer(out), rows, n_embd, eps, cuda::DType(dtype), device, pointer(stream)}));
}

void layer_norm_bwd(uintptr_t dout, uintptr_t dsum, uintptr_t x, uintptr_t weight, uintptr_t dx, uintptr_t dweight,
                    uintptr_t dbias, uintptr_t partial, int64_t rows, int32_t n_embd, int32_t parts, float eps,
                    int32_t dtype, int32_t device, uintptr_t stream) {
    check("layer_norm", cuda::layer_norm_bwd({pointer(dout), pointer(dsum), pointer(x), pointer(weight), pointer(dx),
                                              pointer(dweight), pointer(dbias), pointer<float>(partial), rows, n_embd,
                                              parts, eps, cuda::DType(dtype), device, pointer(stream)}));
}

void activation_fwd(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t rows, int32_t n, int32_t activation,
                    int32_t dtype, int32_t device, uintptr_t stream) {
    check("activation",
          cuda::activation_fwd({pointer(x), pointer(bias), pointer(out), rows, n, cuda::Activation(activation),
                                cuda::DType(dtype), device, pointer(stream)}));
}

void activation_bwd(uintptr_t dout, uintptr_t x, uintptr_t bias, uintptr_t dx, uintptr_t dbias, uintptr_t partial,
                    int64_t rows, int32_t n, int32_t parts, int32_t activation, int32_t dtype, int32_t device,
                    uintptr_t stream) {
    check("activation", cuda::activation_bwd({pointer(dout), pointer(x), pointer(bias), pointer(dx), pointer(dbias),
                                              pointer<float>(partial), rows, n, parts, cuda::Activation(activation),
                                              cuda::DType(dtype), device, pointer(stream)}));
}

void cross_entropy_fwd(uintptr_t logits, uintptr_t labels, uintptr_t losses, uintptr_t loss, uintptr_t count,
                       uintptr_t statistics, uintptr_t partial, int64_t rows, int32_t k, int32_t parts,
                       int64_t ignore_index, bool mean, int32_t dtype, int32_t device, uintptr_t stream) {
    check("cross_entropy", cuda::cross_entropy_fwd({pointer(logits), pointer<int64_t>(labels), pointer<float>(losses),
                                                    pointer<float>(loss), pointer<float>(count),
                                                    pointer<float>(statistics), pointer<float>(partial), rows, k, parts,
                                                    ignore_index, mean, cuda::DType(dtype), device, pointer(stream)}));
}

void cross_entropy_bwd(uintptr_t dloss, uintptr_t logits, uintptr_t labels, uintptr_t statistics, uintptr_t count,
                       uintptr_t dlogits, int64_t rows, int32_t k, bool for_each, int64_t ignore_index, int32_t dtype,
                       int32_t device, uintptr_t stream) {
    check("cross_entropy",
          cuda::cross_entropy_bwd({pointer<float>(dloss), pointer(logits), pointer<int64_t>(labels),
                                   pointer<float>(statistics), pointer<float>(count), pointer(dlogits), rows, k,
                                   for_each, ignore_index, cuda::DType(dtype), device, pointer(stream)}));
}

void attention_decode(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t k_cache, uintptr_t v_cache, uintptr_t v_scale,
                      uintptr_t position, uintptr_t starts, uintptr_t prefix_k, uintptr_t prefix_v, uintptr_t out,
                      uintptr_t partial, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row,
                      int64_t v_head, int64_t prefix_row, int64_t prefix_head, int64_t rows, int64_t heads,
                      int64_t positions, int64_t group, int64_t prefix, int32_t dim, bool position_by_row,
                      int32_t splits, int32_t prefix_splits, float scale, int32_t dtype, bool dependent, int32_t device,
                      uintptr_t stream) {
    const cuda::AttentionDecodeParams params{pointer(q),
                                             pointer(k),
                                             pointer(v),
                                             pointer(k_cache),
                                             pointer(v_cache),
                                             pointer<float>(v_scale),
                                             pointer<int32_t>(position),
                                             pointer<int32_t>(starts),
                                             pointer(prefix_k),
                                             pointer(prefix_v),
                                             pointer(out),
                                             pointer<float>(partial),
                                             q_row,
                                             q_head,
                                             k_row,
                                             k_head,
                                             v_row,
                                             v_head,
                                             prefix_row,
                                             prefix_head,
                                             rows,
                                             heads,
                                             positions,
                                             group,
                                             prefix,
                                             dim,
                                             position_by_row,
                                             splits,
                                             prefix_splits,
                                             scale,
                                             cuda::DType(dtype),
                                             dependent,
                                             device,
                                             pointer(stream)};
    check("attention_decode", cuda::attention_decode(params));
}

void gemv(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t norm_weight, uintptr_t residual, uintptr_t out,
          int64_t ld, int32_t rows, int32_t n_in, int32_t n_out, bool transposed, float eps, int32_t activation,
          int32_t dtype, bool dependent, int32_t device, uintptr_t stream) {
    check("gemv", cuda::gemv({pointer(x), pointer(weight), pointer(bias), pointer(norm_weight), pointer(residual),
                              pointer(out), ld, rows, n_in, n_out, transposed, eps, cuda::Activation(activation),
                              cuda::DType(dtype), dependent, device, pointer(stream), 0, 0}));
}

}  // namespace

void bind_cuda(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("quantize_cuda", &quantize, unlocked);
    m.def("quantize_table_cuda", &quantize_table, unlocked);
    m.def("quantize_lookup_cuda", &quantize_lookup, unlocked);
    m.def("dequantize_cuda", &dequantize, unlocked);
    m.def("sample_cuda", &sample, unlocked);
    m.def("rms_norm_fwd_cuda", &rms_norm_fwd, unlocked);
    m.def("rms_norm_bwd_cuda", &rms_norm_bwd, unlocked);
    m.def("layer_norm_fwd_cuda", &layer_norm_fwd, unlocked);
    m.def("layer_norm_bwd_cuda", &layer_norm_bwd, unlocked);
    m.def("activation_fwd_cuda", &activation_fwd, unlocked);
    m.def("activation_bwd_cuda", &activation_bwd, unlocked);
    m.def("cross_entropy_fwd_cuda", &cross_entropy_fwd, unlocked);
    m.def("cross_entropy_bwd_cuda", &cross_entropy_bwd, unlocked);
    m.def("causal_attention_fwd_cuda", &attention_fwd, unlocked);
    m.def("causal_attention_bwd_cuda", &attention_bwd, unlocked);
    // How many rows `partial` should have for the GPU to be full.
    m.def("norm_bwd_parts", &cuda::norm_bwd_parts);
    m.def("activation_bwd_parts", &cuda::activation_bwd_parts);
    m.def("cross_entropy_parts", &cuda::cross_entropy_parts);

    m.def("attention_decode_cuda", &attention_decode, unlocked);
    m.def("attention_decode_splits", &cuda::attention_decode_splits,
          "Into how many parts to split a number of keys when there are so many blocks without.");
    m.def("gemv_cuda", &gemv, unlocked);
}
