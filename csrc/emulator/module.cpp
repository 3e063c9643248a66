// pybind11 module _emulated, which only the tests build: the CUDA functions of _C on tensors of the CPU, and the
// emulator's schedule and counters. Device and stream are taken and ignored.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../bind.h"
#include "emulator.h"

namespace py = pybind11;
namespace emulator = igpt::emulator;

namespace {

void set_schedule(const std::string& order, uint64_t seed) {
    const std::map<std::string, emulator::Order> orders{
        {"fifo", emulator::Order::fifo}, {"random", emulator::Order::random}, {"skewed", emulator::Order::skewed}};
    emulator::set_schedule({orders.at(order), seed});
}

std::map<std::string, uint64_t> counters() {
    const emulator::Counters c = emulator::counters();
    return {
        {"launches", c.launches},
        {"barriers", c.barriers},
        {"collectives", c.collectives},
        {"load_requests", c.load_requests},
        {"load_sectors", c.load_sectors},
        {"load_bytes", c.load_bytes},
        {"store_requests", c.store_requests},
        {"store_sectors", c.store_sectors},
        {"store_bytes", c.store_bytes},
        {"shared_requests", c.shared_requests},
        {"shared_wavefronts", c.shared_wavefronts},
        {"shared_conflicts", c.shared_conflicts},
        {"mma", c.mma},
        {"ldmatrix", c.ldmatrix},
        {"ldmatrix_wavefronts", c.ldmatrix_wavefronts},
        {"async_copies", c.async_copies},
    };
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
    bind_cuda(m);
    m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 0);
    m.def("set_blocks", &emulator::set_blocks, py::arg("first") = 0, py::arg("count") = emulator::kAllBlocks,
          "Launches run only these blocks, by linear index; without arguments, all.");
    m.def("counters", &counters, "Since the last reset, by name; see emulator.h.");
    m.def("reset_counters", &emulator::reset_counters);
}
