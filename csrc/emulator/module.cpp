// pybind11 module _emulated, which only the tests build: the CUDA functions of _C on tensors of the CPU, and the
// emulator's schedule and counters. Device and stream are taken and ignored.
#include <pybind11/pybind11.h>

#include "../bind/bind.h"
#include "bind_emulator.h"

PYBIND11_MODULE(_emulated, m) {
    bind_cuda(m);
    igpt::emulator::bind_emulator(m);
}
