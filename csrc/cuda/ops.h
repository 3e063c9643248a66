// The CUDA launchers, as plain C++: all that module.cpp sees of CUDA.
// A launcher sets the device for its length, launches on the given stream and returns the runtime's error code.
#pragma once

#include <cstdint>

namespace igpt::cuda {

// Nearest colour cluster; see csrc/cpu/ops.h for the definition.
struct QuantizeParams {
    const void* x;          // (n, 3) uint8 or float32
    const float* clusters;  // (k, 3), any k >= 1
    int64_t* out;           // (n,)
    int64_t n;
    int32_t k;
    int32_t device;
    void* stream;
};

int quantize_u8(const QuantizeParams& params);
int quantize_f32(const QuantizeParams& params);

// The runtime's text for an error code.
const char* error_string(int code);

}  // namespace igpt::cuda
