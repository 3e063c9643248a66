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

// Several rows of inputs of the two products, as the formats take them.
struct SplitRows {
    alignas(64) float x[shared_rows][kKeys];
    alignas(64) uint8_t high[shared_rows][kKeys];
    alignas(64) uint8_t low[shared_rows][kKeys];
    float scale[shared_rows];
};
static_assert(max_head_dim <= kKeys);

// The formats: `split` makes of the first n numbers of row r what its product takes; queries and probabilities stay
// fp32, as in `attention_decode`, where it takes them so.
template <class F>
struct Shared : F {
    using Inputs = SplitRows;
    template <bool Signed>
    static void split(SplitRows& rows, int64_t r, int64_t n) {
        if constexpr (F::splits) rows.scale[r] = F::template split_row<Signed>(rows.x[r], n, rows.high[r], rows.low[r]);
    }
};
struct SharedBf16 : Shared<Bf16> {
    template <int R, int C>
    static void run(const Piece& p) {
        widen<R, C>(p);
    }
};

// sums (rows, 2, kTile) = x W, one tile. A row alone is computed twice: a product of one row adds in another order.
template <class F>
inline void several_rows(const char* weights, ptrdiff_t stride, int64_t count, const typename F::Inputs& x,
                         int64_t rows, float* sums, int registers, const char* end, const char* next) {
    const int64_t blocks = (rows + F::max_rows - 1) / F::max_rows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = rows * b / blocks, here = rows * (b + 1) / blocks - row;
        Piece piece{};
        piece.weights = weights;
        piece.stride = stride;
        piece.count = count;
        piece.x = x.x[row];
        piece.high = x.high[row];
        piece.low = x.low[row];
        piece.ld = here == 1 ? 0 : kKeys;
        piece.sums = sums + 2 * row * kTile;
        piece.width = kTile;
        piece.first = true;
        if (blocks == 1)
            prefetch_in_front(piece, end, next);
        else
            prefetch_in_parts(piece, end, next, count / F::step, b, blocks);
        if constexpr (F::tiled) {
            F::set_inputs(piece, x);
            run_columns<F, F::max_rows>(piece, registers);
        } else {
            run_rows<F>(piece, here == 1 ? 2 : here, registers);
        }
    }
    if constexpr (F::tiled && F::step == 2)
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                float* sum = sums + 2 * r * kTile + c * kLanes;
                store(sum, load(sum) + load(sum + kTile));
            }
}

constexpr int64_t kSums = (shared_rows + 1) * 2 * kTile;  // of a tile, with a row that was computed twice

// Scores of the primer's positions from .. from + count - 1, a multiple of kLanes.
template <class F>
inline void score_rows(const AttentionDecodeParams& p, const typename F::Inputs& q, int64_t rows, int64_t from,
                       int64_t count, int64_t size, typename F::Inputs& scores) {
    const int64_t d = p.head_dim, tile_bytes = kTile * d * size, seen = padded(p.position + 1, kTile);
    alignas(64) float sums[kSums];
    for (int64_t t = from; t < from + count; t += kTile) {
        const int64_t left = (from + count - t) / kLanes;
        const int registers = int(left < 4 ? left : 4);
        several_rows<F>(p.keys + t / kTile * tile_bytes, 4 * F::bytes, d, q, rows, sums, registers,
                        p.keys + seen / kTile * tile_bytes, p.values);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const int64_t at = t + c * kLanes;
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
                if constexpr (F::splits) v = F::whole(sum, sum + kTile, p.key_sums + at) * set1(q.scale[r]);
                if (p.format == Format::int8) v = v * load(p.key_scale + at);
                store(scores.x[r] + at - from, v);
            }
    }
}

// The largest score, the sum of the weights and the weighted values so far, of each row.
struct Running {
    float most[shared_rows], total[shared_rows];
    alignas(64) float acc[shared_rows][max_head_dim + kLanes];
};

// acc = acc * keep + probabilities V of each row, over count positions, a multiple of value_rows.
template <class F>
inline void mix_rows(const AttentionDecodeParams& p, const typename F::Inputs& probabilities, int64_t rows,
                     int64_t from, int64_t count, const float* keep, Running& sofar) {
    const int64_t width = padded(p.head_dim, kLanes), stride = width / kLanes * F::bytes;
    const char *base = p.values + from / F::step * stride,
               *end = p.values + padded(p.position + 1, value_rows) / F::step * stride;
    alignas(64) float sums[kSums];
    for (int64_t n = 0; n < width; n += kTile) {
        const int registers = int((width - n < kTile ? width - n : kTile) / kLanes);
        several_rows<F>(base + n / kLanes * F::bytes, stride, count, probabilities, rows, sums, registers, end, p.next);
        for (int64_t r = 0; r < rows; ++r)
            for (int c = 0; c < registers; ++c) {
                const float* sum = sums + 2 * r * kTile + c * kLanes;
                Vec v = load(sum);
                if constexpr (F::splits) v = F::whole(sum, sum + kTile, nullptr) * set1(probabilities.scale[r]);
                float* at = sofar.acc[r] + n + c * kLanes;
                store(at, from == 0 ? v : fma(load(at), set1(keep[r]), v));
            }
    }
}

// The scores of `count` positions become probabilities; returns what to multiply the past with.
template <class F>
inline float weigh_row(const AttentionDecodeParams& p, typename F::Inputs& scores, int64_t r, int64_t from,
                       int64_t count, Running& sofar) {
    float* x = scores.x[r];
    const int64_t rounded = padded(count, kLanes);
    for (int64_t i = count; i < rounded; ++i) x[i] = -__builtin_inff();
    const float here = largest(x, rounded), before = sofar.most[r];
    const float most = from == 0 || here > before || here != here ? here : before;
    const float keep = from == 0 ? 0.0f : __builtin_expf(before - most);
    sofar.most[r] = most;
    sofar.total[r] = (from == 0 ? 0.0f : sofar.total[r] * keep) + weigh(x, count, most);
    if (p.format == Format::int8)
        for (int64_t i = 0; i < count; ++i) x[i] *= p.value_scale[from + i];
    F::template split<false>(scores, r, padded(count, value_rows));
    return keep;
}

// GCC takes its own vector functions for something that may throw, and would clean up after it with the C++ runtime.
template <class F>
[[gnu::nothrow]] void attend_to_prefix(const AttentionDecodeParams& p, const AttentionDecodeParams* rows, int64_t count,
                                       int64_t size, Running& sofar) {
    const int64_t keys = p.position + 1;
    typename F::Inputs q, probabilities;
    float keep[shared_rows];
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < p.head_dim; ++i) q.x[r][i] = rows[r].q[i] * p.scale;
        F::template split<true>(q, r, p.head_dim);
    }
    for (int64_t from = 0; from < keys; from += kKeys) {
        const int64_t here = keys - from < kKeys ? keys - from : kKeys;
        score_rows<F>(p, q, count, from, padded(here, kLanes), size, probabilities);
        for (int64_t r = 0; r < count; ++r) keep[r] = weigh_row<F>(p, probabilities, r, from, here, sofar);
        mix_rows<F>(p, probabilities, count, from, padded(here, value_rows), keep, sofar);
    }
}

struct Nothing {};

// Unit: what the products in bf16 and int8 need while they run.
template <class InBf16, class InInt8, class Unit>
inline void attend_with(const AttentionDecodeParams& primer, const AttentionDecodeParams* sequences, int64_t count) {
    Running sofar;
    if (primer.format == Format::fp32) {
        attend_to_prefix<Shared<Fp32>>(primer, sequences, count, 4, sofar);
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
    attend_with<SharedBf16, Shared<Int8>, Nothing>(primer, sequences, count);
}

}  // namespace
}  // namespace igpt::cpu
