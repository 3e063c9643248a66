// The CPU's forward pass for Python: raw addresses and sizes in. No maths, no torch.
// Whoever calls it has checked every argument (igpt_fast/engines/cpu/forward.py).
#include "cpu/forward.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bind.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

namespace cpu = igpt::cpu;

void* memory(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

void bind_forward(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<cpu::Forward>(m, "Forward")
        .def(py::init([](std::shared_ptr<cpu::DecoderWeights> weights) {
                 return std::make_unique<cpu::Forward>(std::move(weights));
             }),
             unlocked)
        .def(
            "run",
            [](const cpu::Forward& self, uintptr_t tokens, int64_t batch, int64_t length, uintptr_t last,
               uintptr_t keys, uintptr_t values, int64_t layers, const std::vector<int64_t>& taken, bool normed,
               uintptr_t states, int64_t bands, uintptr_t means, int32_t threads) {
                cpu::ForwardParams p{};
                p.tokens = reinterpret_cast<const int64_t*>(tokens);
                p.batch = batch;
                p.length = length;
                p.layers = layers;
                p.last = memory(last);
                p.keys = memory(keys);
                p.values = memory(values);
                p.taken = taken.data();
                p.takes = int64_t(taken.size());
                p.normed = normed;
                p.states = memory(states);
                p.bands = bands;
                p.means = reinterpret_cast<float*>(means);
                self.run(p, threads);
            },
            unlocked, py::kw_only(), "tokens"_a, "batch"_a, "length"_a, "last"_a, "keys"_a, "values"_a, "layers"_a,
            "taken"_a, "normed"_a, "states"_a, "bands"_a, "means"_a, "threads"_a);
}
