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

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// All tensors contiguous and 16-byte aligned; n_embd a multiple of 8, at most 8192. The formulas: norm.cu.
struct RmsNormFwdParams {
    const void* x;         // (rows, n_embd)
    const void* residual;  // (rows, n_embd), or null
    const void* weight;    // (n_embd,)
    void* sum;             // (rows, n_embd): x + residual; null without residual
    void* out;             // (rows, n_embd)
    int64_t rows;
    int32_t n_embd;
    float eps;
    DType dtype;  // of all of them
    int32_t device;
    void* stream;
};

struct RmsNormBwdParams {
    const void* dout;    // (rows, n_embd)
    const void* dsum;    // (rows, n_embd): gradient that reaches x past the norm, or null
    const void* x;       // (rows, n_embd): what was normalised, x + residual where there was one
    const void* weight;  // (n_embd,)
    void* dx;            // (rows, n_embd), the residual's gradient as well
    void* dweight;       // (n_embd,)
    float* partial;      // (parts, n_embd), to work in
    int64_t rows;
    int32_t n_embd;
    int32_t parts;  // blocks to work in; rms_norm_bwd_parts(rows) are a good number
    float eps;
    DType dtype;  // of all but partial
    int32_t device;
    void* stream;
};

int rms_norm_fwd(const RmsNormFwdParams& params);
int rms_norm_bwd(const RmsNormBwdParams& params);

// How many blocks fill a GPU with the backward, at a small price for their partial sums.
constexpr int32_t rms_norm_bwd_parts(int64_t rows) { return int32_t(rows < 512 ? rows : 512); }

// The runtime's text for an error code.
const char* error_string(int code);

}  // namespace igpt::cuda
