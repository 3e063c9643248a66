// The CUDA launchers, as plain C++: all that the binding (bind/cuda.cpp) sees of CUDA.
// A launcher sets the device for its length, launches on the given stream and returns the runtime's error code.
#pragma once

#include <cstdint>

namespace igpt::cuda {

// What every launch has.
struct Launch {
    int32_t device;
    void* stream;
};

// Whether a launch may begin before the one before has ended (launch.cuh): when all of its blocks have called
// grid_dependency_launch, which they do once they have read what they read, or as soon as they begin.
enum class Dependent : int32_t { none = 0, late = 1, early = 2 };

// Nearest colour cluster; see csrc/cpu/quantize_kernels.h for the definition.
struct QuantizeParams : Launch {
    const void* x;          // (n, 3) uint8 or float32, 16-byte aligned
    const float* clusters;  // (k, 3), any k >= 1
    int64_t* out;           // (n,)
    int64_t n;
    int32_t k;
};

int quantize_u8(const QuantizeParams& params);
int quantize_f32(const QuantizeParams& params);

// The same for uint8 through a table of all 2^24 colours; its layout: quantize_table.cu.
struct QuantizeTableParams : Launch {
    const float* clusters;  // (k, 3), 1 <= k <= 65536
    uint16_t* table;        // (2^24,), 16-byte aligned
    int32_t k;
};
struct QuantizeLookupParams : Launch {
    const uint8_t* x;       // (n, 3), 16-byte aligned
    const uint16_t* table;  // as quantize_table fills it
    int64_t* out;           // (n,), 16-byte aligned
    int64_t n;
};

int quantize_table(const QuantizeTableParams& params);
int quantize_lookup(const QuantizeLookupParams& params);

enum class TokenType : int32_t { i64 = 0, i32 = 1, i16 = 2, u8 = 3 };

// Colours of tokens: dequantize.cu.
struct DequantizeParams : Launch {
    const void* tokens;     // (n,), 16-byte aligned
    const float* clusters;  // (k, 3), k <= 8192
    uint8_t* out;           // (n, 3), 16-byte aligned
    int64_t n;
    int32_t k;
    TokenType token;
};

int dequantize(const DequantizeParams& params);

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// All tensors contiguous and 16-byte aligned; n_embd a multiple of 8, at most 8192. The formulas: norm.cu.
struct NormFwdParams : Launch {
    const void* x;         // (rows, n_embd) of `x_dtype`
    const void* residual;  // (rows, n_embd), or null
    const void* weight;    // (n_embd,) of `weight_dtype`
    const void* bias;      // (n_embd,) of `weight_dtype`, or null: layer_norm's
    void* sum;             // (rows, n_embd): x + residual; null without residual
    void* out;             // (rows, n_embd) of `out_dtype`
    int64_t rows;
    int32_t n_embd;
    float eps;
    DType dtype;                             // of residual and sum, of x without them
    DType x_dtype, weight_dtype, out_dtype;  // those of layer_norm are `dtype`
    bool centred;                            // layer_norm, else rms_norm
};

struct NormBwdParams : Launch {
    const void* dout;    // (rows, n_embd) of `out_dtype`
    const void* dsum;    // (rows, n_embd): gradient that reaches x past the norm, or null
    const void* x;       // (rows, n_embd): what was normalised, x + residual where there was one
    const void* weight;  // (n_embd,) of `weight_dtype`
    void* dx;            // (rows, n_embd), the residual's gradient as well
    void* dbranch;       // (rows, n_embd) of `x_dtype`: dx again, for an x that was of another dtype; or null
    void* dweight;       // (n_embd,) of `weight_dtype`
    void* dbias;         // (n_embd,) of `weight_dtype`, of layer_norm; null of rms_norm
    float* partial;      // (parts, n_embd) of rms_norm, (2, parts, n_embd) of layer_norm, to work in
    int64_t rows;
    int32_t n_embd;
    int32_t parts;  // blocks to work in; norm_bwd_parts(rows) are a good number
    float eps;
    DType dtype;                             // of x, dsum and dx
    DType x_dtype, weight_dtype, out_dtype;  // those of layer_norm are `dtype`
    bool centred;                            // layer_norm, else rms_norm
};

int norm_fwd(const NormFwdParams& params);
int norm_bwd(const NormBwdParams& params);

// How many blocks fill a GPU with the backward, at a small price for their partial sums.
constexpr int32_t norm_bwd_parts(int64_t rows) { return int32_t(rows < 792 ? rows : 792); }  // 6 blocks for each of 132

enum class Activation : int32_t { none = -1, quick_gelu = 0, gelu_tanh = 1, gelu_erf = 2 };

// All tensors contiguous and 16-byte aligned. The formulas: activation.cu.
struct ActivationFwdParams : Launch {
    const void* x;     // (rows, n)
    const void* bias;  // (n,), or null
    void* out;         // (rows, n); may be x
    int64_t rows;
    int32_t n;  // a multiple of 8
    Activation activation;
    DType dtype;  // of all of them
};

struct ActivationBwdParams : Launch {
    const void* dout;  // (rows, n)
    const void* x;     // (rows, n)
    const void* bias;  // (n,), or null
    void* dx;          // (rows, n); may be dout
    void* dbias;       // (n,); null without bias
    float* partial;    // (parts, n), to work in; null without bias
    int64_t rows;
    int32_t n;
    int32_t parts;  // of the rows; activation_bwd_parts(rows, n) are a good number
    Activation activation;
    DType dtype;  // of all but partial
};

int activation_fwd(const ActivationFwdParams& params);
int activation_bwd(const ActivationBwdParams& params);

// With the blocks that the columns make, they fill a GPU; each has 64 rows or more, so that the partial sums are few.
constexpr int32_t activation_bwd_parts(int64_t rows, int32_t n) {
    const int64_t columns = (int64_t(n) + 255) / 256, wanted = (528 + columns - 1) / columns, most = (rows + 63) / 64;
    return int32_t(wanted < most ? wanted : most);
}

// logits and dlogits contiguous and 16-byte aligned. The formulas: cross_entropy.cu.
struct CrossEntropyFwdParams : Launch {
    const void* logits;     // (rows, k)
    const int64_t* labels;  // (rows,)
    float* losses;          // (rows,), 0 where ignored; or null
    float* loss;            // (1,): their sum or mean; or null
    float* count;           // (1,): how many rows count; null without loss
    float* statistics;      // (rows, 2): the largest logit, and the logarithm of the sum of the exponentials less it;
                            // zeros where no logit was read
    float* partial;         // (parts, 2), to work in; null without loss
    int64_t rows;
    int32_t k;
    int32_t parts;  // blocks to work in; cross_entropy_parts(rows) are a good number
    int64_t ignore_index;
    bool mean;  // divide the loss by the count
    DType dtype;
};

struct CrossEntropyBwdParams : Launch {
    const float* dloss;       // a gradient for each row, or one for all
    const void* logits;       // (rows, k)
    const int64_t* labels;    // (rows,)
    const float* statistics;  // (rows, 2), of the forward
    const float* count;       // of the forward where the loss was a mean, else null
    void* dlogits;            // (rows, k); may be logits
    int64_t rows;
    int32_t k;
    bool for_each;  // whether dloss has a number for each row
    int64_t ignore_index;
    DType dtype;
};

int cross_entropy_fwd(const CrossEntropyFwdParams& params);
int cross_entropy_bwd(const CrossEntropyBwdParams& params);

constexpr int32_t cross_entropy_parts(int64_t rows) { return int32_t(rows < 4 * 1056 ? (rows + 3) / 4 : 1056); }

// How tokens are drawn, where that stands on the device. Any numbers are taken; the last three are cut to 32 bits.
struct SampleSettings {
    uint64_t seed;
    double top_p, temperature, min_score;
    int64_t top_k, offset, first;
};

// Drawing tokens, and the next step's input: sample.cu.
struct SampleParams : Launch {
    const void* logits;              // (rows, k), each row contiguous
    const float* uniform;            // (rows,), or null: made of the seed, the streams and the positions
    const int64_t* streams;          // (rows,), not negative, where there is no `uniform`
    const SampleSettings* settings;  // in place of seed, top_p .. top_k here; or null: offset and first are 0
    int32_t* position;  // (rows,) or (1,), of the drawn tokens, less the offset; may be null beside a `uniform`
    const void* wte;    // (.., n_embd), 16-byte aligned, where there is an `embedding`
    const void* wpe;    // (n_positions, n_embd), likewise
    int64_t* tokens;    // (rows, columns)
    float* logprobs;    // (rows, columns), or null
    void* embedding;    // (rows, n_embd), 16-byte aligned, or null
    uint64_t seed;
    int64_t row_stride;  // of logits, in elements
    int64_t rows;
    int64_t columns;          // 1 without settings: the row's token is the only one
    double top_p;             // 1 keeps all
    float temperature;        // 0: the largest logit
    float min_score;          // minus infinity keeps all
    int32_t top_k;            // 0 keeps all
    int32_t k;                // 1 to 1024
    int32_t position_stride;  // 1, or 0 for one position of all rows
    int32_t n_embd;
    int32_t n_positions;
    DType dtype;          // of logits
    DType embed_dtype;    // of wte, wpe and embedding
    Dependent dependent;  // settings and streams must not come from the launch before
    bool advance;         // position += 1 at the end, where every row has its own
    bool vector = false;  // the launcher's: rows can be read four logits at a time
};

int sample(SampleParams params);

// A (B, H, T, D) tensor: any strides, in elements, but 1 for D; every row aligned to 16 bytes.
struct AttentionTensor {
    void* data;
    int64_t batch, head, position;  // strides
};

// What the forward and the backward of causal attention have in common. The formulas: attention_fwd.cuh.
struct AttentionShape : Launch {
    int32_t batch, heads, t_q, t_k;  // t_q <= t_k: the queries are the last positions
    int32_t head_dim;                // 32, 64, 96 or 128
    float scale;                     // above 0
    const int32_t* starts;           // (B,): the first key that a batch row shows; or null
    const uint8_t* key_mask;         // (B, T_k): 0 hides a key; or null
    int64_t key_mask_stride;         // from a batch row of it to the next
    DType dtype;                     // of all tensors: bf16 or f16
};

struct AttentionFwdParams {
    AttentionShape shape;
    AttentionTensor q, k, v, out;
    float* lse;  // (B, H, T_q): log of the sum of exponentials, -infinity where no key is shown
    // Queries of a block, 64 or, with a head_dim below 128, 128. 0: whichever suits the sizes, or the kernel for Hopper
    // where that can run (attention_fwd_hopper.cuh); -1: whichever suits the sizes of those that every GPU runs.
    int32_t rows;
};

struct AttentionBwdParams {
    AttentionShape shape;
    AttentionTensor q, k, v, out, dout, dq, dk, dv;
    const float* lse;  // from the forward
    float* terms;      // (B, H, T_q, 2), aligned to 8 bytes, to work in
    // The kernels that every GPU runs, even where those for Hopper could (attention_bwd_hopper.cuh).
    bool portable;
};

int causal_attention_fwd(const AttentionFwdParams& params);
int causal_attention_bwd(const AttentionBwdParams& params);

// One new position of every sequence against its cache, into which its key and value go. The formula, and what the
// kernels ask of layouts: attention_decode.cu.
struct AttentionDecodeParams : Launch {
    const void* q;            // (rows, heads, dim), the last dimension contiguous, like k and v
    const void* k;            // of the new position
    const void* v;            // of the new position
    void* k_cache;            // (rows, heads, positions, dim)
    float* k_scale;           // (rows, heads, positions): k_cache is in e4m3, times these; null: it is in dtype
    void* v_cache;            // (rows, heads, positions, dim)
    float* v_scale;           // likewise of v_cache; there where k_scale is
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
    // Whether this may begin before the launches before it have ended. Without `ring` it reads nothing before they
    // have; with it the position, the starts, and what the caches hold before the position must not come from them.
    Dependent dependent;
    bool ring;     // of caches of 16 bits or less, in code for sm_90: through shared memory, by blocks that stay
    bool cluster;  // with it, where the device has clusters: up to 8 splits are put together by one
};

int attention_decode(const AttentionDecodeParams& params);

// Into how many parts the keys of each of `blocks` (row, head)s are split, no part below 64 keys.
//   Without `ring`, and below sm_90: so that about two blocks for each of 132 multiprocessors are at work.
//   With it: as few as load the device's multiprocessors evenly, nine tenths of them if that can be; with `cluster`
//   no more than a cluster has blocks, where the device has clusters.
int32_t attention_decode_splits(int64_t blocks, int64_t keys, int device, bool ring, bool cluster);

// out = activation(norm(x) weight + bias) + residual for few rows. The formula: gemv.cu.
struct GemvParams : Launch {
    const void* x;            // (rows, n_in)
    const void* weight;       // (n_in, n_out), ld elements from row to row; transposed: (n_out, n_in), likewise
    const void* bias;         // (n_out,), or null
    const void* norm_weight;  // (n_in,) of the rms_norm of x, or null for none
    const void* residual;     // (rows, n_out), or null
    void* out;                // (rows, n_out)
    int64_t ld;               // a multiple of 8
    int32_t rows;             // 0 to 64
    int32_t n_in, n_out;      // multiples of 8
    bool transposed;
    float eps;
    Activation activation;
    DType dtype;            // bf16 or f16, of all of them
    Dependent dependent;    // weight, bias, norm_weight must not come from a launch that may still be running
    int32_t splits, share;  // the launcher's own: blocks that share n_in, and their share
};

int gemv(const GemvParams& params);

// A new stream, which waits for no other, the default one neither, and which nothing destroys. Returns an error's code.
int make_stream(int device, void** stream);

// The runtime's text for an error code.
const char* error_string(int code);

}  // namespace igpt::cuda
