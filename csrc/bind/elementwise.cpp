// The CPU's norms, activations, loss and dequantize for Python: raw addresses and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/ops).
#include <cstdint>

#include "bind.h"
#include "cpu/elementwise_kernels.h"

namespace py = pybind11;

namespace {

namespace cpu = igpt::cpu;

template <class T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void norm_fwd(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t total, uintptr_t out,
              int64_t rows, int64_t n, float eps, bool centred, int32_t format, int32_t weight_format,
              int32_t out_format, int32_t threads) {
    cpu::norm_fwd({at(x), at(residual), at(weight), at(bias), at(total), at(out), rows, n, eps, centred,
                   cpu::Format(format), cpu::Format(weight_format), cpu::Format(out_format), threads});
}

void norm_bwd(uintptr_t dout, uintptr_t dsum, uintptr_t x, uintptr_t weight, uintptr_t dx, uintptr_t dweight,
              uintptr_t dbias, int64_t rows, int64_t n, float eps, bool centred, int32_t format, int32_t weight_format,
              int32_t out_format, int32_t threads) {
    cpu::norm_bwd({at(dout), at(dsum), at(x), at(weight), at(dx), at(dweight), at(dbias), rows, n, eps, centred,
                   cpu::Format(format), cpu::Format(weight_format), cpu::Format(out_format), threads});
}

void activation_fwd(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t rows, int64_t n, int32_t kind, int32_t format,
                    int32_t threads) {
    cpu::activation_fwd({at(x), at(bias), at(out), rows, n, cpu::Activation(kind), cpu::Format(format), threads});
}

void activation_bwd(uintptr_t dout, uintptr_t x, uintptr_t bias, uintptr_t dx, uintptr_t dbias, int64_t rows, int64_t n,
                    int32_t kind, int32_t format, int32_t threads) {
    cpu::activation_bwd(
        {at(dout), at(x), at(bias), at(dx), at(dbias), rows, n, cpu::Activation(kind), cpu::Format(format), threads});
}

void cross_entropy_fwd(uintptr_t logits, uintptr_t labels, uintptr_t losses, uintptr_t total, uintptr_t count,
                       uintptr_t statistics, int64_t rows, int64_t k, int64_t ignore_index, bool mean, int32_t format,
                       int32_t threads) {
    cpu::cross_entropy_fwd({at(logits), at<const int64_t>(labels), at<float>(losses), at<float>(statistics), rows, k,
                            ignore_index, cpu::Format(format), threads},
                           at<float>(total), at<float>(count), mean);
}

void cross_entropy_bwd(uintptr_t dloss, uintptr_t logits, uintptr_t labels, uintptr_t statistics, uintptr_t count,
                       uintptr_t dlogits, int64_t rows, int64_t k, bool each, int64_t ignore_index, int32_t format,
                       int32_t threads) {
    cpu::cross_entropy_bwd({at<const float>(dloss), at(logits), at<const int64_t>(labels), at<const float>(statistics),
                            at<const float>(count), at(dlogits), rows, k, ignore_index, each, cpu::Format(format),
                            threads});
}

void dequantize(uintptr_t tokens, int32_t token_bytes, uintptr_t clusters, uintptr_t out, int64_t n, int64_t k,
                int32_t threads) {
    cpu::dequantize({at(tokens), token_bytes, at<const float>(clusters), at<uint8_t>(out), n, k, threads});
}

}  // namespace

void bind_elementwise(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("norm_fwd_cpu", &norm_fwd, unlocked);
    m.def("norm_bwd_cpu", &norm_bwd, unlocked);
    m.def("activation_fwd_cpu", &activation_fwd, unlocked);
    m.def("activation_bwd_cpu", &activation_bwd, unlocked);
    m.def("cross_entropy_fwd_cpu", &cross_entropy_fwd, unlocked);
    m.def("cross_entropy_bwd_cpu", &cross_entropy_bwd, unlocked);
    m.def("dequantize_cpu", &dequantize, unlocked);
}
