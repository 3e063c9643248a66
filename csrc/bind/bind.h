// The parts that make up the Python modules.
#pragma once

#include <pybind11/pybind11.h>

// The CUDA ops: into _C, and with the emulator behind them into the tests' _emulated.
void bind_cuda(pybind11::module_& m);

// The CPU decoder, into _C.
void bind_decoder(pybind11::module_& m);

// Causal attention on the CPU, into _C.
void bind_attention(pybind11::module_& m);

// The CPU's norms, activations, loss, quantize and dequantize, into _C.
void bind_elementwise(pybind11::module_& m);

// The CPU's forward pass, into _C; after the decoder, whose weights it reads.
void bind_forward(pybind11::module_& m);
