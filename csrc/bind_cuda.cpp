// The CUDA ops for Python: raw addresses and sizes in, Params out to the launchers. No maths, no torch.
// Whoever calls them has checked every argument (igpt_fast/ops.py).
#include <cstdint>
#include <stdexcept>
#include <string>

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

void rms_norm_fwd(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t sum, uintptr_t out, int64_t rows,
                  int32_t n_embd, float eps, int32_t dtype, int32_t device, uintptr_t stream) {
    check("rms_norm", cuda::rms_norm_fwd({pointer(x), pointer(residual), pointer(weight), pointer(sum), pointer(out),
                                          rows, n_embd, eps, cuda::DType(dtype), device, pointer(stream)}));
}

void rms_norm_bwd(uintptr_t dout, uintptr_t dsum, uintptr_t x, uintptr_t weight, uintptr_t dx, uintptr_t dweight,
                  uintptr_t partial, int64_t rows, int32_t n_embd, int32_t parts, float eps, int32_t dtype,
                  int32_t device, uintptr_t stream) {
    check("rms_norm", cuda::rms_norm_bwd({pointer(dout), pointer(dsum), pointer(x), pointer(weight), pointer(dx),
                                          pointer(dweight), pointer<float>(partial), rows, n_embd, parts, eps,
                                          cuda::DType(dtype), device, pointer(stream)}));
}

void attention_decode(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t k_cache, uintptr_t v_cache, uintptr_t position,
                      uintptr_t starts, uintptr_t prefix_k, uintptr_t prefix_v, uintptr_t out, uintptr_t partial,
                      int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,
                      int64_t prefix_row, int64_t prefix_head, int64_t rows, int64_t heads, int64_t positions,
                      int64_t group, int64_t prefix, int32_t dim, bool position_by_row, int32_t splits,
                      int32_t prefix_splits, float scale, int32_t dtype, int32_t device, uintptr_t stream) {
    const cuda::AttentionDecodeParams params{pointer(q),
                                             pointer(k),
                                             pointer(v),
                                             pointer(k_cache),
                                             pointer(v_cache),
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
                                             device,
                                             pointer(stream)};
    check("attention_decode", cuda::attention_decode(params));
}

void gemv(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t norm_weight, uintptr_t residual, uintptr_t out,
          int64_t ld, int32_t rows, int32_t n_in, int32_t n_out, bool transposed, float eps, int32_t activation,
          int32_t dtype, int32_t device, uintptr_t stream) {
    check("gemv", cuda::gemv({pointer(x), pointer(weight), pointer(bias), pointer(norm_weight), pointer(residual),
                              pointer(out), ld, rows, n_in, n_out, transposed, eps, cuda::GemvActivation(activation),
                              cuda::DType(dtype), device, pointer(stream), 0}));
}

}  // namespace

void bind_cuda(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("quantize_cuda", &quantize, unlocked);
    m.def("rms_norm_fwd_cuda", &rms_norm_fwd, unlocked);
    m.def("rms_norm_bwd_cuda", &rms_norm_bwd, unlocked);
    m.def("rms_norm_bwd_parts", &cuda::rms_norm_bwd_parts,
          "How many rows `partial` should have for the GPU to be full.");
    m.def("attention_decode_cuda", &attention_decode, unlocked);
    m.def("attention_decode_splits", &cuda::attention_decode_splits,
          "Into how many parts to split a number of keys when there are so many blocks without.");
    m.def("gemv_cuda", &gemv, unlocked);
}
