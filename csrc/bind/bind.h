// The parts of _C; the first of the tests' _emulated, too. bind_forward comes after bind_decoder: it reads its weights.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_decoder(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_forward(pybind11::module_& m);
