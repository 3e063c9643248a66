// pybind11 module igpt_fast._C: what was built, what runs, and the parts of bind.h. No maths, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "build_info.h"
#include "cpu/giving_way.h"
#include "cpu/ops.h"
#include "cpu/threads.h"
#include "cpu/watch.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// Raised whenever a function below changes its arguments or meaning: backend.py refuses a module with another number.
constexpr int kInterface = 14;

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
    using igpt::cpu::Activation;
    m.attr("activations") =
        py::dict("none"_a = int(Activation::none), "quick_gelu"_a = int(Activation::quick_gelu),
                 "gelu_tanh"_a = int(Activation::gelu_tanh), "gelu_erf"_a = int(Activation::gelu_erf));
    m.def(
        "cpu_limits",
        [](const std::string& root) {
            const igpt::cpu::Limits limits = igpt::cpu::thread_limits(root);
            return std::make_pair(limits.mask, limits.quota);
        },
        "root"_a = "",
        "Processors of the affinity mask, and those that the control groups' quota is worth; 0: unknown, no limit.");
    m.def("cpu_given_way", igpt::cpu::times_given_way, "How often this process's regions have given way to others.");
    using igpt::cpu::GivingWay;
    py::class_<GivingWay>(m, "GivingWay", "The policy of that, for its tests; times in nanoseconds.")
        .def(py::init())
        .def_property_readonly("halvings", &GivingWay::halvings)
        .def_property_readonly("next", &GivingWay::next)
        .def("begin", &GivingWay::begin, "time"_a)
        .def("look", &GivingWay::look, "time"_a, "contended"_a);
    m.def("cpu_isas", &cpu_isas, "Names of the compiled instruction sets and whether this processor has them.");
    m.attr("by_amd") = igpt::cpu::by_amd();
    m.def("cpu_isa", [] { return std::string(igpt::cpu::ops().isa); });
    m.def("cpu_bf16_products", [] { return igpt::cpu::ops().bf16_products; });
    m.def("select_cpu_isa", [](const std::string& name) { return igpt::cpu::select_isa(name.c_str()); });
    bind_decoder(m);
    bind_cpu(m);
    bind_forward(m);
}
