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

// One new position of every sequence against its cache, into which its key and value go. The formula, and what the
// kernels ask of layouts: attention_decode.cu.
struct AttentionDecodeParams {
    const void* q;            // (rows, heads, dim), the last dimension contiguous, like k and v
    const void* k;            // of the new position
    const void* v;            // of the new position
    void* k_cache;            // (rows, heads, positions, dim)
    void* v_cache;            // (rows, heads, positions, dim)
    const int32_t* position;  // of the new key: (rows,), or (1,) for all
    const int32_t* starts;    // (rows,): the first key that each sees, counted from the prefix's first; or null
    const void* prefix_k;     // (rows / group, heads, prefix, dim), the last two dimensions contiguous; or null
    const void* prefix_v;     // likewise, of the same strides
    void* out;                // (rows, heads, dim)
    float* partial;           // rows * heads * slots * (dim + 2) to work in; null if slots is 1
    int64_t q_row, q_head;    // strides in elements, multiples of 16 bytes
    int64_t k_row, k_head;
    int64_t v_row, v_head;
    int64_t prefix_row, prefix_head;
    int64_t rows, heads, positions;
    int64_t group, prefix;  // rows that share a prefix, its length; 1 and 0 without
    int32_t dim;            // 32, 64, 96 or 128
    int32_t position_step;  // 1 for a position of each row, 0 for one of all
    int32_t splits;         // blocks for the cache of a (row, head)
    int32_t prefix_splits;  // blocks for the prefix of a (row / group, head, 16 rows); 0 without
    float scale;
    DType dtype;
    int32_t device;
    void* stream;
};

int attention_decode(const AttentionDecodeParams& params);

// Into how many parts `keys` are split, so that about two blocks for each of 132 multiprocessors are at work, each with
// 64 keys or more. `blocks`: how many there are without.
constexpr int32_t attention_decode_splits(int64_t blocks, int64_t keys) {
    const int64_t wanted = blocks >= 256 || blocks < 1 ? 1 : (264 + blocks - 1) / blocks;
    const int64_t most = keys < 64 ? 1 : (keys + 63) / 64;
    return int32_t(wanted < most ? wanted : most);
}

enum class GemvActivation : int32_t { none = -1, quick_gelu = 0, gelu_tanh = 1, gelu_erf = 2 };

// out = activation(norm(x) weight + bias) + residual for few rows. The formula: gemv.cu.
struct GemvParams {
    const void* x;            // (rows, n_in)
    const void* weight;       // (n_in, n_out), ld elements from row to row; transposed: (n_out, n_in), likewise
    const void* bias;         // (n_out,), or null
    const void* norm_weight;  // (n_in,) of the rms_norm of x, or null for none
    const void* residual;     // (rows, n_out), or null
    void* out;                // (rows, n_out)
    int64_t ld;               // a multiple of 8
    int32_t rows;             // 0 to 8
    int32_t n_in, n_out;      // multiples of 8
    bool transposed;
    float eps;
    GemvActivation activation;
    DType dtype;  // bf16 or f16, of all of them
    int32_t device;
    void* stream;
    int32_t splits;  // the launcher's own
};

int gemv(const GemvParams& params);

// The runtime's text for an error code.
const char* error_string(int code);

}  // namespace igpt::cuda
