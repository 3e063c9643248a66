// out = softmax(scale q K^T) V of the newest positions of several sequences that began with one primer, the body.
//
// Layouts: decoder_kernels.h. The primer's keys and values lie in memory once and are read once for all rows, kKeys
// positions at a time, by products of several rows; what came after it is each sequence's own and goes through
// `attention_decode`. Two parts of a softmax, with the largest score m and the sum s of e^(score - m) of each, make the
// whole:
//   out = (w_1 out_1 + w_2 out_2) / (w_1 + w_2),  w_i = s_i e^(m_i - max(m_1, m_2))
// Every row is computed in the same order whatever the others are, and however many. Bound by reading the sequences'
// own parts; on the primer by multiply-adds, 4 rows head_dim a position, and with tiles (AMX) by reading it.
#pragma once

#include "attention_decode.h"

namespace igpt::cpu {
namespace {

struct SharedBf16 : Split<Bf16, shared_rows> {
    template <int R, int C>
    static void run(const Piece& p) {
        widen<R, C>(p);
    }
};

// GCC takes its own vector functions for something that may throw, and would clean up after it with the C++ runtime.
template <class F>
[[gnu::nothrow]] void attend_to_prefix(const AttentionDecodeParams& p, const AttentionDecodeParams* rows, int64_t count,
                                       int64_t size, Running<shared_rows>& sofar) {
    const int64_t keys = p.position + 1;
    typename F::Inputs q, probabilities;
    float keep[shared_rows];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < p.head_dim; ++i) q.x[r][i] = rows[r].q[i] * p.scale;
        F::template split<true>(q, r, p.head_dim);
    }
    for (int64_t from = 0; from < keys; from += kKeys) {
        const int64_t here = keys - from < kKeys ? keys - from : kKeys;
        score<F>(p, q, count, from, padded(here, kLanes), size, keys, p.values, probabilities);
        for (int64_t r = 0; r < count; ++r) keep[r] = weigh_row<F>(p, probabilities, r, from, here, sofar);
        mix<F>(p, probabilities, count, from, padded(here, value_rows), keep, padded(keys, value_rows), p.next, sofar);
    }
}

struct Nothing {};

// Unit: what the products in bf16 and int8 need while they run.
template <class InBf16, class InInt8, class Unit>
inline void attend_with(const AttentionDecodeParams& primer, const AttentionDecodeParams* sequences, int64_t count) {
    Running<shared_rows> sofar;
    if (primer.format == Format::fp32) {
        attend_to_prefix<Split<Fp32, shared_rows>>(primer, sequences, count, 4, sofar);
    } else {
        [[maybe_unused]] const Unit unit{};
        if (primer.format == Format::bf16)
            attend_to_prefix<InBf16>(primer, sequences, count, 2, sofar);
        else
            attend_to_prefix<InInt8>(primer, sequences, count, 1, sofar);
    }
    for (int64_t r = 0; r < count; ++r) {
        float own[2];
        AttentionDecodeParams row = sequences[r];
        row.state = own;
        attention_decode(row);
        const float most = sofar.most[r] > own[0] ? sofar.most[r] : own[0];
        const float before = __builtin_expf(sofar.most[r] - most), after = own[1] * __builtin_expf(own[0] - most);
        const float inverse = 1.0f / (sofar.total[r] * before + after);
        for (int64_t i = 0; i < row.head_dim; ++i)
            row.out[i] = row.out[i] * (after * inverse) + sofar.acc[r][i] * (before * inverse);
    }
}

void attention_decode_prefix(const AttentionDecodeParams& primer, const AttentionDecodeParams* sequences,
                             int64_t count) {
    attend_with<SharedBf16, Split<Int8, shared_rows>, Nothing>(primer, sequences, count);
}

}  // namespace
}  // namespace igpt::cpu
