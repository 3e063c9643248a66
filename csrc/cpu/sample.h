// Drawing tokens on the CPU: what the driver (sample.cpp) is given. Definition: igpt_fast/reference.py, `sample`.
#pragma once

#include <cstdint>

namespace igpt::cpu {

// tokens[i]: the first id at which the cumulative weight of row i exceeds uniform[i] times the total.
struct SampleParams {
    const float* logits;  // (rows, k), rows `stride` numbers apart
    int64_t stride;
    const float* uniform;  // (rows,) in [0, 1)
    const int64_t* known;  // (rows,): a token that is given, or below 0; or null: all are drawn
    float temperature;     // 0: the likeliest
    int64_t top_k;         // 0: all
    double top_p;          // 1: all
    float min_score;       // minus infinity: all
    int64_t* tokens;       // (rows,)
    float* logprobs;       // (rows,): log_softmax of the logits as they are, at the token; or null
    double* cumulative;    // (rows, k): the cumulative weights, NaN where there is no distribution; or null
    int64_t rows, k;
    int32_t threads;
};

// Throws std::bad_alloc, and std::out_of_range for a known token that is none.
void sample(const SampleParams& params);

}  // namespace igpt::cpu
