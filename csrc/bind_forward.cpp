// The CPU's forward pass for Python: raw addresses and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/forwards.py).
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/forward.h"

namespace py = pybind11;

namespace {

namespace cpu = igpt::cpu;

// A number made of 64 of each array's 16-bit elements: scattered, as evenly spaced ones may all lie in one column.
uint64_t sample_halves(const std::vector<std::pair<uintptr_t, int64_t>>& arrays) {
    uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (const auto& [address, count] : arrays)
        for (uint64_t i = 1; count > 0 && i <= 64; ++i) {
            const uint64_t turn = i * 0x9e3779b97f4a7c15u;  // of 2^64: the golden ratio's multiples are spread
            const auto at = uint64_t((unsigned __int128)turn * uint64_t(count) >> 64);
            hash = (hash ^ reinterpret_cast<const uint16_t*>(address)[at]) * 1099511628211u;
        }
    return hash;
}

uint16_t* halves(uintptr_t address) { return reinterpret_cast<uint16_t*>(address); }

}  // namespace

void bind_forward(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("has_cpu_forward", [] { return cpu::ops().forward.gemm != nullptr; });
    m.def("sample_halves", &sample_halves);
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
            unlocked);
}
