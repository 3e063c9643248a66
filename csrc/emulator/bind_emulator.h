// The emulator's schedule and counters for Python: what every test module of compiled kernels has.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../bind/params.h"
#include "emulator.h"
#include "record.h"

namespace igpt::emulator {

inline void set_schedule_by_name(const std::string& order, uint64_t seed) {
    const std::map<std::string, Order> orders{
        {"fifo", Order::fifo}, {"random", Order::random}, {"skewed", Order::skewed}};
    set_schedule({orders.at(order), seed});
}

template <auto... Members>
std::map<std::string, uint64_t> by_name(const Counters& of) {
    return {{std::string(bind::name_of<Members>()), of.*Members}...};
}

inline std::map<std::string, uint64_t> counters_by_name() {
    using C = Counters;
    return by_name<&C::launches, &C::barriers, &C::collectives, &C::load_requests, &C::load_sectors, &C::load_bytes,
                   &C::store_requests, &C::store_sectors, &C::store_bytes, &C::shared_requests, &C::shared_wavefronts,
                   &C::shared_conflicts, &C::mma, &C::ldmatrix, &C::ldmatrix_wavefronts, &C::async_copies,
                   &C::tile_copies, &C::tile_bytes, &C::bulk_copies, &C::bulk_bytes, &C::wgmma>(counters());
}

// (kernel's address in the module, blocks, threads of a block, bytes of shared memory) for each.
using LaunchTuple = std::tuple<uint64_t, uint64_t, uint32_t, size_t>;

inline std::vector<LaunchTuple> stop_recording_tuples() {
    std::vector<LaunchTuple> found;
    for (const Launch& l : stop_recording()) {
        found.emplace_back(l.kernel, uint64_t(l.grid.x) * l.grid.y * l.grid.z, l.block.x * l.block.y * l.block.z,
                           l.shared_bytes);
    }
    return found;
}

inline void bind_emulator(pybind11::module_& m) {
    m.def("set_schedule", &set_schedule_by_name, pybind11::arg("order"), pybind11::arg("seed") = 0);
    m.def("set_capability", &set_capability, pybind11::arg("ten_times") = 80,
          "The device's compute capability, to the launchers that look: 90 for wgmma and TMA.");
    m.def("set_multiprocessors", &set_multiprocessors, pybind11::arg("count") = 132,
          "How many the device has, to the launchers that look.");
    m.def("set_blocks", &set_blocks, pybind11::arg("first") = 0, pybind11::arg("count") = kAllBlocks,
          "Launches run only these blocks, by linear index; without arguments, all.");
    m.def("synchronize", &synchronize, "All launches so far have ended, as at the begin of a graph.");
    m.def("counters", &counters_by_name, "Since the last reset, by name; see emulator.h.");
    m.def("reset_counters", &reset_counters);
    m.def("start_recording", &start_recording, "Launches are written down from now on, and nothing runs.");
    m.def(
        "stop_recording", &stop_recording_tuples,
        "Launches run again. Those since the start: (kernel's address in the module, blocks, threads, shared bytes).");
}

}  // namespace igpt::emulator
