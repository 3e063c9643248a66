// The CPU's forward pass for Python: raw addresses and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/engines/cpu/forward.py).
#include "cpu/forward.h"

#include <cstdint>
#include <memory>
#include <utility>

#include "bind.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

namespace cpu = igpt::cpu;

uint16_t* halves(uintptr_t address) { return reinterpret_cast<uint16_t*>(address); }

}  // namespace

void bind_forward(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("has_cpu_forward", [] { return cpu::ops().forward.gemm != nullptr; });
    py::class_<cpu::Forward>(m, "Forward")
        .def(py::init([](std::shared_ptr<cpu::DecoderWeights> weights) {
                 return std::make_unique<cpu::Forward>(std::move(weights));
             }),
             unlocked)
        .def(
            "run",
            [](const cpu::Forward& self, uintptr_t tokens, int64_t batch, int64_t length, uintptr_t last,
               uintptr_t hidden, uintptr_t keys, uintptr_t values, int32_t threads) {
                self.run({reinterpret_cast<const int64_t*>(tokens), batch, length, halves(last), halves(hidden),
                          halves(keys), halves(values)},
                         threads);
            },
            unlocked, py::kw_only(), "tokens"_a, "batch"_a, "length"_a, "last"_a, "hidden"_a, "keys"_a, "values"_a,
            "threads"_a);
}
