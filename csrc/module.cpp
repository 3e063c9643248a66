// pybind11 module igpt_fast._C: raw addresses and sizes in, Params out to the launchers. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/ops).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "build_info.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

// Raised whenever a function below changes its arguments or meaning: backend.py refuses a module with another number.
constexpr int kInterface = 5;

int32_t check_clusters(int64_t k) {
    if (k < 1 || k > INT32_MAX) throw std::invalid_argument("quantize: clusters has " + std::to_string(k) + " rows");
    return int32_t(k);
}

int64_t quantize_cpu(uintptr_t x, bool is_u8, uintptr_t clusters, uintptr_t out, int64_t n, int64_t k,
                     int32_t threads) {
    const igpt::cpu::QuantizeParams params{reinterpret_cast<const void*>(x),
                                           reinterpret_cast<const float*>(clusters),
                                           reinterpret_cast<int64_t*>(out),
                                           n,
                                           check_clusters(k),
                                           threads};
    return (is_u8 ? igpt::cpu::quantize_u8 : igpt::cpu::quantize_f32)(params);
}

std::vector<std::pair<std::string, bool>> cpu_isas() {
    igpt::cpu::Isa all[8];
    std::vector<std::pair<std::string, bool>> names;
    for (int i = 0, n = igpt::cpu::isas(all); i < n; ++i) names.emplace_back(all[i].table->isa, all[i].supported);
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("version") = IGPT_VERSION;
    m.attr("interface") = kInterface;
    m.attr("compiler") = IGPT_COMPILER;
    m.attr("openmp") = IGPT_OPENMP_STATUS;
    m.attr("cuda_status") = IGPT_CUDA_STATUS;
#ifdef IGPT_WITH_CUDA
    m.attr("has_cuda") = true;
    bind_cuda(m);
#else
    m.attr("has_cuda") = false;
#endif
    m.def("quantize_cpu", &quantize_cpu, py::call_guard<py::gil_scoped_release>());
    m.def("cpu_isas", &cpu_isas, "Names of the compiled instruction sets and whether this processor has them.");
    m.def("cpu_isa", [] { return std::string(igpt::cpu::ops().isa); });
    m.def("select_cpu_isa", [](const std::string& name) { return igpt::cpu::select_isa(name.c_str()); });
    bind_attention(m);
    bind_decoder(m);
    bind_elementwise(m);
    bind_forward(m);
}
